"""Any LoRA at all, of every kind, through every spelling that has words for it and back; the others say so and write
nothing."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

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
from lora_core.errors import ConfigError
from lora_core.formats import read_adapter, write_adapter
from lora_core.safe_files import read_header
from tests.lora_core.adapters_on_disk import assert_same

Shape = tuple[int, ...]
TEXT = "text_model.encoder.layers.{n}"
LAYERS: dict[str, Shape] = {  # {n}: a number
    "unet.down_blocks.1.attentions.{n}.transformer_blocks.0.attn1.to_q": (16, 16),
    "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_out.0": (16, 24),
    "unet.up_blocks.1.attentions.{n}.transformer_blocks.0.ff.net.0.proj": (32, 8),
    "unet.down_blocks.{n}.resnets.0.conv1": (16, 8, 3, 3),
    "unet.up_blocks.{n}.resnets.1.conv_shortcut": (16, 24, 1, 1),
    "unet.down_blocks.{n}.downsamplers.0.conv": (8, 8, 3, 3),
    "unet.up_blocks.0.upsamplers.0.conv": (8, 8, 3, 3),
    "unet.conv_in": (8, 4, 3, 3),
    "unet.mid_block.resnets.{n}.norm1": (16,),
    f"text_encoder.{TEXT}.self_attn.q_proj": (16, 16),
    f"text_encoder.{TEXT}.mlp.fc2": (8, 24),
    f"text_encoder.{TEXT}.layer_norm2": (8,),
    f"text_encoder_2.{TEXT}.self_attn.out_proj": (16, 8),
    "text_encoder.text_model.embeddings.token_embedding": (24, 8),
}
ALPHAS = st.sampled_from((1.0, 4.0, 0.5, 2.75, 0.1, 1e-3, 96.0))
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
Draw = Callable[..., int]


def numbers(seed: int) -> Callable[..., Tensor]:
    g = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(*shape, generator=g)


@st.composite
def low_ranks(draw: st.DrawFn, shape: Shape) -> LowRank:
    rank, new = draw(st.integers(1, 5)), numbers(draw(st.integers(0, 99)))
    ones = (1,) * (len(shape) - 2)
    return LowRank(new(rank, *shape[1:]), new(shape[0], rank, *ones), draw(ALPHAS))


@st.composite
def other_kinds(draw: st.DrawFn, shape: Shape) -> Delta:
    new, alpha, rank = numbers(draw(st.integers(0, 99))), draw(ALPHAS), draw(st.integers(1, 3))
    (out, inn), kernel = shape[:2], shape[2:]
    ones = (1,) * len(kernel)
    large = (
        kernel if kernel == (3, 3) else ()
    )  # LyCORIS has matrices of pairs; a 1x1 kernel goes without saying
    kind = draw(
        st.sampled_from(("loha", "tucker", "lokr", "split", "whole", "glora", "ia3", "oft", "boft", "full"))
    )
    if kind == "loha":
        return Hadamard(new(out, rank), new(rank, inn, *large), new(out, rank), new(rank, inn, *large), alpha)
    if kind == "tucker" and kernel == (3, 3):
        a, b, core = (new(rank, out), new(rank, out)), (new(rank, inn), new(rank, inn)), (rank, rank, 3, 3)
        return Hadamard(a[0], b[0], a[1], b[1], alpha, new(*core), new(*core))
    if kind == "lokr":
        return Kronecker((new(4, 2),), (new(out // 4, rank), new(rank, inn // 2, *large)), alpha)
    if kind == "split":
        pair = (new(out // 4, rank), new(rank, inn // 2, *large))
        return Kronecker((new(4, rank), new(rank, 2)), pair, alpha)
    if kind == "glora":
        a1, a2, b1 = new(inn, rank, *ones), new(rank, inn, *ones), new(out, rank, *ones)
        return Generalized(a1, a2, b1, new(rank, inn, *kernel), alpha=alpha)
    if kind == "ia3":
        on_input = draw(st.booleans())
        n = inn if on_input else out
        return Scaling(new(1, n, 1, 1) if kernel else new(n), on_input)
    if kind == "oft":
        rescale = new(out, 1, *ones) if draw(st.booleans()) else None
        return Rotation(new(out // 4, 4, 4), draw(st.sampled_from((0.0, 0.25))), rescale)
    if kind == "boft":
        return Rotation(new(2, out // 4, 4, 4))
    if kind == "full":
        return Full(new(*shape))
    return Kronecker((new(4, 2),), (new(out // 4, inn // 2, *kernel),), alpha)


@st.composite
def deltas(draw: st.DrawFn, path: str, shape: Shape, plain: str | None) -> Delta:
    """`plain`: None for any kind, else "lora" or "dora" (by outputs), as PEFT can say them."""
    new = numbers(draw(st.integers(100, 199)))
    if len(shape) == 1:
        change: Delta = Full(new(*shape))
        return draw(st.sampled_from((change, WithBias(change, new(*shape)), WithBias(None, new(*shape)))))
    if "embedding" in path:
        return draw(low_ranks(shape))
    if plain is not None:
        low = draw(low_ranks(shape))
        return WithMagnitude(low, _column(new, shape)) if plain == "dora" else low
    change = draw(st.one_of(low_ranks(shape), other_kinds(shape)))
    if isinstance(change, LowRank | Hadamard | Kronecker) and draw(st.booleans()):
        by_row = new(1, shape[1], *(1,) * len(shape[2:]))
        change = WithMagnitude(change, draw(st.sampled_from((_column(new, shape), by_row))))
    return WithBias(change, new(shape[0])) if draw(st.integers(0, 3)) == 0 else change


def _column(new: Callable[..., Tensor], shape: Shape) -> Tensor:
    return new(shape[0], *(1,) * (len(shape) - 1))


@st.composite
def adapters(draw: st.DrawFn, plain: bool = False) -> Adapter:
    """`plain`: LoRA or DoRA throughout a component, on linear layers and convolutions."""
    family = draw(st.sampled_from(("sd1", "sd2", "sdxl")))
    possible = [p for p in LAYERS if family == "sdxl" or not p.startswith("text_encoder_2")]
    if plain:
        possible = [p for p in possible if len(LAYERS[p]) > 1 and "embedding" not in p]
    chosen = draw(st.lists(st.sampled_from(possible), min_size=1, max_size=5, unique=True))
    how = {c: draw(st.sampled_from(("lora", "dora"))) for c in ("unet", "text_encoder", "text_encoder_2")}
    made = {}
    for path in chosen:
        kind = how[path.partition(".")[0]] if plain else None
        made[path.format(n=draw(st.integers(0, 1)))] = draw(deltas(path, LAYERS[path], kind))
    words: dict[str, dict[str, Tensor]] = {}
    if not plain and draw(st.integers(0, 3)) == 0:
        words = {"<fox>": {"text_encoder": torch.randn(2, 768)}}
        if family == "sdxl":
            words["<fox>"]["text_encoder_2"] = torch.randn(2, 1280)
    dtype = draw(st.sampled_from(DTYPES))
    cast = {path: delta.to(dtype=dtype) for path, delta in made.items()}
    rows = {word: {c: t.to(dtype) for c, t in parts.items()} for word, parts in words.items()}
    return Adapter(cast, family=family, embeddings=rows)


def can_say(adapter: Adapter, spelling: str) -> bool:
    """LoRA and DoRA by outputs, one of the two in a component; no biases, no words; embeddings in PEFT's alone."""
    if spelling == "kohya":
        return True
    dora: dict[str, set[bool]] = {}
    for path, delta in adapter.deltas.items():
        low = delta.inner if isinstance(delta, WithMagnitude) else delta
        if not isinstance(low, LowRank) or ("embedding" in path and spelling == "diffusers"):
            return False
        if isinstance(delta, WithMagnitude) and delta.magnitude.shape[0] == 1:
            return False
        dora.setdefault(path.partition(".")[0], set()).add(isinstance(delta, WithMagnitude))
    return not adapter.embeddings and all(len(kinds) == 1 for kinds in dora.values())


