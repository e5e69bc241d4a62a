"""Several LoRAs into one and to another rank: PEFT's numbers, and laws where PEFT is wrong or has no opinion."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

from lora_core import Adapter, combine, resize
from lora_core.combination import METHODS
from lora_core.deltas import Delta
from lora_core.deltas.kronecker import Kronecker
from lora_core.deltas.low_rank import LowRank
from lora_core.deltas.magnitude import WithMagnitude
from lora_core.errors import ConfigError, WrongFamily
from lora_core.lower_rank import LOST

RANK, ALPHA = 4, 7.0
NAMES = ("linear", "strided", "pointwise")


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(24, 18)
        self.strided = nn.Conv2d(6, 10, 3, stride=2, padding=1)
        self.pointwise = nn.Conv2d(12, 9, 1)


def noise(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def peft_model(*, rank: int = RANK) -> Any:
    """PEFT's side: two LoRAs, "ink" and "cat", with random factors."""
    torch.manual_seed(0)
    config = peft.LoraConfig(r=rank, lora_alpha=ALPHA, target_modules=list(NAMES))
    model = peft.get_peft_model(Model(), config, adapter_name="ink")
    model.add_adapter("cat", config)
    for at, adapter in enumerate(("ink", "cat")):
        for i, name in enumerate(NAMES):
            layer = getattr(model.base_model.model, name)
            for j, factor in enumerate((layer.lora_A[adapter].weight, layer.lora_B[adapter].weight)):
                factor.data = (
                    noise(*factor.shape, seed=100 * at + 10 * i + j) * 0.25
                )  # changes of up to about 1
    return model


def layer_of(model: Any, name: str) -> Any:
    return getattr(model.base_model.model, name)


def ours(model: Any, adapter: str, **changes: Any) -> Adapter:
    deltas: dict[str, Delta] = {}
    for name in NAMES:
        layer = layer_of(model, name)
        deltas[f"unet.{name}"] = LowRank(
            layer.lora_A[adapter].weight.detach().clone(),
            layer.lora_B[adapter].weight.detach().clone(),
            ALPHA,
        )
    return Adapter(deltas, **{"family": "sd1", "name": adapter, **changes})


