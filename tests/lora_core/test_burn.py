"""The burn guard and the overlap of two LoRAs, against dense matrices."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lora_core import Adapter, LivePipeline
from lora_core.adapter import weight_of
from lora_core.burn import LIMIT, advice, block_of, normalised, overlap, strength
from lora_core.deltas.low_rank import LowRank
from lora_core.errors import ConfigError, WrongFamily
from lora_core.mix import AdapterWeight, Mix, check_blocks
from tests.lora_core.test_pipeline import ALL, random_adapter
from tests.lora_core.test_worn_kinds import adapter_of
from tests.small_models import small_pipeline

WEIGHTS = {"unet": -0.4, "text_encoder": 0.5, "blocks": {"down.1": 0.9, "up.1.attn": 0.0}}


@pytest.fixture(scope="module", params=["sd1", "sdxl"])
def live(request: pytest.FixtureRequest) -> LivePipeline:
    """Nothing here writes to it: each test loads and unloads."""
    return LivePipeline(small_pipeline(request.param))


@pytest.fixture(scope="module")
def sd1() -> LivePipeline:
    return LivePipeline(small_pipeline("sd1"))


def worn(live: LivePipeline, adapters: Mapping[str, tuple[Adapter, Any]]) -> tuple[Any, Any, Mix]:
    """-> layers and changes as the engine makes them, and the mix."""
    live.unload()
    for name, (adapter, value) in adapters.items():
        live.load(adapter, name=name, weight=value)
    found = (*live._changes(), dict(live._mix))
    live.unload()
    return found


def changed(adapters: Mapping[str, Adapter], layers: Mapping[str, nn.Module], mix: Mix) -> Any:
    """`changes` of another mix of the same LoRAs."""
    return {
        path: [(mix[n].at(path), a.deltas[path]) for n, a in adapters.items() if path in a.deltas]
        for path in layers
    }


def dense(layers: Mapping[str, nn.Module], changes: Any) -> dict[str, float]:
    moved: dict[str, float] = {}
    whole: dict[str, float] = {}
    for path, weighted in changes.items():
        w0, block = weight_of(layers[path]).detach(), block_of(path)
        total = sum(w * delta.delta(w0).double() for w, delta in weighted)
        moved[block] = moved.get(block, 0.0) + float(total.square().sum())
        whole[block] = whole.get(block, 0.0) + float(w0.double().square().sum())
    return {block: math.sqrt(moved[block] / whole[block]) for block in moved}


def negative(adapter: Adapter) -> Adapter:
    """Its ΔW with the other sign: the factors' up is turned round."""
    deltas = {p: LowRank(d.down, -d.up, d.alpha) for p, d in adapter.deltas.items() if isinstance(d, LowRank)}
    return replace(adapter, deltas=deltas)


# --- strength ----------------------------------------------------------------------------------------------


def test_strength_equals_dense(live: LivePipeline) -> None:
    a = random_adapter(live, 1, targets=ALL)
    b = random_adapter(live, 2, variant="dora", targets=ALL)
    c = random_adapter(live, 3, targets=ALL)
    both_kinds = {"a": (a, 0.7), "b": (b, WEIGHTS), "c": (c, -0.3)}
    for chosen in ({"a": both_kinds["a"]}, {"a": both_kinds["a"], "c": both_kinds["c"]}, both_kinds):
        layers, changes, _ = worn(live, chosen)
        got, expected = strength(layers, changes), dense(layers, changes)
        assert got == pytest.approx(expected, rel=1e-5)
        assert all(figure > 1e-3 for figure in got.values())
    encoders = {c for c in live.models if c != "unet"}
    downs = {f"down.{i}" for i in range(len(live.models["unet"].down_blocks))}
    ups = {name.replace("down", "up") for name in downs}
    assert set(got) == encoders | downs | ups | {"mid"}
    assert list(got)[-len(encoders) :] == sorted(encoders)


