"""TrainEvent: a fact the trainer states. Console, page and tests read the same stream.

Every event is one JSON line of `events.jsonl` in the run folder: {"event": "Step", "time": ..., fields...}.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, TextIO

from tqdm import tqdm


@dataclass(frozen=True, kw_only=True)
class TrainEvent:
    quiet: ClassVar[bool] = False  # quiet events are in the file and not on the console

    def line(self) -> str:
        facts = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return json.dumps({"event": type(self).__name__, "time": round(time.time(), 3), **facts}, default=str)


@dataclass(frozen=True, kw_only=True)
class Note(TrainEvent):
    """Something the user should know: a skipped picture, a cut caption, a choice made for them."""

    text: str

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True, kw_only=True)
class TakenUp(TrainEvent):
    """A process begins to work at the run, or goes on with it: what earlier ones said of its end is past."""

    quiet: ClassVar[bool] = True
    pid: int
    versions: dict[str, str]  # of Python, torch and what else decides the result


@dataclass(frozen=True, kw_only=True)
class Preflight(TrainEvent):
    """Before the first step: what two steps of the largest batch cost, and what speaks against the training."""

    largest: str  # width x height
    pictures: int  # of that step's batch
    pieces: int  # in which it is computed; 1: whole
    memory: int  # bytes at the height of steps and saves: of the card, or of the process
    memory_pictures: int  # likewise while a picture is made; 0: none is
    memory_total: int  # bytes, of the card or of the machine
    step_s: float  # of the largest step
    steps_s: float  # of all that are to come
    more_s: dict[str, float]  # what else takes time, in its order, estimated from one of each
    total_s: float
    disk: int  # bytes at its end, at most
    disk_shares: dict[str, int]  # of what
    disk_free: int
    warnings: tuple[str, ...]

    def __str__(self) -> str:
        drawn = f", {size(self.memory_pictures)} while pictures are made" * (
            self.memory_pictures > self.memory
        )
        more = {"steps": self.steps_s} | {
            what: s for what, s in self.more_s.items() if s >= 0.01 * self.total_s
        }
        parts = ", ".join(f"{what} {duration(s)}" for what, s in more.items())
        shares = ", ".join(f"{what} {size(count)}" for what, count in self.disk_shares.items())
        one = self.pictures == 1
        return "\n".join(
            [
                f"Preflight: the largest step, {self.pictures} picture{'s' * (not one)} of {self.largest}, takes "
                f"{self.step_s:.2g} s and {size(self.memory)} of {size(self.memory_total)} memory{drawn}.",
                f"Time: about {duration(self.total_s)} ({parts}).",
                f"Disk: at most {size(self.disk)} of {size(self.disk_free)} that are free ({shares}).",
                *(f"Warning: {warning}" for warning in self.warnings),
            ]
        )


@dataclass(frozen=True, kw_only=True)
class Started(TrainEvent):
    """Just before the first step."""

    run: str
    base: str
    family: str
    device: str
    dtype: str
    trainable: int  # parameters
    total: int  # parameters of the base
    layers: int
    images: int
    class_images: int
    steps: int
    first_step: int

    def __str__(self) -> str:
        return (
            f"{self.base} ({self.family}) on {self.device}, base in {self.dtype}: training {self.trainable:,} "
            f"parameters in {self.layers} layers, {100 * self.trainable / self.total:.2f} % of {self.total:,}; "
            f"{self.images} pictures, {self.class_images} of the class; steps {self.first_step} to {self.steps}."
        )


@dataclass(frozen=True, kw_only=True)
class Step(TrainEvent):
    quiet: ClassVar[bool] = True
    step: int
    steps: int
    loss: float
    learning_rate: float
    eta_s: float


@dataclass(frozen=True, kw_only=True)
class Measured(TrainEvent):
    """At the same noise and timesteps every time (trainers.validation)."""

    step: int
    validation: float | None  # mean squared error on held-out pictures
    validation_by_timestep: dict[int, float]
    drift: float | None  # mean |prediction with the LoRA - without| on prompts it should leave alone
    drift_by_prompt: dict[str, float]

    def __str__(self) -> str:
        found = {"validation loss": self.validation, "drift": self.drift}
        return f"Step {self.step}: " + ", ".join(f"{k} {v:.4g}" for k, v in found.items() if v is not None)


@dataclass(frozen=True, kw_only=True)
class Preview(TrainEvent):
    step: int
    paths: tuple[str, ...]
    prompts: tuple[str, ...]  # of each path

    def __str__(self) -> str:
        return f"Step {self.step}: preview {', '.join(self.paths)}"


@dataclass(frozen=True, kw_only=True)
class Saved(TrainEvent):
    step: int
    path: str  # the state to resume from
    lora: str

    def __str__(self) -> str:
        return f"Step {self.step}: saved {self.path}"


@dataclass(frozen=True, kw_only=True)
class Paused(TrainEvent):
    step: int

    def __str__(self) -> str:
        return f"Paused after step {self.step}."


@dataclass(frozen=True, kw_only=True)
class Continued(TrainEvent):
    step: int

    def __str__(self) -> str:
        return f"Going on after step {self.step}."


@dataclass(frozen=True, kw_only=True)
class StepsChanged(TrainEvent):
    """While it runs: the training is to have `steps`, and not as many as `before`."""

    step: int
    steps: int
    before: int

    def __str__(self) -> str:
        return f"After step {self.step}: the training has {self.steps} steps now, before {self.before}."


@dataclass(frozen=True, kw_only=True)
class Finished(TrainEvent):
    path: str  # the LoRA
    seconds: float
    layers: int  # as read back from the file
    sha256: str  # of its tensors; empty for a PEFT folder

    def __str__(self) -> str:
        return f"Finished in {self.seconds:.0f} s: {self.path} ({self.layers} layers, read back and equal)."


@dataclass(frozen=True, kw_only=True)
class Interrupted(TrainEvent):
    step: int
    path: str  # the state to resume from; empty: stopped while it was getting ready
    resume: str  # the command that goes on

    def __str__(self) -> str:
        kept = "saved" if self.path else "there was nothing new to save"
        return f"Stopped at step {self.step}; {kept}. Go on with: {self.resume}"


@dataclass(frozen=True, kw_only=True)
class Failed(TrainEvent):
    reason: str

    def __str__(self) -> str:
        return f"Failed: {self.reason}"


@dataclass(frozen=True, kw_only=True)
class Reported(TrainEvent):
    """The figures of before and after."""

    sheet: str
    figures: dict[str, Any]

    def __str__(self) -> str:
        shown = ", ".join(f"{k} {v}" for k, v in self.figures.items() if not isinstance(v, list | dict))
        return f"Report: {shown}; sheet {self.sheet}"


Emit = Callable[[TrainEvent], None]


def json_lines(event: TrainEvent) -> None:
    """Each event as one line on stdout, as in events.jsonl: for programs that watch a training."""
    print(event.line(), flush=True)


class Console:
    """A progress bar with loss and time left; other events as lines above it."""

    def __init__(self) -> None:
        self._bar: tqdm[Any] | None = None
        self._out: TextIO = sys.stdout

    def __call__(self, event: TrainEvent) -> None:
        if isinstance(event, Step):
            if self._bar is None:
                self._bar = tqdm(
                    total=event.steps,
                    initial=event.step - 1,
                    unit="step",
                    file=sys.stderr,
                    dynamic_ncols=True,
                )
            self._bar.total = event.steps
            self._bar.update(event.step - self._bar.n)
            self._bar.set_postfix_str(f"loss {event.loss:.4f}")
        elif not event.quiet:
            if self._bar is not None and isinstance(event, Finished | Interrupted | Failed):
                self._bar.close()
                self._bar = None
            if isinstance(event, Failed):
                return  # raised as well: the command says it, once
            try:
                self._write(event, self._out)
            except OSError:  # `| head` has had enough; the bar is on stderr, and the rest now too
                if self._out is sys.stderr:
                    raise
                self._out = sys.stderr
                self._write(event, sys.stderr)

    @staticmethod
    def _write(event: TrainEvent, file: TextIO) -> None:
        tqdm.write(str(event), file=file)
        file.flush()  # a log is read while the training runs


def size(count: float) -> str:
    """620 kB, 1.2 GB"""
    for unit, factor in (("GB", 1e9), ("MB", 1e6)):
        if count >= factor:
            return f"{count / factor:.1f} {unit}"
    return f"{count / 1e3:.0f} kB"


def duration(seconds: float) -> str:
    """45 s, 12 min, 3 h 20 min"""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"
