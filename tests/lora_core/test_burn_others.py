"""How far kinds without factors move a model, and what they have in common: from the dense changes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lora_core.adapter import Adapter
from lora_core.burn import overlap, strength
from lora_core.deltas import Delta
from lora_core.deltas.bias import WithBias
from lora_core.terms import Turn
from tests.lora_core.kinds_by_hand import KINDS, random

LAYERS: dict[str, Any] = {
    "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q": nn.Linear(20, 16),
    "unet.down_blocks.0.resnets.0.conv1": nn.Conv2d(6, 16, 3),
    "unet.mid_block.resnets.0.norm1": nn.GroupNorm(4, 16),
    "text_encoder.text_model.embeddings.token_embedding": nn.Embedding(48, 16),
}


def changes_of(kind: str, seed: int) -> dict[str, Delta]:
    g = torch.Generator().manual_seed(seed)
    made = {path: KINDS[kind](layer.weight.shape, g, i) for i, (path, layer) in enumerate(LAYERS.items())}
    return {path: delta for path, delta in made.items() if delta is not None}


def dense(path: str, delta: Delta) -> Tensor:
    return delta.delta(LAYERS[path].weight.detach())


@pytest.mark.parametrize("kind", KINDS)
def test_strength_is_that_of_the_dense_changes(kind: str) -> None:
    one, other = changes_of(kind, 1), changes_of("low rank", 2)
    changes = {p: [(0.5, d), *([(-0.2, other[p])] if p in other else [])] for p, d in one.items()}
    found = strength(LAYERS, changes)
    for block, paths in (
        ("down.0", [p for p in one if "down_blocks" in p]),
        ("text_encoder", [p for p in one if "text" in p]),
    ):
        moved = sum(float(sum(w * dense(p, d) for w, d in changes[p]).square().sum()) for p in paths)
        whole = sum(float(LAYERS[p].weight.detach().square().sum()) for p in paths)
        assert found[block] == pytest.approx((moved / whole) ** 0.5, rel=1e-4)
        assert found[block] > 0


def test_a_bias_is_no_change_of_a_weight() -> None:
    path = next(iter(LAYERS))
    low = changes_of("low rank", 1)[path]
    bias = random(torch.Generator().manual_seed(0), 16)
    with_bias = strength(LAYERS, {path: [(1.0, WithBias(low, bias))]})
    assert with_bias == strength(LAYERS, {path: [(1.0, low)]})
    assert strength(LAYERS, {path: [(1.0, WithBias(None, bias))]}) == {"down.0": 0.0}


@pytest.mark.parametrize("kind", KINDS)
def test_overlap_needs_the_base_where_there_are_no_factors(kind: str) -> None:
    a, b = Adapter(changes_of(kind, 1)), Adapter(changes_of("low rank", 2))
    shared = [p for p in a.deltas if p in b.deltas]
    without = overlap(a, b)
    assert list(without.left_out) == ([] if kind == "low rank" else shared)
    found = overlap(a, b, LAYERS)
    pairs = [(dense(p, a.deltas[p]), dense(p, b.deltas[p])) for p in shared]
    ab, aa, bb = (
        sum(float((x * y).sum()) for x, y in z)
        for z in (pairs, [(x, x) for x, _ in pairs], [(y, y) for _, y in pairs])
    )
    assert found.cosine == pytest.approx(ab / (aa * bb) ** 0.5, abs=1e-5)
    assert overlap(a, a, LAYERS).cosine == pytest.approx(1.0, abs=1e-5)


def test_a_turn_is_computed_in_the_layers_own_dtype() -> None:
    """Under autocast the layer's output comes in another one."""
    layer = LAYERS[next(iter(LAYERS))]
    stages = tuple(changes_of("butterfly", 1)[next(iter(LAYERS))].turn_form()[0])  # type: ignore[attr-defined]
    x = torch.randn(3, 20)
    with torch.no_grad():
        out = layer(x)
        exact = Turn(stages, None, layer.bias).term(layer, x, out)
        rounded = Turn(stages, None, layer.bias).term(layer, x, out.bfloat16())
    torch.testing.assert_close(rounded, exact, atol=0.02, rtol=0.05)
