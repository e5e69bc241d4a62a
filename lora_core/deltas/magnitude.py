"""DoRA (arXiv 2402.09353): a magnitude around any other delta. W' = m · V/|V|, V = W + inner ΔW."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from lora_core import algebra
from lora_core.deltas import Delta, Factored


@dataclass(frozen=True, eq=False)
class WithMagnitude:
    """`magnitude` keeps the shape it was written with: its axis is read from it (see algebra.magnitude_axis)."""

    needs_original: ClassVar[bool] = True

    inner: Delta
    magnitude: Tensor

    @property
    def rank(self) -> int:
        """Of what is inside. TypeError if that has no factors."""
        return _factored(self.inner).rank

    @property
    def alpha(self) -> float:
        return _factored(self.inner).alpha

    def shape(self) -> tuple[int, ...]:
        return self.inner.shape()

    def fits(self, weight: tuple[int, ...]) -> bool:
        return self.inner.fits(weight)

    def delta(self, original: Tensor) -> Tensor:
        return algebra.dora_delta(original, self.inner.delta(original), self.magnitude)

    def low_rank_form(self) -> None:
        """None: the norm of V takes the original weight. `inner` may have a form."""

    def tensors(self) -> dict[str, Tensor]:
        return {**self.inner.tensors(), "magnitude": self.magnitude}

    def to(self, *, dtype: torch.dtype | None = None, device: torch.device | None = None) -> WithMagnitude:
        return replace(
            self, inner=self.inner.to(dtype=dtype, device=device), magnitude=self.magnitude.to(device, dtype)
        )


def _factored(delta: Delta) -> Factored:
    if not isinstance(delta, Factored):
        raise TypeError(f"a {type(delta).__name__} has no rank")
    return delta
