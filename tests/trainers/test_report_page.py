"""report.html: there while the run goes on, whole without a network, and safe whatever a prompt says."""

from __future__ import annotations

import itertools
import math
import os
import re
import shutil
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.trainers.runs import Recorder, base_folder, config, events_in, pictures
from trainers import report
from trainers.config import TrainConfig
from trainers.curves import Curve, chart, thinned, ticks
from trainers.dreambooth import train
from trainers.events import Note, Saved, Step, TrainEvent
from trainers.report_page import PREVIEW_SIDE, data_uri, page
from trainers.run_folder import RunFolder
from trainers.story import Story

NASTY = '"><script>alert(1)</script><img src=http://evil.example/x onerror=alert(2)> a zxq cat'


class Tags(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.found if name == tag]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return base_folder(tmp_path_factory.mktemp("page") / "base")


def settings(tmp: Path, base: Path, **tables: dict[str, Any]) -> TrainConfig:
    pictures(tmp / "images", 2)
    short = {"steps": 6, "batch_size": 1}
    return config(tmp, base, **{**tables, "train": {**short, **tables.get("train", {})}})


def read(run: Path) -> str:
    return (run / "report.html").read_text(encoding="utf-8")


def test_a_run_with_nasty_words_is_one_safe_file(tmp_path: Path, base: Path) -> None:
    wanted = settings(
        tmp_path,
        base,
        data={"prompt": NASTY},
        preview={"every": 2, "prompts": [NASTY], "steps": 1},
        report={"subject_prompts": [NASTY], "unrelated_prompts": ["a dog"], "seeds": [0], "steps": 1},
    )
    if sys.platform == "linux":  # a name that is no Unicode
        shutil.copyfile(tmp_path / "images" / "0.png", os.fsencode(tmp_path / "images") + b"/caf\xe9.png")
    run = train(wanted).parent
    text = read(run)
    tags = Tags(text)
    assert not tags.all("script")
    assert not tags.all("link")
    named = [value for _, attrs in tags.found for key, value in attrs.items() if key in ("src", "href")]
    assert named
    assert all(str(value).startswith("data:image/webp;base64,") for value in named)
    assert not [key for _, attrs in tags.found for key in attrs if key.startswith("on")]
    assert any("default-src 'none'" in (meta.get("content") or "") for meta in tags.all("meta"))
    shown = [img["alt"] for img in tags.all("img")]
    assert shown == [
        "The same prompts and seeds without and with the LoRA",
        *(f"{NASTY}, step {step}" for step in (2, 4, 6)),
    ]
    assert str(tmp_path) not in text
    assert "torch" in text
    assert "moved latent subject" in text
    assert len(list(run.glob(".*.partial"))) == 0


def test_the_curve_is_the_losses(tmp_path: Path, base: Path) -> None:
    run = train(settings(tmp_path, base)).parent
    losses = [e["loss"] for e in events_in(run) if e["event"] == "Step"]
    (raw,) = re.findall(r'<polyline class="line raw" points="([^"]+)"', read(run))
    places = [tuple(map(float, pair.split(","))) for pair in raw.split()]
    assert len(places) == len(losses) == 6
    gaps = [b[0] - a[0] for a, b in itertools.pairwise(places)]
    assert max(gaps) - min(gaps) < 0.3
    # one straight line from loss to height: fitted by the ends, it holds for all
    low, high = losses.index(min(losses)), losses.index(max(losses))
    slope = (places[high][1] - places[low][1]) / (losses[high] - losses[low])
    assert slope < 0  # up is more
    for loss, (_, y) in zip(losses, places, strict=True):
        assert y == pytest.approx(places[low][1] + slope * (loss - losses[low]), abs=0.2)


def test_what_is_measured_is_drawn(tmp_path: Path, base: Path) -> None:
    held_out = {"share": 0.5, "every": 2}
    run = train(
        settings(tmp_path, base, validation=held_out, report={"unrelated_prompts": ["a dog"], "steps": 1})
    ).parent
    measured = [e for e in events_in(run) if e["event"] == "Measured"]
    text = read(run)
    for title in ("Loss on held-out pictures", "Drift of what should stay"):
        (drawn,) = re.findall(rf"{title}.*?</figure>", text)
        assert len(re.findall(r'points="([^"]+)"', drawn)[0].split()) == len(measured) > 1


def test_it_is_there_while_the_run_goes_on(tmp_path: Path, base: Path) -> None:
    seen: dict[int, str] = {}
    run = tmp_path / "runs" / "small"

    def look(event: TrainEvent) -> None:
        if isinstance(event, Step) and (run / "report.html").exists():
            seen[event.step] = read(run)

    train(settings(tmp_path, base, save={"every": 2}), listeners=[look])
    assert "0 of 6" in seen[1]
    assert "2 of 6" in seen[3]
    assert "4 of 6" in seen[5]
    assert 'class="state running"' in seen[5]
    assert 'class="state finished"' in read(run)


