"""The trainable form against PEFT, and its laws: the identity at birth, nothing left behind."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from torch import nn

from lora_core import LoraConfig, attach, collect, detach
from lora_core.errors import ConfigError, NothingMatched
from lora_core.train_form import LoraForm
from lora_core.trainable.layer import TrainableLayer
from lora_core.trainable.low_rank import TrainableLowRank
from tests.small_models import small_pipeline


class Toy(nn.Module):
    """A linear and two convolutions, one of them strided, with and without bias."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(12, 10)
        self.plain = nn.Linear(10, 10, bias=False)
        self.conv1 = nn.Conv2d(3, 10, 3, padding=1, stride=2)
        self.conv2 = nn.Conv2d(10, 10, 1, bias=False)

    def forward(self, x: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
        low = self.plain(torch.tanh(self.proj(x)))
        return low + self.conv2(torch.tanh(self.conv1(image))).mean((2, 3))


def low_rank(layer: nn.Module) -> TrainableLowRank:
    assert isinstance(layer, TrainableLayer)
    assert isinstance(layer.factors, TrainableLowRank)
    return layer.factors


TARGETS = ("proj", "plain", "conv1", "conv2")


def pair(variant: str, rank_stabilized: bool = False) -> tuple[Toy, LoraForm, peft.PeftModel]:
    """The same toy under our form and under PEFT, with equal non-trivial factors; alpha is not rank."""
    torch.manual_seed(3)
    toy = Toy()
    theirs = peft.get_peft_model(
        copy.deepcopy(toy),
        peft.LoraConfig(
            r=4,
            lora_alpha=6,
            target_modules=list(TARGETS),
            use_dora=variant == "dora",
            use_rslora=rank_stabilized,
        ),
    )
    form = attach(
        toy, LoraConfig(rank=4, alpha=6, targets=TARGETS, variant=variant, rank_stabilized=rank_stabilized)
    )
    for path, own in zip(form.paths, form.layers, strict=True):
        layer = theirs.base_model.model.get_submodule(path.removeprefix("unet."))
        assert isinstance(own, TrainableLayer)
        factors = low_rank(own)
        with torch.no_grad():
            factors.down.normal_(std=0.3)
            factors.up.normal_(std=0.3)
            layer.lora_A["default"].weight.copy_(factors.down)
            layer.lora_B["default"].weight.copy_(factors.up)
            if own.magnitude is not None:
                own.magnitude.mul_(torch.rand_like(own.magnitude) + 0.5)
                magnitude = layer.lora_magnitude_vector["default"].weight
                magnitude.copy_(own.magnitude.reshape(magnitude.shape))
    return toy, form, theirs


@pytest.mark.parametrize("variant", ["lora", "dora"])
@pytest.mark.parametrize("rank_stabilized", [False, True])
def test_forward_and_gradients_equal_peft(variant: str, rank_stabilized: bool) -> None:
    toy, form, theirs = pair(variant, rank_stabilized)
    x, image = torch.randn(5, 12), torch.randn(5, 3, 8, 8)
    ours, reference = toy(x, image), theirs(x, image)
    torch.testing.assert_close(ours, reference, rtol=1e-5, atol=1e-5)
    ours.square().sum().backward()
    reference.square().sum().backward()
    for path, own in zip(form.paths, form.layers, strict=True):
        layer = theirs.base_model.model.get_submodule(path.removeprefix("unet."))
        assert isinstance(own, TrainableLayer)
        factors = low_rank(own)
        torch.testing.assert_close(
            factors.down.grad, layer.lora_A["default"].weight.grad, rtol=1e-4, atol=1e-4
        )
        torch.testing.assert_close(factors.up.grad, layer.lora_B["default"].weight.grad, rtol=1e-4, atol=1e-4)
        if own.magnitude is not None:
            want = layer.lora_magnitude_vector["default"].weight.grad
            assert own.magnitude.grad is not None
            torch.testing.assert_close(own.magnitude.grad.reshape(want.shape), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("variant", ["lora", "dora"])
@pytest.mark.parametrize("init", ["gaussian", "kaiming"])
def test_no_op_at_birth(variant: str, init: str) -> None:
    toy = Toy()
    x, image = torch.randn(5, 12), torch.randn(5, 3, 8, 8)
    before = toy(x, image)
    attach(toy, LoraConfig(rank=3, alpha=7, targets=TARGETS, variant=variant, init=init))
    torch.testing.assert_close(toy(x, image), before, rtol=1e-5, atol=1e-5)


def test_gaussian_has_diffusers_spread() -> None:
    form = attach(nn.Sequential(nn.Linear(4000, 32)), LoraConfig(rank=16, alpha=4, targets="all-linear"))
    (layer,) = form.layers
    assert low_rank(layer).down.std().item() == pytest.approx(1 / 16, rel=0.02)
    assert not low_rank(layer).up.any()


@pytest.mark.parametrize("variant", ["lora", "dora"])
@pytest.mark.parametrize("rank_stabilized", [False, True])
def test_collected_delta_is_what_was_trained(variant: str, rank_stabilized: bool) -> None:
    """Adding the collected ΔW to the bare weights gives the attached model's output: trained = dense."""
    toy, form, _ = pair(variant, rank_stabilized)
    x, image = torch.randn(5, 12), torch.randn(5, 3, 8, 8)
    attached = toy(x, image)
    adapter = collect(form)
    detach(form)
    with torch.no_grad():
        for path, delta in adapter.deltas.items():
            weight = toy.get_submodule(path.removeprefix("unet.")).weight
            weight += delta.delta(weight.clone())
    torch.testing.assert_close(toy(x, image), attached, rtol=1e-5, atol=1e-5)


def test_detach_leaves_no_trace() -> None:
    toy = Toy()
    toy.proj.weight.requires_grad_(False)
    flags = {n: p.requires_grad for n, p in toy.named_parameters()}
    tree = [n for n, _ in toy.named_modules()]
    form = attach(toy, LoraConfig(rank=2, alpha=5, targets=TARGETS))
    assert not any(p.requires_grad for p in toy.parameters())
    assert {id(p) for p in form.parameters()}.isdisjoint(id(p) for p in toy.parameters())
    detach(form)
    assert {n: p.requires_grad for n, p in toy.named_parameters()} == flags
    assert [n for n, _ in toy.named_modules()] == tree
    assert not any(m._forward_hooks for m in toy.modules())


def test_start_from_continues_the_same_function_whatever_the_scale() -> None:
    toy, form, _ = pair("dora")
    x, image = torch.randn(5, 12), torch.randn(5, 3, 8, 8)
    trained, adapter = toy(x, image), collect(form)
    detach(form)
    attach(toy, LoraConfig(rank=4, alpha=11, targets=TARGETS, variant="dora"), start=adapter)
    torch.testing.assert_close(toy(x, image), trained, rtol=1e-5, atol=1e-5)


def test_start_from_another_shape_is_refused_and_nothing_is_attached() -> None:
    toy, form, _ = pair("lora")
    adapter = collect(form)
    detach(form)
    for wrong in (
        LoraConfig(rank=8, alpha=3, targets=TARGETS),
        LoraConfig(rank=4, alpha=3, targets=("proj",)),
        LoraConfig(rank=4, alpha=3, targets=TARGETS, variant="dora"),
    ):
        with pytest.raises(ConfigError, match="start from"):
            attach(toy, wrong, start=adapter)
        assert not any(m._forward_hooks for m in toy.modules())


def test_disabled_is_the_base() -> None:
    toy, form, _ = pair("lora")
    x, image = torch.randn(5, 12), torch.randn(5, 3, 8, 8)
    worn = toy(x, image)
    with form.disabled():
        bare = toy(x, image)
    detach(form)
    assert torch.equal(bare, toy(x, image))
    assert not torch.allclose(bare, worn)


def test_dropout_only_while_training() -> None:
    toy = Toy()
    form = attach(toy, LoraConfig(rank=4, alpha=9, targets=TARGETS, init="random", dropout=0.5))
    x, image = torch.randn(5, 12), torch.randn(5, 3, 8, 8)
    assert not torch.equal(toy(x, image), toy(x, image))
    form.eval()
    assert torch.equal(toy(x, image), toy(x, image))


@pytest.mark.parametrize(
    ("targets", "expected"),
    [("attention", 128), (("attention", "feed-forward"), 160), ("conv", 63), ("all-linear", 184)],
)
def test_groups_find_stable_diffusions_layers(targets: str | tuple[str, ...], expected: int) -> None:
    """Counted by hand from SD 1.5's configuration: 16 transformer blocks with 8 attention and 2 feed-forward
    layers; 22 resnets with 2 convolutions, 13 shortcuts (the real widths have one more), 6 resamplers."""
    form = attach(small_pipeline("sd1").unet, LoraConfig(rank=2, alpha=1, targets=targets))
    try:
        assert len(form.paths) == expected
    finally:
        detach(form)


def test_targets_that_match_nothing_name_near_misses() -> None:
    with pytest.raises(NothingMatched, match=r"to_q"):
        attach(small_pipeline("sd1").unet, LoraConfig(targets=("to_qq",)))


def test_rank_and_alpha_patterns() -> None:
    form = attach(
        Toy(),
        LoraConfig(rank=2, alpha=3, targets=TARGETS, rank_pattern={"conv.*": 5}, alpha_pattern={"proj": 9}),
    )
    layers = zip(form.paths, form.layers, strict=True)
    found = {
        path: (low_rank(layer).site.rank, low_rank(layer).site.config.alpha_at(path.removeprefix("unet.")))
        for path, layer in layers
    }
    assert found == {"unet.proj": (2, 9), "unet.plain": (2, 3), "unet.conv1": (5, 3), "unet.conv2": (5, 3)}


@pytest.mark.parametrize(
    ("dtype", "within"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-4)], ids=["fp32", "bf16"]
)
def test_the_norms_of_dora_are_in_fp32_whatever_the_forward_pass_is_in(
    dtype: torch.dtype, within: float
) -> None:
    """Of a bf16 weight but for W Aᵀ, see row_norms_together: in bf16 they would be wrong by 4e-3."""
    torch.manual_seed(0)
    layer = nn.Linear(256, 64).to(dtype)
    form = attach(
        {"unet": nn.ModuleDict({"to_q": layer})},
        LoraConfig(rank=8, alpha=8, targets=("to_q",), variant="dora"),
    )
    (own,) = form.layers
    factors = low_rank(own)
    with torch.no_grad():
        factors.up.normal_()
    with torch.autocast("cpu", torch.bfloat16):
        layer(torch.randn(2, 256))
    assert isinstance(own, TrainableLayer)
    assert own.norm is not None
    changed = layer.weight.double() + factors.up.double() @ factors.down.double()
    torch.testing.assert_close(own.norm[1].double(), changed.norm(dim=1), rtol=within, atol=0)
