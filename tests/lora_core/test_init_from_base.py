"""PiSSA, OLoRA and LoftQ against PEFT and naive loops, and the law that their files are for the ORIGINAL base."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import bitsandbytes as bnb
import peft
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_core import LoraConfig, attach, collect, detach, init_from_base
from lora_core.deltas import Delta
from lora_core.deltas.low_rank import LowRank
from lora_core.deltas.magnitude import WithMagnitude
from lora_core.errors import ConfigError
from lora_core.init_from_base import loftq, olora, pissa, residual
from lora_core.loftq import loftq_in_place
from lora_core.quantised import quantise
from lora_core.storages import dequantised, nf4_packed
from lora_core.train_form import LoraForm

INITS = ("pissa", "pissa_niter_4", "olora")
RANK, ALPHA = 4, 6


class Toy(nn.Module):
    """Linear layers with and without a bias, and a strided convolution; widths of whole nf4 blocks."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.pixels = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.one = nn.Linear(128, 64)
        self.two = nn.Linear(64, 96, bias=False)
        with torch.no_grad():  # with principal parts, as trained weights have
            for layer in (self.one, self.two):
                out, inner = layer.weight.shape
                layer.weight += torch.randn(out, 3) @ torch.randn(3, inner) / inner

    def forward(self, image: Tensor) -> Tensor:
        x = self.pixels(image).flatten(1)  # (N, 8 * 4 * 4)
        return self.two(torch.tanh(self.one(x)))


IMAGE = torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(7))
TARGETS = ("one", "two", "pixels")


def config(init: str, **more: Any) -> LoraConfig:
    return LoraConfig(**{"rank": RANK, "alpha": ALPHA, "targets": TARGETS, "init": init, **more})


def train_a_little(form: LoraForm, seed: int = 1) -> None:
    """Moves every trained number by some 5 %, as training would."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in form.parameters():
            p.mul_(1 + 0.05 * torch.randn(p.shape, generator=g))


def with_delta(toy: nn.Module, deltas: Mapping[str, Delta]) -> nn.Module:
    """The oracle: ΔW added to the original weights."""
    dense = copy.deepcopy(toy)
    for path, delta in deltas.items():
        layer = dense.get_submodule(path.removeprefix("unet."))
        with torch.no_grad():
            layer.weight.copy_((layer.weight.float() + delta.delta(layer.weight)).to(layer.weight.dtype))
    return dense


# --- against PEFT ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank_stabilized", [False, True])
@pytest.mark.parametrize("variant", ["lora", "dora"])
@pytest.mark.parametrize("init", INITS)
def test_output_and_gradients_are_pefts(
    monkeypatch: pytest.MonkeyPatch, init: str, variant: str, rank_stabilized: bool
) -> None:
    randomised = torch.svd_lowrank

    def seeded(*args: Any, **more: Any) -> Any:  # PEFT has drawn other numbers before it comes to this
        torch.manual_seed(3)
        return randomised(*args, **more)

    for place in (torch, peft.tuners.lora.layer):
        monkeypatch.setattr(place, "svd_lowrank", seeded)
    ours, theirs = Toy(), Toy()
    wanted = peft.LoraConfig(
        r=RANK,
        lora_alpha=ALPHA,
        target_modules=["one", "two"],
        init_lora_weights=init,
        use_dora=variant == "dora",
        use_rslora=rank_stabilized,
    )
    peft.inject_adapter_in_model(wanted, theirs)
    form = attach(
        ours, config(init, targets=("one", "two"), variant=variant, rank_stabilized=rank_stabilized)
    )
    before = ours(IMAGE)
    torch.testing.assert_close(before, Toy()(IMAGE), rtol=0, atol=0 if variant == "lora" else 1e-5)
    with torch.no_grad():
        for path, own in zip(form.paths, form.layers, strict=True):
            layer = theirs.get_submodule(path.removeprefix("unet."))
            a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            torch.testing.assert_close(own.factors.up @ own.factors.down, b @ a, rtol=1e-5, atol=1e-5)
            a.copy_(own.factors.down * 1.1)  # and from here on the same numbers, signs included
            b.copy_(own.factors.up * 0.9)
            own.factors.down *= 1.1
            own.factors.up *= 0.9
            if variant == "dora":
                layer.lora_magnitude_vector["default"].weight.mul_(1.2)
                own.magnitude *= 1.2
    out, expected = ours(IMAGE), theirs(IMAGE)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    for model_out in (out, expected):
        model_out.square().sum().backward()
    for path, own in zip(form.paths, form.layers, strict=True):
        layer = theirs.get_submodule(path.removeprefix("unet."))
        for mine, peer in (
            (own.factors.down, layer.lora_A["default"].weight),
            (own.factors.up, layer.lora_B["default"].weight),
        ):
            torch.testing.assert_close(mine.grad, peer.grad, rtol=1e-4, atol=1e-4)


def test_a_convolution_is_its_matrix() -> None:
    """PEFT has no such beginning for convolutions; the oracle is the matrix's own."""
    weight = torch.randn(8, 3, 3, 3)
    for begin in (pissa, olora):
        down, up = begin(weight, rank=RANK, scale=1.5)
        a, b = begin(weight.flatten(1), rank=RANK, scale=1.5)
        assert down.shape == (RANK, 3, 3, 3)
        assert up.shape == (8, RANK, 1, 1)
        assert torch.equal(down.flatten(1), a)
        assert torch.equal(up.flatten(1), b)
    left = residual(weight, *pissa(weight, rank=RANK, scale=1.5), scale=1.5).flatten(1)
    values = torch.linalg.svdvals(weight.flatten(1))
    torch.testing.assert_close(torch.linalg.svdvals(left)[: 8 - RANK], values[RANK:], rtol=1e-4, atol=1e-4)


