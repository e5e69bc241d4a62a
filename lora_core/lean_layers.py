"""Frozen layers that keep less for the backward pass than the library's, while a LoRA is attached.

a convolution     nothing: its input's gradient asks for the weight alone. The library keeps the input.
GEGLU             the projection, of which the gate's GELU is made once more. The library keeps that too, a third
                  of what the feed-forward layers keep.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from diffusers.models.activations import GEGLU
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.grad import conv2d_input
from transformers.activations import QuickGELUActivation

from lora_core.small_convs import multiplied
from lora_core.storages import Undo, storage_of


def keep_less(models: Mapping[str, nn.Module], trained: Collection[nn.Module] = ()) -> list[Undo]:
    """Let such layers of `models` be called so -> the way back. `trained`: what a LoRA is added to the output of."""
    undo: list[Undo] = []
    for model in models.values():
        for layer in model.modules():
            for part, call in _calls(layer, trained):
                if "forward" not in part.__dict__:
                    part.forward = partial(call, part)
                    undo.append(partial(part.__dict__.pop, "forward"))
    return undo


def _calls(
    layer: nn.Module, trained: Collection[nn.Module]
) -> Iterator[tuple[nn.Module, Callable[..., Tensor]]]:
    if isinstance(layer, nn.Conv2d) and _plain(layer):
        yield layer, _convolve
    elif type(layer) is GEGLU:
        yield layer, _gate
    elif type(layer) is QuickGELUActivation:
        yield layer, _quick_gelu
    elif type(layer) is ResnetBlock2D and layer.time_embedding_norm == "default":
        inner: list[Any] = [layer.norm1, layer.norm2, layer.nonlinearity]
        if type(layer.nonlinearity) is nn.SiLU and not any(part in trained for part in inner):
            yield from zip(inner, (_normalise, _normalise, _activate), strict=True)


def _plain(layer: nn.Conv2d) -> bool:
    return layer.padding_mode == "zeros" and not isinstance(layer.padding, str) and storage_of(layer) is None


def _convolve(layer: nn.Conv2d, x: Tensor) -> Tensor:
    if x.dim() != 4 or any(p.requires_grad for p in layer.parameters(recurse=False)):
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
        back: Tensor = conv2d_input(  # type: ignore[no-untyped-call]
            ctx.shape, weight, grad, layer.stride, layer.padding, layer.dilation, layer.groups
        )
        return back.to(ctx.dtype), None


def _gate(layer: GEGLU, x: Tensor) -> Tensor:
    out: Tensor = _Gated.apply(layer.proj(x))  # type: ignore[no-untyped-call]
    return out


class _Gated(torch.autograd.Function):
    """(..., 2·n) -> (..., n): a · gelu(b)."""

    @staticmethod
    def forward(ctx: Any, projected: Tensor) -> Tensor:
        ctx.save_for_backward(projected)
        kept, gate = projected.chunk(2, dim=-1)
        return kept * F.gelu(gate)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (grad,), (projected,) = grads, ctx.saved_tensors
        kept, gate = projected.chunk(2, dim=-1)
        return torch.cat([grad * F.gelu(gate), torch.ops.aten.gelu_backward(grad * kept, gate)], dim=-1)


def _quick_gelu(_: nn.Module, x: Tensor) -> Tensor:
    out: Tensor = _QuickGelu.apply(x)  # type: ignore[no-untyped-call]
    return out


class _QuickGelu(torch.autograd.Function):
    """x · sigmoid(1.702 x)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * torch.sigmoid(1.702 * x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (grad,), (x,) = grads, ctx.saved_tensors
        share = torch.sigmoid(1.702 * x)
        back: Tensor = grad * share + 1.702 * torch.ops.aten.sigmoid_backward(grad * x, share)
        return back


def _normalise(norm: nn.GroupNorm, x: Tensor) -> Tensor:
    """With the SiLU that follows."""
    out: Tensor = _Normalised.apply(x, norm)  # type: ignore[no-untyped-call]
    return out


def _activate(activation: nn.SiLU, x: Tensor) -> Tensor:
    """Of the time embedding (N, C); pictures (N, C, h, w) come out of `_normalise`."""
    return x if x.dim() == 4 else F.silu(x)


class _Normalised(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, norm: nn.GroupNorm) -> Tensor:
        ctx.norm = norm
        kind = x.device.type
        ctx.cast = partial(
            torch.autocast, kind, torch.get_autocast_dtype(kind), enabled=torch.is_autocast_enabled(kind)
        )
        ctx.save_for_backward(x)
        return F.silu(type(norm).forward(norm, x))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        with torch.enable_grad(), ctx.cast():
            again = x.detach().requires_grad_()
            out = F.silu(type(ctx.norm).forward(ctx.norm, again))
        return torch.autograd.grad(out, again, grads)[0], None
