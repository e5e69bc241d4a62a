"""Every layer of the real models, in every spelling that names it, behind every ending: read to the last key.

Files here are headers of full size with an empty (sparse) body: names and shapes are all that matters.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from lora_core.adapter import file_path
from lora_core.errors import FileRefused, NotFinite
from lora_core.formats import describe_adapter, read_adapter
from lora_core.formats.endings import role_of
from lora_core.formats.keys import flattened
from lora_core.formats.names import path_of
from lora_core.ldm_names import to_sgm
from tests.lora_core.adapters_on_disk import assert_same, saved
from tests.lora_core.full_size import FAMILIES, UP_WITH_ATTENTION, Built, everything
from tests.lora_core.key_maps_of_others import comfyui_map
from tests.small_models import small_pipeline

Shape = tuple[int, ...]
Name = Callable[
    [str, str, str], str | None
]  # (component, path inside it, family) -> the layer's name in a file


def sgm(inside: str, family: str) -> str:
    name = to_sgm(inside, attention_up=UP_WITH_ATTENTION[family])
    assert name is not None
    return name


def kohya(component: str, inside: str, family: str) -> str:
    """sd-scripts, LyCORIS: SDXL's UNet in sgm's names."""
    if component == "unet":
        return f"lora_unet_{flattened(sgm(inside, family) if family == 'sdxl' else inside)}"
    return f"lora_te{'' if family != 'sdxl' else 2 if component.endswith('2') else 1}_{flattened(inside)}"


def kohya_as_diffusers(component: str, inside: str, family: str) -> str:
    """The other way round for each family's UNet; SD 1's encoder as SDXL's first."""
    if component == "unet":
        return f"lora_unet_{flattened(inside if family == 'sdxl' else sgm(inside, family))}"
    return f"lora_te{2 if component.endswith('2') else 1}_{flattened(inside)}"


def onetrainer(component: str, inside: str, family: str) -> str:
    """In the open model initiative's names."""
    if component == "unet":
        return f"unet.{sgm(inside, family)}"
    return f"{'clip_g' if component.endswith('2') else 'clip_l'}.{inside}"


def onetrainer_inside(component: str, inside: str, family: str) -> str:
    prefix = {"unet": "lora_unet", "text_encoder": "lora_te1", "text_encoder_2": "lora_te2"}[component]
    return f"{prefix}.{inside}"


def comfyui(component: str, inside: str, family: str) -> str:
    if component == "unet":
        return f"diffusion_model.{sgm(inside, family)}"
    clip = "clip_h" if family == "sd2" else "clip_g" if component.endswith("2") else "clip_l"
    return f"text_encoders.{clip}.transformer.{inside}"


def diffusers(component: str, inside: str, family: str) -> str:
    return f"{component}.{inside}"


def transformers_5(component: str, inside: str, family: str) -> str:
    return f"{component}.{inside.removeprefix('text_model.')}"


def lycoris(component: str, inside: str, family: str) -> str | None:
    """Around one module, which the names do not say: the UNet's and the first encoder's are unlike."""
    return None if component == "text_encoder_2" else f"lycoris_{flattened(inside)}"


def wrapped(component: str, inside: str, family: str) -> str:
    return f"module.base_model.model.{component}.{inside}"


def alone(component: str, inside: str, family: str) -> str | None:
    return None if component == "text_encoder_2" else inside


