"""What a LoRA adds to one weight, by kind. alpha/rank is applied inside, the user's weight outside."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch
from torch import Tensor


@runtime_checkable
class Delta(Protocol):
    """The change of one weight."""

    def delta(self, original: Tensor) -> Tensor:
        """ΔW, fp32, of `original`'s shape. `original` is the untouched base weight."""
        ...

    def tensors(self) -> dict[str, Tensor]:
        """The stored tensors under their native names."""
        ...

    def shape(self) -> tuple[int, ...]:
        """The shape of the weight this belongs to, as far as the factors tell: (out, in) or (out, in, k, k)."""
        ...

    def to(self, *, dtype: torch.dtype | None = None, device: torch.device | None = None) -> Delta: ...
