"""What the trainer is told while it runs: by signals, and by files in the run's `control` folder.

SIGINT and SIGTERM save and stop; a second one leaves at once. SIGHUP, a terminal that is closed, saves and stops.

    control/pause            no step is taken as long as this is there
    control/save             save the state and the LoRA now            } taken away
    control/stop             save and stop, like SIGINT                 } when acted on
    control/steps            a number: how many steps the training is to have
    control/sample-*.json    {"prompt": "...", "weight": 1.0, "seed": 0, "steps": 25, "guidance": 7.5}: one picture with
                             the LoRA as it is, at any weight; all but the prompt may be left out

The folder is there while a process listens: it is made afresh when a run starts or resumes, so that what a killed
process left undone is not done to the next one, and it goes with the process. `Commands` writes these files for the
app; any program may, in UTF-8 or, with a byte order mark, in UTF-16, as PowerShell does. What cannot be understood is
said, and nothing that lies there ends a training. Nothing here imports torch.
"""

from __future__ import annotations

import codecs
import fnmatch
import json
import os
import secrets
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from types import FrameType

from lora_core.errors import ConfigError, LoraError, SaveFailed, Stopped, did_you_mean
from lora_core.safe_writes import write_atomic

FOLDER = "control"
MOST_STEPS = 10**9
ASKING = (signal.SIGINT, signal.SIGTERM)
HANGING_UP = (signal.SIGHUP,) if hasattr(signal, "SIGHUP") else ()  # Windows has none
ORDERS, SAMPLES = ("pause", "save", "stop", "steps"), "sample-*.json"


class StopRequest:
    """Asked between steps; set by a signal, by another thread, or by a file once `watch` names one."""

    def __init__(self) -> None:
        self._event = threading.Event()
        self._file: Path | None = None

    def ask(self) -> None:
        self._event.set()

    def watch(self, file: Path | None) -> None:
        self._file = file

    def check(self) -> None:
        """Raise Stopped if asked: for the long work before the first step, which keeps what it has made."""
        if self.asked:
            raise Stopped(
                "Stopped before the first step. Class pictures and latents made so far are kept; start again."
            )

    @property
    def asked(self) -> bool:
        if self._file is not None and _take_away(self._file):
            self._event.set()
        return self._event.is_set()


@contextmanager
def signals_ask(stop: StopRequest) -> Iterator[None]:
    """While inside, the first SIGINT or SIGTERM asks `stop`; the second leaves with 130 at once. So does SIGHUP ask, as
    often as it comes: a closed terminal sends it once itself and once through its shell. Under nohup it is ignored."""
    signalled = False

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal signalled
        # not stop.asked: a signal that follows the page's own "stop and save" must not cut the save
        if signalled and number in ASKING:
            os._exit(130)
        signalled = signalled or number in ASKING
        stop.ask()

    if threading.current_thread() is not threading.main_thread():
        yield  # signal handlers belong to the main thread; a caller in another one uses stop.ask()
        return
    heard = [*ASKING, *(n for n in HANGING_UP if signal.getsignal(n) is not signal.SIG_IGN)]
    before = {number: signal.signal(number, handle) for number in heard}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# --- the one who commands -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sample:
    """One picture asked for. None: as the run's previews. Its values are checked where the picture is made."""

    prompt: str
    weight: float = 1.0
    seed: int | None = None
    steps: int | None = None
    guidance: float | None = None

    @classmethod
    def read(cls, file: Path) -> Sample:
        """Raises ConfigError: not JSON, no prompt, or a key that means nothing."""
        try:
            table = json.loads(_read_text(file))
        except (OSError, ValueError, RecursionError) as problem:
            raise ConfigError(f'it is not JSON such as {{"prompt": "a cat"}} ({problem}).') from problem
        if not isinstance(table, dict) or not isinstance(table.get("prompt"), str):
            raise ConfigError('it has no prompt: write {"prompt": "a cat"}.')
        known = {field.name for field in fields(cls)}
        for key in table.keys() - known:
            raise ConfigError(f'"{key}" is no setting of a sample.{did_you_mean(key, known)}')
        return cls(**table)

    def __post_init__(self) -> None:
        if not self.prompt.strip():
            raise ConfigError("There is no prompt for the sample. Say what the picture should show.")
        number = isinstance(self.weight, int | float) and not isinstance(self.weight, bool)
        if not number or not -100 <= self.weight <= 100:
            raise ConfigError(
                f"its weight is {self.weight!r}: use a number such as 0.8; 0 is the base model, 1 the LoRA as it is."
            )


def check_steps(steps: int) -> None:
    """Raise ConfigError for a number that no training can have."""
    if not 1 <= steps <= MOST_STEPS:
        raise ConfigError(f"A training has at least one step, at most {MOST_STEPS:,}, and not {steps:,}.")


