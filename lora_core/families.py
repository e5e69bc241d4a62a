"""The families of Stable Diffusion models as rows of one table, and how a model or a LoRA shows its own."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import nn

from lora_core.adapter import Adapter, resolve
from lora_core.deltas import Delta
from lora_core.deltas.bias import WithBias
from lora_core.deltas.hadamard import Hadamard
from lora_core.deltas.kronecker import Kronecker
from lora_core.deltas.magnitude import WithMagnitude
from lora_core.deltas.oft import Rotation
from lora_core.deltas.shapes import compatible as compatible
from lora_core.errors import WrongFamily
from lora_core.replication import not_replicated
from lora_core.storages import dense_shape
from lora_core.worn import WEARERS


@dataclass(frozen=True)
class Family:
    """How one family differs from the others.

    components          what a LoRA of it can change, in the order of adapter.COMPONENTS
    context_width       features of a text embedding in the original models; others of the family may differ
    base_versions       kohya's `ss_base_model_version`: the plain one first, the v-prediction one behind it
    architectures       modelspec's `architecture`, in the same order
    resolution          side in pixels the original models were trained at
    """

    key: str
    title: str
    components: tuple[str, ...]
    context_width: int
    base_versions: tuple[str, ...]
    architectures: tuple[str, ...]
    resolution: int


FAMILIES: dict[str, Family] = {
    family.key: family
    for family in (
        Family(
            key="sd1",
            title="SD 1.x",
            components=("unet", "text_encoder"),
            context_width=768,
            base_versions=("sd_v1",),
            architectures=("stable-diffusion-v1/lora",),
            resolution=512,
        ),
        Family(
            key="sd2",
            title="SD 2.x",
            components=("unet", "text_encoder"),
            context_width=1024,
            base_versions=("sd_v2", "sd_v2_v"),
            architectures=("stable-diffusion-v2-512/lora", "stable-diffusion-v2-768-v/lora"),
            resolution=768,
        ),
        Family(
            key="sdxl",
            title="SDXL",
            components=("unet", "text_encoder", "text_encoder_2"),
            context_width=2048,
            base_versions=("sdxl_base_v1-0",),
            architectures=("stable-diffusion-xl-v1-base/lora",),
            resolution=1024,
        ),
    )
}


_LINEAR = "attention blocks that begin with a linear layer"
_CONVOLUTIONS = "attention blocks that begin with a convolution"
# Blocks that an SDXL UNet does not have, or not with attention.
_NOT_IN_SDXL = (
    "unet.down_blocks.0.attentions.",
    "unet.up_blocks.2.attentions.",
    "unet.down_blocks.3.",
    "unet.up_blocks.3.",
)


def family_of_unet(unet: nn.Module) -> Family:
    """The family of a live UNet, told as `family_of_whole_unet` does. Raises WrongFamily for a UNet of none of them."""
    entries = {f"unet.{path}": layer for path, layer in unet.named_modules() if path.endswith(".proj_in")}
    shapes: dict[str, tuple[int, ...]] = {f"unet.{path}": () for path, _ in unet.named_modules()}
    for kind in (nn.Linear, nn.Conv2d):  # where they differ, it is none of ours
        if all(isinstance(layer, kind) for layer in entries.values()):
            shapes |= {path: dense_shape(layer) for path, layer in entries.items()}
    told = family_of_whole_unet(shapes)
    if told.key is not None:
        return FAMILIES[told.key]
    raise WrongFamily(
        f"{type(unet).__name__} has {len(entries)} attention blocks with an entry layer of a known kind: "
        f"it is no UNet of {', '.join(f.title for f in FAMILIES.values())}. Open a model of one of these."
    )


class Told(NamedTuple):
    """A family's key, and what shows it: the end of "told by ...". Both are empty where nothing does."""

    key: str | None = None
    by: str = ""


def family_of_whole_unet(shapes: Mapping[str, tuple[int, ...]]) -> Told:
    """The family of a UNet all of whose layers are here (adapter path -> weight shape), told from what it is built of
    and never from widths: a small model of a family is of that family."""
    entries = {len(shape) for path, shape in shapes.items() if path.endswith(".proj_in")}
    told = _of_sdxl_alone(shapes)
    if told.key or not entries & {2, 4}:
        return told
    return Told("sd2", _LINEAR) if 2 in entries else Told("sd1", _CONVOLUTIONS)


def _of_sdxl_alone(paths: Iterable[str]) -> Told:
    if any(".transformer_blocks.1." in path for path in paths):
        return Told("sdxl", "attention blocks of several transformer layers")
    if any(path.startswith("unet.add_embedding.") for path in paths):
        return Told("sdxl", "an embedding of picture sizes")
    return Told()