def test_strength_of_kinds_without_factors(sd1: LivePipeline) -> None:
    adapters = {"loha": (adapter_of(sd1, "loha", 3), 0.6), "lokr": (adapter_of(sd1, "lokr", 4), -0.5)}
    layers, changes, _ = worn(sd1, adapters)
    assert strength(layers, changes) == pytest.approx(dense(layers, changes), rel=1e-5)


def test_a_lora_and_its_negative_are_nothing(live: LivePipeline) -> None:
    a = random_adapter(live, 5, targets=ALL)
    alone = strength(*worn(live, {"a": (a, 1.0)})[:2])
    for other in ({"n": (negative(a), 1.0)}, {"x": (a, -0.7), "y": (a, -0.3)}):
        got = strength(*worn(live, {"a": (a, 1.0), **other})[:2])
        assert all(got[block] < 1e-6 * alone[block] for block in alone)
    twice = strength(*worn(live, {"a": (a, 1.0), "again": (a, 1.0)})[:2])
    assert twice == pytest.approx({block: 2 * figure for block, figure in alone.items()}, rel=1e-6)
    minus = strength(*worn(live, {"a": (a, -1.0)})[:2])
    assert minus == pytest.approx(alone)


def test_doras_cancel_too(sd1: LivePipeline) -> None:
    a = random_adapter(sd1, 6, variant="dora")
    alone = strength(*worn(sd1, {"a": (a, 1.0)})[:2])
    got = strength(*worn(sd1, {"a": (a, 1.0), "b": (a, -1.0)})[:2])
    assert all(got[block] < 1e-6 * alone[block] for block in alone)


def test_strength_of_nothing_and_of_weight_zero(sd1: LivePipeline) -> None:
    assert strength({}, {}) == {}
    layer, delta = nn.Linear(6, 5), LowRank(torch.randn(2, 6), torch.randn(5, 2), 3.0)
    path = "unet.mid_block.attentions.0.proj_in"
    assert strength({path: layer}, {path: [(0.0, delta)]}) == {"mid": 0.0}
    nn.init.zeros_(layer.weight)
    assert strength({path: layer}, {path: [(1.0, delta)]}) == {"mid": math.inf}


def test_layers_outside_the_blocks_have_a_name_of_their_own() -> None:
    assert block_of("unet.conv_in") == "conv_in"
    assert block_of("unet.time_embedding.linear_1") == "time_embedding"
    assert block_of("unet.down_blocks.1.resnets.0.conv1") == "down.1"
    assert block_of("unet.mid_block.resnets.0.conv1") == "mid"
    assert block_of("text_encoder_2.text_projection") == "text_encoder_2"


# --- normalised --------------------------------------------------------------------------------------------

USERS_OWN: list[Any] = [
    1.0,
    {"unet": 0.5, "text_encoder": 2.0, "text_encoder_2": -1.0},
    {"unet": 0.8, "blocks": {"down.1": 0.3, "up": 1.4}},
    {"blocks": {"down": 0.6, "down.attn": 0.0, "down.1.attn": -0.9, "mid.res": 2.0, "up.1.res": 0.2}},
    {"blocks": {"to_k$": 0.2, "down.1": 0.5, "attn2": 0.7}},
    {"blocks": {"": 0.4, "attn2": 1.1, "down.attn": 0.3, r"(?i)TO_(Q|K)$": -0.6, "up.2": 0.8}},
    {"blocks": {"^up_blocks.1": 0.9, r"(?x) to_v  # values": 0.1, r"(attn)(?!.*\1.*\1)": 0.5, "mid": 0.7}},
    {
        "blocks": {"to_kk|to_q": 0.2, "to_qq|to_k": 0.3, r"resnets.*conv2": 0.0}
    },  # equally long: the first wins
    {"unet": 0.0, "text_encoder": 0.0, "blocks": {"down.0": 0.0}},
    {"unet": 0.0, "blocks": {"mid": 3.0}, "curve": [[0, 1], [1, 0]], "half": "conditional"},
]


def every_path(live: LivePipeline) -> list[str]:
    return [
        f"{c}.{n}"
        for c, model in live.models.items()
        for n, m in model.named_modules()
        if isinstance(m, nn.Linear | nn.Conv2d)
    ]


