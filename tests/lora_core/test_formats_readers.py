"""What A1111, ComfyUI and InvokeAI make of the kohya files we write: their arithmetic and their names, as stated in
readers_of_others and key_maps_of_others. Where they read something else than its writers mean, that is stated too."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from lora_core import algebra
from lora_core.adapter import Adapter
from lora_core.deltas import Delta
from lora_core.deltas.bias import WithBias
from lora_core.deltas.full import Full
from lora_core.deltas.glora import Generalized
from lora_core.deltas.hadamard import Hadamard
from lora_core.deltas.ia3 import Scaling
from lora_core.deltas.kronecker import Kronecker
from lora_core.deltas.low_rank import LowRank
from lora_core.deltas.magnitude import WithMagnitude
from lora_core.deltas.oft import Rotation
from lora_core.formats import write_adapter
from lora_core.formats.cautions import NO_BIAS, OTHER, REFUSES, SKIPS, cautions
from lora_core.safe_files import read_header
from tests.lora_core.full_size import FAMILIES, everything
from tests.lora_core.key_maps_of_others import (
    a1111_finds,
    a1111_modules,
    comfyui_map,
    invokeai_family,
    invokeai_name,
)
from tests.lora_core.readers_of_others import (
    READERS,
    Refused,
    Skipped,
    cayley,
    column_norms,
    comfyui,
    kron,
    row_norms,
    skew,
    turned_by_blocks,
)

Shape = tuple[int, ...]
LAYERS: dict[str, tuple[str, Shape]] = {
    "linear": ("unet.down_blocks.0.attentions.0.transformer_blocks.0.ff.net.2", (40, 24)),
    "conv": ("unet.mid_block.resnets.0.conv1", (40, 24, 3, 3)),
    "conv 1x1": ("unet.mid_block.attentions.0.proj_in", (40, 24, 1, 1)),
}
NORM = ("unet.mid_block.resnets.0.norm1", (40,))


def r(*shape: int) -> Tensor:
    return 0.4 * torch.randn(*shape)


def ones(shape: Shape) -> Shape:
    return (1,) * (len(shape) - 2)


def lora(shape: Shape) -> LowRank:
    return LowRank(r(3, *shape[1:]), r(shape[0], 3, *ones(shape)), alpha=1.25)


def loha(shape: Shape) -> Hadamard:
    return Hadamard(r(shape[0], 3), r(3, *shape[1:]), r(shape[0], 3), r(3, *shape[1:]), alpha=1.25)


def lokr(shape: Shape) -> Kronecker:
    return Kronecker((r(4, 3),), (r(10, 2), r(2, 8, *shape[2:])), alpha=0.75)


def lokr_whole(shape: Shape) -> Kronecker:
    return Kronecker((r(4, 3),), (r(10, 8, *shape[2:]),), alpha=0.75)


def glora(shape: Shape) -> Generalized:
    (out, inn), one = shape[:2], ones(shape)
    return Generalized(r(inn, 3, *one), r(3, inn, *one), r(out, 3, *one), r(3, inn, *shape[2:]), alpha=1.25)


def by_outputs(shape: Shape, inner: Delta) -> Delta:
    return WithMagnitude(inner, 1 + torch.rand(shape[0], 1, *ones(shape)))


def by_inputs(shape: Shape, inner: Delta) -> Delta:
    return WithMagnitude(inner, 1 + torch.rand(1, shape[1], *ones(shape)))


def outputs_scaled(shape: Shape) -> Scaling:
    return Scaling(r(1, 40, 1, 1) if len(shape) == 4 else r(40), on_input=False)


def inputs_scaled(shape: Shape) -> Scaling:
    return Scaling(r(1, 24, 1, 1) if len(shape) == 4 else r(24), on_input=True)


KINDS: dict[str, Callable[[Shape], Delta]] = {
    "lora": lora,
    "lora and bias": lambda s: WithBias(lora(s), r(s[0])),
    "bias alone": lambda s: WithBias(None, r(s[0])),
    "dora, inputs": lambda s: by_inputs(s, lora(s)),
    "dora, outputs": lambda s: by_outputs(s, lora(s)),
    "loha": loha,
    "loha, inputs": lambda s: by_inputs(s, loha(s)),
    "loha, outputs": lambda s: by_outputs(s, loha(s)),
    "lokr": lokr,
    "lokr, whole": lokr_whole,
    "lokr, both split": lambda s: Kronecker((r(4, 1), r(1, 3)), (r(10, 1), r(1, 8, *s[2:])), 0.75),
    "lokr, inputs": lambda s: by_inputs(s, lokr(s)),
    "glora": glora,
    "ia3, outputs": outputs_scaled,
    "ia3, inputs": inputs_scaled,
    "oft": lambda s: Rotation(r(10, 4, 4)),
    "oft, limited": lambda s: Rotation(r(10, 4, 4), limit=0.01),
    "oft, rescaled": lambda s: Rotation(r(10, 4, 4), rescale=1 + r(40, 1, *ones(s))),
    "oft, turns": lambda s: Rotation(torch.linalg.qr(r(10, 4, 4)).Q, skew=False),
    "boft": lambda s: Rotation(r(3, 4, 10, 10), rescale=1 + r(40, 1, *ones(s))),
    "boft, limited": lambda s: Rotation(r(3, 4, 10, 10), limit=0.01),
    "full": lambda s: Full(r(*s)),
    "full and bias": lambda s: WithBias(Full(r(*s)), r(s[0])),
}
CONVOLUTIONS = {
    "loha, tucker": lambda s: Hadamard(
        r(3, 40), r(3, 24), r(3, 40), r(3, 24), 1.25, r(3, 3, 3, 3), r(3, 3, 3, 3)
    ),
    "lokr, tucker": lambda s: Kronecker((r(4, 3),), (r(2, 10), r(2, 8), r(2, 2, 3, 3)), 0.75),
}
NORMS: dict[str, Callable[[Shape], Delta]] = {
    "norm": lambda s: WithBias(Full(r(*s)), r(*s)),
    "norm, weight alone": lambda s: Full(r(*s)),
    "norm, bias alone": lambda s: WithBias(None, r(*s)),
}
CASES = [
    *((kind, make, *LAYERS[which]) for which in LAYERS for kind, make in KINDS.items()),
    *((kind, make, *LAYERS["conv"]) for kind, make in CONVOLUTIONS.items()),
    *((kind, make, *NORM) for kind, make in NORMS.items()),
]

# Reader -> kind -> what becomes of it there; what is not named is read as it is meant
UNLIKE: dict[str, dict[str, str]] = {
    "A1111": {
        **dict.fromkeys(("dora, outputs", "loha, outputs"), OTHER),
        "lora and bias": NO_BIAS,
        **dict.fromkeys(("bias alone", "norm, bias alone"), REFUSES),
        "glora": SKIPS,
        "ia3, outputs": SKIPS,  # of convolutions
    },
    "ComfyUI": {
        **dict.fromkeys(("dora, outputs", "loha, outputs"), OTHER),
        **dict.fromkeys(("oft, limited", "oft, rescaled", "boft, limited"), OTHER),
        **dict.fromkeys(("ia3, outputs", "ia3, inputs", "oft, turns"), SKIPS),
    },
    "InvokeAI": {
        "dora, outputs": OTHER,
        "lora and bias": NO_BIAS,
        **dict.fromkeys(("loha, inputs", "loha, outputs", "lokr, inputs"), REFUSES),
        **dict.fromkeys(("bias alone", "norm, bias alone", "glora", "boft", "boft, limited"), REFUSES),
        **dict.fromkeys(("oft", "oft, limited", "oft, rescaled", "oft, turns"), REFUSES),
        "ia3, outputs": REFUSES,  # of convolutions
    },
}


def written(delta: Delta, path: str, folder: Path) -> dict[str, Tensor]:
    """What ends the keys of the only layer in our kohya file -> tensor."""
    tensors = load_file(write_adapter(Adapter({path: delta}), folder / "x"))
    assert len({key.partition(".")[0] for key in tensors}) == 1
    return {key.partition(".")[2]: tensor for key, tensor in tensors.items()}


def weight_of(shape: Shape) -> Tensor:
    return torch.randn(shape) / torch.Size(shape[1:]).numel() ** 0.5


@pytest.mark.parametrize(
    ("kind", "make", "path", "shape"), CASES, ids=lambda v: v if isinstance(v, str) else ""
)
def test_our_kohya_files_are_fused_to_the_same_weights(
    kind: str, make: Callable[[Shape], Delta], path: str, shape: Shape, tmp_path: Path
) -> None:
    torch.manual_seed(len(kind) + len(shape))
    delta, weight = make(shape), weight_of(shape)
    state, expected = written(delta, path, tmp_path), delta.delta(weight)
    said = {p: e for caution in cautions(Adapter({path: delta})) for p, e in caution.effects.items()}
    for name, reader in READERS.items():
        outcome = UNLIKE[name].get(kind)
        if kind == "ia3, outputs" and name != "ComfyUI" and len(shape) == 2:
            outcome = None
        assert said.get(name) == outcome, name
        if outcome in (REFUSES, SKIPS):
            with pytest.raises(Refused if outcome == REFUSES else Skipped):
                reader(state, weight)
            continue
        found = reader(state, weight)
        error = float((found.weight - expected).norm() / expected.norm().clamp_min(1e-9))
        assert error > 0.01 if outcome == OTHER else error < 1e-5, (name, outcome)
        if isinstance(delta, WithBias) and outcome != NO_BIAS:
            assert found.bias is not None
            torch.testing.assert_close(found.bias, delta.bias)
        else:
            assert found.bias is None


# ---------------------------------------------------------------- where a naive reading fails


def dora(
    folder: Path, axis: int, shape: Shape = (24, 24)
) -> tuple[LowRank, Tensor, Tensor, dict[str, Tensor]]:
    """A LoRA, its magnitude, the base's weight of a square layer, and what we write."""
    torch.manual_seed(3)
    low, weight = lora(shape), weight_of(shape)
    magnitude = 1 + torch.rand((24, 1) if axis == 0 else (1, 24))
    delta = WithMagnitude(low, magnitude)
    return low, magnitude, weight, written(delta, LAYERS["linear"][0], folder)


