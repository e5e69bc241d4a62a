"""What a layer wears beside the stacked factors: terms that are added to its output (see worn)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_core import algebra


class Extra(Protocol):
    """A term beside the stacked factors; it has one slot of the weights."""

    def term(self, layer: nn.Module, x: Tensor, base_out: Tensor) -> Tensor:
        """What weight 1 adds; shaped like `base_out`, or such that it broadcasts to it."""
        ...

    def delta(self, rows: slice, original: Tensor) -> Tensor:
        """The same as a change of the weight: fp32, these rows of it, flat (n, in*k*k). `original` is all of W0,
        (out, in*k*k), in its own dtype."""
        ...

    def to(self, device: torch.device, dtype: torch.dtype | None) -> Extra: ...


@dataclass(frozen=True)
class Gain:
    """(g - 1) * W x for a DoRA or a scale of the outputs; W x = base_out - bias. The bias is a copy: an offloaded layer
    has none at hand. What else changes the bias is a term of its own (Shift), and added to base_out only later."""

    gain: Tensor  # (out,) g - 1
    bias: Tensor | None  # (out,)

    def term(self, layer: nn.Module, x: Tensor, base_out: Tensor) -> Tensor:
        return _plain(layer, base_out, self.bias) * along_outputs(self.gain, layer, base_out)

    def delta(self, rows: slice, original: Tensor) -> Tensor:
        return self.gain[rows, None] * original[rows].float()

    def to(self, device: torch.device, dtype: torch.dtype | None) -> Gain:
        return Gain(self.gain.to(device, dtype), _moved(self.bias, device, dtype))


@dataclass(frozen=True)
class InputGain:
    """W (v * x) for a scale of the inputs: through the layer's own forward once more, which asks nobody how its weight
    is kept (packed, cast, offloaded)."""

    gain: Tensor  # (in,) v
    bias: Tensor | None  # (out,)

    def term(self, layer: nn.Module, x: Tensor, base_out: Tensor) -> Tensor:
        spread = (-1, 1, 1) if isinstance(layer, nn.Conv2d) else (-1,)
        # forward, not a call: a call would run the hook that this is part of
        return _plain(layer, layer.forward(x * self.gain.reshape(spread)), self.bias)

    def delta(self, rows: slice, original: Tensor) -> Tensor:
        places = original.shape[1] // len(self.gain)  # k*k
        return original[rows].float() * self.gain.repeat_interleave(places)

    def to(self, device: torch.device, dtype: torch.dtype | None) -> InputGain:
        return InputGain(self.gain.to(device, dtype), _moved(self.bias, device, dtype))


@dataclass(frozen=True)
class Turn:
    """g R (W x) - W x for OFT and BOFT: the outputs are turned, and ΔW is never made. See algebra.turned."""

    stages: tuple[tuple[Tensor, Tensor | None], ...]
    rescale: Tensor | None  # (out,)
    bias: Tensor | None  # (out,)

    def term(self, layer: nn.Module, x: Tensor, base_out: Tensor) -> Tensor:
        outputs = 1 if isinstance(layer, nn.Conv2d) else -1
        first = _plain(layer, base_out, self.bias).movedim(outputs, 0)  # (out, ...)
        own = self.stages[0][0].dtype  # autocast: the layer's own dtype, as for x
        turned = algebra.turned(first.flatten(1).to(own), self.stages, self.rescale)
        return turned.reshape(first.shape).movedim(0, outputs)

    def delta(self, rows: slice, original: Tensor) -> Tensor:
        # rows far apart meet in a butterfly, so all of them are turned for some
        return algebra.turned(original.float(), self.stages, self.rescale)[rows]

    def to(self, device: torch.device, dtype: torch.dtype | None) -> Turn:
        stages = tuple(
            (blocks.to(device, dtype), _moved(order, device, None)) for blocks, order in self.stages
        )
        return Turn(stages, _moved(self.rescale, device, dtype), _moved(self.bias, device, dtype))


@dataclass(frozen=True)
class Shift:
    """A change of the bias. It has no `delta`: what folds a Worn folds its `bias` into the layer's own."""

    change: Tensor  # (out,)

    def term(self, layer: nn.Module, x: Tensor, base_out: Tensor) -> Tensor:
        return along_outputs(self.change, layer, base_out)

    def delta(self, rows: slice, original: Tensor) -> Tensor:
        return torch.zeros_like(original[rows], dtype=torch.float32)

    def to(self, device: torch.device, dtype: torch.dtype | None) -> Shift:
        return Shift(self.change.to(device, dtype))


@dataclass(frozen=True)
class Dense:
    """ΔW as it is. The layer's output is linear in its weight, norms and embeddings included."""

    change: Tensor  # of the layer's weight's shape

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


def along_outputs(vector: Tensor, layer: nn.Module, out: Tensor) -> Tensor:
    """(out,) shaped to meet the layer's output `out`: (N, out, ...) of convolutions and group norms, else (.., out)."""
    if isinstance(layer, nn.Conv2d | nn.GroupNorm):
        return vector.reshape(-1, *[1] * (out.dim() - 2))
    return vector


def gained(out: Tensor, gain: Tensor, offset: Tensor | None, layer: nn.Module) -> Tensor:
    """gain ⊙ out + offset for each output, gain and offset (out,), in the dtype of the layer's output `out`.

    It is the affine map of a batch norm whose mean is 0 and whose variance is 1. That library call reads half precision
    and a gain in fp32 as they are, and its backward pass sums the gain's gradient in fp32: one pass there and one back,
    where a product of two dtypes makes a wide copy of either side first.
    """
    channels_second = isinstance(layer, nn.Conv2d | nn.GroupNorm)
    flat = out if channels_second else out.reshape(-1, len(gain))
    dtype = out.dtype if out.dtype.itemsize > 2 else torch.float32
    gain, offset = gain.to(dtype), None if offset is None else offset.to(dtype)
    mean, half = (
        torch.zeros_like(gain),
        torch.full_like(gain, 0.5),
    )  # and ½ more: torch 2.12 wants an eps above 0
    return F.batch_norm(flat, mean, half, gain, offset, training=False, eps=0.5).view(out.shape)


def _plain(layer: nn.Module, out: Tensor, bias: Tensor | None) -> Tensor:
    """W x."""
    return out if bias is None else out - along_outputs(bias, layer, out)


def _moved(tensor: Tensor | None, device: torch.device, dtype: torch.dtype | None) -> Tensor | None:
    return None if tensor is None else tensor.to(device, dtype)
