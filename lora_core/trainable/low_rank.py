"""LoRA and LoCon in training (arXiv 2106.09685): ΔW = s B A for linear layers and convolutions."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_core import algebra, init
from lora_core.deltas import Delta
from lora_core.deltas.low_rank import LowRank
from lora_core.errors import ConfigError
from lora_core.trainable import Factors, Site
from lora_core.worn import through


class TrainableLowRank(Factors):
    """down A (r, in[, k, k]) runs with the layer's stride and padding, up B (out, r[, 1, 1]) mixes its outputs."""

    def __init__(self, site: Site) -> None:
        super().__init__(site)
        down, up = init.begin(site, rank=self.rank, scale=self.scale)
        self.down, self.up = nn.Parameter(down), nn.Parameter(up)

    def change(self, x: Tensor) -> Tensor:
        low = through(self.site.layer, x, self.down)
        return (F.conv2d(low, self.up) if self.up.dim() == 4 else F.linear(low, self.up)) * self.scale

    def row_norms(self, weight: Tensor, n0: Tensor) -> Tensor:
        return algebra.row_norms(weight, self.down, self.up, scale=self.scale, n0=n0)

    def collect(self) -> Delta:
        return LowRank(
            self.down.detach().cpu().clone(), self.up.detach().cpu().clone(), alpha=self.stored_alpha
        )

    @torch.no_grad()
    def load(self, delta: Delta) -> None:
        if not isinstance(delta, LowRank) or delta.rank != self.rank:
            found = delta.rank if isinstance(delta, LowRank) else type(delta).__name__
            raise ConfigError(
                f"{self.site.path}: the file to start from has rank {found}, this training rank {self.rank}. "
                f"Set rank = {found}."
            )
        self.down.copy_(delta.down.reshape(self.down.shape))
        self.up.copy_(delta.up.reshape(self.up.shape) * (delta.scale / self.scale))