def test_input_axis_dora_is_written_so_that_no_reader_takes_it_for_the_other(tmp_path: Path) -> None:
    """On a square layer only the shape (1, n) tells. Read naively, by rows, it is another weight."""
    low, magnitude, weight, state = dora(tmp_path, 1)
    merged = weight + low.delta(weight)
    meant = magnitude * merged / column_norms(merged)
    naive = magnitude.reshape(-1, 1) * merged / row_norms(merged)
    assert (naive - meant).norm() > 0.1 * meant.norm()
    for reader in READERS.values():
        torch.testing.assert_close(weight + reader(state, weight).weight, meant, atol=1e-5, rtol=1e-5)


def test_output_axis_dora_is_what_lycoris_and_peft_mean_and_three_programs_read_otherwise(
    tmp_path: Path,
) -> None:
    """A1111 and InvokeAI scale its rows and divide by the norms of the columns; ComfyUI divides by |W|, which is right
    only while |W + ΔW| is |W|. README says so; a LoRA for these programs is baked, or trained without DoRA."""
    low, magnitude, weight, state = dora(tmp_path, 0)
    merged = weight + low.delta(weight)
    meant = weight + algebra.dora_delta(weight, low.delta(weight), magnitude)
    torch.testing.assert_close(meant, magnitude * merged / row_norms(merged))
    scrambled = magnitude * merged / column_norms(merged)
    halfway = magnitude * merged / row_norms(weight)
    for reader, found in (("A1111", scrambled), ("InvokeAI", scrambled), ("ComfyUI", halfway)):
        torch.testing.assert_close(
            weight + READERS[reader](state, weight).weight, found, atol=1e-5, rtol=1e-5
        )
        assert (found - meant).norm() > 0.05 * meant.norm()