def test_the_randomised_svd_comes_near_the_full_one_and_repeats() -> None:
    weight = torch.randn(96, 64) @ torch.diag(0.8 ** torch.arange(64.0))
    exact = torch.linalg.multi_dot([*reversed(pissa(weight, rank=RANK, scale=1.5))])
    found = []
    for _ in range(2):
        state = torch.get_rng_state()
        down, up = pissa(
            weight, rank=RANK, scale=1.5, iterations=16, generator=torch.Generator().manual_seed(5)
        )
        assert torch.equal(state, torch.get_rng_state())
        found.append(up @ down)
    assert torch.equal(found[0], found[1])
    assert (found[0] - exact).norm() < 1e-2 * exact.norm()


@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize("turns", [1, 3])
def test_loftq_against_a_loop(kind: str, turns: int) -> None:
    """PEFT's own wants a GPU, and forgets to divide by s; bitsandbytes packs and unpacks in both."""
    weight = torch.randn(96, 64) / 8

    def store(w: Tensor) -> Tensor:
        if kind == "int8":
            packed = bnb.nn.Int8Params(w.clone(), has_fp16_weights=False, requires_grad=False).to("cpu")
            return packed.CB.float() * packed.SCB[:, None] / 127
        packed, state = bnb.functional.quantize_4bit(w, blocksize=64, quant_type="nf4")
        return bnb.functional.dequantize_4bit(packed, state)

    layer = nn.Sequential(nn.Linear(64, 96, bias=False))
    with torch.no_grad():
        layer[0].weight.copy_(weight)
    quantise({"unet": layer}, kind)
    form = attach(
        layer,
        config("loftq", targets="all-linear", loftq_iterations=turns),
        originals=lambda component, name: weight,
    )
    part = torch.zeros_like(weight)
    for _ in range(turns):
        q = store(weight - part)
        u, s, vh = torch.linalg.svd(weight - q)
        part = torch.zeros_like(weight)
        for i in range(RANK):
            part += s[i] * torch.outer(u[:, i], vh[i])
    torch.testing.assert_close(dequantised(layer[0]), q, rtol=1e-5, atol=1e-6)
    (own,) = form.layers
    torch.testing.assert_close(own.factors.up @ own.factors.down * own.site.scale, part, rtol=1e-4, atol=1e-5)
    assert (weight - q - part).norm() < (weight - store(weight)).norm()