def test_what_cannot_be_written_is_said_once_and_costs_nothing(tmp_path: Path, base: Path) -> None:
    straight, hindered = Recorder(), Recorder()
    train(settings(tmp_path, base), listeners=[straight])
    run = tmp_path / "runs" / "small-2"

    def hinder(event: TrainEvent) -> None:
        if isinstance(event, Step) and event.step == 1:
            (run / "report.html").unlink()
            (run / "report.html").mkdir()
            (run / "report.html" / "in the way").touch()

    lora = train(settings(tmp_path, base, save={"every": 2}), listeners=[hindered, hinder])
    assert lora.exists()
    assert hindered.losses == straight.losses
    (note,) = [e.text for e in hindered.seen if isinstance(e, Note) and "report" in e.text]
    assert "the training goes on" in note
    assert len([e for e in hindered.seen if isinstance(e, Saved)]) == 3


def test_a_sheet_that_cannot_be_made_leaves_the_lora_finished(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shots = {"subject_prompts": ["a cat"], "seeds": [0], "steps": 1}
    run = tmp_path / "runs" / "small"

    def blocked(*_: Any) -> None:
        (run / "sheet.png").mkdir()
        write(*_)

    write = report.sheet
    monkeypatch.setattr(report, "sheet", blocked)
    recorder = Recorder()
    assert train(settings(tmp_path, base, report=shots), listeners=[recorder]).exists()
    last = recorder.seen[-1]
    assert isinstance(last, Note)
    assert "the LoRA is finished" in last.text
    assert 'class="state finished"' in read(run)


def test_a_resumed_run_shows_every_step_once(tmp_path: Path, base: Path) -> None:
    recorder = Recorder(stop_at=3)
    wanted = settings(tmp_path, base)
    with pytest.raises(Exception, match="Stopped at step 3"):
        train(wanted, stop=recorder.stop, listeners=[recorder])
    run = tmp_path / "runs" / "small"
    assert "stopped, and can be resumed" in read(run)
    train(wanted, resume=run)
    (raw,) = re.findall(r'<polyline class="line raw" points="([^"]+)"', read(run))
    assert len(raw.split()) == 6


def test_any_events_make_a_page(tmp_path: Path, base: Path) -> None:
    """Cut short, without a start, with pictures that are gone: what is there is shown."""
    wanted = settings(tmp_path, base, preview={"every": 3, "prompts": ["a cat"], "steps": 1})
    run = train(wanted).parent
    lines = (run / "events.jsonl").read_bytes().splitlines(keepends=True)
    shutil.rmtree(run / "previews")
    for count in range(len(lines) + 1):
        (run / "events.jsonl").write_bytes(b"".join(lines[:count]) + b'{"event": "Step", "st')
        story = Story(RunFolder(run, "small"))
        story.read_on()
        text = page(story, wanted, data_uri)
        assert "</html>" in text
        assert not Tags(text).all("img")


@pytest.mark.parametrize("make", [lambda p: None, lambda p: p.write_text("no picture"), lambda p: p.mkdir()])
def test_a_picture_that_is_none_is_left_out(tmp_path: Path, make: Callable[[Path], object]) -> None:
    make(tmp_path / "x.png")
    assert data_uri(tmp_path / "x.png", PREVIEW_SIDE) == ""


@given(
    st.lists(st.floats(-1e6, 1e6, allow_nan=False), min_size=1, max_size=3000),
    st.integers(4, 700),
)
def test_thinning_keeps_the_ends_of_every_stretch(heights: list[float], most: int) -> None:
    points = [(float(i), y) for i, y in enumerate(heights)]
    kept = thinned(points, most)
    assert len(kept) <= max(most, 1)
    assert kept == sorted(set(kept))
    assert set(kept) <= set(points)
    assert max(y for _, y in kept) == max(heights)
    assert min(y for _, y in kept) == min(heights)


@given(st.floats(-1e6, 1e6), st.floats(1e-9, 1e6), st.integers(3, 9))
def test_ticks_are_round_and_inside(low: float, width: float, count: int) -> None:
    high = low + width
    if high - low < 1e-9 * max(1, abs(low)):
        return  # the same number
    found = ticks(low, high, count)
    assert 1 <= len(found) <= count + 1
    step = found[1] - found[0] if len(found) > 1 else found[0] or 1.0
    assert all(low - step * 1e-6 <= t <= high + step * 1e-6 for t in found)
    if len(found) > 2:
        lead = step / 10 ** math.floor(math.log10(step) + 1e-6)
        assert min(abs(lead - r) for r in (1, 2, 5, 10)) < 1e-3


@pytest.mark.parametrize(
    "points",
    [[(1.0, 0.5)], [(1.0, 0.0), (2.0, 0.0)], [(1.0, math.nan), (2.0, 0.5)], [(5.0, -3.0), (9.0, 1e9)]],
)
def test_odd_curves_are_drawn_inside_their_frame(points: list[tuple[float, float]]) -> None:
    text = chart("Loss", [Curve("x", points, "main")])
    numbers = [float(n) for n in re.findall(r'(?:cy|y1|y2)="([-\d.]+)"', text)]
    for pair in re.findall(r'points="([^"]+)"', text):
        numbers += [float(p.split(",")[1]) for p in pair.split()]
    assert numbers
    assert all(0 <= n <= 240 for n in numbers)
    assert "nan" not in text


def test_no_points_are_no_chart() -> None:
    assert chart("Loss", [Curve("x", [], "main"), Curve("y", [(1.0, math.nan)], "raw")]) == ""
