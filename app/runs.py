"""Every training there ever was in one folder, each as it stands; what has not changed is read once."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from trainers.run_folder import RunFolder
from trainers.story import ALIVE, Story

MOST = 100  # shown, the newest


@dataclass(frozen=True)
class Past:
    """A run in a line. `state` as TrainView has it; a run that a process is at work at is in its hands."""

    name: str
    began: float  # seconds since 1970
    state: str
    step: int
    steps: int
    report: bool


class Runs:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._known: dict[tuple[Path, int], Past] = {}
        self._lock = threading.Lock()

    def all(self) -> list[Past]:
        """The one that began last first."""
        with self._lock:
            states = list(self._states())
            self._known = {state: self._known.get(state) or _read(state[0]) for state in states}
            return sorted(self._known.values(), key=lambda past: past.began, reverse=True)[:MOST]

    def mark(self, but: Path | None) -> list[object]:
        """What differs when `all` may; of the run `but`, which is at work and says something at every step, nothing."""
        return [(root.name, None if root == but else told) for root, told in self._states()]

    def _states(self) -> Iterator[tuple[Path, int]]:
        for preset in sorted(self.folder.glob("*/preset.toml")):
            events = preset.with_name("events.jsonl")
            yield preset.parent, events.stat().st_size if events.exists() else 0


def _read(root: Path) -> Past:
    folder = RunFolder(root, root.name)
    story = Story(folder)
    story.read_on()
    state = story.state
    if state in ALIVE and not folder.busy():
        state = "broken off"
    return Past(root.name, folder.began, state, story.step, story.steps, folder.page.exists())
