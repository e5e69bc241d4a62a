"""The trainable form of a layer's change: one small file per kind, each calling `algebra` for its formula."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lora_core import algebra
from lora_core.config import LoraConfig
from lora_core.deltas import Delta
from lora_core.worn import Place, original_weight, weight_shape


@dataclass(frozen=True)
class Site:
    """Where a change is to be trained: a layer of the base, its path, and what the config says about it."""

    layer: nn.Module
    path: str
    config: LoraConfig
    generator: torch.Generator | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the layer's weight, by the layer's own figures: (out, in) or (out, in, k, k)."""
        out, inner = weight_shape(self.layer)
        return (out, *inner)

    @property
    def device(self) -> torch.device:
        return Place.of(self.layer).device

    def original(self) -> Tensor:
        """W0, wherever and however it is kept: the one place through which training reads a base weight."""
        return original_weight(self.layer, self.path)


class Factors(nn.Module, ABC):
    """fp32 parameters of one kind, with alpha/rank inside. `change(x)` is ΔW x in the layer's own geometry."""

    def __init__(self, site: Site) -> None:
        super().__init__()
        self.site = site  # no Module: the frozen layer is not registered as a child
        self.rank, self.alpha = site.config.rank_at(site.path), site.config.alpha_at(site.path)
        self.rank_stabilized = site.config.rank_stabilized

    @property
    def scale(self) -> float:
        return algebra.lora_scale(alpha=self.alpha, rank=self.rank, rank_stabilized=self.rank_stabilized)

    @property
    def stored_alpha(self) -> float:
        """rsLoRA is stored as alpha·√r: readers that know only alpha/r then compute the same ΔW."""
        return self.alpha * self.rank**0.5 if self.rank_stabilized else self.alpha

    @abstractmethod
    def change(self, x: Tensor) -> Tensor:
        """ΔW x, fp32, shaped like the layer's output. `x` is fp32."""

    @abstractmethod
    def row_norms(self, weight: Tensor, n0: Tensor) -> Tensor:
        """|W + ΔW| per output, (out,), fp32; `n0` is rowsum(W²)."""

    @abstractmethod
    def collect(self) -> Delta:
        """What was trained, detached, on the CPU."""

    @abstractmethod
    def load(self, delta: Delta) -> None:
        """Begin from `delta`: the same ΔW whatever its alpha was. ConfigError where it does not fit."""