# --- files are for the original base -----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variant", ["lora", "dora"])
@pytest.mark.parametrize("init", INITS)
def test_the_file_on_the_original_base_is_the_trained_model(
    init: str, variant: str, dtype: torch.dtype
) -> None:
    """fp32: to rounding, 1e-5. bf16: to the rounding of the activations and, in the oracle, of the sum W + ΔW, 2^-8
    each, through three layers."""
    toy = Toy().to(dtype)
    weights = copy.deepcopy(toy.state_dict())
    form = attach(toy, config(init, variant=variant))
    train_a_little(form)
    trained = toy(IMAGE.to(dtype))
    adapter = collect(form)
    assert all(torch.equal(v, weights[k]) for k, v in toy.state_dict().items())  # never written to
    detach(form)
    for delta in adapter.deltas.values():
        low = delta.inner if isinstance(delta, WithMagnitude) else delta
        assert isinstance(low, LowRank)
        assert low.rank == 2 * RANK
        assert low.scale == pytest.approx(ALPHA / RANK)
    found = with_delta(toy, adapter.deltas)(IMAGE.to(dtype))
    error = (found - trained).norm() / trained.norm()
    assert error < (1e-5 if dtype is torch.float32 else 2e-2)
    assert (toy(IMAGE.to(dtype)) - trained).norm() / trained.norm() > 2e-2 or dtype is torch.bfloat16


def test_no_digits_are_lost_in_an_fp16_file() -> None:
    """Against the spelling [B, -B0] [A; A0] of the same difference, whose halves cancel."""
    weight = torch.randn(96, 64)
    down0, up0 = pissa(weight, rank=RANK, scale=1.5)
    down, up = down0 + 1e-3 * torch.randn_like(down0), up0 + 1e-3 * torch.randn_like(up0)
    exact = (up.double() @ down.double() - up0.double() @ down0.double()).float()

    def error(a: Tensor, b: Tensor) -> float:
        return float((b.half().float() @ a.half().float() - exact).norm() / exact.norm())

    ours = error(*init_from_base.algebra.difference(down, up, down0, up0))
    other = error(torch.cat([down, down0]), torch.cat([up, -up0], dim=1))
    assert ours < 1e-3
    assert other > 20 * ours


