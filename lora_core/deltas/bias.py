"""A change of the layer's bias beside that of its weight, or alone (kohya's and LyCORIS' `diff_b`)."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lora_core.deltas import Delta


@dataclass(frozen=True, eq=False)
class WithBias:
    """b' = b + `bias`, (out,); `inner` changes the weight, None leaves it alone. Outermost of the modifiers: a
    magnitude is of the weight, so DoRA with a bias is WithBias(WithMagnitude(...))."""

    inner: Delta | None
    bias: Tensor

    def __post_init__(self) -> None:
        if self.bias.dim() != 1:
            raise ValueError(
                f"a bias of shape {tuple(self.bias.shape)} was found where one number per output was expected"
            )

    @property
    def needs_original(self) -> bool:
        return self.inner is not None and self.inner.needs_original

    def shape(self) -> tuple[int, ...]:
        """(out,) where the bias is all there is: no more is told."""
        return (int(self.bias.shape[0]),) if self.inner is None else self.inner.shape()

    def fits(self, weight: tuple[int, ...]) -> bool:
        return len(self.bias) == weight[0] and (self.inner is None or self.inner.fits(weight))

    def delta(self, original: Tensor) -> Tensor:
        """Of the weight."""
        if self.inner is None:
            return torch.zeros(original.shape, dtype=torch.float32, device=original.device)
        return self.inner.delta(original)

    def low_rank_form(self) -> tuple[Tensor, Tensor] | None:
        return None if self.inner is None else self.inner.low_rank_form()

    def tensors(self) -> dict[str, Tensor]:
        return {**({} if self.inner is None else self.inner.tensors()), "diff_b": self.bias}

    def to(self, *, dtype: torch.dtype | None = None, device: torch.device | None = None) -> WithBias:
        inner = None if self.inner is None else self.inner.to(dtype=dtype, device=device)
        return replace(self, inner=inner, bias=self.bias.to(device, dtype))
