"""Wide frozen convolutions over few pixels, on a CPU, as one matrix product.

oneDNN brings the whole weight into an order of its own on every call. For an SD 1.5's 2560 x 1280 x 3 x 3 over the
4 x 4 latents of a 256-pixel picture that takes four times as long as the product itself, in bf16 as in fp32, and
another copy of the weight. Such layers multiply the weight as it lies.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

WEIGHTS = 2**21  # fewer are in order sooner than their product is
PIXELS = 128  # of a batch's outputs: with more, oneDNN's order pays


def multiplied(layer: nn.Conv2d, x: Tensor) -> Tensor | None:
    """The frozen layer's output, or None where the library's way is the quicker."""
    weight = layer.weight
    plain = layer.groups == 1 and layer.dilation == (1, 1)
    wide = layer.kernel_size != (1, 1) and weight.numel() >= WEIGHTS
    here = x.device.type == weight.device.type == "cpu" and x.dtype == weight.dtype
    if not (plain and wide and here) or x.shape[0] * _outputs(layer, x) > PIXELS:
        return None
    out: Tensor = _Multiplied.apply(x, layer)  # type: ignore[no-untyped-call]
    return out


def _outputs(layer: nn.Conv2d, x: Tensor) -> int:
    height, width = _sides(layer, x.shape)
    return height * width


def _sides(layer: nn.Conv2d, shape: torch.Size) -> tuple[int, int]:
    height, width = (
        (side + 2 * pad - kernel) // stride + 1
        for side, pad, kernel, stride in zip(
            shape[2:], _pads(layer), layer.kernel_size, layer.stride, strict=True
        )
    )
    return height, width


def _pads(layer: nn.Conv2d) -> tuple[int, int]:
    assert not isinstance(layer.padding, str)  # as `_can` has seen
    height, width = layer.padding
    return height, width


class _Multiplied(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: nn.Conv2d) -> Tensor:
        ctx.layer, ctx.shape = layer, x.shape
        out = F.linear(_windows(layer, x), _matrix(layer), layer.bias)
        out = out.view(len(x), *_sides(layer, x.shape), -1).permute(0, 3, 1, 2)
        return out if _pixels_outside(layer) else out.contiguous()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (grad,), layer = grads, ctx.layer
        rows = grad.permute(0, 2, 3, 1).reshape(-1, grad.shape[1])
        return _added_up(layer, rows @ _matrix(layer), ctx.shape), None


def _pixels_outside(layer: nn.Conv2d) -> bool:
    """Whether the weight lies as (out, k, k, in): channels last."""
    return layer.weight.is_contiguous(memory_format=torch.channels_last)


def _matrix(layer: nn.Conv2d) -> Tensor:
    """(out, k·k·in), or (out, in·k·k), whichever is the weight as it lies."""
    weight = layer.weight.permute(0, 2, 3, 1) if _pixels_outside(layer) else layer.weight
    return weight.reshape(len(weight), -1)


def _windows(layer: nn.Conv2d, x: Tensor) -> Tensor:
    """(N, in, H, W) -> (N·h·w, k·k·in): for each output what it sees, in the matrix's order."""
    (top, left), (kh, kw), (down, right) = _pads(layer), layer.kernel_size, layer.stride
    padded = F.pad(x, (left, left, top, top))
    seen = padded.unfold(2, kh, down).unfold(3, kw, right)  # (N, in, h, w, k, k)
    order = (0, 2, 3, 4, 5, 1) if _pixels_outside(layer) else (0, 2, 3, 1, 4, 5)
    return seen.permute(order).reshape(-1, layer.in_channels * kh * kw)


def _added_up(layer: nn.Conv2d, windows: Tensor, shape: torch.Size) -> Tensor:
    """The other way: (N·h·w, k·k·in) -> (N, in, H, W), each pixel the sum over the windows that see it, in fp32."""
    (top, left), (kh, kw), (down, right) = _pads(layer), layer.kernel_size, layer.stride
    n, channels, height, width = shape
    h, w = _sides(layer, shape)
    last = _pixels_outside(layer)
    seen = windows.view((n, h, w, kh, kw, channels) if last else (n, h, w, channels, kh, kw))
    total = torch.zeros(n, height + 2 * top, width + 2 * left, channels)
    for i in range(kh):
        for j in range(kw):
            part = seen[:, :, :, i, j] if last else seen[..., i, j]
            total[:, i : i + down * (h - 1) + 1 : down, j : j + right * (w - 1) + 1 : right] += part
    inside = total[:, top : top + height, left : left + width].permute(0, 3, 1, 2).to(windows.dtype)
    return inside if last else inside.contiguous()