@pytest.mark.parametrize("variant", ["lora", "dora"])
@pytest.mark.parametrize("init", [*INITS, "loftq"])
@pytest.mark.parametrize("kind", ["nf4", "int8", "fp8"])
def test_on_a_quantised_base(kind: str, init: str, variant: str) -> None:
    """QPiSSA: the base keeps the residual, rounded. The file is for the ORIGINAL base, and its error there is exactly
    what rounding took of the residual; `detach` puts back what the base had, bit for bit."""
    if kind == "fp8":
        toy: nn.Module = Toy()
        originals = copy.deepcopy(toy.state_dict())
        for name in TARGETS:
            layer = toy.get_submodule(name)
            layer.weight.data = layer.weight.data.to(torch.float8_e4m3fn)
    else:
        toy = Toy()
        originals = copy.deepcopy(toy.state_dict())
        quantise({"unet": toy}, kind)
    targets = ("one", "two")
    before = {
        n: (toy.get_submodule(n).weight.data.clone(), dequantised(toy.get_submodule(n))) for n in targets
    }
    form = attach(
        toy,
        config(init, targets=targets, variant=variant),
        originals=lambda component, name: originals[name],
    )
    train_a_little(form)
    adapter = collect(form)
    for name, own in zip(targets, form.layers, strict=True):
        weight, delta = originals[f"{name}.weight"], adapter.deltas[f"unet.{name}"]
        low = delta.inner if isinstance(delta, WithMagnitude) else delta
        part = own.factors.start_up @ own.factors.start_down * own.site.scale
        kept = dequantised(own.site.layer)
        now = kept + own.factors.up @ own.factors.down * own.site.scale  # what is trained, V
        lost = weight - part - kept  # what rounding took of the residual, and LoftQ's rank r could not hold
        torch.testing.assert_close(weight + low.delta(weight) - now, lost, rtol=1e-4, atol=1e-5)
        error = (lost.norm() / weight.norm()).item()
        assert 0 < error < {"nf4": 0.1, "int8": 0.02, "fp8": 0.04}[kind]
        # less than what rounding the whole weight takes
        assert lost.norm() < (weight - before[name][1]).norm() or init == "olora"
    detach(form)
    for name in targets:
        layer = toy.get_submodule(name)
        assert torch.equal(layer.weight.data.view(torch.uint8), before[name][0].view(torch.uint8))
        assert torch.equal(dequantised(layer), before[name][1])


# --- LoftQ in place ----------------------------------------------------------------------------------------


def packed_toy() -> tuple[Toy, dict[str, Tensor], LoraForm, Callable[[str, str], Tensor]]:
    toy = Toy()
    originals = copy.deepcopy(toy.state_dict())
    quantise({"unet": toy}, "nf4")
    form = attach(toy, config("gaussian", targets=("one", "two"), variant="dora"))
    return toy, originals, form, lambda component, name: originals[name]


def test_in_place_a_layer_is_accepted_or_rolled_back() -> None:
    toy, originals, form, read = packed_toy()
    wanted, before = Toy()(IMAGE), toy(IMAGE)
    errors, asked = [(before - wanted).norm().item()], []
    state = copy.deepcopy(form.state_dict())
    parameters = [id(p) for p in form.parameters()]

    def refuse(form: LoraForm, path: str) -> bool:
        asked.append(path)
        return False

    assert loftq_in_place(form, read, accept=refuse) == ()
    assert asked == ["unet.one", "unet.two"]
    assert form.state_dict().keys() == state.keys()
    assert all(torch.equal(v, state[k]) for k, v in form.state_dict().items())

    def better(form: LoraForm, path: str) -> bool:
        error = (toy(IMAGE) - wanted).norm().item()
        errors.append(error)
        return error < errors[0]

    assert loftq_in_place(form, read, accept=better) == ("unet.one", "unet.two")
    assert errors[0] > errors[1] > errors[2]
    assert [id(p) for p in form.parameters()] == parameters
    for name, own in zip(("one", "two"), form.layers, strict=True):
        lost = originals[f"{name}.weight"] - dequantised(own.site.layer)
        u, s, vh = torch.linalg.svd(lost, full_matrices=False)
        expected = u[:, :RANK] * s[:RANK] @ vh[:RANK]
        torch.testing.assert_close(
            own.factors.up @ own.factors.down * own.site.scale, expected, rtol=1e-4, atol=1e-5
        )
    train_a_little(form)
    for path, delta in collect(form).deltas.items():
        assert isinstance(delta, WithMagnitude)
        assert delta.inner.rank == 2 * RANK, path  # type: ignore[attr-defined]


def test_loftq_wants_a_quantised_base_and_its_originals() -> None:
    toy = Toy()
    before = copy.deepcopy(toy.state_dict())
    with pytest.raises(ConfigError, match="one is not quantised"):
        attach(toy, config("loftq", targets=("one",)))
    form = attach(toy, config("gaussian", targets=("one",)))
    with pytest.raises(ConfigError, match="no layer of this LoRA is quantised"):
        loftq_in_place(form, lambda component, name: before[name])
    detach(form)
    quantise({"unet": toy}, "nf4")
    with pytest.raises(ConfigError, match="Give `originals`"):
        attach(toy, config("loftq", targets=("one",)))


