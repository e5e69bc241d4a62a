"""How A and B begin: `begin` is asked once per layer. The identity at step 0 where it says so."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from lora_core.trainable import Site


@torch.no_grad()
def gaussian(down: Tensor, up: Tensor, generator: torch.Generator | None = None) -> None:
    """A ~ N(0, std = 1/r), B = 0: diffusers' way. Identity."""
    down.normal_(std=1 / down.shape[0], generator=generator)
    up.zero_()


@torch.no_grad()
def kaiming(down: Tensor, up: Tensor, generator: torch.Generator | None = None) -> None:
    """A kaiming uniform with a = sqrt(5), B = 0: PEFT's and the reference code's default. Identity."""
    nn.init.kaiming_uniform_(down, a=math.sqrt(5), generator=generator)
    up.zero_()


@torch.no_grad()
def random(down: Tensor, up: Tensor, generator: torch.Generator | None = None) -> None:
    """Both kaiming uniform: PEFT's `init_lora_weights=False`. Not the identity: for tests and debugging."""
    nn.init.kaiming_uniform_(down, a=math.sqrt(5), generator=generator)
    nn.init.kaiming_uniform_(up, a=math.sqrt(5), generator=generator)


INITIALISERS: dict[str, Callable[[Tensor, Tensor, torch.Generator | None], None]] = {
    "gaussian": gaussian,
    "kaiming": kaiming,
    "random": random,
}


def begin(site: Site, *, rank: int, scale: float) -> tuple[Tensor, Tensor]:
    """-> fp32 down (r, in[, k, k]) and up (out, r[, 1, 1]) on the layer's device, by the config's `init`.

    `scale` is the s of ΔW = s B A, and `site.original()` the weight, for beginnings that depend on them; it is
    read only by those, since it may have to be brought from a host or dequantised.
    """
    out, *inner = site.shape
    down = torch.empty(rank, *inner, device=site.device)
    up = torch.empty(out, rank, *[1] * (len(inner) - 1), device=site.device)
    INITIALISERS[site.config.init](down, up, site.generator)
    return down, up
