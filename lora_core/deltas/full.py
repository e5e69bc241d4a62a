"""A whole change: ΔW as it is, for a layer trained without factors (kohya's and LyCORIS' `diff`)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from lora_core.deltas.shapes import compatible


@dataclass(frozen=True, eq=False)
class Full:
    """`change` of the weight's own shape: a linear layer's, a convolution's, an embedding's or a norm's (out,)."""

    needs_original: ClassVar[bool] = False

    change: Tensor

    def shape(self) -> tuple[int, ...]:
        return tuple(int(n) for n in self.change.shape)

    def fits(self, weight: tuple[int, ...]) -> bool:
        return compatible(self.shape(), weight)

    def delta(self, original: Tensor) -> Tensor:
        return self.change.float().reshape(original.shape)

    def low_rank_form(self) -> None:
        """None: there are no factors."""

    def tensors(self) -> dict[str, Tensor]:
        return {"diff": self.change}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> Full:
        return cls(tensors["diff"])

    def to(self, *, dtype: torch.dtype | None = None, device: torch.device | None = None) -> Full:
        return replace(self, change=self.change.to(device, dtype))