def test_a_failed_attach_puts_the_residuals_back() -> None:
    toy = Toy()
    originals = copy.deepcopy(toy.state_dict())
    quantise({"unet": toy}, "nf4")
    before = dequantised(toy.one)

    def read(component: str, name: str) -> Tensor:
        if name.startswith("two"):
            raise ConfigError("gone")
        return originals[name]

    with pytest.raises(ConfigError, match="gone"):
        attach(toy, config("pissa", targets=("one", "two")), originals=read)
    assert torch.equal(dequantised(toy.one), before)
    assert not any(m._forward_hooks for m in toy.modules())


# --- words -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("init", ["eva", "corda", "lora_ga", "orthogonal", "mica"])
def test_pefts_others_are_refused_by_name(init: str) -> None:
    with pytest.raises(ConfigError, match=f'init = "{init}" is one of PEFT'):
        LoraConfig(init=init)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"init": "pisa"}, 'Did you mean "pissa"'),
        ({"init": "pissa_niter_x"}, "is unknown"),
        ({"init": "loftq", "loftq_iterations": 0}, "at least 1"),
        ({"init": "pissa", "loftq_iterations": 3}, 'about init = "loftq"'),
        ({"init": "pissa", "kind": "loha"}, "leave init out"),
    ],
)
def test_wrong_words(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        LoraConfig(**wrong)


def test_a_file_to_start_from_is_another_beginning() -> None:
    toy = Toy()
    form = attach(toy, config("gaussian"))
    adapter = collect(form)
    detach(form)
    with pytest.raises(ConfigError, match="another beginning"):
        attach(toy, config("pissa"), start=adapter)


def test_dropout_falls_on_what_is_trained_alone() -> None:
    """As in PEFT: the residual and what was taken out of it see the full input."""
    toy = Toy()
    form = attach(toy, config("pissa", targets=("two",), dropout=0.5))
    (own,) = form.layers
    x = torch.randn(3, 64)
    torch.manual_seed(4)
    out = toy.two(x)
    torch.manual_seed(4)
    dropped = F.dropout(x, 0.5)
    part = own.factors.start_up @ own.factors.start_down * own.site.scale
    trained = own.factors.up @ own.factors.down * own.site.scale
    expected = x @ (toy.two.weight - part).T + dropped @ trained.T
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("where", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_norms_may_be_computed_elsewhere(where: str) -> None:
    plain, other = Toy(), Toy()
    forms = [
        attach(plain, config("random", variant="dora"), generator=torch.Generator().manual_seed(1)),
        attach(
            other,
            config("random", variant="dora"),
            generator=torch.Generator().manual_seed(1),
            norm_device=where,
        ),
    ]
    torch.testing.assert_close(other(IMAGE), plain(IMAGE), rtol=1e-5, atol=1e-5)
    assert all(p.device.type == "cpu" for p in forms[1].parameters())


def test_nf4_is_packed_from_the_same_numbers_in_any_dtype() -> None:
    weight = torch.randn(96, 64).bfloat16()
    packed = [nf4_packed(w, torch.device("cpu")) for w in (weight, weight.float())]
    assert torch.equal(packed[0].data, packed[1].data)


def test_loftq_function_returns_what_is_to_be_kept() -> None:
    weight = torch.randn(32, 16)
    assert torch.equal(loftq(weight, torch.round, rank=RANK, scale=1.5)[2], weight)
    _, _, kept = loftq(weight, torch.round, rank=RANK, scale=1.5, iterations=2)
    first = loftq(weight, torch.round, rank=RANK, scale=1.5)
    torch.testing.assert_close(kept, weight - 1.5 * first[1] @ first[0])
