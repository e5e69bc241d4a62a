"""One LoRA's share of one layer, made ready to be worn: factors, and for some kinds a term of their own.

`wear` turns a Delta into a `Worn` without forming ΔW where that can be avoided:

    LoRA, LoCon, Tucker, LoHa      factors, ΔW = up down exactly
    DoRA on the output axis        W + w (m V/|V| - W): the factors carry g = m/|V|, and a Gain adds (g - 1) W x
    LoKr                           Kron: two small products by reshape
    what has no such form          Dense: ΔW computed from the original, run through the layer's own geometry
                                   (an input-axis DoRA, a magnitude around LoHa or LoKr)
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_core import algebra
from lora_core.adapter import weight_of
from lora_core.deltas import Delta
from lora_core.deltas.magnitude import WithMagnitude
from lora_core.errors import LoraError
from lora_core.storages import dequantised, refuse_lost, storage_of


class Extra(Protocol):
    """A term beside the stacked factors; it has one slot of the weights."""

    def term(self, layer: nn.Module, x: Tensor, base_out: Tensor) -> Tensor:
        """What weight 1 adds; shaped like `base_out`, or such that it broadcasts to it."""
        ...

    def delta(self, rows: slice, original: Tensor) -> Tensor:
        """The same as a change of the weight: fp32, these rows of it, flat (n, in*k*k); `original` those of W0."""
        ...

    def to(self, device: torch.device, dtype: torch.dtype | None) -> Extra: ...


@dataclass(frozen=True)
class Gain:
    """(g - 1) * W x for a DoRA; W x = base_out - bias. The bias is a copy: an offloaded layer has none at hand."""

    gain: Tensor  # (out,) g - 1
    bias: Tensor | None  # (out,)

    def term(self, layer: nn.Module, x: Tensor, base_out: Tensor) -> Tensor:
        spread = (-1, 1, 1) if isinstance(layer, nn.Conv2d) else (-1,)
        plain = base_out if self.bias is None else base_out - self.bias.reshape(spread)
        return plain * self.gain.reshape(spread)

    def delta(self, rows: slice, original: Tensor) -> Tensor:
        return self.gain[rows, None] * original

    def to(self, device: torch.device, dtype: torch.dtype | None) -> Gain:
        bias = None if self.bias is None else self.bias.to(device, dtype)
        return Gain(self.gain.to(device, dtype), bias)


@dataclass(frozen=True)
class Dense:
    change: Tensor  # dW, of the layer's weight's shape

    def term(self, layer: nn.Module, x: Tensor, base_out: Tensor) -> Tensor:
        return through(layer, x, self.change)

    def delta(self, rows: slice, original: Tensor) -> Tensor:
        return algebra.flat(self.change[rows])

    def to(self, device: torch.device, dtype: torch.dtype | None) -> Dense:
        return Dense(self.change.to(device, dtype))


@dataclass(frozen=True)
class Kron:
    """kron(C, D) x without forming it: x as (in1, in2), D over in2, then C over in1."""

    c: Tensor  # (out1, in1)
    d: Tensor  # (out2, in2[, k, k])

    def term(self, layer: nn.Module, x: Tensor, base_out: Tensor) -> Tensor:
        wide = self.c.shape[1]  # in1
        if isinstance(layer, nn.Conv2d):
            parts = x.reshape(x.shape[0] * wide, -1, *x.shape[2:])  # (N in1, in2, h, w)
            inner = through(layer, parts, self.d)  # (N in1, out2, h', w')
            inner = inner.reshape(x.shape[0], wide, *inner.shape[1:])
            return torch.einsum("oi,niphw->nophw", self.c, inner).flatten(1, 2)
        parts = x.reshape(*x.shape[:-1], wide, -1)  # (..., in1, in2)
        return torch.matmul(self.c, torch.matmul(parts, self.d.T)).flatten(-2)

    def delta(self, rows: slice, original: Tensor) -> Tensor:
        high = self.d.shape[0]  # out2: row i of the whole is row i // out2 of C and i % out2 of D
        index = torch.arange(rows.start, rows.stop, device=self.d.device)
        c, d = self.c[index // high].float(), self.d[index % high].float()
        return torch.einsum("ni,n...->ni...", c, d).flatten(1)

    def to(self, device: torch.device, dtype: torch.dtype | None) -> Kron:
        return Kron(self.c.to(device, dtype), self.d.to(device, dtype))


@dataclass(frozen=True)
class Worn:
    """`down` (r, in[, k, k]) and `up` (out, r), scale and gain folded into `up`; r may be 0."""

    name: str
    down: Tensor
    up: Tensor
    extras: tuple[Extra, ...] = ()

    @property
    def rank(self) -> int:
        return int(self.down.shape[0])


def through(layer: nn.Module, x: Tensor, weight: Tensor) -> Tensor:
    """x through the layer's own operation (a convolution's geometry, a norm's statistics, a look-up) with another
    weight and no bias."""
    if isinstance(layer, nn.Conv2d):
        convolved: Tensor = layer._conv_forward(x, weight, None)
        return convolved
    if isinstance(layer, nn.Embedding):
        return F.embedding(x, weight)
    if isinstance(layer, nn.LayerNorm):
        return F.layer_norm(x, layer.normalized_shape, weight, None, layer.eps)
    if isinstance(layer, nn.GroupNorm):
        return F.group_norm(x, layer.num_groups, weight, None, layer.eps)
    return F.linear(x, weight)


@dataclass(frozen=True)
class Place:
    """Where a layer computes, and in what; dtype None: in whatever its input comes, known at the first call."""

    device: torch.device
    dtype: torch.dtype | None

    @classmethod
    def of(cls, layer: nn.Module) -> Place:
        weight = weight_of(layer)
        device = getattr(getattr(layer, "_hf_hook", None), "execution_device", None)
        if device is None or isinstance(device, dict):
            device = torch.device("cpu") if weight.is_meta else weight.device
        plain = weight.is_floating_point() and weight.element_size() >= 2
        return cls(torch.device(device), weight.dtype if plain else None)


def original_weight(layer: nn.Module, path: str) -> Tensor:
    """W0 as it lies, or in fp32 where the layer keeps it in fewer bits: what the layer computes with. From an offload
    hook's own map where the layer's weight is on the meta device.

    Raises LoraError where it cannot be had (gone, or in a form that cannot be read).
    """
    weight = stored(layer, path, "weight")
    assert weight is not None
    return weight.detach() if storage_of(layer) is None else dequantised(layer, weight)


def stored(layer: nn.Module, path: str, name: str) -> Tensor | None:
    """A layer's "weight" or "bias", from an offload hook's own map where the layer has only a meta tensor."""
    tensor: Tensor | None = getattr(layer, name)
    if tensor is None or not tensor.is_meta:
        return tensor
    hook: Any = getattr(layer, "_hf_hook", None)
    if getattr(hook, "weights_map", None) is None:
        raise LoraError(f"{path} is on the meta device and its {name} cannot be found. Open the model again.")
    found: Tensor = hook.weights_map[name]
    return found


@torch.no_grad()
def wear(name: str, delta: Delta, layer: nn.Module, path: str, original: Tensor | None = None) -> Worn:
    """`original` is W0 where the layer is fused at the moment. Tensors stay in the Delta's dtype or fp32."""
    refuse_lost(layer, path)
    place = Place.of(layer)
    out, shape = weight_shape(layer)
    empty = Worn(name, torch.empty(0, *shape, device=place.device), torch.empty(out, 0, device=place.device))
    inner = delta.inner if isinstance(delta, WithMagnitude) else delta
    form = inner.low_rank_form()
    if form is not None:
        down, up = form[0].to(place.device), algebra.flat(form[1].to(place.device))
        down = down.reshape(down.shape[0], *shape)
        if not isinstance(delta, WithMagnitude):
            return balanced(Worn(name, down, up), place)
    if not isinstance(delta, WithMagnitude) and hasattr(delta, "kron_form") and _groups(layer) == 1:
        c, d = (t.to(place.device) for t in delta.kron_form())
        return Worn(name, empty.down, empty.up, (Kron(c, d.reshape(d.shape[0], -1, *shape[1:])),))
    w0 = (original_weight(layer, path) if original is None else original).to(place.device)
    bias = stored(layer, path, "bias")
    if form is not None and isinstance(delta, WithMagnitude):
        magnitude = delta.magnitude.to(place.device, torch.float32)
        if algebra.magnitude_axis(magnitude, w0.shape) == 0:
            g = magnitude.reshape(-1) / algebra.row_norms(w0, down, up, scale=1.0)
            return balanced(
                Worn(
                    name,
                    down,
                    up * g[:, None],
                    (Gain(g - 1, bias if bias is None else bias.to(place.device)),),
                ),
                place,
            )
    dense = delta.to(device=place.device).delta(w0)
    return Worn(name, empty.down, empty.up, (Dense(dense),))


