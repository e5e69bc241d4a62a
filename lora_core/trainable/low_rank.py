"""LoRA and LoCon in training (arXiv 2106.09685): ΔW = s B A for linear layers and convolutions."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_core import algebra, init
from lora_core.deltas import Delta
from lora_core.deltas.low_rank import LowRank
from lora_core.errors import ConfigError
from lora_core.terms import through
from lora_core.trainable import Factors, Site, on_cpu


class _DownAndUp(Factors):
    def __init__(self, site: Site) -> None:
        super().__init__(site)
        down, up = init.begin(site)
        self.down, self.up = nn.Parameter(down), nn.Parameter(up)

    def row_norms(self, weight: Tensor, n0: Tensor) -> Tensor:
        return algebra.row_norms(weight, self.down, self.up, scale=self.site.scale, n0=n0)


class TrainableLowRank(_DownAndUp):
    """down A (r, in[, k, k]) runs with the layer's stride and padding, up B (out, r[, 1, 1]) mixes its outputs."""

    fast = ("up",)

    @staticmethod
    def trains(site: Site) -> bool:
        return site.config.kind == "lora" and not site.is_embedding

    def change(self, x: Tensor) -> Tensor:
        return self._through(x, self.down, self.up)

    def _through(self, x: Tensor, down: Tensor, up: Tensor) -> Tensor:
        # scaled before `up`, where there is least to scale
        low = through(self.site.layer, x, down) * self.site.scale
        return F.conv2d(low, up) if up.dim() == 4 else F.linear(low, up)

    def collect(self) -> Delta:
        return LowRank(on_cpu(self.down), on_cpu(self.up), self.site.stored_alpha)

    @torch.no_grad()
    def load(self, delta: Delta) -> None:
        found = of_rank(self.site, delta)
        self.down.copy_(found.down.reshape(self.down.shape))
        self.up.copy_(found.up.reshape(self.up.shape) * (found.scale / self.site.scale))


class TrainableEmbedding(_DownAndUp):
    """loralib's and PEFT's embedding: A (r, num) is looked up, B (dim, r) mixes; the weight (num, dim) changes by
    s (B A)ᵀ. No dropout falls on numbers of words, as in PEFT."""

    drops_out = False
    fast = ()  # PEFT gives an embedding's factors a rate of their own; ours have the plain one

    @staticmethod
    def trains(site: Site) -> bool:
        return site.config.kind == "lora" and site.is_embedding

    def change(self, x: Tensor) -> Tensor:
        return F.linear(F.embedding(x, self.down.T), self.up) * self.site.scale

    def collect(self) -> Delta:
        """Of the weight as it is kept, (num, dim) = (num, r) (r, dim)."""
        return LowRank(
            on_cpu(self.up).T.contiguous(), on_cpu(self.down).T.contiguous(), self.site.stored_alpha
        )

    @torch.no_grad()
    def load(self, delta: Delta) -> None:
        found = of_rank(self.site, delta)
        self.down.copy_(found.up.T)
        self.up.copy_(found.down.T * (found.scale / self.site.scale))


def of_rank(site: Site, delta: Delta) -> LowRank:
    if not isinstance(delta, LowRank):
        raise another_kind(site, delta)
    if delta.rank != site.rank:
        raise another_rank(site, delta.rank)
    return delta


def another_kind(site: Site, delta: Delta) -> ConfigError:
    return ConfigError(
        f"{site.path}: the file to start from holds a {type(delta).__name__} there, this training is of kind = "
        f'"{site.config.kind}". Set kind to the file\'s, or train without start_from.'
    )


def another_rank(site: Site, rank: int) -> ConfigError:
    return ConfigError(
        f"{site.path}: the file to start from has rank {rank}, this training rank {site.rank}. Set rank = {rank}."
    )
