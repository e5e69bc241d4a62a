"""The story of a training run: its events.jsonl read as it grows, for the page and for the report."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trainers.control import names_in
from trainers.run_folder import RunFolder

ALIVE = ("starting", "running", "paused")
MOST_POINTS = 1000  # of a curve; more are slow to draw and look the same
SMOOTHING = (
    0.95  # a loss depends on the noise level drawn more than on what was learnt: about 20 steps are averaged
)
ASKED_TO_END = (130, -signal.SIGINT, -signal.SIGTERM)


@dataclass(frozen=True)
class TrainView:
    """A run at one moment.

    state     starting | running | paused | finished | stopped | failed; finished: the LoRA is there, and the report
              may still be in the making
    eta_s     seconds left, pauses not counted; 0 until known
    losses    (step, raw, smoothed), at most 1,000
    previews  (step, prompt, picture), the run's own and the samples asked for, in the order they were made
    held_out  (step, loss on held-out pictures), where that is measured
    saved     (step, LoRA file) of every save whose file is still there: old ones are swept
    preflight the facts of its Preflight, empty before there is one
    waiting   the orders that it has not taken yet, by the names of their files
    lora      the finished LoRA, else that of the newest save
    resume    the command that goes on with a run that is stopped, or has failed after a save
    """

    state: str
    run: Path
    name: str
    step: int
    steps: int
    eta_s: float
    losses: tuple[tuple[int, float, float], ...]
    previews: tuple[tuple[int, str, Path], ...]
    held_out: tuple[tuple[int, float], ...]
    saved: tuple[tuple[int, Path], ...]
    notes: tuple[str, ...]
    preflight: dict[str, Any]
    waiting: tuple[str, ...]
    lora: Path | None
    report: Path | None
    sheet: Path | None
    figures: dict[str, Any]
    error: str
    resume: str


@dataclass
class Story:
    """What a run's events.jsonl tells, read on from where it was last read."""

    folder: RunFolder
    steps: int = 0
    log_start: int = 0  # of this process's words in the log, bytes
    state: str = "starting"
    step: int = 0
    eta_s: float = 0.0
    losses: list[tuple[int, float, float]] = field(default_factory=list)
    rates: list[tuple[int, float]] = field(default_factory=list)
    validation: list[tuple[int, float]] = field(default_factory=list)
    drift: list[tuple[int, float]] = field(default_factory=list)
    started: dict[str, Any] = field(default_factory=dict)  # the facts of the last Started
    preflight: dict[str, Any] = field(default_factory=dict)  # likewise, of its Preflight
    versions: dict[str, str] = field(default_factory=dict)  # of the last process
    seconds: float = 0.0  # between the first and the last word of each process, added up
    previews: list[tuple[int, str, Path]] = field(default_factory=list)
    saved: dict[int, Path] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    lora: Path | None = None
    sheet: Path | None = None
    figures: dict[str, Any] = field(default_factory=dict)
    error: str = ""
    last_said: float = 0.0  # seconds since 1970
    offset: int = 0  # bytes read

    def read_on(self) -> None:
        for line in self._new_lines():
            try:
                self._take(json.loads(line))
            except (ValueError, KeyError, TypeError):
                continue  # cut short by a disk that was full: the training went on, and so does its story

    def _new_lines(self) -> Iterator[bytes]:
        """Whole ones: the rest of a line that is being written is read next time."""
        try:
            with self.folder.events.open("rb") as file:
                file.seek(self.offset)
                data = file.read()
        except FileNotFoundError:
            return
        whole = data[: data.rfind(b"\n") + 1]
        self.offset += len(whole)
        yield from whole.splitlines()

    def _take(self, event: dict[str, Any]) -> None:
        said = event.get("time", self.last_said)
        if event["event"] != "TakenUp" and self.last_said:
            self.seconds += max(0.0, said - self.last_said)
        self.last_said = said
        match event["event"]:
            case "TakenUp":
                self.take_up()
                self.versions = event.get("versions", {})
            case "Started":
                self._begin_at(event["first_step"])
                self.started = event
                self.state, self.steps = "running", event["steps"]
            case "Step":
                self.step, self.steps, self.eta_s = event["step"], event["steps"], event["eta_s"]
                self._add_loss(event["step"], event["loss"])
                self.rates.append((event["step"], event["learning_rate"]))
            case "Measured":
                for curve, name in ((self.validation, "validation"), (self.drift, "drift")):
                    if event[name] is not None:
                        curve.append((event["step"], event[name]))
            case "Preflight":
                self.notes += event["warnings"]
                self.preflight = event
            case "StepsChanged":
                self.steps = event["steps"]
            case "Paused":
                self.state = "paused"
            case "Continued":
                self.state = "running"
            case "Preview":
                made = zip(event["prompts"], event["paths"], strict=True)
                self.previews += [(event["step"], prompt, Path(path)) for prompt, path in made]
            case "Saved":
                self.saved[event["step"]] = Path(event["lora"])
            case "Note":
                self.notes.append(event["text"])
            case "Finished":
                self.state, self.lora, self.eta_s = "finished", Path(event["path"]), 0.0
            case "Reported":
                self.sheet, self.figures = Path(event["sheet"]), event["figures"]
            case "Interrupted":
                self.state = "stopped"
            case "Failed":
                self.state, self.error = "failed", event["reason"]

    def take_up(self) -> None:
        """Another process begins: how the last one ended is past, and what it noted will be noted again."""
        self.state, self.error, self.notes = "starting", "", []

    def _begin_at(self, first_step: int) -> None:
        """A killed run goes on from its last save: what it had said of later steps is done, and said, again."""
        self.step, self.lora, self.sheet, self.figures = first_step - 1, None, None, {}
        self.losses = [point for point in self.losses if point[0] < first_step]
        for curve in (self.rates, self.validation, self.drift):
            curve[:] = [point for point in curve if point[0] < first_step]
        self.previews = [shown for shown in self.previews if shown[0] < first_step]
        self.saved = {step: lora for step, lora in self.saved.items() if step < first_step}

    def _add_loss(self, step: int, loss: float) -> None:
        """Smoothed by an exponential average that is not drawn towards 0 at the start (as Adam's are not)."""
        t, before = len(self.losses) + 1, self.losses[-1][2] if self.losses else 0.0
        mean = SMOOTHING * before * (1 - SMOOTHING ** (t - 1)) + (1 - SMOOTHING) * loss
        self.losses.append((step, loss, mean / (1 - SMOOTHING**t)))

    def end(self, code: int | None) -> None:
        """The process is gone without having said how it ended. `code`: None where it was not our child."""
        if code in ASKED_TO_END:
            self.state = "stopped"
            return
        words, self.state = self._last_words(), "failed"
        if code in (2, 3):  # refused to start: the sentence is for the user
            self.error = words
            return
        how = "ended without saying why"
        if code is not None and code < 0:
            how = f"was killed ({signal.Signals(-code).name})"
        self.error = f"The training {how} after step {self.step}. "
        if code in (None, -signal.SIGKILL):
            self.error += "When memory runs out, the system does that: close other programs, then resume."
        elif words:
            self.error += f"Its last words: {words} (all of them: {self.folder.log})"

    def _last_words(self) -> str:
        try:
            with self.folder.log.open("rb") as log:
                log.seek(max(self.log_start, self.folder.log.stat().st_size - 4096))
                lines = log.read().decode("utf-8", errors="replace").split("\n")
        except FileNotFoundError:
            return ""
        return next((line.strip() for line in reversed(lines) if line.strip()), "")

    def view(self) -> TrainView:
        stride = -(-len(self.losses) // (MOST_POINTS - 1)) or 1
        shown = [point for i, point in enumerate(self.losses[:-1]) if i % stride == 0] + self.losses[-1:]
        goes_on = self.state == "stopped" or (self.state == "failed" and self.saved)
        return TrainView(
            state=self.state,
            run=self.folder.root,
            name=self.folder.root.name,
            step=self.step,
            steps=self.steps,
            eta_s=self.eta_s,
            losses=tuple(shown),
            previews=tuple(self.previews),
            held_out=tuple(self.validation),
            saved=tuple(sorted((step, lora) for step, lora in self.saved.items() if lora.exists())),
            notes=tuple(self.notes),
            preflight=self.preflight,
            waiting=tuple(n for n in names_in(self.folder.control) if self.state != "paused" or n != "pause"),
            lora=self.lora or (self.saved[max(self.saved)] if self.saved else None),
            report=self.folder.page if self.folder.page.exists() else None,
            sheet=self.sheet,
            figures=self.figures,
            error=self.error,
            resume=self.folder.resume_command if goes_on else "",
        )
