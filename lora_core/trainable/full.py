"""A module trained whole: ΔW as it is, which begins at zero."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lora_core import algebra
from lora_core.deltas import Delta
from lora_core.deltas.full import Full
from lora_core.terms import through
from lora_core.trainable import Factors, Site, on_cpu
from lora_core.trainable.low_rank import another_kind
from lora_core.worn import weight_shape


class TrainableFull(Factors):
    """The change and not the weight is the parameter: the identity is then exact in any precision of the base, and
    weight decay pulls towards the base instead of towards zero (PEFT trains a copy of the module)."""

    drops_out = False
    fast = ()

    def __init__(self, site: Site) -> None:
        super().__init__(site)
        out, inner = weight_shape(site.layer)
        self.weight = nn.Parameter(torch.zeros(out, *inner, device=site.device))

    @staticmethod
    def trains(site: Site) -> bool:
        return False  # asked for module by module, by modules_to_save, and not by `kind`

    def change(self, x: Tensor) -> Tensor:
        return through(self.site.layer, x, self.weight)

    def row_norms(self, weight: Tensor, n0: Tensor) -> Tensor:
        return algebra.row_norms_squared(weight.float() + self.weight).sqrt()

    def collect(self) -> Delta:
        return Full(on_cpu(self.weight))

    @torch.no_grad()
    def load(self, delta: Delta) -> None:
        if not isinstance(delta, Full):
            raise another_kind(self.site, delta)
        self.weight.copy_(delta.change.reshape(self.weight.shape))