def family_of_layers(shapes: Mapping[str, tuple[int, ...]], matrices: Container[str] = ()) -> Told:
    """The family that an adapter's layers (adapter path -> weight shape) show.

    Parts of a model that only one family has decide first, the original models' widths after that. A first
    text encoder of width 768 belongs to SD 1.x and SDXL alike, so it tells nothing.
    matrices    layers of kinds that are stored as matrices whatever they are: their number of sides tells nothing
    """
    in_unet = {path: shape for path, shape in shapes.items() if path.startswith("unet.")}
    contexts = {s[1] for p, s in in_unet.items() if p.endswith((".attn2.to_k", ".attn2.to_v")) and len(s) > 1}
    entries = {len(s) for p, s in in_unet.items() if p.endswith(".proj_in") and p not in matrices}
    words = {
        max(shape[:2])  # all four are square, and of some kinds one side is told
        for path, shape in shapes.items()
        if path.startswith("text_encoder.") and path.endswith("_proj")
    }
    if any(path.startswith("text_encoder_2.") for path in shapes):
        return Told("sdxl", "layers of a second text encoder")
    if (told := _of_sdxl_alone(in_unet)).key:
        return told
    for key in ("sdxl", "sd2", "sd1"):
        width = FAMILIES[key].context_width
        if width in contexts:
            return Told(key, f"cross-attention to text of {width} features")
        if key == "sd2" and width in words:
            return Told(key, f"a text encoder of {width} features")
    if entries == {4}:
        return Told("sd1", _CONVOLUTIONS)
    # SDXL's begin with a linear layer as well, but not here
    if entries == {2} and any(path.startswith(_NOT_IN_SDXL) for path in in_unet):
        return Told("sd2", _LINEAR)
    return Told()


def family_of_adapter(adapter: Adapter) -> Told:
    """By its layers first. The numbers of replicated layers count in a stack and tell nothing."""
    paths = not_replicated(adapter.deltas, adapter.metadata)
    shapes = {path: adapter.deltas[path].shape() for path in paths}
    matrices = {path for path in paths if _stored_as_matrix(adapter.deltas[path])}
    told = family_of_layers(shapes, matrices)
    return told if told.key else Told(adapter.family, adapter.told_by)


def _stored_as_matrix(delta: Delta | None) -> bool:
    """A 1x1 convolution of these kinds too: what turns a layer's inputs says how many there are, and no more."""
    while isinstance(delta, WithBias | WithMagnitude):
        delta = delta.inner
    return isinstance(delta, Hadamard | Kronecker | Rotation) and len(delta.shape()) == 2


def check_belongs(adapter: Adapter, models: Mapping[str, nn.Module], family: Family) -> dict[str, nn.Module]:
    """-> the layers of `adapter` that the model has, by path.

    Raises WrongFamily, in one sentence for its reader, if `adapter` is of another family than the model with these
    components, or if a layer of it has another shape than the model's. Layers that the model lacks are not this
    function's matter: they are counted by Coverage."""
    shapes = {path: tuple(delta.shape()) for path, delta in adapter.deltas.items()}
    own = family_of_adapter(adapter).key
    if own is not None and own != family.key:
        title = FAMILIES[own].title if own in FAMILIES else own
        raise WrongFamily(
            f"This is an {title} LoRA; the model is {family.title}. Load it on an {title} model."
        )
    layers = resolve(shapes, dict(models))
    for path, layer in layers.items():
        delta = adapter.deltas[path]
        if not isinstance(getattr(layer, "weight", None), nn.Parameter):
            raise WrongFamily(
                f"{path} of this LoRA is a {type(layer).__name__} in this model, which has no weight to "
                "change. Load it on the model it was trained on."
            )
        if not isinstance(layer, WEARERS):
            raise WrongFamily(
                f"{path} of this LoRA is a {type(layer).__name__} in this model, and only "
                f"{', '.join(kind.__name__ for kind in WEARERS)} layers can wear one. Load it on the model it was "
                "trained on."
            )
        if isinstance(delta, WithBias) and isinstance(layer, nn.Embedding):
            raise WrongFamily(
                f"{path} of this LoRA changes a bias, and an embedding has none. Download it again."
            )
        if isinstance(delta, WithBias) and delta.of == "value" and getattr(layer, "bias", None) is None:
            raise WrongFamily(
                f"{path} of this LoRA has a bias, and in this model it has none. Load it on the model it was trained "
                "on."
            )
        expected = dense_shape(layer)
        if not delta.fits(expected):
            why = "of other sizes" if own else f"of another kind than this {family.title} one"
            raise WrongFamily(
                f"{path} of this LoRA changes a weight of {by(shapes[path])}, in this model it has "
                f"{by(expected)}. The LoRA was trained on a model {why}: load it on that."
            )
    return layers


def by(shape: Iterable[Any]) -> str:
    """(320, 768) -> "320 x 768"; -1, a side that is not told, is a question mark."""
    return " x ".join("?" if n == -1 else str(n) for n in shape)