@pytest.mark.parametrize("with_paths", [False, True])
@pytest.mark.parametrize("own", USERS_OWN)
def test_each_path_is_scaled_by_its_blocks_factor(live: LivePipeline, own: Any, with_paths: bool) -> None:
    paths = every_path(live)
    mix = {"a": AdapterWeight.parse("a", own), "b": AdapterWeight.parse("b", 0.5)}
    known = sorted({block_of(path) for path in paths})
    strengths = {block: (0.1, 0.3, 0.55)[i % 3] for i, block in enumerate(known)}
    got = normalised(mix, strengths, 0.2, paths=paths if with_paths else None)
    for name, before in mix.items():
        for path in paths:
            figure = strengths[block_of(path)]
            factor = 0.2 / figure if figure > 0.2 else 1.0
            assert got[name].at(path) == pytest.approx(factor * before.at(path), rel=1e-12), (path, got[name])
        assert (got[name].curve, got[name].half) == (before.curve, before.half)
        assert AdapterWeight.parse(name, got[name].plain) == got[name]  # it can be written down
        if with_paths:
            users = AdapterWeight(
                blocks=tuple((k, v) for k, v in got[name].blocks if k not in dict(before.blocks))
            )
            check_blocks(name, users, paths)


def test_keys_are_block_names_where_they_can_be() -> None:
    plain = normalised({"a": AdapterWeight()}, {"down.1": 0.3, "mid": 0.1, "text_encoder": 0.6}, 0.15)
    assert plain == {"a": AdapterWeight(1.0, 0.25, 1.0, (("down.1", 0.5),))}
    own = AdapterWeight.parse("a", {"blocks": {"down.attn": 0.4, "down": 0.8}})
    named = normalised({"a": own}, {"down.1": 0.3}, 0.15)["a"].plain
    assert named["blocks"] == {"down.attn": 0.4, "down": 0.8, "down.1": 0.4, "down.1.attn": 0.2}


