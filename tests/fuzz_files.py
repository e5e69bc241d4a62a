"""Spoiled files through every public door: each is refused in a sentence or read right, soon and in little memory.

    python -m tests.fuzz_files --count 20000                  half an hour
    python -m tests.fuzz_files --first 4711 --count 1         that one again, with what was done to it

A case is its number and the seed, wherever it runs. Exit code 1 if any failed.
"""

from __future__ import annotations

import argparse
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from lora_core import LivePipeline, coverage_on, look, read_adapter
from lora_core.errors import LoraError, NotFinite
from lora_core.facts import Facts
from lora_core.formats.files import headers_of
from lora_core.formats.peft import CONFIG, WEIGHTS
from lora_core.models import find_base
from tests.fuzz_corpus import CHANGES, Draft, Raw, as_json, corpus, spoiled_bytes, spoiled_header
from tests.small_models import small_pipeline

SECONDS = 2.0  # of processor time, for all doors together
MEMORY = 100 * 2**20  # bytes beyond the file's own
SENTENCE = 1000  # characters of a refusal
BASES = 1 / 25  # of the cases: a model is built for each
STATUS = Path("/proc/self/status")  # Linux
LARGEST = 2**40  # bytes of a sparse file


@dataclass
class Report:
    outcomes: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    slowest: tuple[float, int] = (0.0, -1)  # seconds, number
    largest: tuple[int, int] = (0, -1)  # bytes beyond the file's, number

    def __str__(self) -> str:
        lines = [f"{n:7,} {what}" for what, n in sorted(self.outcomes.items())]
        return "\n".join(
            [
                *lines,
                f"slowest: {self.slowest[0]:.2f} s (number {self.slowest[1]})",
                f"most memory: {self.largest[0] / 2**20:.0f} MB beyond the file's (number {self.largest[1]})",
                f"{len(self.problems)} problems",
                *self.problems[:20],
            ]
        )


class Wrong(AssertionError):
    """A door did what it must not."""


