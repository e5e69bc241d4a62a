"""(IA)³: a factor for each output row or each input column, W' = W ∘ (1 + v) (arXiv 2205.05638)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from lora_core import algebra


@dataclass(frozen=True, eq=False)
class Scaling:
    """`vector` v, (n,) or as LyCORIS stores a convolution's (1, n, 1, 1): n inputs, or n outputs.

    The paper's own l is 1 + v (PEFT stores that). Raises ValueError for a tensor that is no vector.
    """

    needs_original: ClassVar[bool] = True

    vector: Tensor
    on_input: bool

    def __post_init__(self) -> None:
        if self.vector.dim() not in (1, 4) or self.vector.numel() != max((0, *self.vector.shape)):
            raise ValueError(
                f"a tensor of shape {tuple(self.vector.shape)} was found where (n,) or (1, n, 1, 1) was expected"
            )

    def shape(self) -> tuple[int, ...]:
        n, convolution = self.vector.numel(), self.vector.dim() == 4
        if self.on_input:
            return (-1, n, -1, -1) if convolution else (-1, n)
        return (n, -1, -1, -1) if convolution else (n,)

    def fits(self, weight: tuple[int, ...]) -> bool:
        return len(weight) in (2, 4) and weight[int(self.on_input)] == self.vector.numel()

    def delta(self, original: Tensor) -> Tensor:
        return algebra.channel_scale(original, self.vector, on_input=self.on_input)

    def scale_form(self) -> tuple[Tensor, bool]:
        """fp32 v (n,), and whether it is the inputs that it scales: W' x = W x + v ∘ (W x), or W x + W (v ∘ x)."""
        return self.vector.float().reshape(-1), self.on_input

    def low_rank_form(self) -> None:
        """None: a scale has the rank of the weight."""

    def tensors(self) -> dict[str, Tensor]:
        return {"vector": self.vector, "on_input": torch.tensor(int(self.on_input))}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> Scaling:
        return cls(tensors["vector"], bool(tensors["on_input"]))

    def to(self, *, dtype: torch.dtype | None = None, device: torch.device | None = None) -> Scaling:
        return replace(self, vector=self.vector.to(device, dtype))