def weight_shape(layer: nn.Module) -> tuple[int, tuple[int, ...]]:
    """(out, (in[, k, k])), from the layer's own figures: a packed weight has another shape. An embedding's rows are
    its words, (num, (dim,)); a norm has one number per channel, (channels, ())."""
    if isinstance(layer, nn.Conv2d):
        return layer.out_channels, (layer.in_channels // layer.groups, *layer.kernel_size)
    if isinstance(layer, nn.Embedding):
        return layer.num_embeddings, (layer.embedding_dim,)
    if isinstance(layer, nn.LayerNorm):
        return layer.normalized_shape[0], layer.normalized_shape[1:]
    if isinstance(layer, nn.GroupNorm):
        return layer.num_channels, ()
    assert isinstance(layer.in_features, int)
    assert isinstance(layer.out_features, int)
    return layer.out_features, (layer.in_features,)


def balanced(worn: Worn, place: Place) -> Worn:
    """Move a power of two (exact) between the factors until their largest entries agree: x Aᵀ can overflow fp16.
    The other dtypes reach to 1e38 and need none of it."""
    if place.dtype is not torch.float16 or worn.rank == 0:
        return worn
    a, b = float(worn.down.abs().max()), float(worn.up.abs().max())
    if a == 0 or b == 0:
        return worn
    shift = round(math.log2(b / a) / 2)
    return Worn(worn.name, worn.down.float() * 2.0**shift, worn.up * 2.0**-shift, worn.extras)


def _groups(layer: nn.Module) -> int:
    return layer.groups if isinstance(layer, nn.Conv2d) else 1
