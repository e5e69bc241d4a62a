"""Every picture gets a shape near its own; batches hold one shape; no picture is forgotten."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from lora_core.errors import ConfigError
from trainers.buckets import Buckets, plan_crop
from trainers.config_data import DataSettings
from trainers.sampler import BatchSampler, Draw, Sampler
from trainers.scan import scan

SIDES = st.integers(1, 6000)


def buckets(resolution: int = 512, **changes: Any) -> Buckets:
    return Buckets.of(DataSettings.model_validate(changes), resolution)


@pytest.mark.parametrize("resolution", [64, 512, 520, 768, 1024])
def test_a_square_is_trained_in_the_square(resolution: int) -> None:
    assert buckets(resolution).fit((777, 777)) == (resolution, resolution)
    assert buckets(resolution, buckets=False).fit((777, 300)) == (resolution, resolution)


def test_the_shapes_of_a_resolution() -> None:
    """By hand: multiples of 64 from 256 to 1024, the other side as long as 512² pixels allow."""
    expected = {(w, min(1024, 262144 // w // 64 * 64)) for w in range(256, 1025, 64)}
    assert set(buckets().shapes) == {s for s in expected if s[1] >= 256} | {(512, 512)}
    assert (72, 56) in buckets(64).shapes  # steps of 8
    assert {s % 32 for shape in buckets(bucket_step=32).shapes for s in shape} == {0}
    assert max(max(s) for s in buckets(bucket_max=640).shapes) == 640
    with pytest.raises(ConfigError, match="leave out the square of 512"):
        buckets(bucket_min=576)


@settings(max_examples=200, deadline=None)
@given(SIDES, SIDES, st.booleans(), st.booleans(), st.sampled_from([64, 512, 1024]))
def test_laws(width: int, height: int, several: bool, upscale: bool, resolution: int) -> None:
    """Sides in steps, no more pixels than the square; covered; with no upscaling nothing grows but to one step."""
    found = buckets(resolution, buckets=several, upscale=upscale)
    bucket = found.fit((width, height))
    plan = plan_crop((width, height), bucket)
    assert all(side % found.step == 0 for side in bucket) or bucket == (resolution, resolution)
    assert bucket[0] * bucket[1] <= resolution**2
    assert plan.bucket == bucket
    assert all(r >= b for r, b in zip(plan.resized, bucket, strict=True))
    assert 0 <= plan.lost < 1
    if upscale:
        assert bucket in found.shapes
    elif min(width, height) >= found.step:
        assert plan.resized[0] <= width
        assert plan.resized[1] <= height


def test_the_nearest_shape_loses_less_than_the_square() -> None:
    for size in ((3000, 2000), (2000, 3000), (1920, 1080), (1080, 2340)):
        square = plan_crop(size, (512, 512)).lost
        assert plan_crop(size, buckets().fit(size)).lost < min(0.13, square / 2)


def pictures(folder: Path, sizes: dict[str, tuple[int, int]]) -> Path:
    folder.mkdir()
    for name, size in sizes.items():
        Image.new("RGB", size, "red").save(folder / name)
    return folder


def test_every_bucket_and_crop_is_reported(tmp_path: Path) -> None:
    sizes = {
        "a.png": (128, 128),
        "b.png": (192, 128),
        "c.png": (193, 128),
        "d.png": (900, 100),
        "e.png": (40, 60),
    }
    given = DataSettings.model_validate({"images": pictures(tmp_path / "p", sizes), "prompt": "x"})
    dataset = scan(given, 64)
    (report,) = dataset.reports
    assert report.buckets == {
        (64, 64): ["a.png"],
        (80, 48): ["b.png", "c.png"],
        (128, 32): ["d.png"],
        (48, 80): ["e.png"],
    }
    assert [e.plan.bucket for e in dataset.instances] == [(64, 64), (80, 48), (80, 48), (128, 32), (48, 80)]
    said = str(report)
    assert "Buckets: 80 x 48: 2, 48 x 80: 1, 64 x 64: 1, 128 x 32: 1." in said
    assert "Cut off at the edges: d.png (56%)." in said  # of the others less than a tenth
    assert report.cut["b.png"] == pytest.approx(1 - 48 / 53)  # 192 x 128 covers 80 x 48 as 80 x 53
    assert "enlarged and soft: e.png" in said
    kept = scan(given.model_copy(update={"upscale": False}), 64)
    assert kept.reports[0].enlarged == []
    assert kept.instances[4].plan.bucket == (40, 56)


def test_more_resolutions_are_more_examples_of_the_same_picture(tmp_path: Path) -> None:
    folder = pictures(tmp_path / "p", {"a.png": (192, 128), "b.png": (128, 128)})
    given = DataSettings.model_validate({"images": folder, "prompt": "x", "more_resolutions": [96]})
    dataset = scan(given, 64)
    assert [(e.path.name, e.plan.bucket) for e in dataset.instances] == [
        ("a.png", (80, 48)),
        ("a.png", (112, 80)),
        ("b.png", (64, 64)),
        ("b.png", (96, 96)),
    ]
    assert dataset.reports[0].used == ["a.png", "b.png"]


# --- batches ---------------------------------------------------------------------------------------------------


def test_a_picture_that_is_not_enlarged_is_once_where_resolutions_come_to_the_same(tmp_path: Path) -> None:
    for name, size in (("small.png", (72, 72)), ("large.png", (200, 200))):
        Image.new("RGB", size).save(tmp_path / name)
    data = {"images": tmp_path, "prompt": "x", "upscale": False, "more_resolutions": (96, 128)}
    dataset = scan(DataSettings.model_validate(data), 64)
    assert [(e.path.name, e.plan.bucket) for e in dataset.examples] == [
        ("large.png", (64, 64)),
        ("large.png", (96, 96)),
        ("large.png", (128, 128)),
        ("small.png", (64, 64)),
        ("small.png", (72, 72)),  # of 96 and of 128
    ]


def test_with_one_bucket_the_order_is_the_samplers() -> None:
    """Batches straddle epochs, all of them full: what square pictures have always had."""
    batches = BatchSampler(["square"] * 5, seed=3)
    assert [batches.take(2) for _ in range(20)] == [
        pair for pair in zip(*[iter(Sampler(5, seed=3).take(40))] * 2, strict=True) for pair in [list(pair)]
    ]
    alone = BatchSampler(["square"], seed=3)
    assert [len(alone.take(4)) for _ in range(3)] == [4, 4, 4]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=30), st.integers(1, 5), st.integers(0, 99))
def test_batches_hold_one_bucket_and_forget_nobody(kinds: list[int], size: int, seed: int) -> None:
    batches, seen = BatchSampler(kinds, seed=seed), []
    while len(seen) < 6 * len(kinds):
        batch = batches.take(size)
        assert 1 <= len(batch) <= size
        assert len({kinds[draw.index] for draw in batch}) == 1
        seen += batch
    numbers = [draw.number for draw in seen]
    assert len(set(numbers)) == len(numbers)
    late = max(
        range(max(numbers) + 1)[-1] - n for n in set(range(max(numbers) + 1)) - set(numbers) or {max(numbers)}
    )
    assert late <= 2 * len(kinds) + size * 5  # who waits, waits about an epoch
    counts = Counter(draw.index for draw in seen)
    assert set(counts) == set(range(len(kinds)))
    assert max(counts.values()) - min(counts.values()) <= 3


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=12), st.integers(1, 4), st.integers(0, 25))
def test_taken_up_anywhere_the_batches_are_those_of_the_straight_run(
    kinds: list[int], size: int, stop: int
) -> None:
    straight = BatchSampler(kinds, seed=1)
    whole = [straight.take(size) for _ in range(40)]
    first = BatchSampler(kinds, seed=1)
    before = [first.take(size) for _ in range(stop)]
    state = json.loads(json.dumps(first.state()))
    second = BatchSampler(kinds, seed=1)
    second.take(size)  # whatever it has done before is past
    second.restore(state)
    assert before + [second.take(size) for _ in range(40 - stop)] == whole
    with pytest.raises(ConfigError, match="it cannot go"):
        BatchSampler([*kinds, 0], seed=1).restore(state)


def test_words_and_crops_have_chance_of_their_own() -> None:
    draw = Draw(0, 7, 3)
    assert draw.rng().random() == random.Random("draw 3 7").random()
    assert draw.words_rng().random() != draw.rng().random()
    assert draw.words_rng().random() == Draw(5, 7, 3).words_rng().random()
