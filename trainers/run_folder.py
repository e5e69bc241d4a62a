"""Where a run lives. One folder each; a name that is taken gets a number, so that no run writes over another.

runs/fox/            preset.toml  events.jsonl  fox.safetensors  report.html  report.json  sheet.png
    checkpoints/     step-000200.safetensors (to resume from), fox-000200.safetensors (the LoRA at that step)
    previews/  cache/  log.txt (what a run started by the app has said)
    control/         while a process is at work: what it is told (trainers.control)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from lora_core.errors import ConfigError, LoraError, SaveFailed
from lora_core.safe_writes import sweep_partials, write_atomic
from trainers import control, presets
from trainers.config import TrainConfig


class RunBusy(LoraError):
    """Another process is at work in this run folder."""


@dataclass(frozen=True)
class RunFolder:
    root: Path
    name: str  # of the LoRA file, without ending

    @property
    def preset(self) -> Path:
        return self.root / "preset.toml"

    @property
    def events(self) -> Path:
        return self.root / "events.jsonl"

    @property
    def log(self) -> Path:
        return self.root / "log.txt"

    @property
    def page(self) -> Path:
        return self.root / "report.html"

    @property
    def tensorboard(self) -> Path:
        return self.root / "tensorboard"

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    @property
    def previews(self) -> Path:
        return self.root / "previews"

    @property
    def cache(self) -> Path:
        return self.root / "cache"

    @property
    def control(self) -> Path:
        return self.root / control.FOLDER

    @property
    def began(self) -> float:
        """Seconds since 1970: the preset is written once, before anything else."""
        return self.preset.stat().st_mtime

    @property
    def resume_command(self) -> str:
        return f'python launch.py --train --resume "{self.root}"'

    @property
    def lora(self) -> Path:
        return self.root / f"{self.name}.safetensors"

    def lora_at(self, step: int) -> Path:
        return self.checkpoints / f"{self.name}-{step:06d}.safetensors"

    @classmethod
    def create(cls, config: TrainConfig) -> RunFolder:
        """A new folder under config.output, with a full copy of the preset in it."""
        number = 1
        while True:
            folder = cls(
                config.output / (config.name if number == 1 else f"{config.name}-{number}"), config.name
            )
            try:
                folder.root.mkdir(parents=True)
                break
            except FileExistsError:
                if folder.never_trained():
                    break  # a start that was refused; its folder serves the next one
                number += 1
            except OSError as problem:
                raise _no_place(folder.root, problem) from problem
        for part in (folder.checkpoints, folder.previews):
            try:
                part.mkdir(exist_ok=True)
            except OSError as problem:
                raise _no_place(part, problem) from problem
        folder.keep_preset(config)
        return folder

    def keep_preset(self, config: TrainConfig) -> None:
        """What the run is trained with, whole. Raises SaveFailed."""
        write_atomic(self.preset, lambda path: _write_text(path, presets.dump(config)))

    def never_trained(self) -> bool:
        """A run folder of ours in which no step was saved, and no process is at work."""
        return not self.has_saved() and not self.busy()

    def has_saved(self) -> bool:
        """Whether there is anything that training made, or the folder is not ours to say."""
        return not self.preset.exists() or self.lora.exists() or any(self.checkpoints.glob("*"))

    def busy(self) -> bool:
        """Whether a living process is at work here: the lock of a dead one is free."""
        lock = self.root / ".lock"
        if not lock.exists():
            return False
        try:
            with FileLock(lock, timeout=0):
                return False
        except OSError:  # Timeout is one; and a lock that may not be looked at is somebody's
            return True

    @classmethod
    def reopen(cls, root: Path, overrides: Sequence[str] = ()) -> tuple[RunFolder, TrainConfig]:
        """A run to go on with, and the preset it was started with, with `overrides`."""
        if root.is_file():
            raise ConfigError(
                f"{root.name} is a file, and only a run's folder holds all that goes on exactly: from weights alone, "
                "without the optimizer's state, a resumed run would be another run. Resume the folder it was made in, "
                f'or begin a new training from it: --train PRESET --set "lora.start_from={root}".'
            )
        preset = root / "preset.toml"
        if not preset.exists():
            raise ConfigError(
                f"{root} is no run folder: it holds no preset.toml. Give the folder under `output`, such as runs/fox."
            )
        config = presets.load(preset, overrides)
        folder = cls(root, config.name)
        for part in (folder.root, folder.checkpoints, folder.previews):
            sweep_partials(part)
        return folder, config

    def lock(self) -> FileLock:
        """Held while training; the operating system frees it when the process dies. Raises RunBusy.

        Half a second of patience: whoever asks `busy` holds it for a moment. Raises SaveFailed where none can be made.
        """
        lock = FileLock(self.root / ".lock", timeout=0.5)
        try:
            lock.acquire()
        except Timeout:
            raise RunBusy(
                f"Another process is training in {self.root}. Wait for it, or stop it first."
            ) from None
        except OSError as problem:
            raise _no_place(self.root, problem) from problem
        return lock


def _no_place(folder: Path, problem: OSError) -> SaveFailed:
    return SaveFailed(
        f"The run folder {folder} cannot be made or written to: {problem.strerror}. Make room or see to it that it may "
        "be written to; or choose another `output`."
    )


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
