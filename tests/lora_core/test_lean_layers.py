"""Layers that keep less for the backward pass give what the library's layers give, forward and back."""

from __future__ import annotations

import itertools
from functools import partial
from typing import Any

import pytest
import torch
from diffusers.models.activations import GEGLU
from diffusers.models.resnet import ResnetBlock2D
from torch import nn
from transformers.activations import QuickGELUActivation

from lora_core import LoraConfig, attach, detach, small_convs, train_form
from lora_core.lean_layers import keep_less


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
    undo = keep_less({"unet": layer})
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
    keep_less({"unet": layer})
    ours, ours_grad = run(layer, x.bfloat16())
    for own, peer, exact in ((ours, theirs, truth), (ours_grad, theirs_grad, truth_grad)):
        assert (own.float() - exact).norm() <= 1.5 * (peer.float() - exact).norm()


OTHERS: list[dict[str, Any]] = [
    {"kernel_size": 3, "padding": 1},
    {"kernel_size": 1},
    {"kernel_size": 3, "stride": 2, "padding": 1, "bias": False},
    {"kernel_size": 3, "groups": 2},
    {"kernel_size": 3, "dilation": 2, "padding": 2},
]


@pytest.mark.parametrize("geometry", OTHERS, ids=str)
@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize(
    ("weights", "pixels"),
    [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.float32, torch.bfloat16)],
    ids=["fp32", "bf16", "bf16 by autocast"],
)
def test_other_convolutions_keep_nothing_and_give_the_same(
    geometry: dict[str, Any], last: bool, weights: torch.dtype, pixels: torch.dtype
) -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(8, 12, **geometry).requires_grad_(False).to(weights)
    if last:
        layer = layer.to(memory_format=torch.channels_last)
    x = torch.randn(2, 8, 10, 9, dtype=weights)
    with torch.autocast("cpu", torch.bfloat16, enabled=weights != pixels):
        expected, expected_grad = run(layer, x)
        assert kept(layer, x) >= x.numel() * torch.finfo(pixels).bits // 8
        (undo,) = keep_less({"unet": layer})
        found, grad = run(layer, x)
        assert kept(layer, x) == 0
    assert found.dtype == expected.dtype == pixels
    assert torch.equal(found, expected)
    torch.testing.assert_close(
        grad, expected_grad, atol=2e-6, rtol=1.6e-2 if pixels != torch.float32 else 1e-5
    )
    undo()
    assert "forward" not in layer.__dict__


def kept(layer: nn.Module, x: torch.Tensor) -> int:
    """Bytes that autograd holds of one call, but for the layer's own."""
    own = {p.untyped_storage().data_ptr() for p in layer.parameters()}
    found: dict[int, int] = {}

    def keep(t: torch.Tensor) -> torch.Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
        return t

    alive = []
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        alive.append(layer(x.requires_grad_()))
    return sum(found.values())


@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "a LoRA on its projection"])
@pytest.mark.parametrize(
    ("weights", "pixels"),
    [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.float32, torch.bfloat16)],
    ids=["fp32", "bf16", "bf16 by autocast"],
)
def test_a_gate_keeps_its_input_or_a_trained_projection(
    trained: bool, weights: torch.dtype, pixels: torch.dtype
) -> None:
    torch.manual_seed(0)
    layer = GEGLU(16, 64).requires_grad_(False).to(weights)
    x = torch.randn(2, 40, 16, dtype=weights)
    with torch.autocast("cpu", torch.bfloat16, enabled=weights != pixels):
        expected, expected_grad = run(layer, x)
        before = kept(layer, x)
        (undo,) = keep_less({"unet": layer})
        hook = layer.proj.register_forward_hook(lambda *_: None) if trained else None  # as a LoRA's
        found, grad = run(layer, x)
        after = kept(layer, x)
    assert torch.equal(found, expected)
    torch.testing.assert_close(
        grad, expected_grad, atol=1e-6, rtol=1.6e-2 if pixels != torch.float32 else 1e-5
    )
    projected = 2 * 40 * 128 * pixels.itemsize
    assert before >= projected * 3 // 2
    cast = (
        layer.proj.weight.numel() * pixels.itemsize if weights != pixels else 0
    )  # which a linear layer keeps
    assert after == (projected + cast if trained else x.nbytes)
    undo()
    if hook is not None:
        hook.remove()
    assert kept(layer, x) >= projected * 3 // 2 or weights != pixels