def test_the_limit_is_met_and_directions_kept(live: LivePipeline) -> None:
    adapters = {
        "a": random_adapter(live, 7, targets=ALL),
        "b": random_adapter(live, 8, variant="dora", targets=ALL),
    }
    values = {"a": {"unet": 0.7, "blocks": {"to_k$": -0.2, "up.1": 0.9}}, "b": WEIGHTS}
    layers, changes, mix = worn(live, {n: (adapters[n], values[n]) for n in adapters})
    before = strength(layers, changes)
    limit = sorted(before.values())[len(before) // 2]
    after_mix = normalised(mix, before, limit, paths=every_path(live))
    after_changes = changed(adapters, layers, after_mix)
    after = strength(layers, after_changes)
    assert max(after.values()) <= limit * (1 + 1e-3)
    for block, figure in before.items():
        assert after[block] == pytest.approx(min(figure, limit), rel=1e-5)
    for path in list(layers)[::7]:
        w0 = weight_of(layers[path]).detach()
        old, new = (
            sum((w * d.delta(w0) for w, d in c[path]), torch.zeros(w0.shape)).flatten()
            for c in (changes, after_changes)
        )
        assert torch.cosine_similarity(old, new, dim=0) == pytest.approx(1.0, abs=1e-5)
    assert normalised(after_mix, after, limit) == after_mix  # and twice is once
    live.unload()
    for name, adapter in adapters.items():  # a pipeline takes it
        live.load(adapter, name=name, weight=after_mix[name].plain)
    live.unload()


def test_what_is_below_the_limit_is_left_alone() -> None:
    mix = {"a": AdapterWeight.parse("a", {"blocks": {"to_k": 0.5}})}
    got = normalised(mix, {"down.1": 0.1, "mid": LIMIT})
    assert got == mix
    assert got is not mix
    silent = {"a": AdapterWeight(0.0, 0.0, 0.0)}
    assert normalised(silent, {"down.1": 9.0}) == silent
    with pytest.raises(ConfigError, match="above 0"):
        normalised(mix, {}, 0.0)


# --- overlap -----------------------------------------------------------------------------------------------


def dense_cosine(a: Adapter, b: Adapter, layers: Mapping[str, Any], block: str = "") -> float:
    def whole(adapter: Adapter) -> Tensor:
        parts = [
            adapter.deltas[p].delta(weight_of(layers[p]).detach()).flatten().double()
            for p in layers
            if block in ("", block_of(p))
        ]
        return torch.cat(parts)

    return float(torch.cosine_similarity(whole(a), whole(b), dim=0))


def test_cosine_with_itself_its_negative_and_an_orthogonal_one(live: LivePipeline) -> None:
    a = random_adapter(live, 9, targets=ALL)
    same, opposite = overlap(a, a), overlap(a, negative(a))
    assert same.cosine == pytest.approx(1.0, abs=1e-6)
    assert opposite.cosine == pytest.approx(-1.0, abs=1e-6)
    assert same.compared == len(a.deltas)
    assert all(c == pytest.approx(1.0, abs=1e-6) for c in same.blocks.values())
    assert set(same.blocks) == {block_of(path) for path in a.deltas}
    down = torch.eye(4, 6)
    up = torch.randn(5, 2, generator=torch.Generator().manual_seed(0))
    path = "unet.mid_block.attentions.0.proj_in"
    one, other = Adapter({path: LowRank(down[:2], up, 3.0)}), Adapter({path: LowRank(down[2:], up, 3.0)})
    assert overlap(one, other).cosine == 0.0


def test_cosine_equals_dense_and_other_kinds_ask_for_the_base(live: LivePipeline) -> None:
    a = random_adapter(live, 10, targets=ALL)
    near = Adapter({p: LowRank(d.down, d.up + 0.3 * d.up.flip(0), 2.0) for p, d in a.deltas.items()})  # type: ignore[attr-defined]
    dora = random_adapter(live, 10, variant="dora", targets=ALL)
    layers, _, _ = worn(live, {"a": (a, 1.0)})
    for other, given in ((near, None), (dora, layers)):
        got = overlap(a, other, given)
        assert got.left_out == ()
        assert got.cosine == pytest.approx(dense_cosine(a, other, layers), abs=1e-5)
        for block, cosine in got.blocks.items():
            assert cosine == pytest.approx(dense_cosine(a, other, layers, block), abs=1e-5)
    mixed = Adapter(
        {**near.deltas, "unet.conv_in": dora.deltas.popitem()[1], **dict([*dora.deltas.items()][:3])}
    )
    without = overlap(a, mixed)
    assert without.left_out == tuple([*dora.deltas][:3])
    assert without.compared == len(a.deltas) - 3


def test_loras_with_nothing_in_common() -> None:
    def on(path: str, inn: int = 6) -> Adapter:
        return Adapter({path: LowRank(torch.ones(2, inn), torch.ones(5, 2), 3.0)})

    apart = overlap(on("unet.conv_in"), on("unet.conv_out"))
    assert (apart.cosine, apart.blocks, apart.compared) == (0.0, {}, 0)
    with pytest.raises(WrongFamily, match=r"conv_in is 5 x 6 in one LoRA and 5 x 8"):
        overlap(on("unet.conv_in"), on("unet.conv_in", 8))
    nothing = Adapter({"unet.conv_in": LowRank(torch.ones(2, 6), torch.zeros(5, 2), 3.0)})
    assert overlap(on("unet.conv_in"), nothing).cosine == 0.0


# --- advice ------------------------------------------------------------------------------------------------


def test_advice_names_what_burns_and_what_to_do() -> None:
    assert advice({"down.1": 0.05, "mid": 0.15}) == ""
    assert advice({}) == ""
    assert advice({"down.1": 0.05, "mid": 0.32}) == (
        "mid (32%) is changed by more than 0.15 times its own size: pictures may burn. Lower the LoRAs' weights in "
        "mid, or normalise."
    )
    assert advice({"up.1": 0.2, "mid": 0.32}).startswith("mid (32%) and up.1 (20%) are changed by")
    assert "and 2 more are changed" in advice({f"up.{i}": 1.0 + i for i in range(6)})
    assert advice({"mid": 0.32}, limit=0.5) == ""
