"""The trainable form of a layer's change: one small file per kind, each calling `algebra` for its formula."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor, nn

from lora_core import algebra
from lora_core.config import LoraConfig
from lora_core.deltas import Delta
from lora_core.errors import ConfigError
from lora_core.storages import Undo, rounded, storage_of
from lora_core.worn import Place, original_weight, stored, weight_shape


@dataclass(frozen=True)
class Site:
    """Where a change is to be trained: a layer of the base, its path, and what the config says about it.

    Outputs come first in every shape here: an embedding is the map of a one-hot vector, W (dim, num), which is the
    transpose of the weight it keeps.
    """

    layer: nn.Module
    path: str
    config: LoraConfig
    generator: torch.Generator | None = None
    checkpoint: Callable[[str], Tensor] | None = None  # parameter name -> W0 before it was quantised
    undo: list[Undo] = field(default_factory=list)  # what takes back what `keep` has changed
    norm_device: torch.device | None = None

    @property
    def is_embedding(self) -> bool:
        return isinstance(self.layer, nn.Embedding)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of W, by the layer's own figures: (out, in) or (out, in, k, k)."""
        out, inner = weight_shape(self.layer)
        return (*inner, out) if self.is_embedding else (out, *inner)

    @cached_property
    def device(self) -> torch.device:
        return Place.of(self.layer).device

    def original(self) -> Tensor:
        """W, wherever and however it is kept: the one place through which training reads a base weight."""
        weight = original_weight(self.layer, self.path)
        return weight.T if self.is_embedding else weight

    @property
    def is_quantised(self) -> bool:
        return storage_of(self.layer) is not None

    def unrounded(self) -> Tensor:
        """W as it was before a quantised base was quantised, from the checkpoint; without one, as the layer has it."""
        if self.checkpoint is None or not self.is_quantised:
            return self.original()
        return self.checkpoint(f"{self.path}.weight")

    def keep(self, weight: Tensor) -> None:
        """A quantised layer keeps `weight` from now on, rounded; `undo` has the way back."""
        storage = storage_of(self.layer)
        assert storage is not None
        self.undo.append(storage.put(self.layer, weight))

    def rounded(self, weight: Tensor) -> Tensor:
        """What this quantised layer would make of `weight`, fp32."""
        return rounded(self.layer, weight)

    def refuse_loftq(self) -> None:
        if not self.is_quantised:
            raise ConfigError(
                f'init = "loftq" makes up for what quantising loses, and {self.path} is not quantised. Open the base '
                'with quantize = "nf4" or "int8", name the layer in exclude, or use init = "pissa".'
            )
        if self.checkpoint is None:
            raise ConfigError(
                'init = "loftq" compares with the weights as they were before quantising. Give `originals`, such as '
                "OpenedBase.original."
            )

    def bias(self) -> Tensor | None:
        return stored(self.layer, self.path, "bias") if hasattr(self.layer, "bias") else None

    @cached_property
    def rank(self) -> int:
        return self.config.rank_at(self.path)

    @cached_property
    def scale(self) -> float:
        """s = alpha/r, or alpha/√r for rsLoRA."""
        alpha = self.config.alpha_at(self.path)
        return algebra.lora_scale(alpha=alpha, rank=self.rank, rank_stabilized=self.config.rank_stabilized)

    @cached_property
    def stored_alpha(self) -> float:
        """rsLoRA is stored as alpha·√r: readers that know only alpha/r then compute the same ΔW."""
        alpha = self.config.alpha_at(self.path)
        return alpha * self.rank**0.5 if self.config.rank_stabilized else alpha


class Factors(nn.Module, ABC):
    """fp32 parameters of one kind, with alpha/rank inside."""

    drops_out: ClassVar[bool] = True  # whether dropout falls on its input
    # LoRA+ (arXiv 2402.12354): the parameters that learn faster; None where the kind has no B
    fast: ClassVar[tuple[str, ...] | None] = None

    def __init__(self, site: Site) -> None:
        super().__init__()
        self.site = site  # no Module: the frozen layer is not registered as a child

    @staticmethod
    @abstractmethod
    def trains(site: Site) -> bool:
        """Whether this is the kind that the config asks for, on such a layer."""

    @abstractmethod
    def change(self, x: Tensor) -> Tensor:
        """ΔW x in the layer's own geometry, shaped like its output. `x` is fp32, or an embedding's numbers."""

    @abstractmethod
    def row_norms(self, weight: Tensor, n0: Tensor) -> Tensor:
        """|W + ΔW| per output, (out,), fp32; `n0` is rowsum(W²)."""

    @abstractmethod
    def collect(self) -> Delta:
        """What was trained, detached, on the CPU."""

    @abstractmethod
    def load(self, delta: Delta) -> None:
        """Begin from `delta`: the same ΔW whatever its alpha was. ConfigError where it does not fit."""


def on_cpu(parameter: Tensor) -> Tensor:
    """A copy that training no longer changes."""
    return parameter.detach().cpu().clone()