class Fuzzer:
    def __init__(self, folder: Path, seed: int = 0) -> None:
        self.folder, self.seed = folder, seed
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the libraries that make the files
            drafts = corpus(folder)
        self.bases = [draft for draft in drafts if draft.is_base]
        self.loras = [draft for draft in drafts if not draft.is_base]
        self.live = LivePipeline(small_pipeline("sd1"))

    def run(self, first: int, count: int) -> Report:
        report = Report()
        for number in range(first, first + count):
            draft, path, size = self.case(number)
            before, began = peak(anew=True), time.process_time()
            try:
                outcome = self.base(path) if draft.is_base else self.lora(path)
            except Exception:  # whatever it is, it is the finding
                outcome = "WRONG"
                report.problems.append(
                    f"number {number}, {draft.source}, {draft.changes}:\n{traceback.format_exc()}"
                )
            seconds, grown = time.process_time() - began, max(0, peak() - before - size)
            report.slowest = max(report.slowest, (seconds, number))
            report.largest = max(report.largest, (grown, number))
            if seconds > SECONDS or grown > MEMORY:
                report.problems.append(
                    f"number {number}, {draft.source}, {draft.changes}: {seconds:.2f} s, {grown / 2**20:.0f} MB"
                )
            report.outcomes[f"{draft.source.partition(' ')[0]}: {outcome}"] += 1
        return report

    def case(self, number: int) -> tuple[Draft, Path, int]:
        """-> what was done to what, where it lies, and its bytes in memory."""
        r = random.Random(f"{self.seed}:{number}")
        draft = r.choice(self.bases if r.random() < BASES else self.loras).copy()
        for change in r.choices(CHANGES, k=r.choice((0, 1, 1, 1, 2, 3))):
            if draft.tensors:
                change(draft, r)
                draft.changes.append(change.__name__)
        header: list[tuple[str, Any]] | Raw = draft.header()
        level = r.random()
        if level < 0.2:
            header = spoiled_header(draft.header(), r)
            draft.changes.append("spoiled_header")
        text, body = as_json(header).encode("utf-8", "surrogatepass"), draft.body()
        length = (
            len(text) if r.random() < 0.95 else r.choice((0, 1, len(text) + 1, len(text) - 1, 2**40, 2**63))
        )
        start = length.to_bytes(8, "little") + text
        data = start + (body if isinstance(body, bytes) else b"")
        if level > 0.85:
            data = spoiled_bytes(data, r)
            draft.changes.append("spoiled_bytes")
        return draft, self.written(draft, data, body, r), len(data)

    def written(self, draft: Draft, data: bytes, body: bytes | int, r: random.Random) -> Path:
        place = self.folder / "case"
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        path = place / (WEIGHTS if draft.source.startswith("peft") else "x.safetensors")
        with path.open("wb") as file:
            file.write(data)
            if isinstance(body, int):
                file.truncate(min(len(data) + body + r.choice((0, 0, 0, 0, 1, -1)), LARGEST))
        if draft.beside is not None:
            path.with_name(CONFIG).write_bytes(draft.beside)
        return place if draft.source.startswith("peft") and r.random() < 0.8 else path

    def lora(self, path: Path) -> str:
        seen = look(path)
        sentence(seen.problem)
        str(seen)
        seen.as_json()
        try:
            adapter = read_adapter(path)
        except NotFinite as problem:
            sentence(str(problem))
            require(seen.facts is not None or seen.problem, "a look saw nothing")
            require(look(path, hashes=True).problem, "a look with hashes found all finite")
            return "not finite"
        except LoraError as problem:
            sentence(str(problem))
            require(seen.problem, f"a look found nothing wrong, reading: {problem}")
            refused(lambda: find_base(path))
            return "refused"
        require(not seen.problem, f"read, but a look says: {seen.problem}")
        whole = look(path, hashes=True)
        require(not whole.problem and whole.hashes, f"read, but a look with hashes says: {whole.problem}")
        require(seen.facts is not None, "read, and a look has no facts")
        require(
            replace(Facts.of(adapter), dtypes={}) == replace(seen.facts, dtypes={}),
            f"reading and looking differ: {Facts.of(adapter)} {seen.facts}",
        )
        for header in headers_of(path):  # raises where we were more generous than the library
            safetensors.torch.load_file(header.path)
        refused(lambda: coverage_on(adapter, self.live.models, self.live.family))
        for delta in list(adapter.deltas.values())[:4]:
            shape = delta.shape()
            if -1 not in shape and delta.fits(shape) and torch.Size(shape).numel() <= 2**18:
                change = delta.delta(torch.zeros(shape))
                require(tuple(change.shape) == shape, f"{shape} is changed by {tuple(change.shape)}")
        return "read"

    def base(self, path: Path) -> str:
        sentence(look(path).problem)
        refused(lambda: read_adapter(path))
        try:
            find_base(path)
        except LoraError as problem:
            sentence(str(problem))
            return "refused"
        safetensors.safe_open(path, "pt").__exit__(None, None, None)
        return "read"


def require(holds: object, what: str) -> None:
    if not holds:
        raise Wrong(what)


def refused(action: Any) -> None:
    """Whatever it says, it says it in a sentence."""
    try:
        action()
    except LoraError as problem:
        sentence(str(problem))


def sentence(text: str) -> None:
    require(len(text) <= SENTENCE and text.isprintable(), f"no sentence: {text!r}")


def peak(*, anew: bool = False) -> int:
    """The most memory this process has had, in bytes; `anew`: forget what it had before, where the system can."""
    if not STATUS.exists():
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return most if sys.platform == "darwin" else most * 1024
    if anew:
        STATUS.with_name("clear_refs").write_text("5")
    (line,) = (line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


@contextmanager
def alarmed(seconds: int) -> Iterator[None]:
    def ring(*_: object) -> None:
        raise TimeoutError(f"not over after {seconds} s")

    signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    yield
    signal.alarm(0)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.fuzz_files", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--first", type=int, default=0, metavar="NUMBER")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    total = Report()
    with tempfile.TemporaryDirectory() as folder:
        fuzzer = Fuzzer(Path(folder), options.seed)
        began = time.perf_counter()
        for first in range(options.first, options.first + options.count, 100):
            count = min(100, options.first + options.count - first)
            with alarmed(100 * 60):
                found = fuzzer.run(first, count)
            total.outcomes += found.outcomes
            total.problems += found.problems
            total.slowest, total.largest = (
                max(total.slowest, found.slowest),
                max(total.largest, found.largest),
            )
            for problem in found.problems:
                print(problem, file=sys.stderr, flush=True)
        print(f"{options.count:,} files in {time.perf_counter() - began:.0f} s\n{total}")
        if options.count == 1:
            print(fuzzer.case(options.first)[0].changes)
    return 1 if total.problems else 0


if __name__ == "__main__":
    sys.exit(main())
