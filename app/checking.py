"""The check before the night: what the loader would feed, at once, and then what two steps would cost.

The look is made here, in a thread; the steps are `launch.py --preflight` in a process of its own, which gives all its
memory back. Nothing is trained. What is asked for while a check runs takes its place.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from app.training import LAUNCH
from lora_core.errors import LoraError
from lora_core.safe_writes import write_atomic
from trainers import presets
from trainers.config import TrainConfig
from trainers.look import look


@dataclass(frozen=True)
class CheckView:
    """`state`: empty, looking, measuring, done or failed. `of`: what was checked, to be compared with what is now."""

    state: str = ""
    of: object = None
    look: dict[str, Any] = field(default_factory=dict)
    preflight: dict[str, Any] = field(default_factory=dict)
    problem: str = ""

    @property
    def busy(self) -> bool:
        return self.state in ("looking", "measuring")


class Check:
    """One at a time. Every method may be called from any thread."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._child: subprocess.Popen[str] | None = None
        self._turn = 0
        self.view = CheckView()

    def start(self, config: TrainConfig, of: object) -> None:
        with self._lock:
            self.stop()
            self.view = CheckView("looking", of)
            threading.Thread(target=self._run, args=(config, self._turn), name="check", daemon=True).start()

    def stop(self) -> None:
        """What is shown goes, and the process with it."""
        with self._lock:
            self._turn += 1
            self.view = CheckView()
            if self._child is not None and self._child.poll() is None:
                self._child.kill()

    def _run(self, config: TrainConfig, turn: int) -> None:
        folder = config.output / "look"
        try:
            self._show(turn, state="measuring", look=look(config, folder))
            preset = folder / f"{config.name}.toml"
            write_atomic(preset, lambda path: _write(path, presets.dump(config)))
            self._show(turn, state="done", preflight=self._measure(preset, turn))
        except LoraError as problem:
            self._show(turn, state="failed", problem=str(problem))

    def _measure(self, preset: Path, turn: int) -> dict[str, Any]:
        """The facts of a Preflight. Raises LoraError with the trainer's own sentence."""
        with self._lock:
            if turn != self._turn:
                return {}
            self._child = child = subprocess.Popen(
                [sys.executable, str(LAUNCH), "--preflight", str(preset), "--json"],
                cwd=LAUNCH.parent,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                encoding="utf-8",
                errors="replace",
            )
        said, complaint = child.communicate()
        told = [json.loads(line) for line in said.splitlines() if line.startswith("{")]
        found: dict[str, Any] = next((event for event in told if event["event"] == "Preflight"), {})
        if child.returncode or not found:
            lines = [line for line in complaint.splitlines() if line.strip()]
            raise LoraError(lines[-1] if lines else "The check ended without saying why.")
        return found

    def _show(self, turn: int, **changes: Any) -> None:
        with self._lock:
            if turn == self._turn:
                self.view = replace(self.view, **changes)


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