def assert_whole(written: Adapter, found: Adapter) -> None:
    assert found.unused == ()
    assert_same(written, found)
    assert {p: type(d) for p, d in written.deltas.items()} == {p: type(d) for p, d in found.deltas.items()}
    assert written.embeddings.keys() == found.embeddings.keys()
    for word, rows in written.embeddings.items():
        assert all(torch.equal(rows[c], found.embeddings[word][c]) for c in rows)


QUICK = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])


@settings(QUICK, max_examples=120)
@given(adapters())
def test_every_lora_comes_back_from_each_spelling_that_can_say_it(adapter: Adapter) -> None:
    with tempfile.TemporaryDirectory() as folder:
        for spelling in ("kohya", "diffusers", "peft"):
            target = Path(folder) / spelling
            if not can_say(adapter, spelling):
                with pytest.raises(ConfigError, match="kohya"):
                    write_adapter(adapter, target, spelling=spelling)
                assert not any(path.is_file() for path in Path(folder).rglob(f"{spelling}*"))
                assert not target.exists()
                continue
            path = write_adapter(adapter, target, spelling=spelling)
            assert_whole(adapter, read_adapter(path))


@settings(QUICK, max_examples=40)
@given(adapters(plain=True), st.permutations(("diffusers", "peft")))
def test_through_all_spellings_the_kohya_file_has_the_same_keys_and_bytes(
    adapter: Adapter, way: list[str]
) -> None:
    """Ranks and alphas by layer, LoRA and DoRA; what a file says of itself stays as well."""
    with tempfile.TemporaryDirectory() as folder:
        first = write_adapter(adapter, Path(folder) / "first")
        step = first
        for spelling in (*way, "kohya"):
            read = replace(read_adapter(step), name="first")
            step = write_adapter(read, Path(folder) / f"{spelling}-step", spelling=spelling)
        before, after = load_file(first), load_file(step)
        assert before.keys() == after.keys()
        for key, tensor in before.items():
            assert (tensor.dtype, tensor.shape) == (after[key].dtype, after[key].shape)
            assert torch.equal(tensor.view(-1).view(torch.uint8), after[key].view(-1).view(torch.uint8)), key
        assert read_header(first).metadata == read_header(step).metadata
