"""Gradients through layers that keep their weights in fp8 between calls.

diffusers' layerwise casting exchanges a parameter's data around each call, so that autograd, in the backward pass,
meets the fp8 weight where it kept the wide one, and stops. While a LoRA is attached, such layers are called so instead:
the weight stays fp8, is widened for the call and, in the backward pass, once more. Nothing of it is kept in between,
nor is the input: the gradient of a frozen layer's input, g W, asks for W alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.grad import conv2d_input

from lora_core.storages import Fp8, Undo
from lora_core.worn import through


class _Widened(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Any) -> Tensor:
        ctx.layer, ctx.shape, ctx.dtype = layer, x.shape, x.dtype
        out: Tensor = through(layer, x, layer.weight.to(x.dtype))
        if layer.bias is None:
            return out
        bias = layer.bias.to(out.dtype)
        return out.add_(bias.reshape(-1, 1, 1) if isinstance(layer, nn.Conv2d) else bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (grad,), layer = grads, ctx.layer
        weight = layer.weight.to(grad.dtype)
        if not isinstance(layer, nn.Conv2d):
            return (grad @ weight).to(ctx.dtype), None
        back: Tensor = conv2d_input(  # type: ignore[no-untyped-call]
            ctx.shape, weight, grad, layer.stride, layer.padding, layer.dilation, layer.groups
        )
        return back.to(ctx.dtype), None


def let_gradients_through(models: Mapping[str, nn.Module]) -> list[Undo]:
    """Call every fp8 linear layer and convolution of `models` so that it can be trained through -> the way back."""
    undo: list[Undo] = []
    storage = Fp8()
    for model in models.values():
        for layer in model.modules():
            if isinstance(layer, nn.Linear | nn.Conv2d) and storage.holds(layer):
                undo.append(partial(_call_as_before, layer, layer.__dict__.get("forward")))
                layer.forward = partial(_call, layer)  # type: ignore[method-assign]
    return undo


def _call(layer: nn.Module, x: Tensor) -> Tensor:
    out: Tensor = _Widened.apply(x, layer)  # type: ignore[no-untyped-call]
    return out


def _call_as_before(layer: Any, before: Callable[..., Any] | None) -> None:
    if before is None:
        del layer.forward
    else:
        layer.forward = before