@pytest.fixture
def same_masks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Both sides prune at random alike: a mask is made from the shape and the number of the call with that shape."""
    calls: dict[tuple[int, ...], int] = {}

    def bernoulli(chance: Tensor, **_: Any) -> Tensor:
        shape = tuple(sorted(chance.flatten(1).shape))  # PEFT prunes dense convolutions unflattened
        calls[shape] = calls.get(shape, 0) + 1
        drawn = torch.rand(chance.numel(), generator=torch.Generator().manual_seed(calls[shape] % 2))
        return (drawn.reshape(chance.shape) < chance).to(chance.dtype)

    monkeypatch.setattr(torch, "bernoulli", bernoulli)
    return


def dense(adapter: Adapter, model: Any, name: str) -> Tensor:
    return adapter.deltas[f"unet.{name}"].delta(layer_of(model, name).weight.detach())


def rank(adapter: Adapter, path: str) -> int:
    delta = adapter.deltas[path]
    assert isinstance(delta, LowRank)
    return delta.rank


PRUNED = [m for m in METHODS if m not in ("cat", "linear", "svd")]


@pytest.mark.usefixtures("same_masks")
@pytest.mark.parametrize("weights", [(0.8, 0.5), (1.2, -0.7)])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_gives_what_peft_gives(method: Any, weights: tuple[float, float]) -> None:
    model = peft_model()
    options: dict[str, Any] = {"density": 0.6} if method in PRUNED else {}
    model.add_weighted_adapter(["ink", "cat"], list(weights), "made", combination_type=method, **options)
    one = combine([(ours(model, "ink"), weights[0]), (ours(model, "cat"), weights[1])], method, **options)
    for name in NAMES:
        theirs = layer_of(model, name).get_delta_weight("made")
        assert theirs.abs().max() > 0.1
        torch.testing.assert_close(dense(one, model, name), theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("method", "options", "theirs"),
    [
        (
            "ties",
            {"majority": "frequency", "density": 0.4},
            {"majority_sign_method": "frequency", "density": 0.4},
        ),
        (
            "ties_svd",
            {"majority": "frequency", "density": 0.4},
            {"majority_sign_method": "frequency", "density": 0.4},
        ),
        ("magnitude_prune", {"density": 1.5}, {"density": 1.5}),
        ("svd", {"rank": 2}, {"svd_rank": 2}),
        ("svd", {"rank": 3, "clamp": 0.9}, {"svd_rank": 3, "svd_clamp": 0.9}),
        (
            "ties_svd",
            {"rank": 6, "density": 0.5, "clamp": 0.99},
            {"svd_rank": 6, "density": 0.5, "svd_clamp": 0.99},
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:The density")
def test_every_option_does_what_peft_s_does(method: Any, options: Any, theirs: Any) -> None:
    model = peft_model()
    model.add_weighted_adapter(["ink", "cat"], [0.8, 0.5], "made", combination_type=method, **theirs)
    one = combine([(ours(model, "ink"), 0.8), (ours(model, "cat"), 0.5)], method, **options)
    for name in NAMES:
        torch.testing.assert_close(
            dense(one, model, name), layer_of(model, name).get_delta_weight("made"), atol=1e-5, rtol=1e-5
        )


def test_cat_is_the_sum_and_linear_is_not() -> None:
    model = peft_model()
    pairs = [(ours(model, "ink"), 0.8), (ours(model, "cat"), -0.5)]
    for name in NAMES:
        total = sum(w * dense(a, model, name) for a, w in pairs)
        torch.testing.assert_close(dense(combine(pairs), model, name), total, atol=1e-5, rtol=1e-5)
        assert (dense(combine(pairs, "linear"), model, name) - total).abs().max() > 0.1
        torch.testing.assert_close(
            dense(combine(pairs, "svd", rank=8), model, name), total, atol=1e-5, rtol=1e-5
        )


def test_layers_that_only_one_has_are_its_own() -> None:
    model = peft_model()
    a, b = ours(model, "ink"), ours(model, "cat")
    del b.deltas["unet.linear"]
    for method in ("cat", "linear", "svd", "ties"):
        one = combine([(a, 0.8), (b, 0.5)], method, **({"density": 1.0} if method == "ties" else {}))
        torch.testing.assert_close(
            dense(one, model, "linear"), 0.8 * dense(a, model, "linear"), atol=1e-5, rtol=1e-5
        )


def test_svd_is_the_best_of_its_rank_and_says_what_it_lost() -> None:
    model = peft_model()
    pairs = [(ours(model, "ink"), 0.8), (ours(model, "cat"), 0.5)]
    one = combine(pairs, "svd", rank=3)
    lost = whole = 0.0
    for name in NAMES:
        total = sum(w * dense(a, model, name).flatten(1) for a, w in pairs)
        assert isinstance(total, Tensor)
        values = torch.linalg.svdvals(total.double())
        error = (dense(one, model, name).flatten(1) - total).norm()
        assert float(error) == pytest.approx(float(values[3:].norm()), rel=1e-4)  # Eckart and Young
        lost, whole = lost + float(error) ** 2, whole + float(total.norm()) ** 2
    assert float(one.metadata[LOST]) == pytest.approx((lost / whole) ** 0.5, rel=1e-3)


def test_signed_election_elects_with_the_weights_signs() -> None:
    """Of two equal LoRAs with weights 1 and -0.5, PEFT's election sees no conflict; this one lets the first win."""
    down, up = noise(2, 5, seed=1), noise(4, 2, seed=2)
    twin = Adapter({"unet.x": LowRank(down, up, 2.0)}, name="twin")
    change = up @ down
    options: dict[str, Any] = {"density": 1.0, "rank": 4}
    plain = combine([(twin, 1.0), (twin, -0.5)], "ties_svd", **options)
    signed = combine(
        [(twin, 1.0), (twin, -0.5)], "ties_svd", signed_election=True, majority="total", **options
    )
    torch.testing.assert_close(plain.deltas["unet.x"].delta(change), change * 0.25, atol=1e-5, rtol=1e-5)
    # +W against -W: the sums are 0, so + wins, and whichever has it stays alone
    expected = torch.where(change > 0, change, -0.5 * change)
    torch.testing.assert_close(signed.deltas["unet.x"].delta(change), expected, atol=1e-5, rtol=1e-5)


def test_dora_needs_the_base_and_then_is_right() -> None:
    model = peft_model()
    a, b = ours(model, "ink"), ours(model, "cat")
    layer = layer_of(model, "linear").base_layer
    magnitude = layer.weight.detach().norm(dim=1, keepdim=True) * 1.3
    a.deltas["unet.linear"] = WithMagnitude(a.deltas["unet.linear"], magnitude)
    with pytest.raises(ConfigError, match=r"unet\.linear is of the kind DoRA, .*svd"):
        combine([(a, 0.8), (b, 0.5)], "linear")
    with pytest.raises(ConfigError, match="needs the base model"):
        combine([(a, 0.8), (b, 0.5)], "svd", rank=18)
    one = combine([(a, 0.8), (b, 0.5)], "svd", rank=18, layers={"unet.linear": layer})
    total = 0.8 * dense(a, model, "linear") + 0.5 * dense(b, model, "linear")
    torch.testing.assert_close(dense(one, model, "linear"), total, atol=1e-5, rtol=1e-5)


