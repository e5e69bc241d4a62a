"""The rack: all active LoRAs of a layer as one stacked low-rank update.

    y = base(x) + ((x A_catᵀ) * w) B_catᵀ              three kernels for any number of LoRAs

A_cat (R, in) and B_cat (out, R) hold the factors of every loaded LoRA, s = alpha/rank folded into B; w (images, R)
repeats each LoRA's user weight over its rank slots. Every layer's w is a view of ONE contiguous buffer, so a
slider is one small copy and never touches a module. DoRAs (output axis) interpolate: W + w (m V/|V| - W), so

    y += sum_i w_i (g_i - 1) * (base(x) - bias)        with g_i = m_i/|V_i| folded into their rows of B

What has no such form (an input-axis DoRA) runs as its dense ΔW through the same layer, weighted alike.
Images of one batch may differ: with classifier-free guidance a batch is [unconditional..., conditional...], so
row i of w serves every batch row congruent to i.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from lora_core import algebra
from lora_core.adapter import Adapter, weight_of
from lora_core.deltas.low_rank import LowRank
from lora_core.deltas.magnitude import WithMagnitude
from lora_core.mix import Mix


@dataclass
class Worn:
    """One LoRA's share of one layer: factors, and/or an output gain, or a dense ΔW."""

    name: str
    down: Tensor  # (r, in[, k, k])
    up: Tensor  # (out, r), scale and gain folded in
    gain: Tensor | None = None  # (out,) g - 1
    dense: Tensor | None = None  # ΔW, then down and up are empty


