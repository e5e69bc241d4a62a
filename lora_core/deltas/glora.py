"""GLoRA: ΔW = alpha/rank · (W·a1·a2 + b1·b2), what LyCORIS trains of it (arXiv 2306.07967)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lora_core import algebra
from lora_core.deltas.shapes import same_size

_FACTORS = ("a1", "a2", "b1", "b2")


@dataclass(frozen=True, eq=False)
class Generalized:
    """a1 (in, r[, 1, 1]), a2 (r, in[, 1, 1]), b1 (out, r[, 1, 1]), b2 (r, in[, k, k]).

    Raises ValueError for factors that do not go together.
    """

    needs_original: ClassVar[bool] = True

    a1: Tensor
    a2: Tensor
    b1: Tensor
    b2: Tensor
    alpha: float

    def __post_init__(self) -> None:
        shapes = {name: tuple(getattr(self, name).shape) for name in _FACTORS}
        dims = {len(shape) for shape in shapes.values()}
        thin = all(shapes[name][2:] in ((), (1, 1)) for name in ("a1", "a2", "b1"))
        if not (dims <= {2, 4} and len(dims) == 1 and thin and self._agree()):
            raise ValueError(
                f"factors of shape {', '.join(map(str, shapes.values()))} were found where (in, r), (r, in), (out, r) "
                "and (r, in[, k, k]) were expected"
            )

    def _agree(self) -> bool:
        rank, width = self.b2.shape[:2]
        return (
            min(self.b2.shape) > 0
            and self.a1.shape[:2] == (width, rank)
            and self.a2.shape[:2] == (rank, width)
            and self.b1.shape[1] == rank
        )

    @property
    def rank(self) -> int:
        return int(self.b2.shape[0])

    @property
    def scale(self) -> float:
        return algebra.lora_scale(alpha=self.alpha, rank=self.rank)

    def shape(self) -> tuple[int, ...]:
        return (int(self.b1.shape[0]), *(int(n) for n in self.b2.shape[1:]))

    def fits(self, weight: tuple[int, ...]) -> bool:
        return same_size(self.shape(), weight) and weight[1] == self.b2.shape[1]

    def delta(self, original: Tensor) -> Tensor:
        return algebra.glora(original, (self.a1, self.a2), (self.b1, self.b2), scale=self.scale)

    def low_rank_form(self) -> None:
        """None: one half of it is made of the weight. See `form_on`."""

    def form_on(self, original: Tensor) -> tuple[Tensor, Tensor] | None:
        """`low_rank_form` with the original weight given: rank 2r for a matrix, r (k·k + 1) for a kernel."""
        places, columns = original[0, 0].numel(), original[0].numel()
        if self.rank * (places + 1) * (len(original) + columns) >= original.numel():
            return None
        return algebra.glora_factors(original, (self.a1, self.a2), (self.b1, self.b2), scale=self.scale)

    def tensors(self) -> dict[str, Tensor]:
        return {
            **{name: getattr(self, name) for name in _FACTORS},
            "alpha": torch.tensor(float(self.alpha)),
        }

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> Generalized:
        return cls(**{name: tensors[name] for name in _FACTORS}, alpha=float(tensors["alpha"]))

    def to(self, *, dtype: torch.dtype | None = None, device: torch.device | None = None) -> Generalized:
        factors = {name: getattr(self, name).to(device, dtype) for name in _FACTORS}
        return Generalized(**factors, alpha=self.alpha)