def test_ranks_may_differ_where_the_method_allows() -> None:
    a, b = ours(peft_model(rank=4), "ink"), ours(peft_model(rank=6), "cat")
    with pytest.raises(ConfigError, match=r"ranks 4, 6.*ties_svd"):
        combine([(a, 1.0), (b, 1.0)], "ties", density=0.5)
    assert rank(combine([(a, 1.0), (b, 1.0)], "cat"), "unet.linear") == 10
    assert rank(combine([(a, 1.0), (b, 1.0)], "svd"), "unet.linear") == 6


def test_a_lokr_needs_no_base() -> None:
    lokr = Kronecker((noise(3, 4, seed=1),), (noise(6, 6, seed=2),), 4.0)
    a = Adapter({"unet.x": lokr}, {"sshs_model_hash": "of the LoKr"}, name="lokr")
    b = Adapter({"unet.x": LowRank(noise(2, 24, seed=3), noise(18, 2, seed=4), 2.0)}, name="lora")
    weight = torch.zeros(18, 24)
    total = 0.5 * lokr.delta(weight) - b.deltas["unet.x"].delta(weight)
    one = combine([(a, 0.5), (b, -1.0)], "svd", rank=18)
    torch.testing.assert_close(one.deltas["unet.x"].delta(weight), total, atol=1e-4, rtol=1e-5)
    with pytest.raises(ConfigError, match="kind LoKr, which has no factors"):
        combine([(a, 0.5), (b, -1.0)])
    small = resize(a, rank=2)
    values = torch.linalg.svdvals(lokr.delta(weight))
    assert float(small.metadata[LOST]) == pytest.approx(float(values[2:].norm() / values.norm()), rel=1e-3)
    assert "sshs_model_hash" not in small.metadata


def test_what_a_clamp_took_is_said_too() -> None:
    model = peft_model()
    pairs = [(ours(model, "ink"), 1.0)]
    assert float(combine(pairs, "svd").metadata[LOST]) < 1e-5
    clamped = combine(pairs, "svd", clamp=0.9)
    lost = whole = 0.0
    for name in NAMES:
        before = dense(pairs[0][0], model, name)
        lost += float((dense(clamped, model, name) - before).square().sum())
        whole += float(before.square().sum())
    assert float(clamped.metadata[LOST]) == pytest.approx((lost / whole) ** 0.5, rel=1e-3)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"method": "tie"}, "Did you mean"),
        ({"method": "ties"}, "needs density"),
        ({"method": "ties", "density": 0}, "above 0"),
        ({"method": "dare_linear", "density": float("nan")}, "needs density"),
        ({"method": "cat", "density": 0.5}, "density has no effect"),
        ({"method": "linear", "rank": 4}, "rank has no effect"),
        ({"method": "svd", "rank": 0}, "1 or more"),
        ({"method": "svd", "clamp": 1.5}, "quantile"),
        ({"method": "magnitude_prune", "density": 0.5, "majority": "frequency"}, "holds no election"),
        ({"method": "ties", "density": 0.5, "majority": "loudest"}, "majority"),
        ({"method": "svd", "signed_election": True}, "holds no election"),
    ],
)
def test_what_makes_no_sense_is_named(options: dict[str, Any], words: str) -> None:
    a = ours(peft_model(), "ink")
    with pytest.raises(ConfigError, match=words):
        combine([(a, 1.0), (a, 1.0)], **options)


def test_wrong_loras_and_weights_are_named() -> None:
    model = peft_model()
    a = ours(model, "ink")
    with pytest.raises(ConfigError, match="no LoRA"):
        combine([])
    with pytest.raises(ConfigError, match='weight of "ink" is nan'):
        combine([(a, float("nan"))])
    with pytest.raises(WrongFamily, match="different models"):
        combine([(a, 1.0), (ours(model, "cat", family="sdxl"), 1.0)])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "either"),
        ({"rank": 2, "energy": 0.5}, "either"),
        ({"energy": 1.5}, "share"),
        ({"rank": 0}, "1 or more"),
    ],
)
def test_a_size_that_makes_no_sense_is_named(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        resize(ours(peft_model(), "ink"), **options)
