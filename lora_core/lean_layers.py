"""Frozen layers that keep less for the backward pass than the library's, while a LoRA is attached.

    a convolution        nothing: its input's gradient asks for the weight alone. The library keeps the input.
    GEGLU                its input, an eighth of the projection, which is made once more; where it is trained, the
                         projection, and the gate alone is made once more. The library keeps one and a half of it.
    GroupNorm and SiLU   of a residual block: the norm's input. The library keeps the SiLU's too.
    quick GELU           of CLIP: its input. The library keeps the sigmoid too.

Of an SD 1.5 with a LoRA on its attention layers that is 115 in place of 220 MB at 256 pixels in bf16, for about one
hundredth of a step's time. What is made once more goes by torch's own backward kernels, called by hand: a pass of
autograd inside a backward pass costs the host several times the kernels of so small a layer, and on a GPU small steps
wait for the host.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, cast

import torch
from diffusers.models.activations import GEGLU
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.activations import QuickGELUActivation

from lora_core.small_convs import multiplied
from lora_core.storages import Undo, storage_of

Call = Callable[[Tensor], Tensor]
aten = torch.ops.aten
QUICK = 1.702  # transformers.activations.QuickGELUActivation


def keep_less(models: Mapping[str, nn.Module]) -> list[Undo]:
    """Let such layers of `models` be called so -> the way back."""
    undo: list[Undo] = []
    for model in models.values():
        for layer in model.modules():
            for part, call in _calls(layer):
                if "forward" not in part.__dict__:
                    part.forward = call
                    undo.append(partial(part.__dict__.pop, "forward"))
    return undo


def _calls(layer: nn.Module) -> Iterator[tuple[Any, Call]]:
    if isinstance(layer, nn.Conv2d) and _plain(layer):
        yield layer, partial(_convolve, layer)
    elif type(layer) is GEGLU:
        yield layer, partial(_gate, layer)
    elif type(layer) is QuickGELUActivation:
        yield layer, _quick_gelu
    elif type(layer) is ResnetBlock2D and _activates_its_norms(layer):
        both, norms = _NormAndActivation(), (layer.norm1, layer.norm2)
        for norm in norms:
            yield norm, partial(both.normalise, cast(nn.GroupNorm, norm))
        yield layer.nonlinearity, both.activate


def _activates_its_norms(block: ResnetBlock2D) -> bool:
    """By SiLU, with nothing in between."""
    return type(block.nonlinearity) is nn.SiLU and block.time_embedding_norm == "default"


# --- convolutions --------------------------------------------------------------------------------------------


def _plain(layer: nn.Conv2d) -> bool:
    return layer.padding_mode == "zeros" and not isinstance(layer.padding, str) and storage_of(layer) is None


def _convolve(layer: nn.Conv2d, x: Tensor) -> Tensor:
    bias = layer.bias
    if x.dim() != 4 or layer.weight.requires_grad or (bias is not None and bias.requires_grad):
        return type(layer).forward(layer, x)
    product = multiplied(layer, x)
    if product is not None:
        return product
    out: Tensor = _Convolved.apply(x, layer)  # type: ignore[no-untyped-call]
    return out


class _Convolved(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: nn.Conv2d) -> Tensor:
        ctx.layer, ctx.shape, ctx.dtype = layer, x.shape, x.dtype
        return type(layer).forward(layer, x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (grad,), layer = grads, ctx.layer
        weight = layer.weight.to(grad.dtype)  # autocast has done as much on the way there
        x = grad.new_empty(1).expand(ctx.shape)  # of which the shape alone is read
        way = (layer.stride, layer.padding, layer.dilation, False, (0, 0), layer.groups)
        back = aten.convolution_backward(grad, x, weight, None, *way, (True, False, False))[0]
        return back.to(ctx.dtype), None


# --- gates ---------------------------------------------------------------------------------------------------


def _gate(layer: GEGLU, x: Tensor) -> Tensor:
    proj = layer.proj
    if proj._forward_hooks:  # a LoRA, which has to see its input once
        out: Tensor = _Gated.apply(proj(x))  # type: ignore[no-untyped-call]
    elif type(proj) is nn.Linear and storage_of(proj) is None and "forward" not in proj.__dict__:
        out = _ProjectedAndGated.apply(x, layer)  # type: ignore[no-untyped-call]
    else:  # a weight in fewer bits, whose own call makes it whole
        out = _Again.apply(x, partial(_project_and_gate, layer))  # type: ignore[no-untyped-call]
    return out


def _project_and_gate(layer: GEGLU, x: Tensor) -> Tensor:
    projected: Tensor = layer.proj(x)
    return _gated(projected)


def _gated(projected: Tensor) -> Tensor:
    """(..., 2·n) -> (..., n): a · gelu(b)."""
    kept, gate = projected.chunk(2, dim=-1)
    return kept * F.gelu(gate)


def _gated_back(projected: Tensor, grad: Tensor) -> Tensor:
    kept, gate = projected.chunk(2, dim=-1)
    return torch.cat([grad * F.gelu(gate), aten.gelu_backward(grad * kept, gate)], dim=-1)


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, projected: Tensor) -> Tensor:
        ctx.save_for_backward(projected)
        return _gated(projected)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (projected,) = ctx.saved_tensors
        return _gated_back(projected, grads[0])


class _ProjectedAndGated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: GEGLU) -> Tensor:
        projected: Tensor = layer.proj(x)
        ctx.proj, ctx.dtype = layer.proj, projected.dtype
        ctx.save_for_backward(x)
        return _gated(projected)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (x,), proj, dtype = ctx.saved_tensors, ctx.proj, ctx.dtype
        weight = proj.weight.to(dtype)  # as autocast has
        projected = F.linear(x.to(dtype), weight, None if proj.bias is None else proj.bias.to(dtype))
        return (_gated_back(projected, grads[0]) @ weight).to(x.dtype), None


class _Again(torch.autograd.Function):
    """call(x), of which the backward pass is given x alone and calls once more."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, call: Call) -> Tensor:
        kind = x.device.type
        ctx.call, ctx.cast = call, (kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))
        ctx.save_for_backward(x)
        return call(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        with torch.enable_grad(), torch.autocast(*ctx.cast):
            leaf = x.detach().requires_grad_()
            out = ctx.call(leaf)
        return torch.autograd.grad(out, leaf, grads)[0], None


# --- norms and activations -----------------------------------------------------------------------------------


class _NormAndActivation:
    """Of a residual block. A norm to whose output something is added is called as ever, and so is its activation."""

    def __init__(self) -> None:
        self._activated = False  # what the activation is about to be given

    def normalise(self, norm: nn.GroupNorm, x: Tensor) -> Tensor:
        self._activated = not norm._forward_hooks
        if not self._activated:
            return type(norm).forward(norm, x)
        out: Tensor = _Normalised.apply(x, norm)  # type: ignore[no-untyped-call]
        return out

    def activate(self, x: Tensor) -> Tensor:
        """Of what comes out of a norm, and of the time embedding."""
        done, self._activated = self._activated, False
        return x if done else F.silu(x)


class _Normalised(torch.autograd.Function):
    """And activated by SiLU."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, norm: nn.GroupNorm) -> Tensor:
        normal = type(norm).forward(norm, x)
        ctx.norm, ctx.dtype = norm, normal.dtype
        ctx.save_for_backward(x)
        return F.silu(normal)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (x,), norm = ctx.saved_tensors, ctx.norm
        weight, bias, given = norm.weight, norm.bias, x
        if x.dtype != ctx.dtype:  # autocast, on some devices
            weight, bias, x = (None if t is None else t.to(ctx.dtype) for t in (weight, bias, x))
        # in the order in which torch.group_norm takes it: as it is on a CPU alone
        last = x.device.type == "cpu" and x.is_contiguous(memory_format=torch.channels_last)
        order = torch.channels_last if last else torch.contiguous_format
        x = x.contiguous(memory_format=order)
        n, channels = x.shape[:2]
        sizes = (n, channels, x.numel() // (n * channels), norm.num_groups)
        normal, mean, rstd = torch.native_group_norm(x, weight, bias, *sizes, norm.eps)
        grad = aten.silu_backward(grads[0], normal).contiguous(memory_format=order)
        back = aten.native_group_norm_backward(grad, x, mean, rstd, weight, *sizes, (True, False, False))[0]
        return back.to(given.dtype), None


def _quick_gelu(x: Tensor) -> Tensor:
    out: Tensor = _QuickGELU.apply(x)  # type: ignore[no-untyped-call]
    return out


class _QuickGELU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * torch.sigmoid(QUICK * x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        ((x,), (grad,)) = ctx.saved_tensors, grads
        share = torch.sigmoid(QUICK * x)
        back: Tensor = grad * share + QUICK * aten.sigmoid_backward(grad * x, share)
        return back