class LinearOfItsOwn(nn.Linear):
    """As of a weight in fewer bits: what it multiplies by is known to its own call alone."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, 2 * self.weight, self.bias)


def test_a_gate_whose_projection_has_a_way_of_its_own_goes_by_it() -> None:
    torch.manual_seed(0)
    layer, x = GEGLU(16, 64), torch.randn(2, 40, 16)
    layer.proj = LinearOfItsOwn(16, 128)
    layer.requires_grad_(False)
    expected, expected_grad = run(layer, x)
    keep_less({"unet": layer})
    found, grad = run(layer, x)
    assert torch.equal(found, expected)
    torch.testing.assert_close(grad, expected_grad, atol=1e-6, rtol=1e-5)
    assert kept(layer, x) == x.nbytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_quick_gelu_keeps_its_input_alone(dtype: torch.dtype) -> None:
    layer, x = QuickGELUActivation(), torch.randn(2, 40, 16, dtype=dtype)
    expected, expected_grad = run(layer, x)
    (undo,) = keep_less({"text_encoder": layer})
    found, grad = run(layer, x)
    assert torch.equal(found, expected)
    assert torch.equal(grad, expected_grad)
    assert kept(layer, x) == x.nbytes
    undo()
    assert kept(layer, x) == 2 * x.nbytes


def block(**options: Any) -> ResnetBlock2D:
    torch.manual_seed(0)
    made = ResnetBlock2D(in_channels=16, out_channels=16, temb_channels=24, groups=4, **options)
    return made.requires_grad_(False)


def through(made: ResnetBlock2D, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """With a gradient to the time embedding too, as where its layers are trained."""
    time = torch.linspace(-2, 2, 24).expand(len(x), 24).clone().requires_grad_()
    out, grad = run(BlockAt(made, time), x)
    assert time.grad is not None
    return out, torch.cat([grad.flatten(), time.grad.flatten()])


class BlockAt(nn.Module):
    def __init__(self, made: ResnetBlock2D, time: torch.Tensor) -> None:
        super().__init__()
        self.made, self.time = made, time

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.made(x, self.time)
        return out


@pytest.mark.parametrize(
    "options", [{}, {"up": True}, {"down": True}, {"time_embedding_norm": "scale_shift"}], ids=str
)
@pytest.mark.parametrize("cast", [False, True], ids=["fp32", "bf16 by autocast"])
def test_a_residual_block_gives_the_same(options: dict[str, Any], cast: bool) -> None:
    made, x = block(**options), torch.randn(2, 16, 8, 8)
    with torch.autocast("cpu", torch.bfloat16, enabled=cast):
        expected, expected_grad = through(made, x)
        before = kept(BlockAt(made, torch.ones(2, 24)), x)
        undo = keep_less({"unet": made})
        found, grad = through(made, x)
        after = kept(BlockAt(made, torch.ones(2, 24)), x)
    assert torch.equal(found, expected)
    torch.testing.assert_close(grad, expected_grad, atol=1e-6, rtol=1.6e-2 if cast else 1e-5)
    assert after <= before * 0.8
    for step in undo:
        step()
    assert not [inner for inner in made.modules() if "forward" in inner.__dict__]


class NormOnACard(nn.GroupNorm):
    """As autocast has it there: in fp32, whatever it is given and whatever its weights are in."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight, bias = self.weight.float(), self.bias.float()
        return nn.functional.group_norm(x.float(), self.num_groups, weight, bias, self.eps)


