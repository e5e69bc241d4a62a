"""OFT and BOFT: the outputs turned, W' = g R W (arXiv 2306.07280, 2311.06243).

OFT's R is block-diagonal, BOFT's a product of such in the orders of a butterfly: stage i mixes rows 2^i b/2 apart.
Each block is the Cayley transform (I + Q) (I - Q)^-1 of a skew Q = B - Bᵀ. LyCORIS and kohya turn by OFT's R
transposed, and by BOFT's R as it is; so it is here. PEFT turns the inputs instead, W' = g (R Wᵀ)ᵀ.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from lora_core import algebra

Stage = tuple[Tensor, Tensor | None]  # blocks of R - I, (k, b, b), and the order of the rows, (out,)


@dataclass(frozen=True, eq=False)
class Rotation:
    """`blocks` B: OFT (k, b, b), BOFT (m, k, b, b), k b sides. `rescale` g (out, 1[, 1, 1]), or none.

    limit       the files' alpha, which here is no scale: |Q| is held within limit · out; 0 is no limit
    skew        whether `blocks` are B; else they are R itself, as LyCORIS of 2023 stored OFT (`oft_diag`)
    on_input    whether it is the weight's columns that are turned, in · k · k of them
    Raises ValueError for tensors that do not go together.
    """

    needs_original: ClassVar[bool] = True

    blocks: Tensor
    limit: float = 0.0
    rescale: Tensor | None = None
    skew: bool = True
    on_input: bool = False

    def __post_init__(self) -> None:
        shape = tuple(self.blocks.shape)
        if len(shape) not in (3, 4) or shape[-1] != shape[-2] or 0 in shape:
            raise ValueError(
                f"blocks of shape {shape} were found where (k, b, b), or for BOFT (m, k, b, b), were expected"
            )
        if len(shape) == 4 and (shape[-1] % 2 or self.sides % (2 ** (shape[0] - 1) * shape[-1])):
            raise ValueError(
                f"{shape[0]} stages of {shape[1]} blocks of {shape[-1]} were found, which no butterfly over "
                f"{self.sides} outputs has"
            )
        if not math.isfinite(self.limit):
            raise ValueError(f"a limit of {self.limit} was found where a finite number was expected")
        if self.rescale is not None and not self.on_input and self.rescale.numel() != self.sides:
            raise ValueError(
                f"a rescale of shape {tuple(self.rescale.shape)} was found where one number for each of the "
                f"{self.sides} outputs was expected"
            )

    @property
    def sides(self) -> int:
        return int(self.blocks.shape[-3] * self.blocks.shape[-1])

    def shape(self) -> tuple[int, ...]:
        if not self.on_input:
            return (self.sides,)
        return (-1 if self.rescale is None else self.rescale.numel(), self.sides)

    def fits(self, weight: tuple[int, ...]) -> bool:
        if len(weight) not in (2, 4):
            return False
        if not self.on_input:
            return weight[0] == self.sides
        return math.prod(weight[1:]) == self.sides and self.shape()[0] in (-1, weight[0])

    def delta(self, original: Tensor) -> Tensor:
        stages, rescale = self.turn_form()
        flat = algebra.flat(original)
        if self.on_input:
            change = algebra.turned(flat.T.contiguous(), stages).T
            change = algebra.rescaled(flat, change, rescale)
        else:
            change = algebra.turned(flat, stages, rescale)
        return change.reshape(original.shape)

    def turn_form(self) -> tuple[list[Stage], Tensor | None]:
        """fp32 stages and g (out,) of `algebra.turned`, which is the same for a weight's rows and for a layer's
        outputs less their bias: R (W x) = (R W) x."""
        rescale = None if self.rescale is None else self.rescale.float().reshape(-1)
        if not self.skew:
            eye = torch.eye(self.blocks.shape[-1], device=self.blocks.device)
            return [((self.blocks.float() - eye).transpose(-1, -2), None)], rescale
        change = algebra.cayley_change(self.blocks, limit=self.limit * self.sides)
        if change.dim() == 3:
            return [(change.transpose(-1, -2), None)], rescale
        half = change.shape[-1] // 2
        orders = [algebra.butterfly_order(self.sides, 2**i * half) for i in range(len(change))]
        return [
            (stage, order.to(change.device)) for stage, order in zip(change, orders, strict=True)
        ], rescale

    def low_rank_form(self) -> None:
        """None: a rotation is of full rank."""

    def tensors(self) -> dict[str, Tensor]:
        return {
            "blocks": self.blocks,
            **({} if self.rescale is None else {"rescale": self.rescale}),
            "limit": torch.tensor(float(self.limit)),
            "skew": torch.tensor(int(self.skew)),
            "on_input": torch.tensor(int(self.on_input)),
        }

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> Rotation:
        return cls(
            tensors["blocks"],
            float(tensors["limit"]),
            tensors.get("rescale"),
            bool(tensors["skew"]),
            bool(tensors["on_input"]),
        )

    def to(self, *, dtype: torch.dtype | None = None, device: torch.device | None = None) -> Rotation:
        rescale = None if self.rescale is None else self.rescale.to(device, dtype)
        return replace(self, blocks=self.blocks.to(device, dtype), rescale=rescale)
