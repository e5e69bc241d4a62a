"""Wide convolutions over few pixels give what the library's convolution gives, forward and back."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from lora_core import LoraConfig, attach, detach, small_convs
from lora_core.small_convs import multiply_small_convs


def wide(
    *,
    stride: int = 1,
    padding: int = 1,
    kernel: int = 3,
    bias: bool = True,
    last: bool = True,
    wide: int = 640,
) -> nn.Conv2d:
    torch.manual_seed(0)
    layer = nn.Conv2d(wide, wide, kernel, stride, padding, bias=bias).requires_grad_(False)
    return layer.to(memory_format=torch.channels_last) if last else layer


def run(layer: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    x = x.detach().clone().requires_grad_()
    out = layer(x)
    weights = torch.linspace(-1, 1, out.numel()).reshape(out.shape)
    (out * weights).sum().backward()
    assert x.grad is not None
    return out.detach(), x.grad


GEOMETRIES: list[dict[str, int]] = [
    *({"last": last, "bias": bias} for last, bias in itertools.product((True, False), repeat=2)),
    *({"last": last, "stride": 2} for last in (True, False)),
    {"padding": 0},
    {"padding": 2, "kernel": 5},
    {"padding": 0, "kernel": 2, "stride": 2, "wide": 768},
]


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize("shape", [(1, 4, 4), (2, 5, 7)], ids=str)
def test_the_product_is_the_convolution(geometry: dict[str, int], shape: tuple[int, int, int]) -> None:
    layer = wide(**geometry)
    x = torch.randn(shape[0], layer.in_channels, *shape[1:])
    expected, expected_grad = run(layer, x)
    undo = multiply_small_convs({"unet": layer})
    assert len(undo) == 1
    found, grad = run(layer, x)
    node = layer(x.requires_grad_()).grad_fn
    assert "Multiplied" in type(node).__name__  # it was not the library that was compared with itself
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(grad, expected_grad, atol=2e-5, rtol=1e-5)
    undo[0]()
    again, _ = run(layer, x)
    assert torch.equal(again, expected)
    assert "forward" not in layer.__dict__


def test_in_bf16_it_is_about_as_near_to_the_truth_as_the_library_is() -> None:
    """Backwards each pixel is the sum of nine parts that were rounded on their own, where the library rounds once: an
    error of 9 ** 0.5 / 3 beside 1 of the same size."""
    layer = wide()
    x = torch.randn(1, 640, 4, 4).bfloat16().float()
    layer.weight.data = layer.weight.data.bfloat16().float()
    truth, truth_grad = run(layer, x)
    layer.bfloat16()
    theirs, theirs_grad = run(layer, x.bfloat16())
    multiply_small_convs({"unet": layer})
    ours, ours_grad = run(layer, x.bfloat16())
    for own, peer, exact in ((ours, theirs, truth), (ours_grad, theirs_grad, truth_grad)):
        assert (own.float() - exact).norm() <= 1.5 * (peer.float() - exact).norm()


@pytest.mark.parametrize(
    "layer",
    [wide(wide=320), wide(kernel=1, padding=0, wide=1600), nn.Conv2d(2048, 2048, 3, groups=2)],
    ids=["narrow", "one pixel", "grouped"],
)
def test_other_layers_are_left_alone(layer: nn.Conv2d) -> None:
    assert multiply_small_convs({"unet": layer}) == []


def test_over_many_pixels_the_library_does_it() -> None:
    layer = wide()
    multiply_small_convs({"unet": layer})
    side = int(small_convs.PIXELS**0.5) + 1
    x = torch.randn(1, 640, side, side, requires_grad=True)
    assert "Convolution" in type(layer(x).grad_fn).__name__


def test_it_lasts_as_long_as_a_lora_is_attached() -> None:
    model = nn.ModuleDict({"wide": wide(), "to_q": nn.Linear(4, 4)})
    form = attach({"unet": model}, LoraConfig(rank=2, targets=("to_q",)))
    assert "forward" in model["wide"].__dict__
    detach(form)
    assert "forward" not in model["wide"].__dict__