def test_alpha_of_a_lokr_of_two_whole_factors_means_nothing(tmp_path: Path) -> None:
    """Taken for a scale, as alpha is everywhere else, ΔW would be three quarters of itself."""
    torch.manual_seed(1)
    path, shape = LAYERS["conv"]
    delta, weight = lokr_whole(shape), weight_of(shape)
    state = written(delta, path, tmp_path)
    whole = kron(state["lokr_w1"], state["lokr_w2"])
    assert float(state["alpha"]) == 0.75
    for reader in READERS.values():
        torch.testing.assert_close(reader(state, weight).weight, whole)


def test_a_limited_turn_is_held_closer_by_comfyui(tmp_path: Path) -> None:
    """It holds |Q| within alpha; LyCORIS, kohya and A1111 within alpha times the outputs, 40 here."""
    torch.manual_seed(2)
    path, shape = LAYERS["linear"]
    delta, weight = KINDS["oft, limited"](shape), weight_of(shape)
    state = written(delta, path, tmp_path)
    closer = turned_by_blocks(cayley(skew(state["oft_blocks"], 0.01)), weight) - weight
    torch.testing.assert_close(comfyui(state, weight).weight, closer, atol=1e-6, rtol=1e-4)
    assert closer.norm() < 0.1 * delta.delta(weight).norm()


# ---------------------------------------------------------------- names


@cache
def adapter_of_everything(family: str) -> Adapter:
    """A LoRA of rank 1 for every layer of the real model, a norm's change whole; its number tells each layer."""
    deltas: dict[str, Delta] = {}
    for number, (path, (_, shape)) in enumerate(everything(family).items(), start=1):
        if len(shape) == 1:
            deltas[path] = Full(torch.full(shape, float(number)))
            continue
        down, up = torch.zeros(1, *shape[1:]).half(), torch.zeros(shape[0], 1, *ones(shape)).half()
        deltas[path] = LowRank(down, up, alpha=float(number))
    return Adapter(deltas, family=family)