NAMES: dict[str, Name] = {
    made.__name__: made
    for made in (
        kohya,
        kohya_as_diffusers,
        onetrainer,
        onetrainer_inside,
        comfyui,
        diffusers,
        transformers_5,
        lycoris,
        wrapped,
        alone,
    )
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("spelling", NAMES)
def test_every_layer_is_known_by_its_name_in_every_spelling(spelling: str, family: str) -> None:
    known = 0
    for path in everything(family):
        component, _, inside = path.partition(".")
        name = NAMES[spelling](component, inside, family)
        assert name is None or path_of(name) == path
        known += name is not None
    assert known > 400


@pytest.mark.parametrize("family", FAMILIES)
def test_every_name_that_comfyui_knows_is_known(family: str) -> None:
    names = comfyui_map(family)
    assert len(names) > 900
    for name, path in names.items():
        found = role_of(f"{name}_lora.up.weight" if ".processor." in name else f"{name}.lora_up.weight", ())
        assert found is not None
        assert (path_of(found[0]), found[1]) == (path, "up"), name


# ---------------------------------------------------------------- whole files

Factors = dict[str, Shape]


def pair(shape: Shape, down: str, up: str) -> Factors:
    """Of rank 4. An embedding's like a linear layer's."""
    return {down: (4, *shape[1:]), up: (shape[0], 4, *[1] * (len(shape) - 2))}


def lora(shape: Shape) -> Factors:
    return {**pair(shape, "lora_down.weight", "lora_up.weight"), "alpha": ()}


def dora(shape: Shape) -> Factors:
    return {**lora(shape), "dora_scale": (shape[0], *[1] * (len(shape) - 1)), "diff_b": shape[:1]}


def tucker(shape: Shape) -> Factors:
    if len(shape) == 2:
        return lora(shape)
    ones = (1, 1)
    return {
        "lora_down.weight": (4, shape[1], *ones),
        "lora_mid.weight": (4, 4, *shape[2:]),
        "lora_up.weight": (shape[0], 4, *ones),
        "alpha": (),
    }


def loha(shape: Shape) -> Factors:
    a, b = (shape[0], 4), (4, math.prod(shape[1:]))
    return {"hada_w1_a": a, "hada_w1_b": b, "hada_w2_a": a, "hada_w2_b": b, "alpha": ()}


def lokr(shape: Shape) -> Factors:
    out, inn = (4 if n % 4 == 0 else 1 for n in shape[:2])
    second = (shape[0] // out, 4), (4, shape[1] // inn * math.prod(shape[2:]))
    return {"lokr_w1": (out, inn), "lokr_w2_a": second[0], "lokr_w2_b": second[1], "alpha": ()}


def ia3(shape: Shape) -> Factors:
    return {"weight": shape[:1] if len(shape) == 2 else (1, shape[0], 1, 1), "on_input": ()}


def glora(shape: Shape) -> Factors:
    (out, inn), tail, one = shape[:2], shape[2:], [1] * (len(shape) - 2)
    return {
        "a1.weight": (inn, 4, *one),
        "a2.weight": (4, inn, *one),
        "b1.weight": (out, 4, *one),
        "b2.weight": (4, inn, *tail),
        "alpha": (),
    }


def oft(shape: Shape) -> Factors:
    return {"oft_blocks": (shape[0] // 4, 4, 4), "rescale": (shape[0], *[1] * (len(shape) - 1)), "alpha": ()}


def whole(shape: Shape) -> Factors:
    return {"diff": shape, "diff_b": shape[:1]}


def peft(shape: Shape) -> Factors:
    return {**pair(shape, "lora_A.weight", "lora_B.weight"), "lora_magnitude_vector": magnitude(shape)}


def named_adapter(shape: Shape) -> Factors:
    return {
        **pair(shape, "lora_A.cat.weight", "lora_B.cat.weight"),
        "lora_magnitude_vector.cat.weight": magnitude(shape),
    }


def with_bias(shape: Shape) -> Factors:
    return {**pair(shape, "lora_A.weight", "lora_B.weight"), "lora_B.bias": shape[:1]}


def of_2023(shape: Shape) -> Factors:
    return pair(shape, "lora.down.weight", "lora.up.weight")


def of_transformers(shape: Shape) -> Factors:
    return pair(shape, "lora_linear_layer.down.weight", "lora_linear_layer.up.weight")


def ai_toolkit(shape: Shape) -> Factors:
    return {**pair(shape, "lora_A.weight", "lora_B.weight"), "magnitude": (shape[0], *[1] * (len(shape) - 1))}


def magnitude(shape: Shape) -> Shape:
    return shape[:1] if len(shape) == 2 else (1, shape[0], 1, 1)


KINDS = (
    *(lora, dora, tucker, loha, lokr, ia3, glora, oft, whole),
    *(peft, named_adapter, with_bias, of_2023, of_transformers, ai_toolkit),
)


def factors_for(built: Built, turn: int) -> Factors:
    if len(built.shape) == 1:
        return {"w_norm": built.shape, "b_norm": built.shape}
    if built.kind == "Embedding":
        return (lora, whole, loha)[turn % 3](built.shape) if turn % 3 != 1 else {"diff": built.shape}
    kind = KINDS[turn % len(KINDS)]
    return kind(built.shape) if kind is not oft or built.shape[0] % 4 == 0 else whole(built.shape)


def outline(path: Path, shapes: dict[str, Shape], metadata: dict[str, str] | None = None) -> Path:
    """A file of these tensors, all zero, that takes no room on disk."""
    header: dict[str, object] = {"__metadata__": metadata or {}}
    end = 0
    for key, shape in shapes.items():
        start, end = end, end + 2 * math.prod(shape)
        header[key] = {"dtype": "F16", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return path


def keys_of(family: str, spelling: str, turn: int) -> Iterator[tuple[str, str, Factors]]:
    for i, (path, built) in enumerate(everything(family).items()):
        component, _, inside = path.partition(".")
        name = NAMES[spelling](component, inside, family)
        if name is not None:
            yield path, name, factors_for(built, i + turn)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("spelling", NAMES)
def test_a_file_of_full_size_is_read_to_its_last_key(spelling: str, family: str, tmp_path: Path) -> None:
    """Kinds take turns over the layers, and begin with another one in each spelling."""
    turn = list(NAMES).index(spelling) + 5 * FAMILIES.index(family)
    made = list(keys_of(family, spelling, turn))
    shapes = {f"{name}.{ending}": shape for _, name, factors in made for ending, shape in factors.items()}
    adapter = describe_adapter(outline(tmp_path / "x.safetensors", shapes))
    assert adapter.unused == ()
    assert set(adapter.deltas) == {path for path, _, _ in made}
    built = everything(family)
    assert [path for path, delta in adapter.deltas.items() if not delta.fits(built[path].shape)] == []
    assert adapter.family == family


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_processors_of_early_2023(family: str, tmp_path: Path) -> None:
    """diffusers 0.12 to 0.16: UNets bare or behind `unet.`, text encoders with the processors' names too."""
    shapes: dict[str, Shape] = {}
    expected: set[str] = set()
    for i, (path, built) in enumerate(everything(family).items()):
        component, _, inside = path.partition(".")
        above, _, layer = inside.removesuffix(".0").rpartition(".")
        factors = pair(built.shape, "down.weight", "up.weight")
        if component == "unet" and above.endswith(("attn1", "attn2")):
            prefix = ("", "unet.")[i % 2]
            shapes |= {f"{prefix}{above}.processor.{layer}_lora.{end}": s for end, s in factors.items()}
        elif component != "unet" and above.endswith("self_attn"):
            layer = f"to_{layer.removesuffix('_proj')}"
            shapes |= {f"{component}.{above}.{layer}_lora.{end}": s for end, s in factors.items()}
        else:
            continue
        expected.add(path)
    adapter = describe_adapter(outline(tmp_path / "x.safetensors", shapes))
    assert adapter.unused == ()
    assert set(adapter.deltas) == expected
    assert len(expected) > 150
    assert all(adapter.deltas[path].fits(everything(family)[path].shape) for path in expected)


@pytest.mark.parametrize("kind", KINDS)
def test_not_finite_is_refused_in_every_factor_of_every_kind(
    kind: Callable[[Shape], Factors], tmp_path: Path
) -> None:
    """An alpha counts, and a core that is multiplied away; the layer is named."""
    name = "unet.mid_block.resnets.0.conv1"
    for factor in (factors := kind((16, 12, 3, 3))):
        if factor == "on_input":
            continue
        state = {f"{name}.{end}": 0.5 * torch.ones(shape) for end, shape in factors.items()}
        assert len(read_adapter(saved(state, tmp_path)).deltas) == 1
        state[f"{name}.{factor}"].view(-1)[0] = float("nan")
        with pytest.raises((NotFinite, FileRefused), match=r"mid_block\.resnets\.0\.conv1"):
            read_adapter(saved(state, tmp_path))


@pytest.mark.parametrize("method", ["LORA", "LOHA", "LOKR", "IA3", "OFT", "BOFT"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_folder_of_peft_of_full_size(family: str, method: str, tmp_path: Path) -> None:
    """A folder for each component; every second norm was saved whole, and what a method has no factors for."""
    made: dict[str, dict[str, Shape]] = {}
    for i, (path, built) in enumerate(everything(family).items()):
        component, _, inside = path.partition(".")
        if component == "text_encoder":
            inside = inside.removeprefix("text_model.")
        factors = of_peft(method, built, path)
        if factors is None:
            factors = (
                {"weight": built.shape}
                if i % 2
                else {"base_layer.weight": built.shape, "bias": built.shape[:1]}
            )
        shapes = {f"base_model.model.{inside}.{ending}": shape for ending, shape in factors.items()}
        made.setdefault(component, {}).update(shapes)
    for component, shapes in made.items():
        (tmp_path / component).mkdir()
        outline(tmp_path / component / "adapter_model.safetensors", shapes)
        config = {"peft_type": method, "r": 4, "alpha": 2, "feedforward_modules": ["ff.net.2", "fc2"]}
        (tmp_path / component / "adapter_config.json").write_text(json.dumps(config))
    adapter = describe_adapter(tmp_path)
    built_of = everything(family)
    assert adapter.unused == ()
    assert adapter.deltas.keys() == built_of.keys()
    assert [path for path, delta in adapter.deltas.items() if not delta.fits(built_of[path].shape)] == []
    assert adapter.family == family


def of_peft(method: str, built: Built, path: str) -> Factors | None:
    shape = built.shape
    if built.kind == "Embedding":
        return (
            {"lora_embedding_A": (4, shape[0]), "lora_embedding_B": (shape[1], 4)}
            if method == "LORA"
            else None
        )
    if len(shape) == 1:
        return None
    inputs = math.prod(shape[1:])
    if method == "IA3":
        fed = path.endswith(("ff.net.2", "fc2"))
        return {
            "ia3_l": (1, shape[1 - (not fed)], 1, 1)
            if len(shape) == 4
            else (1, inputs)
            if fed
            else (shape[0], 1)
        }
    if method == "OFT":
        return {"oft_R.weight": (inputs // 4, 6)} if shape[2:] != (3, 3) and inputs % 4 == 0 else None
    if method == "BOFT":
        scale = (1, shape[0]) if len(shape) == 4 else (shape[0], 1)
        return {"boft_R": (1, inputs // 4, 4, 4), "boft_s": scale} if inputs % 4 == 0 else None
    factors = {"LORA": peft, "LOHA": loha, "LOKR": lokr}[method](shape)
    return {ending: side for ending, side in factors.items() if ending != "alpha"}


# ---------------------------------------------------------------- what LyCORIS' own wrapper saves


@pytest.mark.parametrize("algo", ["locon", "loha", "lokr", "full", "ia3", "diag-oft", "glora"])
@pytest.mark.parametrize("component", ["unet", "text_encoder"])
def test_what_the_wrapper_of_lycoris_saves_is_read(component: str, algo: str, tmp_path: Path) -> None:
    """Names of its own making around a whole model: each is the layer whose module it wrapped, and the change the same
    as under kohya's names."""
    wrapper = pytest.importorskip("lycoris")
    model = getattr(small_pipeline("sd1"), component)
    layers = "BasicTransformerBlock" if component == "unet" else "CLIPEncoderLayer"
    wrapper.LycorisNetwork.apply_preset({"target_module": [layers, "ResnetBlock2D"]})
    torch.manual_seed(4)
    network = wrapper.create_lycoris(model, 1.0, linear_dim=4, linear_alpha=1.5, conv_dim=4, algo=algo)
    modules = {id(module): file_path(component, path) for path, module in model.named_modules()}
    expected = {modules[id(lora.org_module[0])] for lora in network.loras}
    network.apply_to()
    state = {key: 0.1 * torch.randn_like(t) if t.dim() else t for key, t in network.state_dict().items()}
    wrapped = read_adapter(saved(state, tmp_path))
    assert wrapped.unused == ()
    assert set(wrapped.deltas) == expected
    assert len(expected) > 10
    prefix = "lora_unet_" if component == "unet" else "lora_te_text_model_"
    assert_same(
        wrapped, read_adapter(saved({k.replace("lycoris_", prefix): t for k, t in state.items()}, tmp_path))
    )
