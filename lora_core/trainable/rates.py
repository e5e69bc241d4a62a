"""Which learning rate is whose."""

from __future__ import annotations

from collections.abc import Mapping

from lora_core.errors import ConfigError
from lora_core.trainable.layer import TrainableLayer
from lora_core.unet_blocks import check_named, deciding


def fast_names(layer: TrainableLayer) -> tuple[str, ...]:
    """LoRA+'s: which of the layer's parameters are B, or a vector."""
    own = () if layer.factors is None else layer.factors.fast
    if own is None:
        raise ConfigError(
            f'{layer.site.path}: a ratio of learning rates (LoRA+) is about B, which kind = "{layer.site.config.kind}" '
            'has not. Set ratio = 1, or kind = "lora".'
        )
    vectors = (name for name, p in layer.named_parameters() if p.dim() == 1)
    return (*(f"factors.{name}" for name in own), *vectors)


def rate_key(rates: Mapping[str, float], path: str) -> str:
    """Which entry of `rates` decides for the layer of an adapter path: the longest block of it, else the component."""
    component, _, inside = path.partition(".")
    blocks = {key.partition(".")[2] for key in rates if key.startswith(component + ".")}
    check_named(blocks)
    block = deciding(blocks, inside)
    return component if block is None else f"{component}.{block}"