@pytest.fixture(scope="module", params=FAMILIES)
def in_file(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, dict[str, str]]:
    """-> family, and each name in our kohya file -> the layer that it means."""
    adapter = adapter_of_everything(request.param)
    tensors = load_file(write_adapter(adapter, tmp_path_factory.mktemp("whole") / "x"))
    paths = list(adapter.deltas)
    numbers = {
        key.partition(".")[0]: int(tensor.flatten()[0])
        for key, tensor in tensors.items()
        if key.endswith((".alpha", ".diff"))
    }
    names = {name: paths[number - 1] for name, number in numbers.items()}
    assert len(set(names.values())) == len(paths)
    return request.param, names


def trained(family: str) -> set[str]:
    """What a LoRA is usually of: linear layers and convolutions, but for SDXL's last projection."""
    return {
        p for p, b in everything(family).items() if b.kind in ("Linear", "Conv2d") and "text_proj" not in p
    }


def test_a1111_finds_the_layers_of_our_files(in_file: tuple[str, dict[str, str]]) -> None:
    """It has no names for a text encoder's norms and embeddings, CLIP-L's in SDXL excepted, nor for the last norm of
    SD 1 and 2."""
    family, names = in_file
    modules = a1111_modules(family)
    lost = {
        path for name, path in names.items() if a1111_finds(name, modules, open_clip=family == "sd2") != path
    }
    assert lost.isdisjoint(trained(family))
    assert all(path.startswith("text_encoder") or path == "unet.conv_norm_out" for path in lost)
    assert ("unet.conv_norm_out" in lost) is (family != "sdxl")
    assert any(path.endswith("layer_norm1") for path in lost) is (family != "sd1")


def test_comfyui_finds_the_layers_of_our_files(in_file: tuple[str, dict[str, str]]) -> None:
    """It has no names for a text encoder's norms and embeddings."""
    family, names = in_file
    known = comfyui_map(family)
    lost = {path for name, path in names.items() if known.get(name) != path}
    assert lost.isdisjoint(trained(family))
    assert all(path.startswith("text_encoder") for path in lost)
    assert {everything(family)[path].kind for path in lost} == {"LayerNorm", "Embedding"}


def test_invokeai_finds_the_layers_of_our_files(in_file: tuple[str, dict[str, str]]) -> None:
    """It walks a flattened name down the model itself, whose names are diffusers'."""
    family, names = in_file
    first = "lora_te1_" if family == "sdxl" else "lora_te_"
    prefixes = {"unet": "lora_unet_", "text_encoder": first, "text_encoder_2": "lora_te2_"}
    for name, path in names.items():
        component, _, inside = path.partition(".")
        assert invokeai_name(name, family) == prefixes[component] + inside.replace(".", "_")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("part", ["all", "unet", "text", "attn1", "to_q"])
def test_invokeai_tells_the_family_of_our_files(family: str, part: str, tmp_path: Path) -> None:
    """By the width of the text, or by how deep SDXL's attention is. Of SD 1 and 2 without either it takes no file."""
    parts = {
        "all": ("",),
        "unet": ("unet.",),
        "text": ("text_encoder",),
        "attn1": ("attn1",),
        "to_q": ("attn1.to_q",),
    }
    chosen = {
        path: delta
        for path, delta in adapter_of_everything(family).deltas.items()
        if path in trained(family) and any(piece in path for piece in parts[part])
    }
    path = write_adapter(Adapter(chosen, family=family), tmp_path / "x")
    shapes = {key: info.shape for key, info in read_header(path).tensors.items()}
    tells = part not in ("attn1", "to_q") or family == "sdxl"
    assert invokeai_family(shapes) == (family if tells else None)


@pytest.mark.parametrize("family", FAMILIES)
def test_comfyui_looks_for_attention_layers_under_older_names_of_diffusers(
    family: str, tmp_path: Path
) -> None:
    """Of a file in today's diffusers spelling it finds the text encoders and half the UNet: kohya's is for it."""
    layers = {p: d for p, d in adapter_of_everything(family).deltas.items() if p in trained(family)}
    path = write_adapter(Adapter(layers, family=family), tmp_path / "x", spelling="diffusers")
    names = {key.rsplit(".lora_", 1)[0] for key in read_header(path).tensors}
    known = comfyui_map(family)
    assert all(known[name] == name for name in names if name in known)
    assert names == layers.keys()
    assert {name.split(".attn")[-1] for name in names - known.keys()} == {
        f"{i}.{to}" for i in (1, 2) for to in ("to_q", "to_k", "to_v", "to_out.0")
    }
