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

from benchmarks import files, method, swap, train
from benchmarks.measure import Row, fastest, figure, interleaved, operations, table

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
