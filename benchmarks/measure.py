"""What every benchmark needs: medians, operation counts, rows, and the table they make."""

from __future__ import annotations

import argparse
import contextlib
import gc
import os
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any

import diffusers
import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode

Action = Callable[[], object]


@dataclass(frozen=True)
class Row:
    """One line of the report. `ours` and `peer` are in `unit`; None: not measured, or not offered."""

    name: str  # as --only takes it
    what: str
    ours: float | None
    peer: float | None
    unit: str = ""
    goal: str = ""
    met: bool | None = None
    repeats: int = 1
    note: str = ""

    @property
    def ratio(self) -> float | None:
        """None where the peer's figure is nothing, or lost in the noise: a quotient would say nothing."""
        return (
            self.ours / self.peer
            if self.ours is not None and self.peer is not None and self.peer > 0
            else None
        )

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "ratio": self.ratio}


def compared(
    name: str,
    what: str,
    ours: float,
    peer: float,
    *,
    repeats: int,
    at_most: float | None = None,
    note: str = "",
) -> Row:
    """A row of two times in seconds, shown in ms, whose goal is a share of the peer's."""
    row = Row(name, what, ours * 1e3, peer * 1e3, "ms", repeats=repeats, note=note)
    if at_most is None:
        return row
    met = None if row.ratio is None else row.ratio <= at_most
    return Row(**{**asdict(row), "goal": f"≤ {at_most:g} × peer", "met": met})


def measured(
    rows: Mapping[str, Callable[[Any], Iterator[Row]]], only: Sequence[str] | None, setting: Any
) -> list[Row]:
    """Every row asked for, each said on stderr as soon as it is there: who stops a long run keeps what it found."""
    found: list[Row] = []
    with quiet():
        for name, measure in rows.items():
            if only is not None and name not in only:
                continue
            start = time.perf_counter()
            for row in measure(setting):
                found.append(row)
                print(f"{row.what}: {row.ours} {row.unit}, peer {row.peer}", file=sys.stderr, flush=True)
            print(f"{name}: {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
    return found


def options_of(
    name: str, doc: str | None, rows: Collection[str], *, sizes: Sequence[str], repeats: int = 5
) -> argparse.ArgumentParser:
    """What every benchmark of rows takes. Of `sizes` the first is for tests and the second the default."""
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{name}", description=(doc or "").split("\n")[0]
    )
    parser.add_argument("--size", choices=sizes, default=sizes[1])
    parser.add_argument("--only", nargs="+", choices=rows, metavar="NAME", help=", ".join(rows))
    parser.add_argument(
        "--repeats", type=positive, default=repeats, metavar="N", help=f"rounds per figure ({repeats})"
    )
    return parser


def report(rows: Sequence[Row], facts: Mapping[str, str], peer: str = "diffusers + PEFT") -> None:
    """Onto stdout."""
    print(f"\n{', '.join(f'{name}: {value}' for name, value in facts.items())}\n\n{table(rows, peer)}")


def positive(text: str) -> int:
    """A count on the command line."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is less than 1")
    return number


@contextlib.contextmanager
def no_collection() -> Iterator[None]:
    """A collection in the middle of a short action would be counted as the action's."""
    gc.collect()
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def seconds(action: Action) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def median_seconds(action: Action, repeats: int, *, after: Action = lambda: None) -> float:
    """Median of `repeats`, after one warm-up; `after` (untimed) undoes the action each time."""
    action()
    after()
    times = []
    for _ in range(repeats):
        with no_collection():
            times.append(seconds(action))
        after()
    return statistics.median(times)


def alternating(do: Action, undo: Action, repeats: int) -> tuple[float, float]:
    """Medians of an action and of its undoing, one after the other, after one warm-up of both."""
    do()
    undo()
    pairs = []
    for _ in range(repeats):
        with no_collection():
            pairs.append((seconds(do), seconds(undo)))
    return statistics.median(d for d, _ in pairs), statistics.median(u for _, u in pairs)


def interleaved(actions: Mapping[str, Action], repeats: int) -> dict[str, list[float]]:
    """Seconds per round of each action. Each round runs all of them, in turning order, so that a machine
    that slows down or warms up does so for all alike: compare within a round."""
    for action in actions.values():
        action()
    names, times = list(actions), {name: [0.0] * repeats for name in actions}
    for turn in range(repeats):
        for i in range(len(names)):
            name = names[(i + turn) % len(names)]
            with no_collection():
                times[name][turn] = seconds(actions[name])
    return times


def fastest(actions: Mapping[str, Action], repeats: int) -> dict[str, float]:
    """The least processor time of each action in seconds, after a warm-up, in rounds as `interleaved` has them. For
    work of one thread that no other program's load may touch."""
    for action in actions.values():
        action()
    names, least = list(actions), dict.fromkeys(actions, float("inf"))
    for turn in range(repeats):
        for i in range(len(names)):
            name = names[(i + turn) % len(names)]
            with no_collection():
                start = time.process_time()
                actions[name]()
                least[name] = min(least[name], time.process_time() - start)
    return least


def extra(times: Mapping[str, Sequence[float]], name: str, base: str) -> float:
    """Median over the rounds of what `name` took longer than `base` in the same round."""
    return statistics.median(a - b for a, b in zip(times[name], times[base], strict=True))


class Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts ATen operations: `all`, and of them those that are no mere view, so do work (`kernels`)."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.all = self.kernels = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.all += 1
        self.kernels += not func.is_view
        return func(*args, **(kwargs or {}))


def operations(action: Action) -> Operations:
    action()  # what happens only once is not the layer's
    counted = Operations()
    with counted:
        action()
    return counted


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the peer's log lines and progress bars: writing them would be timed, and hide the table."""
    libraries = (diffusers.utils.logging, transformers.utils.logging)
    before = [library.get_verbosity() for library in libraries]
    bars = [library.is_progress_bar_enabled() for library in libraries]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for library in libraries:
            library.set_verbosity_error()
            library.disable_progress_bar()
        try:
            yield
        finally:
            for library, level, bar in zip(libraries, before, bars, strict=True):
                library.set_verbosity(level)
                if bar:
                    library.enable_progress_bar()


def machine() -> dict[str, str]:
    names = ("torch", "diffusers", "peft", "transformers")
    return {
        "cores": str(os.cpu_count()),
        "threads": str(torch.get_num_threads()),
        "processor": f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}",
        **({"GPU": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}),
        "load": f"{os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else "unknown",
        "python": platform.python_version(),
        **{name: version(name) for name in names},
    }


def table(rows: Sequence[Row], peer: str = "diffusers + PEFT") -> str:
    """GitHub's Markdown."""
    head = ("row", "what", "ours", peer, "ratio", "goal", "met", "n", "note")
    lines = [head, ("---",) * len(head)]
    for row in rows:
        met = {None: "–", True: "yes", False: "no"}[row.met]
        ratio = "–" if row.ratio is None else f"{row.ratio:.3g}"
        shown = [figure(value, row.unit) for value in (row.ours, row.peer)]
        lines.append((row.name, row.what, *shown, ratio, row.goal or "–", met, str(row.repeats), row.note))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def figure(value: float | None, unit: str) -> str:
    if value is None:
        return "–"
    shown = f"{value:.0f}" if abs(value) >= 100 or value == int(value) else f"{value:.3g}"
    return f"{shown} {unit}".rstrip()