def test_a_norm_that_autocast_takes_to_fp32_gives_the_same() -> None:
    made, x = block().bfloat16(), torch.randn(2, 16, 8, 8, dtype=torch.bfloat16)
    for name in ("norm1", "norm2"):
        norm = NormOnACard(4, 16, eps=1e-6).bfloat16().requires_grad_(False)
        with torch.no_grad():
            norm.weight.add_(0.3 * torch.randn(16))
            norm.bias.add_(0.3 * torch.randn(16))
        setattr(made, name, norm)
    with torch.autocast("cpu", torch.bfloat16):
        expected, expected_grad = through(made, x)
        keep_less({"unet": made})
        found, grad = through(made, x)
    assert torch.equal(found, expected)
    assert torch.equal(grad, expected_grad)


def test_a_block_whose_norm_is_trained_normalises_as_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is added to a norm's output belongs before the SiLU."""
    x, time, found = torch.randn(1, 16, 8, 8), torch.randn(1, 24), []
    for lean in (True, False):
        if not lean:
            monkeypatch.setattr(train_form, "keep_less", lambda models: [])
        model = nn.ModuleDict({"block": block()})
        form = attach({"unet": model}, LoraConfig(rank=2, targets=("conv1",), modules_to_save=("norm2",)))
        assert model["block"].norm2._forward_hooks
        assert ("forward" in model["block"].conv1.__dict__) == lean
        torch.manual_seed(1)
        with torch.no_grad():
            for p in form.parameters():
                p.add_(torch.randn_like(p))
        found.append(model["block"](x, time))
    assert torch.equal(*found)
    assert not torch.equal(found[0], block()(x, time))


def test_what_is_worn_on_a_norm_later_is_heard_before_the_silu() -> None:
    """Also where somebody else calls the norm, as accelerate's offloading does."""
    x, time, made = torch.randn(1, 16, 8, 8), torch.randn(1, 24), block()
    hook = made.norm1.register_forward_hook(lambda norm, given, out: out - 1)
    expected = made(x, time)
    hook.remove()
    plain = made(x, time)
    keep_less({"unet": made})
    assert torch.equal(made(x, time), plain)
    made.norm1.register_forward_hook(lambda norm, given, out: out - 1)
    assert torch.equal(made(x, time), expected)
    other = block()
    other.norm2.forward = partial(nn.GroupNorm.forward, other.norm2)
    keep_less({"unet": other})
    assert torch.equal(other(x, time), plain)


def test_a_layer_that_is_trained_itself_is_called_as_ever() -> None:
    layer = nn.Conv2d(4, 4, 3)
    keep_less({"unet": layer})
    layer(torch.randn(1, 4, 5, 5)).sum().backward()
    assert layer.weight.grad is not None
    assert layer.bias is not None
    assert layer.bias.grad is not None


@pytest.mark.parametrize(
    "options", [{"padding": "same"}, {"padding": 1, "padding_mode": "circular"}], ids=str
)
def test_other_paddings_are_left_alone(options: dict[str, Any]) -> None:
    assert keep_less({"unet": nn.Conv2d(4, 4, 3, **options)}) == []


@pytest.mark.parametrize(
    "layer",
    [wide(wide=320), wide(kernel=1, padding=0, wide=1600), nn.Conv2d(2048, 2048, 3, groups=2)],
    ids=["narrow", "one pixel", "grouped"],
)
def test_only_wide_layers_are_products(layer: nn.Conv2d) -> None:
    layer.requires_grad_(False)
    keep_less({"unet": layer})
    x = torch.randn(1, layer.in_channels, 4, 4, requires_grad=True)
    assert "Convolved" in type(layer(x).grad_fn).__name__


def test_over_many_pixels_the_library_does_it() -> None:
    layer = wide()
    keep_less({"unet": layer})
    side = int(small_convs.PIXELS**0.5) + 1
    x = torch.randn(1, 640, side, side, requires_grad=True)
    assert "Convolved" in type(layer(x).grad_fn).__name__


def test_it_lasts_as_long_as_a_lora_is_attached() -> None:
    model = nn.ModuleDict({"wide": wide(), "to_q": nn.Linear(4, 4)})
    form = attach({"unet": model}, LoraConfig(rank=2, targets=("to_q",)))
    assert "forward" in model["wide"].__dict__
    detach(form)
    assert "forward" not in model["wide"].__dict__
