"""Adapters of every kind for the small models, made by hand: on every layer that can wear something."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lora_core import Adapter, LivePipeline
from lora_core.adapter import file_path, weight_of
from lora_core.deltas import Delta
from lora_core.deltas.bias import WithBias
from lora_core.deltas.full import Full
from lora_core.deltas.glora import Generalized
from lora_core.deltas.ia3 import Scaling
from lora_core.deltas.low_rank import LowRank
from lora_core.deltas.oft import Rotation
from lora_core.worn import WEARERS

Make = Callable[[torch.Size, torch.Generator, int], Delta | None]


def wearers(live: LivePipeline) -> dict[str, Any]:
    """Adapter path -> layer, norms and embeddings too."""
    return {
        file_path(component, path): layer
        for component, model in live.models.items()
        for path, layer in model.named_modules()
        if isinstance(layer, WEARERS)
    }


def random(g: torch.Generator, *shape: int, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(*shape, generator=g)


def whole(shape: torch.Size, g: torch.Generator, i: int) -> Delta:
    return Full(random(g, *shape, scale=0.1 / max(1, shape[1:].numel()) ** 0.5))


def low_rank(shape: torch.Size, g: torch.Generator, i: int) -> Delta | None:
    """alpha is not the rank; of an embedding the rows are its words."""
    if len(shape) < 2:
        return None
    down, up = random(g, 3, *shape[1:]), random(g, shape[0], 3, *[1] * (len(shape) - 2))
    return LowRank(down, up / down[0].numel() ** 0.5, alpha=0.6)


def scaling(shape: torch.Size, g: torch.Generator, i: int) -> Delta | None:
    """Inputs and outputs in turn; a convolution's as LyCORIS stores it."""
    if len(shape) < 2:
        return None
    n = shape[i % 2]
    vector = random(g, n, scale=0.2)
    return Scaling(vector[None, :, None, None] if len(shape) == 4 else vector, on_input=i % 2 == 1)


def generalized(shape: torch.Size, g: torch.Generator, i: int) -> Delta | None:
    if len(shape) < 2:
        return None
    (out, width), tail, one = shape[:2], shape[2:], [1] * (len(shape) - 2)
    rank = 2 + 14 * (i % 3 == 0)  # as factors, and where they are many as a dense change
    return Generalized(
        random(g, width, rank, *one, scale=0.3 / rank**0.5),
        random(g, rank, width, *one, scale=1 / width**0.5),
        random(g, out, rank, *one, scale=0.3 / rank**0.5),
        random(g, rank, width, *tail, scale=1 / shape[1:].numel() ** 0.5),
        alpha=0.7 * rank,
    )


def turning(shape: torch.Size, g: torch.Generator, i: int) -> Delta | None:
    """OFT; every third within a limit, every second rescaled."""
    if len(shape) < 2 or shape[0] % 4:
        return None
    rescale = 1 + random(g, shape[0], *[1] * (len(shape) - 1), scale=0.1)
    blocks = random(g, shape[0] // 4, 4, 4, scale=0.1)
    return Rotation(blocks, limit=0.01 * (i % 3 == 0), rescale=rescale if i % 2 else None)


def butterfly(shape: torch.Size, g: torch.Generator, i: int) -> Delta | None:
    if len(shape) < 2 or shape[0] % 16:
        return None
    return Rotation(random(g, 3, shape[0] // 4, 4, 4, scale=0.05), limit=0.02 * (i % 3 == 0))


KINDS: dict[str, Make] = {
    "whole": whole,
    "low rank": low_rank,
    "scaling": scaling,
    "generalized": generalized,
    "turning": turning,
    "butterfly": butterfly,
}


def adapter_of(live: LivePipeline, kind: str, seed: int, biases: str = "none") -> Adapter:
    """`biases`: "none", "beside" the kind where the layer has one, or "alone"."""
    g = torch.Generator().manual_seed(seed)
    deltas: dict[str, Delta] = {}
    for i, (path, layer) in enumerate(wearers(live).items()):
        shape = weight_of(layer).shape
        change = None if biases == "alone" else KINDS[kind](shape, g, i)
        if biases != "none" and getattr(layer, "bias", None) is not None:
            deltas[path] = WithBias(change, random(g, shape[0], scale=0.05))
        elif change is not None:
            deltas[path] = change
    return Adapter(deltas)


def without_embeddings(live: LivePipeline, adapter: Adapter) -> Adapter:
    layers = wearers(live)
    return Adapter({p: d for p, d in adapter.deltas.items() if not isinstance(layers[p], nn.Embedding)})
