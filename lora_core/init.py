"""How A and B begin. Each function fills both in place; the identity at step 0 where it says so."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn


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