class Commands:
    """Tells the training in a run folder what to do. It acts after the step it is at.

    Every method raises LoraError if no training listens there, SaveFailed if the command cannot be written.
    """

    def __init__(self, run: Path) -> None:
        self.folder = run / FOLDER

    def pause(self) -> None:
        """Until `unpause`; meanwhile it still saves, samples and stops."""
        self._write("pause")

    def unpause(self) -> None:
        _take_away(self.folder / "pause")

    def save(self) -> None:
        self._write("save")

    def stop(self) -> None:
        """Save and stop; the run can be resumed."""
        self._write("stop")

    def steps(self, steps: int) -> None:
        """The training is to have so many; those that are done count."""
        check_steps(steps)
        self._write("steps", str(steps))

    def sample(
        self,
        prompt: str,
        *,
        weight: float = 1.0,
        seed: int | None = None,
        steps: int | None = None,
        guidance: float | None = None,
    ) -> None:
        """One picture with the LoRA as it is; what is left out is as in the run's previews."""
        asked = Sample(prompt, weight, seed, steps, guidance)
        wanted = {field.name: getattr(asked, field.name) for field in fields(asked)}
        text = json.dumps({key: value for key, value in wanted.items() if value is not None})
        self._write(f"sample-{time.time_ns():020d}-{secrets.token_hex(2)}.json", text)

    def _write(self, name: str, text: str = "") -> None:
        if not self.folder.is_dir():
            raise LoraError(
                f"No training listens in {self.folder.parent}: it is still starting, or it is over. Once its first "
                "events are there it can be told."
            )
        write_atomic(self.folder / name, lambda partial: _write_text(partial, text))


# --- the one who obeys ----------------------------------------------------------------------------------------


class Orders:
    """What waits in the control folder. `waiting` is asked after every step, everything else only if it says so."""

    def __init__(self, folder: Path, stop: StopRequest) -> None:
        self.folder, self.stop = folder, stop
        self._strange: set[str] = set()  # no orders; said once

    @property
    def waiting(self) -> bool:
        """One look into one folder: some 10 µs."""
        return bool(self._names())

    def hold(self) -> bool:
        """Whether no step is to be taken now. Stopping ends a pause."""
        return (self.folder / "pause").exists() and not self.stop.asked

    def take_save(self) -> bool:
        return _take_away(self.folder / "save")

    def take_steps(self, refuse: Callable[[str], None]) -> int | None:
        """How many steps the training is to have; None if nobody asked. `refuse` is told of what is no number."""
        if "steps" not in self._names():
            return None
        file = self.folder / "steps"
        try:
            text = _read_text(file).strip()
        except (OSError, UnicodeError) as problem:
            text = str(problem)
        _take_away(file)
        if text.isascii() and text.isdecimal() and 1 <= int(text[:20]) <= MOST_STEPS:
            return int(text)
        refuse(f"The number of steps was not changed: control/steps must hold one, and not {text[:60]!r}.")
        return None

    def take_samples(self, refuse: Callable[[str], None]) -> list[Sample]:
        """In the order they were asked for. `refuse` is told of one that cannot be understood."""
        taken: list[Sample] = []
        for name in sorted(fnmatch.filter(self._names(), SAMPLES)):
            file = self.folder / name
            try:
                taken.append(Sample.read(file))
            except ConfigError as problem:
                refuse(f"{name} was not done: {problem}")
            _take_away(file)
        return taken

    def pass_over_the_rest(self, refuse: Callable[[str], None]) -> None:
        """What is no order is said once, and costs the steps no further look."""
        for name in self._names():
            if name not in ORDERS and not fnmatch.fnmatch(name, SAMPLES):
                self._strange.add(name)
                refuse(f"control/{name} is no order; known are {', '.join(ORDERS)}, and {SAMPLES}.")

    def _names(self) -> list[str]:
        return [name for name in names_in(self.folder) if name not in self._strange]


def names_in(folder: Path) -> list[str]:
    """The orders that wait, by the names of their files; none where there is no folder."""
    try:
        return sorted(name for name in os.listdir(folder) if not name.startswith("."))
    except OSError:  # over, or somebody tidied up: a training does not end for that
        return []


@contextmanager
def listening(folder: Path, stop: StopRequest) -> Iterator[Orders]:
    """An empty control folder for as long as inside. Only for the process that holds the run's lock."""
    try:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
    except OSError as problem:
        raise SaveFailed(
            f"{folder}, through which the training is told things, cannot be made: {problem.strerror}. Remove what is "
            "there, or choose another `output`."
        ) from problem
    stop.watch(folder / "stop")
    try:
        yield Orders(folder, stop)
    finally:
        stop.watch(None)
        shutil.rmtree(folder, ignore_errors=True)


def _take_away(file: Path) -> bool:
    """Whether it was there, a file or a folder of that name, and is no longer."""
    try:
        file.unlink()
    except FileNotFoundError:
        return False
    except OSError:
        shutil.rmtree(file, ignore_errors=True)
        return not file.exists()  # Windows keeps what another program has open: next time
    return True


def _read_text(path: Path) -> str:
    """Raises OSError, UnicodeError."""
    data = path.read_bytes()
    wide = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    return data.decode("utf-16" if wide else "utf-8-sig")


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
