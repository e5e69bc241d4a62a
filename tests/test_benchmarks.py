"""The benchmarks run, and say something about every row. No figure is judged here: that is what they are for."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks import files, likeness, method, swap, train
from benchmarks.likeness_runs import SPACES, Judge, Setting
from benchmarks.measure import Row, fastest, figure, interleaved, operations, table
from benchmarks.train_sides import Ours, Peer

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Models this small are slower on two threads, and much slower where the cores are shared."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


QUICK = ("load", "fuse", "operations", "recompilations", "sheet")


@pytest.mark.parametrize("only", [QUICK, pytest.param(tuple(swap.ROWS), marks=pytest.mark.slow)], ids=len)
def test_every_row_is_in_the_table_with_finite_figures(
    only: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = tmp_path / "swap.json"
    small = ["--size", "tiny", "--repeats", "1", "--swaps", "1"]
    rows = swap.main([*small, "--json", str(report), "--only", *only])
    assert {row.name for row in rows} == set(only)
    for row in rows:
        figures = (row.ours, row.peer, row.ratio)
        assert all(value is None or math.isfinite(value) for value in figures), row
        assert row.ours is not None or row.note, row
    printed = capsys.readouterr().out
    assert all(f"\n| {row.name} | {row.what} |" in printed for row in rows)
    written = json.loads(report.read_text(encoding="utf-8"))
    assert [line["what"] for line in written["rows"]] == [row.what for row in rows]
    assert written["machine"]["dtype"] == "bfloat16"


def test_every_row_of_the_method_is_in_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    rows = method.main(["--size", "tiny", "--repeats", "1"])
    assert {row.name for row in rows} == set(method.ROWS)
    assert all(row.ours is not None and math.isfinite(row.ours) for row in rows)
    printed = capsys.readouterr().out
    assert all(f"\n| {row.name} | {row.what} |" in printed for row in rows)


def test_every_row_of_the_files_is_in_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    rows = files.main(["--size", "tiny", "--repeats", "1"])
    assert [row.name for row in rows] == ["open", "look", "look", "look first"]
    assert all(row.ours and row.peer and math.isfinite(row.ours) for row in rows)
    printed = capsys.readouterr().out
    assert all(f"\n| {row.name} | {row.what} |" in printed for row in rows)
    assert "| the library |" in printed


@pytest.mark.parametrize(
    "only", [("losses",), pytest.param(("step", "memory", "losses", "dora"), marks=pytest.mark.slow)], ids=len
)
def test_every_row_of_the_training_is_in_the_table(
    only: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    rows = train.main(["--size", "tiny", "--repeats", "2", "--only", *only])
    assert {row.name for row in rows} == set(only)
    assert all(row.ours is not None and math.isfinite(row.ours) for row in rows)
    assert all(row.met for row in rows if row.name == "losses")  # no timing: both sides did the same work
    printed = capsys.readouterr().out
    assert all(f"\n| {row.name} | {row.what} |" in printed for row in rows)


def test_every_row_of_the_likeness_is_in_the_table_and_nothing_is_trained_twice(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kept, report = tmp_path / "kept", tmp_path / "likeness.json"
    arguments = ["--size", "tiny", "--seeds", "1", "--kept", str(kept), "--json", str(report)]
    rows = likeness.main(arguments)
    assert [row.name for row in rows] == ["reference"] * 7 + ["class-free"] * 7
    for row in rows:
        assert math.isfinite(row.ours or math.nan), row
        assert row.met is not None or row.what == "named backgrounds obeyed"
    printed = capsys.readouterr().out
    assert all(f"\n| {row.name} | {row.what} |" in printed for row in rows)
    written = json.loads(report.read_text(encoding="utf-8"))
    base, likes, moved = (
        {side: found["fox 0"][f"{what} latent"] for side, found in written["figures"].items()}
        for what in ("base", "likeness", "drift")
    )
    assert set(base.values()) == {base["ours"]}  # one judge
    assert base["ours"] not in likes.values()  # each file does something
    assert all(moved.values())
    assert len(set(likes.values())) == 3
    files = {path: path.stat().st_mtime_ns for path in kept.glob("*.safetensors")}
    assert len(files) == 3
    assert likeness.main(arguments) == likeness.main([*arguments, "--so-far"]) == rows
    assert {path: path.stat().st_mtime_ns for path in kept.glob("*.safetensors")} == files


def test_likeness_is_judged_by_paired_differences() -> None:
    ours, peer = [0.30, 0.42, 0.54], [0.29, 0.40, 0.51]
    apart, error = likeness.difference(ours, peer)
    assert (apart, error) == pytest.approx((0.02, 0.01 / math.sqrt(3)))
    found = {
        side: {
            f"fox {seed}": {"obedience": 0.5}
            | {f"{what} {space}": value for what in (*likeness.MEASURED, "base") for space in SPACES}
            for seed, value in enumerate(values)
        }
        for side, values in {"ours": ours, "reference": peer, "class-free": [0.31, 0.44, 0.57]}.items()
    }
    assert [row.met for row in likeness.against_reference(found)] == [False] * 6 + [None]
    alike = found | {"reference": found["ours"]}
    assert [row.met for row in likeness.against_reference(alike)] == [True] * 6 + [None]
    free = list(likeness.without_class(found))
    assert free[0].ratio == pytest.approx(1.32 / 1.26)  # 4.8 % more
    assert [row.met for row in free] == [True] * 6 + [None]
    del found["class-free"]["fox 1"]  # a run that was stopped
    row, *_ = likeness.without_class(found)
    assert (row.repeats, row.ours, row.peer) == (2, pytest.approx(0.44), pytest.approx(0.42))
    assert list(likeness.without_class({side: {} for side in found})) == []


def test_both_sides_of_the_likeness_take_the_same_steps(tmp_path: Path) -> None:
    """From one LoRA, with one picture and one of the class there is nothing to shuffle: the same draws, v targets and
    prior, so the same losses but for rounding."""
    setting = Setting(("fox",), 1, 10, True, tmp_path, tmp_path)
    config = setting.preset("fox", 0)
    assert config.data.images is not None
    for name, picture in zip(("own", "class"), sorted(config.data.images.glob("*.png")), strict=False):
        (tmp_path / name).mkdir()
        (tmp_path / name / "0.png").write_bytes(picture.read_bytes())
    Judge().draw_beginning(config)
    data = {
        "images": tmp_path / "own",
        "class_images": tmp_path / "class",
        "class_count": 0,
        "prior_weight": 0.5,
    }
    wanted = config.model_copy(
        update={
            "data": config.data.model_copy(update={**data, "prompt": "a zxq animal"}),
            "train": config.train.model_copy(
                update={"batch_size": 1, "schedule": "constant", "warmup_steps": 0}
            ),
        }
    )
    ours, peer = Ours(wanted), Peer(wanted)
    for _ in range(3):
        ours.step()
        peer.step()
    ours.close()
    assert ours.losses == pytest.approx(peer.losses, rel=1e-4)
    assert len(set(ours.losses)) == 4


def test_an_unknown_row_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        swap.main(["--only", "nothing"])
    assert "invalid choice: 'nothing'" in capsys.readouterr().err


def test_the_list_names_every_benchmark() -> None:
    listed = subprocess.run(
        [sys.executable, "-m", "benchmarks", "--list"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "python -m benchmarks.swap" in listed.stdout


def test_measuring() -> None:
    calls: list[str] = []
    times = interleaved({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 2)
    assert calls == ["a", "b", "a", "b", "b", "a"]  # a warm-up, then rounds in turning order
    assert {name: len(found) for name, found in times.items()} == {"a": 2, "b": 2}
    least = fastest({"a": lambda: sum(range(200_000)), "b": lambda: None}, 2)
    assert least["a"] > least["b"] >= 0
    counted = operations(lambda: torch.ones(2, 3).t() + 1)
    assert (counted.all, counted.kernels) == (3, 2)  # t is a view
    assert Row("x", "y", 1.0, 0.0).ratio is None
    assert figure(None, "ms") == "–"
    assert (
        table([Row("x", "y", 1.0, 4.0, "ms", "≤ 1", True)])
        .splitlines()[-1]
        .startswith("| x | y | 1 ms | 4 ms | 0.25 | ≤ 1 | yes |")
    )
