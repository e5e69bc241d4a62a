"""Beginnings taken from the base's own weight: PiSSA (arXiv 2404.02948), OLoRA (2406.01775), LoftQ (2310.08659).

    W = s B0 A0 + residual        the residual stays in the base, A and B begin as A0 and B0

Pure functions: a weight W (out, in[, k, k]) in, fp32 down A0 (r, in[, k, k]) and up B0 (out, r[, 1, 1]) out. A
convolution is the matrix (out, in*k*k). `scale` is the s of ΔW = s B A: it is divided out, so that s B0 A0 is the part
of W whatever alpha is. PEFT does so for PiSSA and OLoRA, and forgets it for LoftQ, which is right there at alpha =
rank alone.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lora_core import algebra
from lora_core.errors import ConfigError


@torch.no_grad()
def pissa(
    weight: Tensor,
    *,
    rank: int,
    scale: float,
    iterations: int | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """The top-r part of the SVD, its square roots on both sides.

    `iterations` None is the full SVD; a number is the randomised one with so many power iterations: 4 are close, 16
    hardly differ (1280 x 1280, rank 16, one core: 2.2 s in full, 0.05 s with 4, 0.16 s with 16). Its random directions
    are the global generator's, or `generator`'s.
    """
    matrix = algebra.flat(weight)
    _refuse_rank("pissa", rank, weight, matrix)
    if iterations is None:
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    else:
        with torch.random.fork_rng(
            [] if matrix.device.type != "cuda" else [matrix.device], enabled=generator is not None
        ):
            if generator is not None:
                torch.manual_seed(int(torch.randint(2**62, (), generator=generator, device=generator.device)))
            left, values, right = torch.svd_lowrank(matrix, q=rank, niter=iterations)
            right = right.T
    return _split(left, values / scale, right, weight, rank)


@torch.no_grad()
def olora(weight: Tensor, *, rank: int, scale: float) -> tuple[Tensor, Tensor]:
    """r rows of R and r columns of Q of the QR decomposition. As in PEFT, s is not divided out here: s B0 A0 is s times
    that part of W, and the residual is what is left of W all the same."""
    matrix = algebra.flat(weight)
    _refuse_rank("olora", rank, weight, matrix)
    q, r = torch.linalg.qr(matrix)
    return _shaped(r[:rank], q[:, :rank], weight)


@torch.no_grad()
def loftq(
    weight: Tensor, stored: Callable[[Tensor], Tensor], *, rank: int, scale: float, iterations: int = 1
) -> tuple[Tensor, Tensor, Tensor]:
    """Q and s B0 A0 with Q + s B0 A0 near W, by turns: Q is W - s B0 A0 rounded, then B0 A0 the SVD of W - Q.

    `stored` gives what a weight is after it was kept in fewer bits. -> A0, B0, and what is to be kept (not rounded).
    """
    matrix = algebra.flat(weight)
    _refuse_rank("loftq", rank, weight, matrix)
    kept = weight.float()
    for turn in range(iterations):
        left, values, right = torch.linalg.svd(matrix - algebra.flat(stored(kept)), full_matrices=False)
        down, up = _split(left, values / scale, right, weight, rank)
        if turn + 1 < iterations:
            kept = residual(weight, down, up, scale=scale)
    return down, up, kept


def residual(weight: Tensor, down: Tensor, up: Tensor, *, scale: float) -> Tensor:
    """W - s B0 A0, fp32, of W's shape."""
    return weight.float() - algebra.low_rank(down, up, scale=scale).reshape(weight.shape)


def _split(left: Tensor, values: Tensor, right: Tensor, weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    root = values[:rank].sqrt()
    return _shaped(root[:, None] * right[:rank], left[:, :rank] * root, weight)


def _shaped(down: Tensor, up: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    out, *inner = weight.shape
    return (
        down.reshape(-1, *inner).contiguous(),
        up.reshape(out, -1, *[1] * (len(inner) - 1)).contiguous(),
    )


def _refuse_rank(init: str, rank: int, weight: Tensor, matrix: Tensor) -> None:
    if rank > min(matrix.shape):
        raise ConfigError(
            f"rank = {rank} is more than a layer of {' x '.join(map(str, weight.shape))} has ({min(matrix.shape)}): "
            f'init = "{init}" has no more parts to begin from. Lower rank, or exclude the layer.'
        )
