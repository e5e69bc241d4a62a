"""Everything that is trained about one layer: its factors and, for DoRA, a magnitude around them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lora_core import algebra
from lora_core.deltas import Delta
from lora_core.deltas.magnitude import WithMagnitude
from lora_core.errors import ConfigError
from lora_core.trainable import Factors, Site
from lora_core.trainable.low_rank import TrainableLowRank
from lora_core.worn import stored


class TrainableLayer(nn.Module):
    """Called by the hook with the layer's input and output.

    plain:  y = base(x) + ΔW x
    DoRA:   y = base(x) + (g - 1) (base(x) - bias) + g ΔW x,  g = m / |W + ΔW|, the norm a constant for the gradient
            (arXiv 2402.09353 §4.3). With dropout the change sees the dropped-out input, the base part the full one;
            PEFT recomputes the base on the dropped-out input there.
    """

    magnitude: nn.Parameter | None

    def __init__(self, site: Site) -> None:
        super().__init__()
        self.site = site
        self.factors: Factors = TrainableLowRank(site)
        self.dropout = nn.Dropout(site.config.dropout)
        self._n0: Tensor | None = None
        self._norm: tuple[tuple[int, ...], Tensor] | None = None
        self.magnitude = None
        if site.config.variant == "dora":
            self.magnitude = nn.Parameter(self._row_norms(site.device).clone())

    def forward(self, x: Tensor, base_out: Tensor) -> Tensor:
        change = self.factors.change(self.dropout(x.float()))
        if self.magnitude is None:
            return base_out + change.to(base_out.dtype)
        layer = self.site.layer
        gain = _along_outputs(self.magnitude / self._row_norms(self.magnitude.device), layer)
        bias = stored(layer, self.site.path, "bias")
        plain = base_out if bias is None else base_out - _along_outputs(bias.to(base_out.device), layer)
        return base_out + ((gain - 1) * plain + gain * change).to(base_out.dtype)

    @torch.no_grad()
    def _row_norms(self, device: torch.device) -> Tensor:
        """|W + ΔW| per output, recomputed only after an optimizer step has touched the factors."""
        versions = tuple(p._version for p in self.factors.parameters())
        if self._norm is None or self._norm[0] != versions or self._norm[1].device != device:
            weight = self.site.original().to(device)
            if self._n0 is None or self._n0.device != device:
                self._n0 = algebra.row_norms_squared(weight)
            self._norm = (versions, self.factors.row_norms(weight, self._n0))
        return self._norm[1]

    def collect(self) -> Delta:
        inner = self.factors.collect()
        if self.magnitude is None:
            return inner
        column = self.magnitude.detach().cpu().clone().reshape(-1, *[1] * (len(self.site.shape) - 1))
        return WithMagnitude(inner, column)

    @torch.no_grad()
    def load(self, delta: Delta) -> None:
        """Begin from an existing delta of the same rank. ConfigError where it is of another kind."""
        inner = delta.inner if isinstance(delta, WithMagnitude) else delta
        if isinstance(delta, WithMagnitude) != (self.magnitude is not None):
            kind = "dora" if isinstance(delta, WithMagnitude) else "lora"
            raise ConfigError(
                f'{self.site.path}: the file to start from is of variant "{kind}". Set variant = "{kind}".'
            )
        self.factors.load(inner)
        if isinstance(delta, WithMagnitude) and self.magnitude is not None:
            if algebra.magnitude_axis(delta.magnitude, torch.Size(self.site.shape)) != 0:
                raise ConfigError(
                    f"{self.site.path}: this DoRA scales input columns; training continues only output-axis DoRAs."
                )
            self.magnitude.copy_(delta.magnitude.reshape(-1))


def _along_outputs(vector: Tensor, layer: nn.Module) -> Tensor:
    """(out,) shaped to multiply the layer's output: (..., out) or (N, out, h, w)."""
    return vector.reshape(-1, 1, 1) if isinstance(layer, nn.Conv2d) else vector
