"""Adapter: one LoRA, independent of the file it came from and of the model it goes to."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lora_core.deltas import Delta
from lora_core.errors import NotFinite

COMPONENTS = ("unet", "text_encoder", "text_encoder_2")


@dataclass(frozen=True, eq=False)
class Adapter:
    """Module path -> Delta.

    A path is `<component>.<module path>`, for text encoders in the spelling every file uses, with
    `text_model.`: `unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q`,
    `text_encoder.text_model.encoder.layers.0.self_attn.q_proj`. `family` is a key of families.FAMILIES
    or None where nothing tells it, `told_by` what does; `unused` names the file's keys that say nothing we know.
    `embeddings` are new words (new_tokens.py): word -> text encoder -> rows (n, width).
    """

    deltas: dict[str, Delta]
    metadata: dict[str, str] = field(default_factory=dict)
    family: str | None = None
    name: str = ""
    unused: tuple[str, ...] = ()
    embeddings: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    told_by: str = ""

    def components(self) -> tuple[str, ...]:
        present = {path.split(".", 1)[0] for path in self.deltas}
        return tuple(c for c in COMPONENTS if c in present)

    def check_finite(self) -> None:
        """Raise NotFinite naming the first tensor with NaN or Inf."""
        for path, tensors in self._all():
            for name, tensor in tensors.items():
                if not is_finite(tensor):
                    bad = int((~torch.isfinite(tensor.float())).sum())
                    raise NotFinite(
                        f"{path} ({name}) holds {bad} values that are NaN or infinite, out of {tensor.numel()}. "
                        "A LoRA must be finite: this one was damaged in training. Use an earlier checkpoint of it."
                    )

    def size_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for _, tensors in self._all() for t in tensors.values())

    def _all(self) -> Iterator[tuple[str, dict[str, Tensor]]]:
        yield from ((path, delta.tensors()) for path, delta in self.deltas.items())
        yield from self.embeddings.items()


def is_finite(tensor: Tensor) -> bool:
    """Whether no value is NaN or infinite: by the least and the largest, which NaN is to both. That takes a tenth of
    the time of looking at each."""
    if not tensor.numel() or not tensor.is_floating_point():
        return True
    if tensor.dtype.itemsize == 1:
        tensor = tensor.half()  # fp8 has next to no arithmetic in torch; all its values are fp16 values
    return all(map(math.isfinite, map(float, tensor.aminmax())))


def live_path(path: str, model: nn.Module) -> str:
    """An adapter's path inside its component -> the path in this model.

    transformers 5 dropped `text_model.` from CLIPTextModel's module names (not from
    CLIPTextModelWithProjection's); files keep it.
    """
    if path.startswith("text_model.") and not hasattr(model, "text_model"):
        return path.removeprefix("text_model.")
    return path


def file_path(component: str, path: str) -> str:
    """The inverse of `live_path`, with the component in front. SDXL's `text_projection` stands beside text_model."""
    if component != "unet" and not path.startswith(("text_model.", "text_projection")):
        path = f"text_model.{path}"
    return f"{component}.{path}"


def resolve(adapter_paths: Iterable[str], models: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """-> the layers that exist, by adapter path."""
    layers: dict[str, nn.Module] = {}
    for path in adapter_paths:
        component, _, inside = path.partition(".")
        model = models.get(component)
        if model is None:
            continue
        try:
            layers[path] = model.get_submodule(live_path(inside, model))
        except AttributeError:
            continue
    return layers


def weight_of(layer: nn.Module) -> Tensor:
    """A layer's weight, typed."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight
