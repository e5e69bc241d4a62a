"""A mix's laws: what crossfading, muting and saving must never change."""

from __future__ import annotations

import json
import math
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_core.errors import ConfigError, LoraError, NotLoaded, SaveFailed
from lora_core.mix import AdapterWeight, Mix, check_blocks, crossfade, known_blocks, muted, solo
from lora_core.named_mixes import read_mix, save_mix
from tests.small_models import small_pipeline

PATHS = [
    *(
        f"unet.{block}.{part}"
        for block in ("down_blocks.0", "down_blocks.1", "down_blocks.10", "mid_block", "up_blocks.1")
        for part in ("attentions.0.transformer_blocks.0.attn1.to_q", "resnets.1.conv1", "downsamplers.0.conv")
    ),
    "unet.conv_in",
    "unet.time_embedding.linear_1",
    "text_encoder.text_model.encoder.layers.0.mlp.fc1",
    "text_encoder_2.text_projection",
]
STEPS = [0.0, 0.2, 0.25, 0.5, 0.6, 0.99, 1.0]

numbers = st.integers(-8, 8).map(lambda n: n / 4) | st.floats(-3, 3)
block_names = st.sampled_from(
    [
        "down",
        "down.0",
        "down.1",
        "down.10",
        "mid",
        "up",
        "up.1",
        "down.attn",
        "down.1.res",
        "mid.attn",
        "up.res",
    ]
)
curves = st.dictionaries(st.floats(0, 1), st.floats(0, 2), max_size=4).map(
    lambda d: [list(p) for p in sorted(d.items())]
)


def dicts(keys: st.SearchStrategy[str] = block_names, *, curve: st.SearchStrategy[Any] = curves) -> Any:
    return st.fixed_dictionaries(
        {},
        optional={
            **dict.fromkeys(("unet", "text_encoder", "text_encoder_2"), numbers),
            "blocks": st.dictionaries(keys, numbers, max_size=4),
            "curve": curve,
        },
    )


def parsed(values: dict[str, Any]) -> Mix:
    return {name: AdapterWeight.parse(name, value) for name, value in values.items()}


def mixes(**options: Any) -> Any:
    return st.dictionaries(st.sampled_from("abc"), numbers | dicts(**options), max_size=3).map(parsed)


def heard(mix: Mix, name: str, path: str, progress: float = 0.0) -> float:
    return mix[name].at(path, progress=progress) if name in mix else 0.0


# --- the end of a crossfade is the mix, its middle is the middle ---


@settings(deadline=None)
@given(mixes(), mixes())
def test_the_ends_of_a_crossfade_are_the_mixes(a: Mix, b: Mix) -> None:
    for t, end in ((0, a), (1.0, b)):
        faded = crossfade(a, b, t)
        assert set(faded) == {*a, *b}
        for name, weight in faded.items():
            assert weight == end.get(name, weight)
            for path in PATHS:
                assert weight.at(path, progress=0.3) == heard(end, name, path, 0.3)


@settings(deadline=None)
@given(
    mixes(curve=st.just([[0, 1], [0.6, 0.25]])), mixes(curve=st.just([[0, 1], [0.6, 0.25]])), st.floats(0, 1)
)
def test_between_them_every_layer_is_on_the_straight_line(a: Mix, b: Mix, t: float) -> None:
    """Whichever blocks either side names; with one curve, or where only one side sounds, at every step."""
    faded = crossfade(a, b, t)
    for name, weight in faded.items():
        one_curve = name not in a or name not in b or a[name].curve == b[name].curve
        for path in PATHS:
            for progress in STEPS if one_curve else ():
                expected = (1 - t) * heard(a, name, path, progress) + t * heard(b, name, path, progress)
                assert weight.at(path, progress=progress) == pytest.approx(expected, abs=1e-12)


def test_overlapping_blocks_of_both_sides() -> None:
    """Neither "down.1" nor "down.attn" says what holds where they meet."""
    a, b = (
        parsed({"x": {"blocks": {"down.1": 0.0}}}),
        parsed({"x": {"blocks": {"down.attn": 0.5, "down": 3}}}),
    )
    middle = crossfade(a, b, 0.5)["x"]
    assert middle.at("unet.down_blocks.1.attentions.0.proj_in") == 0.25
    assert middle.at("unet.down_blocks.0.attentions.0.proj_in") == 0.75
    assert middle.at("unet.down_blocks.1.resnets.0.conv1") == 1.5
    assert middle.at("unet.down_blocks.0.resnets.0.conv1") == 2.0
    assert middle.at("unet.mid_block.resnets.0.conv1") == 1.0
    apart = crossfade(
        parsed({"x": {"blocks": {"up": 0, "attn2": 0}}}), parsed({"x": {"blocks": {"mid": 0}}}), 0.5
    )
    assert dict(apart["x"].blocks) == {"up": 0.5, "attn2": 0.5, "mid": 0.5}


@settings(deadline=None)
@given(curves, curves, st.floats(0, 1), st.floats(0, 1))
def test_curves_are_mixed_as_factors(one: Any, other: Any, t: float, progress: float) -> None:
    a, b = parsed({"x": {"curve": one}}), parsed({"x": {"curve": other}})
    expected = (1 - t) * a["x"].factor(progress) + t * b["x"].factor(progress)
    assert crossfade(a, b, t)["x"].factor(progress) == pytest.approx(expected, abs=1e-9)


@given(mixes(), st.floats(0, 1))
def test_a_crossfade_to_itself_stands_still(mix: Mix, t: float) -> None:
    for name, weight in crossfade(mix, dict(mix), t).items():
        assert all(weight.at(p, progress=x) == mix[name].at(p, progress=x) for p in PATHS for x in STEPS)


def test_absent_and_silent_are_the_same() -> None:
    a = parsed({"x": {"unet": 0.8, "curve": [[0, 1], [1, 0]], "half": "conditional"}})
    assert crossfade(a, {}, 0.25)["x"].plain == crossfade(a, parsed({"x": 0.0}), 0.25)["x"].plain
    assert crossfade(a, {}, 0.25)["x"].half == "conditional"
    assert crossfade({}, a, 0.25)["x"].at("unet.conv_in", progress=0.5) == pytest.approx(0.25 * 0.8 * 0.5)


@pytest.mark.parametrize("t", [0, 0.5, 1])
def test_there_is_nothing_between_two_halves(t: float) -> None:
    with pytest.raises(ConfigError, match=r'"x" acts on the prompt alone .* in one mix and on both'):
        crossfade(parsed({"x": 1.0}), parsed({"x": {"half": "conditional"}}), t)


@pytest.mark.parametrize("t", [-0.01, 1.01, math.nan, math.inf, True, "0.5", None])
def test_crossfades_stay_between(t: Any) -> None:
    with pytest.raises(ConfigError, match="crossfade stands at"):
        crossfade(parsed({"x": 1.0}), {}, t)


# --- mute and solo ---

THREE = parsed(
    {
        "a": {"unet": -0.5, "blocks": {"mid": 0.3}, "curve": [[0, 1], [1, 0]]},
        "b": 0.7,
        "c": {"half": "conditional"},
    }
)


def test_muting_is_free_of_order_and_forgets_nothing() -> None:
    before = dict(THREE)
    for order in permutations("ab"):
        mix = THREE
        for name in order:
            mix = muted(mix, [name])
        assert mix == muted(THREE, ["a", "b"])
    assert before == THREE
    silent = muted(THREE, ["a"])
    assert list(silent) == list(THREE)
    assert all(silent["a"].at(path, progress=x) == 0 for path in PATHS for x in STEPS)
    assert (silent["b"], silent["c"]) == (THREE["b"], THREE["c"])
    assert (silent["a"].curve, [k for k, _ in silent["a"].blocks]) == (THREE["a"].curve, ["mid"])
    assert "-0" not in json.dumps(silent["a"].plain)
    assert muted(THREE, []) == THREE


def test_solo_is_muting_the_others() -> None:
    assert solo(THREE, ["a"]) == muted(THREE, ["b", "c"])
    assert solo(THREE, ["a"])["a"] == THREE["a"]
    assert solo(THREE, list("abc")) == THREE
    assert solo(THREE, []) == muted(THREE, list("abc"))
    assert muted(solo(THREE, ["a", "b"]), ["b"]) == solo(muted(THREE, ["b"]), ["a", "b"])


@pytest.mark.parametrize("change", [muted, solo])
def test_unknown_names_are_refused(change: Any) -> None:
    mix = parsed({"watercolour": 1.0, "ink": 1.0})
    with pytest.raises(NotLoaded, match='Did you mean "watercolour"'):
        change(mix, ["ink", "watercolor"])
    with pytest.raises(NotLoaded, match="none in it"):
        change({}, ["ink"])
    assert change(mix, "ink") == change(mix, ["ink"])  # not the letters i, n, k


# --- one weight ---


@settings(deadline=None)
@given(numbers | dicts(st.sampled_from(["down.1", "attn2", "mid"])), st.booleans())
def test_plain_is_what_parse_takes(value: Any, half: bool) -> None:
    if half and isinstance(value, dict):
        value = {**value, "half": "conditional"}
    weight = AdapterWeight.parse("x", value)
    assert AdapterWeight.parse("x", weight.plain) == weight
    assert AdapterWeight.parse("x", json.loads(json.dumps(weight.plain))) == weight
    rich = weight.blocks or weight.curve or weight.half != "both"
    assert isinstance(weight.plain, dict) == bool(
        rich or len({weight.unet, weight.text_encoder, weight.text_encoder_2}) > 1
    )


@given(dicts(), st.integers(-2, 3))
def test_scaled_scales_every_layer_at_every_step(value: Any, factor: int) -> None:
    weight = AdapterWeight.parse("x", {**value, "half": "conditional"})
    scaled = weight.scaled(factor)
    assert (scaled.curve, scaled.half) == (weight.curve, "conditional")
    for path in PATHS:
        for progress in STEPS:
            assert scaled.at(path, progress=progress) == pytest.approx(
                factor * weight.at(path, progress=progress)
            )


def test_a_curve() -> None:
    weight = AdapterWeight.parse(
        "x", {"unet": 2, "blocks": {"mid": 4}, "curve": [[0.2, 1], [0.6, 0.5], [0.8, 0]]}
    )
    at = {0.0: 1, 0.2: 1, 0.4: 0.75, 0.6: 0.5, 0.7: 0.25, 0.8: 0, 1.0: 0}
    for progress, factor in at.items():
        assert weight.factor(progress) == pytest.approx(factor)
        assert weight.at("unet.conv_in", progress=progress) == pytest.approx(2 * factor)
        assert weight.at("unet.mid_block.resnets.0.conv1", progress=progress) == pytest.approx(4 * factor)
        assert weight.at("text_encoder.text_model.encoder.layers.0.mlp.fc1", progress=progress) == 1
    assert weight.at("unet.conv_in") == 2
    assert weight.moving
    still = AdapterWeight.parse("x", {"curve": [[0, 0.5], [1, 0.5]]})
    assert not still.moving
    assert [still.factor(x) for x in STEPS] == [0.5] * len(STEPS)
    assert not AdapterWeight.parse("x", 1).moving


def test_a_dict_changes_what_it_names_and_a_number_everything() -> None:
    before = AdapterWeight.parse(
        "x", {"blocks": {"mid": 0.5}, "curve": [[0, 1], [1, 0]], "half": "conditional"}
    )
    changed = AdapterWeight.parse("x", {"unet": 0.25, "blocks": {"up": 0}}, before)
    assert changed.blocks == (("mid", 0.5), ("up", 0.0))
    assert (changed.unet, changed.curve, changed.half) == (0.25, before.curve, "conditional")
    assert AdapterWeight.parse("x", {"curve": [], "half": "both"}, before).plain == {
        **dict.fromkeys(("unet", "text_encoder", "text_encoder_2"), 1.0),
        "blocks": {"mid": 0.5},
    }
    assert AdapterWeight.parse("x", 0.5, before) == AdapterWeight(0.5, 0.5, 0.5)


@pytest.mark.parametrize(
    ("value", "phrase"),
    [
        (True, "not a finite number"),
        ("1", "not a finite number"),
        (10**400, "not a finite number"),
        ({"unet": math.nan}, "x.unet = nan"),
        ({"curv": []}, 'Did you mean "curve"'),
        ({1: 2}, '"1" is unknown'),
        ({"half": "conditionl"}, 'Did you mean "conditional"'),
        ({"half": ["both"]}, "is unknown"),
        ({"curve": 1}, "list of [progress, factor] points"),
        ({"curve": [0, 1]}, "list of [progress, factor] points"),
        ({"curve": ["01"]}, "list of [progress, factor] points"),
        ({"curve": [[0, 1, 2]]}, "list of [progress, factor] points"),
        ({"curve": [[0, math.inf]]}, "x.curve = inf is not a finite number"),
        ({"curve": [[math.nan, 1]]}, "not a finite number"),
        ({"curve": [[0, 1], [1.1, 0]]}, "0 is the first step, 1 is the last"),
        ({"curve": [[-0.1, 1]]}, "0 is the first step"),
        ({"curve": [[0.5, 1], [0.4, 0]]}, "must increase"),
        ({"curve": [[0.5, 1], [0.5, 0]]}, "must increase"),
        ({"blocks": [["mid", 1]]}, "x.blocks = [['mid', 1]] is no table"),
        ({"blocks": {1: 1}}, "is no table"),
        ({"blocks": {"mid": "1"}}, "x.blocks.mid"),
        ({"blocks": {"at(tn": 1}}, "neither a block name nor a regular expression"),
    ],
)
def test_bad_weights(value: Any, phrase: str) -> None:
    with pytest.raises(ConfigError) as caught:
        AdapterWeight.parse("x", value)
    assert phrase in str(caught.value)


# --- the blocks of a model ---


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_blocks_of_a_real_topology(family: str) -> None:
    pipe = small_pipeline(family)
    inside = [name for name, layer in pipe.unet.named_modules() if hasattr(layer, "weight")]
    paths = [f"unet.{name}" for name in inside]
    paths += [f"text_encoder.{name}" for name, _ in pipe.text_encoder.named_modules()]
    levels = range(len(pipe.unet.config.block_out_channels))
    known = ["down", *(f"down.{i}" for i in levels), "mid", "up", *(f"up.{i}" for i in levels)]
    assert known_blocks(paths) == known == known_blocks(inside)
    good = AdapterWeight.parse(
        "ink", {"blocks": dict.fromkeys([*known, "mid.attn", "up.res", r"attn2\.to_[kv]"], 0.5)}
    )
    check_blocks("ink", good, paths)
    check_blocks("ink", AdapterWeight(), [])
    for key in ("down.9", "down.0.attn" if family == "sdxl" else "down.3.attn", "atn2", "text_model"):
        weight = AdapterWeight.parse("ink", {"blocks": {"mid": 1, key: 1}})
        with pytest.raises(ConfigError) as caught:
            check_blocks("ink", weight, iter(paths))
        assert f'"{key}" names no layer' in str(caught.value)
        assert ", ".join(known) in str(caught.value)
    for key, near in (("dwon.1", "down.1"), ("mid.atn", "mid.attn")):
        with pytest.raises(ConfigError, match=f'Did you mean "{near}"'):
            check_blocks("ink", AdapterWeight.parse("ink", {"blocks": {key: 1}}), paths)


def test_ten_blocks_are_counted_not_spelled() -> None:
    paths = [f"unet.down_blocks.{i}.resnets.0.conv1" for i in (10, 2, 1)]
    assert known_blocks(paths) == ["down", "down.1", "down.2", "down.10"]


# --- named mixes ---

NASTY = [
    "ink",
    "a.b",
    'say "hi"',
    "back\\slash",
    "",
    " ",
    "ünïcödé 🐱",
    "new\nline\r\n",
    "\x7f\x00\x1b",
    "[x]",
    "a = 1 # b",
    "\u2028",
]
nasty = st.sampled_from(NASTY) | st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
floats = st.floats(allow_nan=False, allow_infinity=False)


@settings(deadline=None, max_examples=60)
@given(
    st.dictionaries(
        nasty,
        floats | dicts(nasty.map(lambda s: s.translate(dict.fromkeys(map(ord, r"\[](){}*+?|^$"))))),
        max_size=4,
    ),
    st.dictionaries(nasty, nasty, max_size=3),
    st.booleans(),
)
def test_a_saved_mix_is_read_back_exactly(
    tmp_path_factory: Any, values: Any, files: dict[str, str], half: bool
) -> None:
    path = tmp_path_factory.mktemp("mix") / "m.toml"
    mix = parsed({**values, **{name: {"half": "conditional", "unet": 5e-324} for name in files if half}})
    files = {name: file for name, file in files.items() if name in mix}
    save_mix(path, mix, files=files)
    assert read_mix(path) == (mix, files)
    assert list(read_mix(path)[0]) == list(mix)


def test_a_mix_written_by_hand(tmp_path: Path) -> None:
    path = tmp_path / "m.toml"
    path.write_bytes(
        b'\xef\xbb\xbf[weights]\r\nink = 1\r\n[weights.cat]\r\nunet = 0.5\r\nblocks = {"down.1" = 0}\r\n'
    )
    assert read_mix(path) == (parsed({"ink": 1.0, "cat": {"unet": 0.5, "blocks": {"down.1": 0.0}}}), {})
    path.write_text("")
    assert read_mix(path) == ({}, {})


@pytest.mark.parametrize(
    ("text", "phrase"),
    [
        ("weights", "is not TOML"),
        ("\xff", "is not TOML"),
        ("x = " + "[" * 20_000, "is not TOML"),
        ("[weight]", 'Did you mean "weights"'),
        ("weights = 1", "weights must be a table"),
        ("[weights]\nink = {unett = 1}", 'Did you mean "unet"'),
        ("[weights]\nink = '1'", "not a finite number"),
        ("[weights]\nink = nan", "not a finite number"),
        ("[weights]\nink = 1" + "0" * 400, "not a finite number"),
        ("[weights]\nink = 1\n[files]\nimk = 'x'", 'Did you mean "ink"'),
        ("[weights]\nink = 1\n[files]\nink = 3", 'the file of "ink" is 3'),
        ("#" * 2**20 + "#", "larger than 1 MiB"),
    ],
)
def test_files_that_are_no_mix(text: str, phrase: str, tmp_path: Path) -> None:
    (tmp_path / "m.toml").write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError) as caught:
        read_mix(tmp_path / "m.toml")
    assert phrase in str(caught.value)
    assert "m.toml" in str(caught.value)


def test_what_cannot_be_saved_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "m.toml"
    save_mix(path, parsed({"ink": 0.5}))
    before = path.read_bytes()
    for mix, files in (
        (parsed({"\ud800": 1.0}), {}),
        ({"ink": AdapterWeight(math.nan)}, {}),
        (parsed({"ink": 1.0}), {"cat": "cat.safetensors"}),
    ):
        with pytest.raises(LoraError):
            save_mix(path, mix, files=files)
    with pytest.raises(SaveFailed):
        save_mix(tmp_path / "no folder" / "m.toml", {})
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(ConfigError, match=r"nothing\.toml cannot be read"):
        read_mix(tmp_path / "nothing.toml")
