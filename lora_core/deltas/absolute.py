"""A weight that is given whole: W' itself, not its change (PEFT's `modules_to_save`, ComfyUI's `set_weight`)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from lora_core import algebra
from lora_core.deltas import Delta
from lora_core.deltas.shapes import compatible


@dataclass(frozen=True, eq=False)
class Absolute:
    """W' = `value`, of the weight's shape, and on it what `inner` changes of it: PEFT saves a table of words that has
    a LoRA of its own whole. The user's weight interpolates between the base's W and W', as everywhere."""

    needs_original: ClassVar[bool] = True

    value: Tensor
    inner: Delta | None = None

    def shape(self) -> tuple[int, ...]:
        return tuple(int(n) for n in self.value.shape)

    def fits(self, weight: tuple[int, ...]) -> bool:
        return compatible(self.shape(), weight) and (self.inner is None or self.inner.fits(weight))

    def delta(self, original: Tensor) -> Tensor:
        change = algebra.change_to(original, self.value)
        return change if self.inner is None else change + self.inner.delta(self.value.reshape(original.shape))

    def low_rank_form(self) -> None:
        """None: there are no factors."""

    def tensors(self) -> dict[str, Tensor]:
        return {**({} if self.inner is None else self.inner.tensors()), "value": self.value}

    def to(self, *, dtype: torch.dtype | None = None, device: torch.device | None = None) -> Absolute:
        inner = None if self.inner is None else self.inner.to(dtype=dtype, device=device)
        return replace(self, value=self.value.to(device, dtype), inner=inner)
