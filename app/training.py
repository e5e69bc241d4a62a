"""The training as the app sees it: one child process, watched through its events, told things through its folder.

The child is `launch.py --train --resume RUN` in a session of its own, so it outlives the page and the server; a server
that starts again finds it by the lock it holds. Its run folder is made here, with the whole preset in it, so there is
never a doubt which folder is whose; the child takes that run up at its beginning.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from lora_core.errors import LoraError
from trainers import presets
from trainers.control import Commands
from trainers.run_folder import RunFolder
from trainers.story import ALIVE, Story, TrainView

__all__ = ["TrainView", "Training"]

LAUNCH = Path(__file__).resolve().parents[1] / "launch.py"
LOOK_AGAIN_S = 5.0  # for a training that somebody else has started in the folder of runs


class Training:
    """One training at a time, of the runs in one folder. Every method may be called from any thread."""

    def __init__(self, runs: Path) -> None:
        self.runs = runs.absolute()
        self._lock = threading.RLock()
        self._child: subprocess.Popen[bytes] | None = None  # None with a story: found, not started here
        self._story: Story | None = None
        self._looked = float("-inf")

    def start(self, preset: str | Path, overrides: Sequence[str] = ()) -> Path:
        """-> the run folder, a new one in `runs` whatever the preset's `output` says: there it is found again.

        Raises ConfigError for a preset that cannot be trained, LoraError while another training runs.
        """
        config = presets.load(preset, [*overrides, f"output={self.runs}"])
        with self._lock:
            self._refuse_a_second()
            folder = RunFolder.create(config)
            return self._launch(folder, Story(folder, steps=config.train.steps))

    def resume(self, run: Path, steps: int | None = None) -> Path:
        """Go on with a run where it was last saved, to `steps` in all where that is given. Raises like `start`."""
        changes = [] if steps is None else [f"train.steps={steps}"]
        with self._lock:
            self._refuse_a_second()
            folder, config = RunFolder.reopen(run.absolute(), changes)
            if folder.busy():
                raise LoraError(f"Another process is training in {run}. Wait for it, or stop it first.")
            return self._launch(folder, Story(folder, steps=config.train.steps), changes)

    def show(self, run: str) -> None:
        """An earlier run takes the place of the one on view. Raises LoraError while one is trained, or for no run."""
        with self._lock:
            self._refuse_a_second()
            self._child, self._story = None, Story(self.folder_of(run))

    def folder_of(self, run: str) -> RunFolder:
        """A run of `runs` by its folder's name. Raises LoraError."""
        found = next((path for path in self.runs.glob("*/preset.toml") if path.parent.name == run), None)
        if found is None:
            raise LoraError(f"There is no run “{run}” in {self.runs}.")
        return RunFolder(found.parent, presets.load(found).name)

    def current(self) -> Path | None:
        """The run at which a process is at work."""
        with self._lock:
            self._find()
            return self._story.folder.root if self._story and self._alive() else None

    def view(self) -> TrainView | None:
        """The current run, or the last one that was; None if there has been none."""
        with self._lock:
            self._find()
            if self._story is None:
                return None
            alive = self._alive()  # asked before reading: all that a dead process said is then in its file
            self._story.read_on()
            if not alive and self._story.state in ALIVE:
                self._story.end(self._child.returncode if self._child else None)
            return self._story.view()

    def commands(self) -> Commands:
        """Of the current run. Raises LoraError without one."""
        run = self.current()
        if run is None:
            raise LoraError("No training is running. Start one, or resume one.")
        return Commands(run)

    def _refuse_a_second(self) -> None:
        self._looked = float("-inf")
        run = self.current()
        if run is not None:
            raise LoraError(f"{run.name} is being trained. Wait for it, or stop and save it first.")

    def _launch(self, folder: RunFolder, story: Story, changes: Sequence[str] = ()) -> Path:
        setting = [word for change in changes for word in ("--set", change)]
        shutil.rmtree(folder.control, ignore_errors=True)  # a killed process's; nobody listens there yet
        try:
            with folder.log.open("ab") as log:
                story.log_start = log.tell()
                self._child = subprocess.Popen(
                    [sys.executable, str(LAUNCH), "--train", "--resume", str(folder.root), *setting],
                    cwd=LAUNCH.parent,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                    # progress bars are for a terminal: here they would fill the disk, 3 MB an hour
                    env={**os.environ, "PYTHONUNBUFFERED": "1", "TQDM_DISABLE": "1"},
                )
        except OSError as problem:
            raise LoraError(f"The training could not be started: {problem}.") from problem
        story.read_on()
        story.take_up()  # at once: the child needs seconds before it says so itself
        self._story = story
        return folder.root

    def _alive(self) -> bool:
        if self._child is not None:
            return self._child.poll() is None
        return self._story is not None and self._story.folder.busy()

    def _find(self) -> None:
        """A run of `runs` that some living process holds, unless one is known already."""
        if time.monotonic() - self._looked < LOOK_AGAIN_S or self._alive():
            return
        self._looked = time.monotonic()
        for lock in sorted(self.runs.glob("*/.lock")):
            folder = RunFolder(lock.parent, lock.parent.name)
            if folder.busy():
                self._child, self._story = None, Story(folder)
                return
