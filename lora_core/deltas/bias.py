"""A change of the layer's bias beside that of its weight, or alone (kohya's and LyCORIS' `diff_b`, PEFT's biases)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from lora_core import algebra
from lora_core.deltas import Delta

Of = Literal["change", "value", "factor"]


@dataclass(frozen=True, eq=False)
class WithBias:
    """`inner` changes the weight, None leaves it alone. Outermost of the modifiers: a magnitude is of the weight, so
    DoRA with a bias is WithBias(WithMagnitude(...)).

    bias    (out,): the change, b' = b + `bias`; or a "value", b' = `bias`; or a "factor", b' = b ∘ (1 + `bias`)
    """

    inner: Delta | None
    bias: Tensor
    of: Of = "change"

    def __post_init__(self) -> None:
        if self.bias.dim() != 1:
            raise ValueError(
                f"a bias of shape {tuple(self.bias.shape)} was found where one number per output was expected"
            )

    @property
    def needs_original(self) -> bool:
        return self.of != "change" or (self.inner is not None and self.inner.needs_original)

    def shape(self) -> tuple[int, ...]:
        """(out,) where the bias is all there is: no more is told."""
        return (int(self.bias.shape[0]),) if self.inner is None else self.inner.shape()

    def fits(self, weight: tuple[int, ...]) -> bool:
        return len(self.bias) == weight[0] and (self.inner is None or self.inner.fits(weight))

    def acts(self, *, has_bias: bool) -> bool:
        """Whether there is a bias to change, in a layer that has one or none: a factor of none is none."""
        return self.of != "factor" or has_bias

    def bias_change(self, original: Tensor | None) -> Tensor | None:
        """b' - b, (out,), for the untouched bias of the base; None where there is nothing to change."""
        if self.of == "change":
            return self.bias
        if self.of == "value":
            return self.bias if original is None else algebra.change_to(original, self.bias)
        return None if original is None else algebra.channel_scale(original, self.bias, on_input=False)

    def delta(self, original: Tensor) -> Tensor:
        """Of the weight."""
        if self.inner is None:
            return torch.zeros(original.shape, dtype=torch.float32, device=original.device)
        return self.inner.delta(original)

    def low_rank_form(self) -> tuple[Tensor, Tensor] | None:
        return None if self.inner is None else self.inner.low_rank_form()

    def tensors(self) -> dict[str, Tensor]:
        name = {"change": "diff_b", "value": "bias", "factor": "scale_b"}[self.of]
        return {**({} if self.inner is None else self.inner.tensors()), name: self.bias}

    def to(self, *, dtype: torch.dtype | None = None, device: torch.device | None = None) -> WithBias:
        inner = None if self.inner is None else self.inner.to(dtype=dtype, device=device)
        return replace(self, inner=inner, bias=self.bias.to(device, dtype))
