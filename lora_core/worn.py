"""One LoRA's share of one layer, made ready to be worn: factors, and for some kinds a term of their own.

`wear` turns a Delta into a `Worn` without forming ΔW where that can be avoided:

    LoRA, LoCon, Tucker, LoHa      factors, ΔW = up down exactly; on embeddings too
    DoRA on the output axis        W + w (m V/|V| - W): the factors carry g = m/|V|, and a Gain adds (g - 1) W x
    LoKr                           Kron: two small products by reshape
    (IA)³                          a Gain v for the outputs, an InputGain for the inputs
    OFT, BOFT                      Turn: R (W x) in place of (R W) x
    GLoRA                          factors again, one half of them made of W
    what has no such form          Dense: ΔW run through the layer's own operation: a whole change, on norms and
                                   embeddings everything else; an input-axis DoRA, a magnitude around LoHa or LoKr,
                                   a whole weight, a turn of the inputs
    a change of the bias           Worn.bias, beside any of them or alone
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lora_core import algebra
from lora_core.adapter import weight_of
from lora_core.deltas import Delta
from lora_core.deltas.bias import WithBias
from lora_core.deltas.glora import Generalized
from lora_core.deltas.ia3 import Scaling
from lora_core.deltas.kronecker import Kronecker
from lora_core.deltas.magnitude import WithMagnitude
from lora_core.deltas.oft import Rotation
from lora_core.errors import LoraError
from lora_core.storages import dequantised, refuse_lost, storage_of
from lora_core.terms import Dense, Extra, Gain, InputGain, Kron, Turn
from lora_core.terms import through as through

# the layers that can wear something
WEARERS = (nn.Linear, nn.Conv2d, nn.Embedding, nn.LayerNorm, nn.GroupNorm)


@dataclass(frozen=True)
class Worn:
    """`down` (r, in[, k, k]) and `up` (out, r), scale and gain folded into `up`; r may be 0. Of an embedding (num, dim)
    they are (r, dim) and (num, r)."""

    name: str
    down: Tensor
    up: Tensor
    extras: tuple[Extra, ...] = ()
    bias: Tensor | None = None  # the change of the layer's bias, (out,)

    @property
    def rank(self) -> int:
        return int(self.down.shape[0])


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
    at = _At(layer, path, original)
    change, bias = (delta.inner, delta.bias_change(at.bias)) if isinstance(delta, WithBias) else (delta, None)
    parts = _Parts() if change is None else next(filter(None, (form(change, at) for form in _forms(layer))))
    down = torch.empty(0, *at.shape, device=at.device) if parts.down is None else parts.down
    up = torch.empty(at.out, 0, device=at.device) if parts.up is None else parts.up
    worn = Worn(name, down, up, parts.extras, None if bias is None else bias.to(at.device))
    return balanced(worn, at.place)


class _At:
    """A layer, and W0 only for those who ask for it: a packed one has to be unpacked."""

    def __init__(self, layer: nn.Module, path: str, original: Tensor | None) -> None:
        self.layer, self.path, self._original = layer, path, original
        self.place = Place.of(layer)
        self.device = self.place.device
        self.out, self.shape = weight_shape(layer)

    @property
    def w0(self) -> Tensor:
        w0 = original_weight(self.layer, self.path) if self._original is None else self._original
        return w0.to(self.device)

    @property
    def bias(self) -> Tensor | None:
        bias = stored(self.layer, self.path, "bias")
        return None if bias is None else bias.detach().to(self.device)


class _Parts(NamedTuple):
    down: Tensor | None = None
    up: Tensor | None = None
    extras: tuple[Extra, ...] = ()


def _as_factors(delta: Delta, at: _At) -> _Parts | None:
    form = delta.low_rank_form()
    return None if form is None else _Parts(*_laid(form, at))


def _as_gain(delta: Delta, at: _At) -> _Parts | None:
    """A DoRA along the outputs around what has factors."""
    form = delta.inner.low_rank_form() if isinstance(delta, WithMagnitude) else None
    if form is None or not isinstance(delta, WithMagnitude):
        return None
    magnitude, w0 = delta.magnitude.to(at.device, torch.float32), at.w0
    if algebra.magnitude_axis(magnitude, w0.shape) != 0:
        return None
    down, up = _laid(form, at)
    g = magnitude.reshape(-1) / algebra.row_norms(w0, down, up, scale=1.0)
    return _Parts(down, up * g[:, None], (Gain(g - 1, at.bias),))


def _as_kron(delta: Delta, at: _At) -> _Parts | None:
    if not isinstance(delta, Kronecker) or _groups(at.layer) > 1:
        return None
    c, d = (t.to(at.device) for t in delta.kron_form())
    return _Parts(extras=(Kron(c, d.reshape(d.shape[0], -1, *at.shape[1:])),))


def _as_scale(delta: Delta, at: _At) -> _Parts | None:
    if not isinstance(delta, Scaling) or _groups(at.layer) > 1:
        return None
    vector, on_input = delta.scale_form()
    return _Parts(extras=((InputGain if on_input else Gain)(vector.to(at.device), at.bias),))


def _as_turn(delta: Delta, at: _At) -> _Parts | None:
    if not isinstance(delta, Rotation) or delta.on_input:
        return None
    stages, rescale = delta.to(device=at.device).turn_form()
    return _Parts(extras=(Turn(tuple(stages), rescale, at.bias),))


def _as_factors_on_weight(delta: Delta, at: _At) -> _Parts | None:
    form = delta.to(device=at.device).form_on(at.w0) if isinstance(delta, Generalized) else None
    return None if form is None else _Parts(*_laid(form, at))


def _as_dense(delta: Delta, at: _At) -> _Parts:
    w0 = at.w0 if delta.needs_original else torch.empty(at.out, *at.shape, device="meta")
    return _Parts(extras=(Dense(delta.to(device=at.device).delta(w0)),))


_FORMS = (_as_factors, _as_gain, _as_kron, _as_scale, _as_turn, _as_factors_on_weight, _as_dense)


def _forms(layer: nn.Module) -> tuple[Callable[[Delta, _At], _Parts | None], ...]:
    """Most forms are about W x; a look-up and a norm are no such product."""
    return _FORMS if isinstance(layer, nn.Linear | nn.Conv2d) else (_as_factors, _as_dense)


def _laid(form: tuple[Tensor, Tensor], at: _At) -> tuple[Tensor, Tensor]:
    """On the layer's device: down (r, in[, k, k]) with the layer's own dimensions, up (out, r)."""
    down, up = form[0].to(at.device), algebra.flat(form[1].to(at.device))
    return down.reshape(down.shape[0], *at.shape), up


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
    return replace(worn, down=worn.down.float() * 2.0**shift, up=worn.up * 2.0**-shift)


def _groups(layer: nn.Module) -> int:
    return layer.groups if isinstance(layer, nn.Conv2d) else 1
