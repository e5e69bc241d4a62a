"""How the factors begin: one function per kind, asked once per layer. The identity at step 0 where it says so."""

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


def begin(site: Site) -> tuple[Tensor, Tensor]:
    """-> fp32 down A (r, in[, k, k]) and up B (out, r[, 1, 1]) on the layer's device, by the config's `init`.

    `site.scale` is the s of ΔW = s B A, and `site.original()` the weight, for beginnings that depend on them; it is
    read only by those, since it may have to be brought from a host or dequantised.
    """
    out, *inner = site.shape
    down = torch.empty(site.rank, *inner, device=site.device)
    up = torch.empty(out, site.rank, *[1] * (len(inner) - 1), device=site.device)
    if site.is_embedding:
        embedding(down, up, site.generator, identity=site.config.init != "random")
    else:
        INITIALISERS[site.config.init](down, up, site.generator)
    return down, up


@torch.no_grad()
def embedding(down: Tensor, up: Tensor, generator: torch.Generator | None, *, identity: bool) -> None:
    """A = 0, B ~ N(0, 1): loralib's and PEFT's, whatever `init` says."""
    up.normal_(generator=generator)
    down.zero_() if identity else down.normal_(generator=generator)


@torch.no_grad()
def loha(site: Site) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> w1_a ~ N(0, 0.1), w1_b ~ N(0, 1), w2_a = 0, w2_b ~ N(0, 1): LyCORIS' beginning. w2_a ~ N(0, 0.1) for
    "random", which is not the identity."""
    out, *inner = site.shape
    a, b = (out, site.rank), (site.rank, *inner)
    w1_a, w1_b, w2_a, w2_b = (torch.empty(shape, device=site.device) for shape in (a, b, a, b))
    w1_a.normal_(std=0.1, generator=site.generator)
    w1_b.normal_(generator=site.generator)
    w2_a.normal_(std=0.1 if site.config.init == "random" else 0.0, generator=site.generator)
    w2_b.normal_(generator=site.generator)
    return w1_a, w1_b, w2_a, w2_b


Shapes = tuple[tuple[int, ...], ...]


@torch.no_grad()
def lokr(site: Site, w1_shapes: Shapes, w2_shapes: Shapes) -> tuple[list[Tensor], list[Tensor]]:
    """-> the factors of W1 and of W2, all kaiming uniform but the last of W2, which is 0: LyCORIS' beginning. "random"
    has no zero."""
    w1, w2 = (
        [torch.empty(shape, device=site.device) for shape in shapes] for shapes in (w1_shapes, w2_shapes)
    )
    for factor in (*w1, *w2):
        nn.init.kaiming_uniform_(factor, a=math.sqrt(5), generator=site.generator)
    if site.config.init != "random":
        w2[-1].zero_()
    return w1, w2
