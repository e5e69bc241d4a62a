"""A LoRA that begins as a part of the base's own weight (init_from_base.py)."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from lora_core import algebra, init_from_base
from lora_core.deltas import Delta
from lora_core.deltas.low_rank import LowRank
from lora_core.errors import ConfigError
from lora_core.init_names import is_from_base, pissa_iterations
from lora_core.trainable import Factors, Site, on_cpu
from lora_core.trainable.low_rank import TrainableLowRank


class TrainableResidual(TrainableLowRank):
    """PiSSA, OLoRA, LoftQ: W = residual + s B0 A0, and A, B begin as A0, B0.

    A base of ordinary numbers is never written to: y = base(x) + s (B A - B0 A0) x. The difference is computed as
    [B - B0, B] [A0; A - A0]: nothing cancels, and the first step is the base bit for bit. A quantised base keeps the
    residual, rounded, which is what it can keep best (QPiSSA): y = base(x) + s B A x, undone by `detach`.

    Dropout falls on A alone, as in PEFT: the part that was taken out of the base sees the full input.
    `collect` gives the rank 2r difference, for the ORIGINAL base.
    """

    start_down: Tensor
    start_up: Tensor

    drops_out = False  # it falls on A alone: see `change`

    def __init__(self, site: Site) -> None:
        Factors.__init__(self, site)
        down, up, kept = begin(site)
        self.down, self.up = nn.Parameter(down), nn.Parameter(up)
        self._started(in_base=site.is_quantised)
        if self.in_base:
            site.keep(kept)

    @staticmethod
    def trains(site: Site) -> bool:
        return TrainableLowRank.trains(site) and is_from_base(site.config.init)

    @classmethod
    def around(cls, factors: TrainableLowRank) -> TrainableResidual:
        """The same parameters, taken for a beginning from a quantised base that stays as it is (LoftQ in place)."""
        own = cls.__new__(cls)
        Factors.__init__(own, factors.site)
        own.down, own.up = factors.down, factors.up
        own._started(in_base=True)
        return own

    def _started(self, *, in_base: bool) -> None:
        self.register_buffer("start_down", self.down.detach().clone())
        self.register_buffer("start_up", self.up.detach().clone())
        self.in_base = in_base  # the residual is there: quantised layers alone

    def difference(self) -> tuple[Tensor, Tensor]:
        """down (2r, ...) and up (out, 2r, ...) of B A - B0 A0."""
        return algebra.difference(self.down, self.up, self.start_down, self.start_up)

    def change(self, x: Tensor) -> Tensor:
        rate = self.site.config.dropout
        if self.in_base:
            return self._through(F.dropout(x, rate, self.training) if rate else x, self.down, self.up)
        if self.training and rate:
            taken_out = self._through(x, self.start_down, self.start_up)
            return self._through(F.dropout(x, rate), self.down, self.up) - taken_out
        return self._through(x, *self.difference())

    def row_norms(self, weight: Tensor, n0: Tensor) -> Tensor:
        down, up = (self.down, self.up) if self.in_base else self.difference()
        return algebra.row_norms(weight, down, up, scale=self.site.scale, n0=n0)

    def collect(self) -> Delta:
        down, up = (on_cpu(t) for t in self.difference())
        return LowRank(down, up, 2 * self.site.stored_alpha)  # twice the rank: the same scale

    def load(self, delta: Delta) -> None:
        raise ConfigError(
            f'{self.site.path}: init = "{self.site.config.init}" begins from the base, and a file to start from is '
            'another beginning. Leave one of them out; such a file goes on with init = "gaussian" and twice the rank.'
        )


def begin(site: Site) -> tuple[Tensor, Tensor, Tensor]:
    """-> A0, B0 on the layer's device, and what a quantised base is to keep."""
    init, rank, scale = site.config.init, site.rank, site.scale
    if init == "loftq":
        site.refuse_loftq()
    weight = site.unrounded().to(site.device)
    if init == "loftq":
        return init_from_base.loftq(
            weight, site.rounded, rank=rank, scale=scale, iterations=site.config.loftq_iterations
        )
    if init == "olora":
        down, up = init_from_base.olora(weight, rank=rank, scale=scale)
    else:
        down, up = init_from_base.pissa(
            weight,
            rank=rank,
            scale=scale,
            iterations=pissa_iterations(init),
            generator=site.generator,
        )
    return down, up, init_from_base.residual(weight, down, up, scale=scale)
