"""LoHa: ΔW = alpha/rank · (W1a W1b) ⊙ (W2a W2b), for Linear and Conv2d (arXiv 2108.06098, 2309.14859)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lora_core import algebra
from lora_core.deltas.products import check_product, product_shape
from lora_core.deltas.shapes import same_size

_FACTORS = ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")


@dataclass(frozen=True, eq=False)
class Hadamard:
    """w1_a and w2_a (out, r), w1_b and w2_b (r, in[, k, k]); or, with the Tucker cores t1 and t2 (r, r, k, k),
    w1_a and w2_a (r, out), w1_b and w2_b (r, in).

    LyCORIS stores a convolution's b as (r, in·k·k): taken as well, and `shape` then tells no more than that.
    Raises ValueError for factors that do not go together.
    """

    needs_original: ClassVar[bool] = False

    w1_a: Tensor
    w1_b: Tensor
    w2_a: Tensor
    w2_b: Tensor
    alpha: float
    t1: Tensor | None = None
    t2: Tensor | None = None

    def __post_init__(self) -> None:
        if (self.t1 is None) != (self.t2 is None):
            raise ValueError("a Tucker core of one half was found where both or none were expected")
        for a, b, core in self._halves():
            check_product(a, b, core)
        first, second = (product_shape(*half) for half in self._halves())
        if first != second:
            raise ValueError(
                f"halves of shape {first} and {second} were found where two of the same shape were expected"
            )

    @property
    def rank(self) -> int:
        return int(self.w1_b.shape[0])

    @property
    def scale(self) -> float:
        return algebra.lora_scale(alpha=self.alpha, rank=self.rank)

    def shape(self) -> tuple[int, ...]:
        return product_shape(self.w1_a, self.w1_b, self.t1)

    def fits(self, weight: tuple[int, ...]) -> bool:
        return same_size(self.shape(), weight)

    def delta(self, original: Tensor) -> Tensor:
        whole = algebra.hadamard(
            self.w1_a, self.w1_b, self.w2_a, self.w2_b, self.t1, self.t2, scale=self.scale
        )
        return whole.reshape(original.shape)

    def low_rank_form(self) -> tuple[Tensor, Tensor] | None:
        """Rank r1·r2: the Khatri-Rao product of the two halves."""
        out, *inner = self.shape()
        columns = torch.Size(inner).numel()
        if int(self.w1_b.shape[0] * self.w2_b.shape[0]) * (out + columns) >= out * columns:
            return None
        first, second = (algebra.down_and_up(*half) for half in self._halves())
        return algebra.khatri_rao(first, second, scale=self.scale)

    def tensors(self) -> dict[str, Tensor]:
        found = {name: getattr(self, name) for name in _FACTORS if getattr(self, name) is not None}
        return {**found, "alpha": torch.tensor(float(self.alpha))}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> Hadamard:
        factors = {name: tensors[name] for name in _FACTORS if name in tensors}
        return cls(**factors, alpha=float(tensors["alpha"]))

    def to(self, *, dtype: torch.dtype | None = None, device: torch.device | None = None) -> Hadamard:
        factors = {n: t.to(device, dtype) for n, t in self.tensors().items() if n in _FACTORS}
        return Hadamard(**factors, alpha=self.alpha)

    def _halves(self) -> tuple[tuple[Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor, Tensor | None]]:
        return (self.w1_a, self.w1_b, self.t1), (self.w2_a, self.w2_b, self.t2)
