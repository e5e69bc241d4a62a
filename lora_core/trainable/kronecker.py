"""LoKr in training (arXiv 2309.14859): ΔW = s W1 ⊗ W2, for linear layers and convolutions."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lora_core import algebra
from lora_core.deltas import Delta
from lora_core.deltas.kronecker import Kronecker
from lora_core.errors import ConfigError
from lora_core.init import lokr
from lora_core.terms import Kron
from lora_core.trainable import Factors, Site, on_cpu
from lora_core.trainable.low_rank import another_kind


class TrainableKronecker(Factors):
    """w1 (out1, in1), whole or as a pair of `rank`; w2 (out2, in2[, k, k]), whole or as a pair.

    W1 is the smaller; out1 and in1 are the divisors that `factor` asks for. As in LyCORIS a side is a pair where that
    is smaller (rank below half its longer side) and, for W1, where `decompose_both` asks for it. Two whole sides have
    scale 1, whatever alpha says.
    """

    def __init__(self, site: Site) -> None:
        super().__init__(site)
        w1, w2 = lokr(site, *sides(site))
        self.w1, self.w2 = nn.ParameterList(w1), nn.ParameterList(w2)

    @staticmethod
    def trains(site: Site) -> bool:
        return site.config.kind == "lokr" and not site.is_embedding

    def change(self, x: Tensor) -> Tensor:
        c, d = self._form()
        return Kron(c, d).term(self.site.layer, x, x)

    def row_norms(self, weight: Tensor, n0: Tensor) -> Tensor:
        return algebra.kronecker_row_norms(weight, *self._form(), n0=n0)

    def collect(self) -> Delta:
        return Kronecker(
            tuple(on_cpu(t) for t in self.w1), tuple(on_cpu(t) for t in self.w2), self.site.stored_alpha
        )

    @torch.no_grad()
    def load(self, delta: Delta) -> None:
        """The factors must be of the same sizes: no other split has the same ΔW."""
        if not isinstance(delta, Kronecker):
            raise another_kind(self.site, delta)
        pairs = list(zip((*self.w1, *self.w2), (*delta.w1, *delta.w2), strict=False))
        if (len(delta.w1), len(delta.w2)) != (len(self.w1), len(self.w2)) or any(
            own.numel() != found.numel() or own.shape[:1] != found.shape[:1] for own, found in pairs
        ):
            theirs, ours = (
                " and ".join(" x ".join(str(tuple(t.shape)) for t in side) for side in both)
                for both in ((delta.w1, delta.w2), (self.w1, self.w2))
            )
            raise ConfigError(
                f"{self.site.path}: the file to start from has factors {theirs}, this training {ours}. Set rank, "
                "factor and decompose_both as they were for the file."
            )
        for own, found in pairs:
            own.copy_(found.reshape(own.shape))
        self.w1[0].mul_(delta.scale / self._scale)

    @property
    def _scale(self) -> float:
        return 1.0 if len(self.w1) == len(self.w2) == 1 else self.site.scale

    def _form(self) -> tuple[Tensor, Tensor]:
        """C (out1, in1) and D (out2, in2[, k, k]), the scale in C."""
        c, d = (
            side[0] if len(side) == 1 else algebra.low_rank(side[1], side[0], scale=1.0)
            for side in (self.w1, self.w2)
        )
        return self._scale * c, d


def sides(site: Site) -> tuple[tuple[tuple[int, ...], ...], tuple[tuple[int, ...], ...]]:
    """The shapes of W1's factors and of W2's: one where it is whole, two where it is a pair."""
    out, inn, *kernel = site.shape
    (out1, out2), (in1, in2) = split(out, site.config.factor), split(inn, site.config.factor)
    r = site.rank
    w1 = ((out1, r), (r, in1)) if site.config.decompose_both and 2 * r < max(out1, in1) else ((out1, in1),)
    w2 = ((out2, r), (r, in2, *kernel)) if 2 * r < max(out2, in2) else ((out2, in2, *kernel),)
    return w1, w2


def split(size: int, factor: int) -> tuple[int, int]:
    """size = small · large, LyCORIS' choice: `factor` itself where it divides, else the divisor of `size` next below
    it whose partner is nearest; -1 asks for the two nearest to each other.

    >>> split(320, 8), split(320, -1), split(250, 4), split(127, 16)
    ((8, 40), (16, 20), (2, 125), (1, 127))
    """
    if factor > 0 and size % factor == 0:
        small = factor
    else:
        limit = size if factor < 0 else factor
        small = max(d for d in range(1, int(size**0.5) + 1) if size % d == 0 and d <= limit)
    return min(small, size // small), max(small, size // small)
