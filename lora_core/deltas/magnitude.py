"""DoRA (arXiv 2402.09353): a magnitude around any other delta. W' = m · V/|V|, V = W + inner ΔW."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lora_core import algebra
from lora_core.deltas.low_rank import LowRank


@dataclass(frozen=True, eq=False)
class WithMagnitude:
    """`magnitude` keeps the shape it was written with: its axis is read from it (see algebra.magnitude_axis)."""

    inner: LowRank
    magnitude: Tensor

    @property
    def rank(self) -> int:
        return self.inner.rank

    @property
    def alpha(self) -> float:
        return self.inner.alpha

    def shape(self) -> tuple[int, ...]:
        return self.inner.shape()

    def delta(self, original: Tensor) -> Tensor:
        return algebra.dora_delta(original, self.inner.delta(original), self.magnitude)

    def tensors(self) -> dict[str, Tensor]:
        return {**self.inner.tensors(), "magnitude": self.magnitude}

    def to(self, *, dtype: torch.dtype | None = None, device: torch.device | None = None) -> WithMagnitude:
        return replace(
            self, inner=self.inner.to(dtype=dtype, device=device), magnitude=self.magnitude.to(device, dtype)
        )