@dataclass
class LayerRack:
    """Everything worn by one layer, stacked. Slots: one per rank, then one per gain, then one per dense part."""

    layer: nn.Module
    path: str
    worn: list[Worn] = field(default_factory=list)
    handle: RemovableHandle | None = None
    weights: Tensor | None = None  # (images, slots), a view of the rack's buffer
    idle: bool = (
        True  # every weight is 0: the hook returns at once, and the output is the base's, bit for bit
    )

    def restack(self) -> None:
        weight = weight_of(self.layer)
        self.down = torch.cat([w.down for w in self.worn])  # (R, in[, k, k])
        self.up = torch.cat([w.up for w in self.worn], dim=1)  # (out, R)
        if weight.dim() == 4:
            self.up = self.up[:, :, None, None]
        self.ranks = [int(w.down.shape[0]) for w in self.worn]
        gains = [w.gain for w in self.worn if w.gain is not None]
        self.gains = torch.stack(gains) if gains else None  # (D, out)
        self.dense = [w.dense for w in self.worn if w.dense is not None]
        self.gain_owner = [w.name for w in self.worn if w.gain is not None]
        self.dense_owner = [w.name for w in self.worn if w.dense is not None]

    @property
    def slots(self) -> int:
        return sum(self.ranks) + len(self.gain_owner) + len(self.dense)

    def slot_weights(self, mix: Mix) -> list[float]:
        at = {w.name: mix[w.name].at(self.path) for w in self.worn}
        by_rank = [at[w.name] for w, r in zip(self.worn, self.ranks, strict=True) for _ in range(r)]
        return [*by_rank, *(at[n] for n in self.gain_owner), *(at[n] for n in self.dense_owner)]

    def forward(self, x: Tensor, base_out: Tensor) -> Tensor:
        assert self.weights is not None
        w = self.weights
        if len(w) > 1:
            w = w.repeat(x.shape[0] // len(w), 1)  # batch row i wears image i % images
        rank, gains = sum(self.ranks), len(self.gain_owner)
        conv, out = isinstance(self.layer, nn.Conv2d), base_out
        if rank:
            low = self._through(x, self.down)
            low = low * _spread(w[:, :rank], low, conv)
            out = out + (F.conv2d(low, self.up) if conv else F.linear(low, self.up))
        if self.gains is not None:
            bias = self.layer.bias
            assert bias is None or isinstance(bias, Tensor)
            plain = base_out if bias is None else base_out - _spread(bias[None], base_out, conv)  # W x
            gain = w[:, rank : rank + gains].to(self.gains.dtype) @ self.gains  # (images or 1, out)
            out = out + _spread(gain, base_out, conv) * plain
        for i, dense in enumerate(self.dense):
            out = out + _spread(w[:, rank + gains + i, None], base_out, conv) * self._through(x, dense)
        return out

    def _through(self, x: Tensor, weight: Tensor) -> Tensor:
        """x through the base layer's own geometry (stride, padding, dilation) with another weight, no bias."""
        if isinstance(self.layer, nn.Conv2d):
            convolved: Tensor = self.layer._conv_forward(x, weight, None)
            return convolved
        return F.linear(x, weight)


def _spread(rows: Tensor, like: Tensor, conv: bool) -> Tensor:
    """(images or 1, n) shaped to multiply `like`, (N, ..., n) or (N, n, h, w)."""
    rows = rows.to(like.dtype)
    if conv:
        return rows[:, :, None, None]
    return rows.reshape(rows.shape[0], *[1] * (like.dim() - 2), rows.shape[1])


class Rack:
    """The live form of a Mix on a model. No module is added; a layer worn by no LoRA carries no hook."""

    def __init__(self) -> None:
        self.layers: dict[str, LayerRack] = {}
        self.enabled = True
        self._buffer = torch.empty(0)

    def load(
        self, name: str, adapter: Adapter, layers: Mapping[str, nn.Module], originals: Mapping[str, Tensor]
    ) -> None:
        """Put `adapter` on `layers` (adapter path -> module). `originals` hold W0 of layers now fused."""
        prepared = {}
        for path, layer in layers.items():
            worn = prepare(name, adapter.deltas[path], layer, originals.get(path, weight_of(layer)))
            prepared[path] = worn  # all of them before any layer changes: an error leaves the rack as it was
        for path, worn in prepared.items():
            slot = self.layers.get(path)
            if slot is None:
                slot = self.layers[path] = LayerRack(layers[path], path)
                slot.handle = layers[path].register_forward_hook(self._hook(slot))
            slot.worn.append(worn)
            slot.restack()

    def delete(self, name: str) -> None:
        for path, slot in list(self.layers.items()):
            if all(w.name != name for w in slot.worn):
                continue
            slot.worn = [w for w in slot.worn if w.name != name]
            if slot.worn:
                slot.restack()
            else:
                if slot.handle is not None:
                    slot.handle.remove()
                del self.layers[path]

    def set_mixes(self, mixes: Sequence[Mix]) -> None:
        """One Mix for all images of a batch, or one per image. One small copy per device and dtype."""
        slots = list(self.layers.values())
        rows = torch.tensor([[w for slot in slots for w in slot.slot_weights(mix)] for mix in mixes])
        if slots:
            device = weight_of(slots[0].layer).device
            if self._buffer.shape == rows.shape and self._buffer.device == device:
                self._buffer.copy_(rows)
            else:
                self._buffer = rows.to(device)
        start = 0
        for slot in slots:
            slot.weights = self._buffer[:, start : start + slot.slots]
            slot.idle = not bool(rows[:, start : start + slot.slots].any())
            start += slot.slots

    def _hook(self, slot: LayerRack) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor | None]:
        def add(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            return slot.forward(inputs[0], output) if self.enabled and not slot.idle else None

        return add


@torch.no_grad()
def prepare(name: str, delta: object, layer: nn.Module, original: Tensor) -> Worn:
    """A Delta -> factors ready to be stacked, in the layer's dtype and on its device."""
    weight = weight_of(layer)
    inner = delta.inner if isinstance(delta, WithMagnitude) else delta
    if not isinstance(inner, LowRank):
        raise TypeError(f"the rack cannot wear a {type(inner).__name__}")
    down = inner.down.to(weight.device, torch.float32).reshape(inner.rank, *weight.shape[1:])
    up = algebra.flat(inner.up.to(weight.device)) * inner.scale  # (out, r)
    gain = None
    if isinstance(delta, WithMagnitude):
        magnitude = delta.magnitude.to(weight.device, torch.float32)
        if algebra.magnitude_axis(magnitude, weight.shape) == 1:
            whole = delta.to(device=weight.device).delta(original.to(weight.device))
            return Worn(name, down[:0].to(weight), up[:, :0].to(weight), dense=whole.to(weight))
        g = magnitude.reshape(-1) / algebra.row_norms(original.to(weight.device), down, up, scale=1.0)
        up, gain = up * g[:, None], (g - 1).to(weight)
    down, up = balance(down, up)
    return Worn(name, down.to(weight), up.to(weight), gain)


def balance(down: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Move a power of two (exact) between A and B until their largest entries agree: x Aᵀ can overflow fp16."""
    a, b = float(down.abs().max()), float(up.abs().max())
    if a == 0 or b == 0:
        return down, up
    shift = round(math.log2(b / a) / 2)
    return down * 2.0**shift, up * 2.0**-shift
