"""Everything that is trained about one layer: factors, a magnitude around them for DoRA, a bias."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_core import algebra
from lora_core.deltas import Delta
from lora_core.deltas.bias import WithBias
from lora_core.deltas.magnitude import WithMagnitude
from lora_core.errors import ConfigError
from lora_core.terms import along_outputs, gained
from lora_core.trainable import Factors, Site, on_cpu
from lora_core.trainable.norms import norms_together
from lora_core.worn import weight_shape


class TrainableLayer(nn.Module):
    """Called by the hook with the layer's input and output.

    plain:  y = base(x) + ΔW x + Δb
    DoRA:   y = g base(x) + (1 - g) bias + g ΔW x + Δb,  g = m / |W + ΔW|, the norm a constant for the
            gradient (arXiv 2402.09353 §4.3). With dropout the change sees the dropped-out input, the base part the
            full one; PEFT recomputes the base on the dropped-out input there.

    `factors` None: its bias alone is trained.
    """

    magnitude: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(self, site: Site, factors: Factors | None, *, magnitude: bool, bias: bool) -> None:
        super().__init__()
        self.site = site
        self.factors = factors
        self.dropout = site.config.dropout if factors is not None and factors.drops_out else 0.0
        self._n0: Tensor | None = None
        self.norm: tuple[tuple[int, ...], Tensor] | None = None
        self.alike: list[TrainableLayer] = []  # whose norms are computed together, this one's among them
        self.magnitude = self.bias = None
        if magnitude:
            self.magnitude = nn.Parameter(self._row_norms(site.device).clone())
        if bias:
            own = site.bias()
            assert own is not None
            self.bias = nn.Parameter(torch.zeros(own.shape, device=site.device))

    def forward(self, x: Tensor, base_out: Tensor) -> Tensor:
        layer, own = self.site.layer, self.bias
        if self.factors is None:
            assert own is not None
            return base_out + along_outputs(own, layer, base_out).to(base_out.dtype)
        if x.is_floating_point() and (self.dropout or not torch.is_autocast_enabled(x.device.type)):
            x = (
                x.float()
            )  # autocast would bring it back into half precision: two copies, of which one is kept
        if self.dropout:
            x = F.dropout(x, self.dropout, self.training)
        change = self.factors.change(x)
        if self.magnitude is None:
            if own is not None:
                change = change + along_outputs(own, layer, base_out)
            return base_out + change.to(base_out.dtype)
        gain, bias = self.magnitude / self._row_norms(self.magnitude.device), self.site.bias()
        offset: Tensor | None = own
        if bias is not None:  # fp8 where the layer is cast; the magnitude scales the weight's part alone
            kept = (1 - gain) * bias.to(gain.device, gain.dtype)
            offset = kept if own is None else kept + own
        return gained(base_out + change.to(base_out.dtype), gain, offset, layer)

    @torch.no_grad()
    def follow_magnitude(self) -> None:
        """After the factors were begun anew: m = |W + ΔW|, so that g is 1."""
        if self.magnitude is not None:
            self.magnitude.copy_(self._row_norms(self.magnitude.device))

    @torch.no_grad()
    def _row_norms(self, device: torch.device) -> Tensor:
        """|W + ΔW| per output, recomputed only after an optimizer step has touched the factors; with those of the
        layers that are alike, if these are as stale."""
        if not self.has_norm(device):
            together = [layer for layer in self.alike if not layer.has_norm(device)]
            if len(together) > 1:
                norms_together(together, device)
            else:
                self._norm_alone(device)
        assert self.norm is not None
        return self.norm[1]

    def versions(self) -> tuple[int, ...]:
        assert self.factors is not None
        return tuple(p._version for p in self.factors.parameters())

    def has_norm(self, device: torch.device) -> bool:
        return self.norm is not None and self.norm[0] == self.versions() and self.norm[1].device == device

    def squared_of(self, weight: Tensor) -> Tensor:
        """rowsum(W²), which stays."""
        if self._n0 is None or self._n0.device != weight.device:
            self._n0 = algebra.row_norms_squared(weight)
        return self._n0

    def _norm_alone(self, device: torch.device) -> None:
        assert self.factors is not None
        where = self.site.norm_device or device
        weight = self.site.original().to(where)
        try:
            if where != device:
                self.factors.to(where)  # the same parameters, for a moment elsewhere
            with torch.autocast(where.type, enabled=False):  # in fp32, whatever the forward pass is in
                norm = self.factors.row_norms(weight, self.squared_of(weight))
        finally:
            if where != device:
                self.factors.to(device)
        self.norm = (self.versions(), norm.to(device))

    def collect(self) -> Delta:
        delta = None if self.factors is None else self.factors.collect()
        if delta is not None and self.magnitude is not None:
            delta = WithMagnitude(delta, on_cpu(self.magnitude).reshape(self._magnitude_shape))
        if self.bias is not None:
            return WithBias(delta, on_cpu(self.bias))
        assert delta is not None
        return delta

    @torch.no_grad()
    def load(self, delta: Delta) -> None:
        """Begin from an existing delta. ConfigError where it is of another kind or changes something else."""
        path = self.site.path
        bias, inner = (delta.bias, delta.inner) if isinstance(delta, WithBias) else (None, delta)
        if isinstance(delta, WithBias) and delta.of != "change":
            raise ConfigError(
                f"{path}: the file to start from holds a bias itself and not its change. Combine it into a new LoRA "
                "first, with the layers of the base model."
            )
        for what, there, own, field in (
            ("bias", bias is not None, self.bias is not None, "bias"),
            ("weight", inner is not None, self.factors is not None, "targets"),
        ):
            if there != own:
                raise ConfigError(
                    f"{path}: the file to start from changes {'the' if there else 'no'} {what} there, this training "
                    f"{'does' if own else 'does not'}. Set {field} as it was for the file."
                )
        magnitude, inner = (
            (inner.magnitude, inner.inner) if isinstance(inner, WithMagnitude) else (None, inner)
        )
        if (magnitude is not None) != (self.magnitude is not None):
            kind = "lora" if magnitude is None else "dora"
            raise ConfigError(
                f'{path}: the file to start from is of variant "{kind}". Set variant = "{kind}".'
            )
        if magnitude is not None and self.magnitude is not None:
            kept = weight_shape(self.site.layer)
            axis = algebra.magnitude_axis(magnitude, torch.Size((kept[0], *kept[1])))
            if axis != int(self.site.is_embedding):
                raise ConfigError(
                    f"{path}: this DoRA scales input columns; training continues only output-axis DoRAs."
                )
            self.magnitude.copy_(magnitude.reshape(-1))
        if bias is not None and self.bias is not None:
            self.bias.copy_(bias)
        if inner is not None and self.factors is not None:
            self.factors.load(inner)

    @property
    def _magnitude_shape(self) -> tuple[int, ...]:
        """(out, 1[, 1, 1]); an embedding's outputs are the columns of its weight, (1, dim)."""
        out, *inner = self.site.shape
        return (1, out) if self.site.is_embedding else (out, *[1] * len(inner))
