"""A change of a weight as the best factors of a lower rank, and what that loses."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from lora_core.deltas.low_rank import LowRank
from lora_core.errors import ConfigError

LOST = "lora_loom.lost"  # metadata: |ΔW - what is left of it| / |ΔW|, over all layers
LEFT_OUT = "lora_loom.left_out"  # metadata: JSON, names of what is not in the LoRA
LARGE = 256  # smaller side from which a whole SVD takes longer than looking for its largest part alone
OVERSAMPLED = 16  # directions looked at beyond the rank asked for (Halko et al., arXiv 0909.4061)
SETTLED = 1e-4  # the search ends when a round adds less than this share to what the factors hold
ROUNDS = 24  # at most; a flat spectrum of 1280 settles in 10, what is of low rank in 2


class Lost:
    """What a lower rank (and a clamp) left out, over all layers; to first order where both did."""

    def __init__(self) -> None:
        self.all = self.gone = 0.0

    def add(self, whole: Tensor | float, gone: Tensor | float) -> None:
        """Squared norms of one layer."""
        self.all += float(whole)
        self.gone += float(gone)

    @property
    def share(self) -> float:
        return (self.gone / self.all) ** 0.5 if self.all else 0.0


def check_rank(rank: int | None, energy: float | None, clamp: float | None = None) -> None:
    """Raise ConfigError, naming the field, unless exactly one of rank and energy is given and all are in range."""
    if (rank is None) == (energy is None):
        raise ConfigError(
            "Give either rank or energy: the one is a number of slots, the other a share to keep."
        )
    if rank is not None and rank < 1:
        raise ConfigError(f"rank = {rank} must be 1 or more.")
    if energy is not None and not 0 < energy <= 1:
        raise ConfigError(f"energy = {energy} is a share to keep: above 0 to 1. Usual is 0.95.")
    if clamp is not None and not 0 < clamp <= 1:
        raise ConfigError(f"clamp = {clamp} is a quantile: above 0 to 1. Usual is 0.99.")


def svd(dense: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """dense (m, n) -> Vᵀ (K, n), U S (m, K), S (K), K = min(m, n), the largest singular value first."""
    u, values, vh = torch.linalg.svd(dense, full_matrices=False)
    return vh, u * values, values


def best_factors(
    dense: Tensor, *, rank: int | None = None, energy: float | None = None
) -> tuple[Tensor, Tensor]:
    """dense (m, n) fp32 -> down (r, n), up (m, r), whose product is the nearest to it of that rank, or of the smallest
    rank that holds this share of |dense|².

    Large matrices are not decomposed as a whole. For a rank, subspace iteration on rank + 16 directions, until it
    settles: what it leaves out is at most 1.005 times what the best leaves out (measured on flat spectra, where it is
    worst), in a tenth of the time. For an energy, the eigenvalues of the smaller Gram matrix in float64.
    """
    m, n = dense.shape
    if rank is None:
        down, up, values = svd(dense) if min(m, n) < LARGE else _by_gram(dense)
        assert energy is not None
        rank = rank_of(values, energy)
    elif min(m, n) < max(LARGE, 2 * (rank + OVERSAMPLED)):
        down, up, _ = svd(dense)
    else:
        down, up = _by_search(dense, rank)
    return down[:rank], up[:, :rank]


def _by_search(dense: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    drawn = torch.randn(  # the same for every run
        dense.shape[1], rank + OVERSAMPLED, generator=torch.Generator().manual_seed(0)
    )
    right, held = drawn.to(dense), 0.0
    for _ in range(ROUNDS):
        left = torch.linalg.qr(dense @ right).Q
        right = torch.linalg.qr(dense.T @ left).Q
        u, values, vh = torch.linalg.svd(dense @ right, full_matrices=False)
        before, held = held, float(values[:rank].square().sum())
        if held - before <= SETTLED * held:
            break
    return vh @ right.T, u * values


def _by_gram(dense: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """All of them, in the order of `svd`: dense · denseᵀ or denseᵀ · dense, whichever is smaller."""
    wide = dense.cpu().double() if dense.device.type == "mps" else dense.double()  # mps has no float64
    tall = wide.shape[0] >= wide.shape[1]
    squares, vectors = torch.linalg.eigh(wide.T @ wide if tall else wide @ wide.T)
    values, vectors = squares.flip(0).clamp(min=0).sqrt(), vectors.flip(1)
    down, up = (vectors.T, wide @ vectors) if tall else (vectors.T @ wide, vectors)
    return down.to(dense), up.to(dense), values.to(dense)


def rank_of(values: Tensor, energy: float) -> int:
    """The smallest number of singular values (largest first) that hold this share of the sum of their squares."""
    shares = values.double().square().cumsum(0)
    return min(int((shares < energy * shares[-1] * (1 - 1e-12)).sum()) + 1, len(values))


def clamped(down: Tensor, up: Tensor, quantile: float) -> tuple[Tensor, Tensor]:
    """Every entry within ± this quantile of the entries of both, as PEFT has it."""
    entries = torch.cat([up.flatten(), down.flatten()]).cpu().numpy()
    most = float(np.quantile(entries, quantile))
    return down.clamp(-most, most), up.clamp(-most, most)


def held(down: Tensor, up: Tensor, clamp: float | None, sums: Lost) -> tuple[Tensor, Tensor]:
    """Flat factors, clamped where that is asked for; what it takes from their product is added to `sums`."""
    if clamp is None:
        return down, up
    within = clamped(down, up, clamp)
    sums.add(0, (up @ down - within[1] @ within[0]).square().sum())
    return within


def low_rank(down: Tensor, up: Tensor, shape: Sequence[int], dtype: torch.dtype) -> LowRank:
    """Flat factors, down (r, in*k*k) and up (out, r), as a layer of this weight shape has them; scale 1."""
    down = down.reshape(-1, *shape[1:]).to(dtype).contiguous()
    up = up.reshape(len(up), -1, *[1] * (len(shape) - 2)).to(dtype).contiguous()
    return LowRank(down, up, float(len(down)))
