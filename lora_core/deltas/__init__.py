"""What a LoRA adds to one weight, by kind. alpha/rank is applied inside, the user's weight outside."""

from __future__ import annotations

from typing import Protocol, cast, runtime_checkable

import torch
from torch import Tensor


@runtime_checkable
class Delta(Protocol):
    """The change of one weight."""

    @property
    def needs_original(self) -> bool:
        """Whether ΔW depends on the weight it changes: without the base it is then no matrix at all."""
        ...

    def delta(self, original: Tensor) -> Tensor:
        """ΔW, fp32, of `original`'s shape. `original` is the untouched base weight."""
        ...

    def tensors(self) -> dict[str, Tensor]:
        """The stored tensors under their native names."""
        ...

    def shape(self) -> tuple[int, ...]:
        """The shape of the weight this belongs to, as far as the factors tell: (out, in) or (out, in, k, k).

        -1 stands for a side they do not tell; (out,) alone also for a weight of more dimensions, where they tell no
        more (OFT, a row scale, a bias). `fits` knows which.
        """
        ...

    def fits(self, weight: tuple[int, ...]) -> bool:
        """Whether a weight of this shape can be changed by it."""
        ...

    def low_rank_form(self) -> tuple[Tensor, Tensor] | None:
        """down (r, in[, k, k]), as stored, and fp32 up (out, r), the scale folded into it, with ΔW = up · down exactly.

        None where there is no such form smaller than the dense ΔW, or where ΔW needs the original weight. `down` has
        the dimensions that `shape` tells: reshape it to (r, *weight.shape[1:]).
        """
        ...

    def to(self, *, dtype: torch.dtype | None = None, device: torch.device | None = None) -> Delta: ...


@runtime_checkable
class Factored(Delta, Protocol):
    """A change made of factors that share a rank, with the scale alpha/rank."""

    @property
    def rank(self) -> int: ...

    @property
    def alpha(self) -> float: ...


def factored(delta: Delta) -> Factored | None:
    """`delta`, if it is one. Asked of each class once: a Protocol with properties takes long to answer."""
    kind = type(delta)
    if kind not in _FACTORED:
        _FACTORED[kind] = isinstance(delta, Factored)
    return cast(Factored, delta) if _FACTORED[kind] else None


_FACTORED: dict[type, bool] = {}
