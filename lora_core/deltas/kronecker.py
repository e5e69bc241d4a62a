"""LoKr: ΔW = alpha/rank · W1 ⊗ W2, for Linear and Conv2d (arXiv 2309.14859)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from lora_core import algebra
from lora_core.deltas.products import check_product, product_shape
from lora_core.deltas.shapes import same_size

_W1 = ("w1_a", "w1_b")
_W2 = ("w2_a", "w2_b", "t2")


@dataclass(frozen=True, eq=False)
class Kronecker:
    """w1 is whole, ((out1, in1),), or the pair (a (out1, r), b (r, in1)).
    w2 is whole, ((out2, in2[, k, k]),), or (a (out2, r), b (r, in2[, k, k])), or with a Tucker core
    (a (r, out2), b (r, in2), t (r, r, k, k)). The weight is (out1·out2, in1·in2[, k, k]).

    LyCORIS stores the b of a convolution's pair as (r, in2·k·k): taken as well, and `shape` then tells no more than
    that. Raises ValueError for factors that do not go together.
    """

    needs_original: ClassVar[bool] = False

    w1: tuple[Tensor, ...]
    w2: tuple[Tensor, ...]
    alpha: float

    def __post_init__(self) -> None:
        if len(self.w1) not in (1, 2) or len(self.w2) not in (1, 2, 3):
            raise ValueError(
                f"{len(self.w1)} and {len(self.w2)} factors were found where 1 or 2 and 1 to 3 were expected"
            )
        for factors, dims in ((self.w1, (2,)), (self.w2, (2, 4))):
            if len(factors) > 1:
                check_product(*factors)
            shape = _shape(factors)
            if len(shape) not in dims or 0 in shape:
                raise ValueError(
                    f"a factor of shape {shape} was found where {' or '.join(map(str, dims))} dimensions were expected"
                )
        # alpha is divided by one rank, and readers differ in whose: files have but one
        ranks = {int(factors[1].shape[0]) for factors in (self.w1, self.w2) if len(factors) > 1}
        if len(ranks) > 1:
            raise ValueError(f"ranks {sorted(ranks)} were found where one was expected")

    @property
    def rank(self) -> int:
        """1 where both factors are whole: none is split, and LyCORIS reads such a layer so too."""
        return next((int(f[1].shape[0]) for f in (self.w1, self.w2) if len(f) > 1), 1)

    @property
    def scale(self) -> float:
        """alpha/rank; 1 where both factors are whole, whatever alpha says."""
        whole = len(self.w1) == len(self.w2) == 1
        return 1.0 if whole else algebra.lora_scale(alpha=self.alpha, rank=self.rank)

    def shape(self) -> tuple[int, ...]:
        (out1, in1), (out2, in2, *spatial) = _shape(self.w1), _shape(self.w2)
        return (out1 * out2, in1 * in2, *spatial)

    def fits(self, weight: tuple[int, ...]) -> bool:
        return same_size(self.shape(), weight)

    def delta(self, original: Tensor) -> Tensor:
        return algebra.kronecker(*self.kron_form(), scale=1.0).reshape(original.shape)

    def low_rank_form(self) -> None:
        """None: a Kronecker product has the product of its factors' ranks. See kron_form."""

    def kron_form(self) -> tuple[Tensor, Tensor]:
        """fp32 C (out1, in1), D (out2, in2[, k, k]), the scale folded into C, with ΔW = C ⊗ D exactly.

        An input x, reshaped to X (in1, in2), becomes C · (X · Dᵀ) (out1, out2), without ΔW. Where `shape` has
        two dimensions and the layer is a convolution, reshape D to (out2, in2, k, k) first: as C has no
        kernel, k·k are the last digits of ΔW's columns whether the product is taken before or after.
        """
        return self.scale * _whole(self.w1), _whole(self.w2)

    def tensors(self) -> dict[str, Tensor]:
        return {
            **({"w1": self.w1[0]} if len(self.w1) == 1 else dict(zip(_W1, self.w1, strict=True))),
            **({"w2": self.w2[0]} if len(self.w2) == 1 else dict(zip(_W2, self.w2, strict=False))),
            "alpha": torch.tensor(float(self.alpha)),
        }

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> Kronecker:
        w1, w2 = (
            tuple(tensors[name] for name in (whole, *split) if name in tensors)
            for whole, split in (("w1", _W1), ("w2", _W2))
        )
        return cls(w1, w2, float(tensors["alpha"]))

    def to(self, *, dtype: torch.dtype | None = None, device: torch.device | None = None) -> Kronecker:
        w1, w2 = (tuple(t.to(device, dtype) for t in factors) for factors in (self.w1, self.w2))
        return replace(self, w1=w1, w2=w2)


def _shape(factors: tuple[Tensor, ...]) -> tuple[int, ...]:
    return tuple(int(n) for n in factors[0].shape) if len(factors) == 1 else product_shape(*factors)


def _whole(factors: tuple[Tensor, ...]) -> Tensor:
    """(out, in[, k, k]), fp32."""
    if len(factors) == 1:
        return factors[0].float()
    return algebra.low_rank(*algebra.down_and_up(*factors), scale=1.0)
