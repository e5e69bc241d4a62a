"""Row norms of DoRA layers that are alike, together: the large products are each layer's own, the small operations,
half of a norm's time, a whole group's. An SD 1.5's 128 attention layers are of six shapes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch

from lora_core import algebra
from lora_core.trainable.low_rank import TrainableLowRank

if TYPE_CHECKING:
    from lora_core.trainable.layer import TrainableLayer


def group_norms(layers: Iterable[TrainableLayer]) -> None:
    """Of one model, whose layers learn in the same steps. Quantised layers stay alone: their weight is made for the
    moment."""
    groups: dict[tuple[object, ...], list[TrainableLayer]] = defaultdict(list)
    for layer in layers:
        site = layer.site
        plain = type(layer.factors) is TrainableLowRank and site.norm_device is None and not site.is_quantised
        if layer.magnitude is not None and plain:
            groups[site.shape, site.rank, site.scale, site.device].append(layer)
    for group in groups.values():
        for layer in group:
            layer.alike = group


def norms_together(layers: Sequence[TrainableLayer], device: torch.device) -> None:
    """Into each layer's `norm`."""
    weights = [layer.site.original().to(device) for layer in layers]
    n0 = torch.stack([layer.squared_of(weight) for layer, weight in zip(layers, weights, strict=True)])
    downs, ups = zip(*((f.down, f.up) for f in map(_factors, layers)), strict=True)
    with torch.autocast(device.type, enabled=False):  # in fp32, whatever the forward pass is in
        norms = algebra.row_norms_together(weights, downs, ups, scale=layers[0].site.scale, n0=n0)
    for layer, norm in zip(layers, norms, strict=True):
        layer.norm = (layer.versions(), norm)


def _factors(layer: TrainableLayer) -> TrainableLowRank:
    assert isinstance(layer.factors, TrainableLowRank)
    return layer.factors
