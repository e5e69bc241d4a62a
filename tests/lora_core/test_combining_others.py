"""Combining and resizing what has no factors of its own: by SVD with the base given, the error stated, else refused;
norms and biases entry by entry."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lora_core import combine, resize
from lora_core.adapter import Adapter
from lora_core.changes import apart
from lora_core.deltas import Delta
from lora_core.deltas.bias import WithBias
from lora_core.deltas.full import Full
from lora_core.deltas.low_rank import LowRank
from lora_core.errors import ConfigError, WrongFamily
from lora_core.lower_rank import LOST
from lora_core.resizing import to_plain
from tests.lora_core.kinds_by_hand import KINDS, random

PATHS = {
    "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q": nn.Linear(20, 16),
    "unet.mid_block.resnets.0.conv1": nn.Conv2d(6, 16, 3),
}
NORM = "unet.mid_block.resnets.0.norm1"
NEEDS_BASE = {"scaling": r"\(IA\)³", "generalized": "GLoRA", "turning": "OFT", "butterfly": "OFT"}
OTHERS = [*NEEDS_BASE, "whole"]


def adapter_of(kind: str, seed: int = 0) -> Adapter:
    g = torch.Generator().manual_seed(seed)
    deltas: dict[str, Delta] = {}
    for i, (path, layer) in enumerate(PATHS.items()):
        delta = KINDS[kind](layer.weight.shape, g, i + 1)
        assert delta is not None
        deltas[path] = delta
    return Adapter(deltas, name=kind)


def dense(parts: list[tuple[Adapter, float]], path: str) -> Tensor:
    weight = PATHS[path].weight.detach()
    return torch.stack([w * a.deltas[path].delta(weight) for a, w in parts]).sum(0)


@pytest.mark.parametrize("kind", OTHERS)
def test_the_best_of_a_rank_and_its_error(kind: str) -> None:
    parts = [(adapter_of(kind), 0.7), (adapter_of("low rank", 1), -0.4)]
    layers: dict[str, Any] = PATHS
    whole = combine(parts, "svd", rank=60, layers=layers)
    for path in PATHS:
        result = whole.deltas[path]
        assert isinstance(result, LowRank)
        weight = PATHS[path].weight
        assert result.shape() == tuple(weight.shape)
        torch.testing.assert_close(result.delta(weight), dense(parts, path), atol=2e-5, rtol=1e-4)
    few = combine(parts, "svd", rank=2, layers=layers)
    gone = sum(float((few.deltas[p].delta(PATHS[p].weight) - dense(parts, p)).square().sum()) for p in PATHS)
    of = sum(float(dense(parts, p).square().sum()) for p in PATHS)
    assert float(few.metadata[LOST]) == pytest.approx((gone / of) ** 0.5, abs=1e-4)
    assert float(few.metadata[LOST]) > 0.05


@pytest.mark.parametrize("kind", OTHERS)
def test_a_lower_rank_alone_and_its_error(kind: str) -> None:
    adapter = adapter_of(kind)
    few = resize(adapter, energy=0.9, layers=PATHS)  # type: ignore[arg-type]
    parts = [(adapter, 1.0)]
    gone = sum(float((few.deltas[p].delta(PATHS[p].weight) - dense(parts, p)).square().sum()) for p in PATHS)
    of = sum(float(dense(parts, p).square().sum()) for p in PATHS)
    assert float(few.metadata[LOST]) == pytest.approx((gone / of) ** 0.5, abs=1e-4)
    assert 0 < gone / of <= 0.1 + 1e-6


@pytest.mark.parametrize("kind", OTHERS)
def test_without_the_base_or_a_rank_it_is_refused(kind: str) -> None:
    adapter = adapter_of(kind)
    name = NEEDS_BASE.get(kind, "full difference")
    with pytest.raises(ConfigError, match=f"is of the kind {name}, which has no factors that cat"):
        combine([(adapter, 1.0)], "cat", layers=PATHS)  # type: ignore[arg-type]
    if kind in NEEDS_BASE:
        for call in (lambda: combine([(adapter, 1.0)], "svd", rank=4), lambda: resize(adapter, rank=4)):
            with pytest.raises(
                ConfigError, match=f"kind {name}, whose change needs the base .* Give the layers"
            ):
                call()
        swapped = dict(zip(PATHS, reversed(PATHS.values()), strict=True))
        swapped[next(iter(PATHS))] = nn.Conv2d(7, 15, 3)
        with pytest.raises(WrongFamily, match="and the layer given has"):
            resize(adapter, rank=4, layers=swapped)
    if kind != "generalized":
        with pytest.raises(ConfigError, match=f"kind {name}, which has no rank of its own"):
            combine([(adapter, 1.0)], "svd", layers=PATHS)  # type: ignore[arg-type]


@pytest.mark.parametrize("method", ["cat", "linear", "svd", "ties", "magnitude_prune_svd"])
def test_norms_and_biases_are_added(method: Any) -> None:
    g = torch.Generator().manual_seed(0)
    path = next(iter(PATHS))
    low = [LowRank(random(g, 2, 20), random(g, 16, 2), alpha=3.0) for _ in range(2)]
    norms, biases = [random(g, 8) for _ in range(2)], [random(g, 16) for _ in range(2)]
    loras = [
        Adapter(
            {
                path: WithBias(low[i], biases[i]),
                NORM: Full(norms[i]),
                "unet.conv_out": WithBias(None, biases[i]),
            }
        )
        for i in range(2)
    ]
    loras[1].deltas[path] = low[1]  # a bias in one of them alone
    options: dict[str, Any] = {"density": 0.5} if method in ("ties", "magnitude_prune_svd") else {}
    result = combine([(loras[0], 0.5), (loras[1], -2.0)], method, **options)
    norm, one, alone = result.deltas[NORM], result.deltas[path], result.deltas["unet.conv_out"]
    assert isinstance(norm, Full)
    assert isinstance(one, WithBias)
    assert isinstance(one.inner, LowRank)
    assert isinstance(alone, WithBias)
    assert alone.inner is None
    torch.testing.assert_close(one.bias, 0.5 * biases[0])
    torch.testing.assert_close(alone.bias, 0.5 * biases[0] - 2 * biases[1])
    if not options:
        torch.testing.assert_close(norm.change, 0.5 * norms[0] - 2 * norms[1])
    else:
        assert (norm.change == 0).any()
    plain = combine([(Adapter({path: low[0]}), 0.5), (Adapter({path: low[1]}), -2.0)], method, **options)
    torch.testing.assert_close(
        one.inner.delta(torch.zeros(16, 20)), plain.deltas[path].delta(torch.zeros(16, 20))
    )


def test_resizing_leaves_norms_and_biases() -> None:
    g = torch.Generator().manual_seed(1)
    path = next(iter(PATHS))
    low, bias = LowRank(random(g, 4, 20), random(g, 16, 4), alpha=3.0), random(g, 16)
    before = Adapter({path: WithBias(low, bias), NORM: WithBias(Full(random(g, 8)), random(g, 8))})
    after = resize(before, rank=2)
    assert after.deltas[NORM] is before.deltas[NORM]
    changed = after.deltas[path]
    assert isinstance(changed, WithBias)
    assert isinstance(changed.inner, LowRank)
    assert changed.inner.rank == 2
    assert torch.equal(changed.bias, bias)


def test_made_plain_with_its_bias_and_what_is_plain_as_it_is() -> None:
    adapter = adapter_of("turning")
    conv, low = list(PATHS)[1], adapter_of("low rank", 1).deltas
    kept, norm, bias = low[conv], Full(torch.randn(16)), torch.randn(16)
    first = next(iter(PATHS))
    mixed = Adapter({first: WithBias(adapter.deltas[first], bias), conv: kept, NORM: norm})
    made = to_plain(mixed, rank=16, layers=PATHS)  # type: ignore[arg-type]
    turned = made.deltas[first]
    assert isinstance(turned, WithBias)
    assert isinstance(turned.inner, LowRank)
    weight = PATHS[first].weight
    torch.testing.assert_close(turned.delta(weight), mixed.deltas[first].delta(weight), atol=1e-5, rtol=1e-4)
    assert torch.equal(turned.bias, bias)
    assert made.deltas[conv] is kept
    assert made.deltas[NORM] is norm
    assert list(made.deltas) == list(mixed.deltas)


@pytest.mark.parametrize("kind", [*OTHERS, "low rank"])
def test_how_far_apart_is_what_dense_arithmetic_says(kind: str) -> None:
    before, after = [(adapter_of(kind), 0.7), (adapter_of("low rank", 1), -0.4)], adapter_of("low rank", 2)
    del after.deltas[next(iter(PATHS))]  # what one side lacks counts whole
    norm = Full(torch.ones(16))
    before[0][0].deltas[NORM] = WithBias(norm, torch.ones(16))
    gone, whole = float((0.7 * norm.change).square().sum()), float((0.7 * norm.change).square().sum())
    for path, layer in PATHS.items():
        total = dense(before, path)
        theirs = after.deltas[path].delta(layer.weight.detach()) if path in after.deltas else torch.zeros(())
        gone, whole = gone + float((total - theirs).square().sum()), whole + float(total.square().sum())
    layers: dict[str, Any] = PATHS
    found = apart(before, after, layers)
    assert found.share == pytest.approx((gone / whole) ** 0.5, rel=1e-5)
    assert found.left_out == ()
    blind = apart(before, after)
    assert blind.left_out == (tuple(PATHS) if kind in NEEDS_BASE else ())
    assert apart([(before[0][0], 1.0)], before[0][0]).share == 0
    assert apart([(before[0][0], 1.0)], before[0][0]).left_out == ()
