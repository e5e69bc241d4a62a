"""LoRA and LoCon: ΔW = alpha/rank · B A, for Linear and Conv2d (arXiv 2106.09685)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from lora_core import algebra
from lora_core.deltas.shapes import same_size


@dataclass(frozen=True, eq=False)
class LowRank:
    """down (r, in[, k, k]), up (out, r[, 1, 1]); a Tucker file's core is composed into `down` when read."""

    needs_original: ClassVar[bool] = False

    down: Tensor
    up: Tensor
    alpha: float

    def __post_init__(self) -> None:
        if self.down.dim() != self.up.dim() or self.up.shape[1] != self.down.shape[0]:
            raise ValueError(
                f"down {tuple(self.down.shape)} and up {tuple(self.up.shape)} do not share a rank"
            )

    @property
    def rank(self) -> int:
        return int(self.down.shape[0])

    @property
    def scale(self) -> float:
        return algebra.lora_scale(alpha=self.alpha, rank=self.rank)

    def shape(self) -> tuple[int, ...]:
        return (int(self.up.shape[0]), *(int(n) for n in self.down.shape[1:]))

    def fits(self, weight: tuple[int, ...]) -> bool:
        return same_size(self.shape(), weight)

    def delta(self, original: Tensor) -> Tensor:
        return algebra.low_rank(self.down, self.up, scale=self.scale).reshape(original.shape)

    def low_rank_form(self) -> tuple[Tensor, Tensor]:
        return self.down, algebra.flat(self.up) * self.scale

    def tensors(self) -> dict[str, Tensor]:
        return {"down": self.down, "up": self.up, "alpha": torch.tensor(float(self.alpha))}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> LowRank:
        return cls(tensors["down"], tensors["up"], float(tensors["alpha"]))

    def to(self, *, dtype: torch.dtype | None = None, device: torch.device | None = None) -> LowRank:
        return replace(self, down=self.down.to(device, dtype), up=self.up.to(device, dtype))
