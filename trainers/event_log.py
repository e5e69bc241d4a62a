"""Where the events of a run go: into its events.jsonl, and to whoever listens."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from lora_core.errors import SaveFailed
from trainers.events import Emit, Note, TrainEvent


class EventLog:
    """Appends each event to a file at once and hands it to the listeners, in order."""

    def __init__(self, path: Path, *listeners: Emit) -> None:
        """Raises SaveFailed where the file cannot be opened."""
        self.path, self.listeners = path, list(listeners)
        self._broken = False
        try:
            self._file = path.open("a", encoding="utf-8", buffering=1)
        except OSError as problem:
            raise SaveFailed(
                f"{path} cannot be written: {problem.strerror}. Make room, or see to it that the folder may be written "
                "to; or choose another `output`."
            ) from problem

    def __call__(self, event: TrainEvent) -> None:
        """A full disk, a closed terminal, a pipe that nobody reads: the training matters more than its diary."""
        try:
            self._file.write(event.line() + "\n")
        except OSError as problem:
            if not self._broken:
                self._broken = True
                text = f"{self.path} cannot be written ({problem.strerror}); the training goes on."
                self._tell(Note(text=text))
        self._tell(event)

    def _tell(self, event: TrainEvent) -> None:
        for listener in list(self.listeners):
            try:
                listener(event)
            except OSError as problem:
                self.listeners.remove(listener)
                who = getattr(listener, "__name__", type(listener).__name__)
                self(Note(text=f"{who} is told no more of the training ({problem.strerror}); it goes on."))

    def close(self) -> None:
        with suppress(OSError):  # what a full disk has not taken
            self._file.close()
