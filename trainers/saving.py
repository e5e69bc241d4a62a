"""Save a run at its bench, and take it up again."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from lora_core.errors import ConfigError, NotFinite, SaveFailed
from trainers import checkpoints, events, presets, unchanged
from trainers.bench import Bench
from trainers.finish import write_lora
from trainers.room import take_room_as_before

AGAIN_S, POLL_S = 5.0, 0.1
WAITING = (
    "What was trained is not lost, but cannot be saved now: it is kept in memory, and saving is tried every few "
    "seconds. Make room; Ctrl-C (once more, if it was pressed) leaves without it."
)


def take_up(bench: Bench) -> int:
    """Continue from the newest whole checkpoint -> optimizer steps already done.

    A run of which nothing was saved is taken up at its beginning, where `prepare` has put it.
    """
    if not bench.folder.has_saved():
        return 0
    path, problems = checkpoints.newest_whole(bench.folder.checkpoints)
    for problem in problems:
        bench.emit(events.Note(text=problem))
    position = checkpoints.load_state(path, trained(bench))
    refuse = bench.config.data.changed == "refuse"
    if found := unchanged.check(position.shown, bench.shown, refuse=refuse):
        bench.emit(events.Note(text=found))
    if found := unchanged.settings_changed(position.preset, presets.dump(bench.config)):
        bench.emit(events.Note(text=found))
    take_room_as_before(bench, position.pieces, position.checkpointed)
    bench.feeder.restore(position.sampler)
    if position.step > bench.config.train.steps:
        raise ConfigError(
            f"This run stands at step {position.step}, beyond train.steps: raise that to go on."
        )
    return position.step


def save(bench: Bench, step: int) -> Path:
    """State to resume from, and the LoRA as it is now. Raises SaveFailed, NotFinite with nothing old lost."""
    path = checkpoints.state_path(bench.folder.checkpoints, step)
    checkpoints.save_state(path, position_of(bench, step), trained(bench))
    lora = write_file(bench, bench.folder.lora_at(step), step)
    checkpoints.prune(bench.folder.checkpoints, bench.config.save.keep)
    bench.emit(events.Saved(step=step, path=str(path), lora=str(lora)))
    return path


def write_file(bench: Bench, path: Path, step: int) -> Path:
    """The LoRA, or its average, in the spelling of the preset."""
    with bench.averaged(bench.config.save.ema):
        return write_lora(bench.config, path, bench.form, bench.opened, bench.ran(step), bench.feeder.dataset)


def position_of(bench: Bench, step: int) -> checkpoints.Position:
    """Where the run stands, and all that a resumed one must find as it was."""
    return checkpoints.Position(
        step, bench.feeder.state(), bench.shown, presets.dump(bench.config), bench.pieces, bench.checkpointed
    )


def trained(bench: Bench) -> checkpoints.Trained:
    return checkpoints.Trained(
        bench.form, bench.optimizer, bench.generator, bench.accelerator.scaler, bench.average
    )


def save_or_say(bench: Bench, step: int) -> None:
    """A full disk in the middle of a run is said and tried again at the next save: the training goes on."""
    try:
        save(bench, step)
    except SaveFailed as problem:
        bench.emit(events.Note(text=f"Step {step} was not saved; the training goes on. {problem}"))


def once_there_is_room(bench: Bench, save: Callable[[], Path], give_up: Callable[[], bool]) -> Path:
    """What would be lost with the process: where it cannot be written, that is said, and tried again until it can.

    Raises SaveFailed once `give_up` says so.
    """
    said = False
    while True:
        try:
            return save()
        except SaveFailed as problem:
            if not said:
                bench.emit(events.Note(text=f"{WAITING} {problem}"))
            said, again = True, time.monotonic() + AGAIN_S
            while time.monotonic() < again:
                if give_up():
                    raise
                time.sleep(POLL_S)


def saved_for(bench: Bench, step: int, problem: NotFinite) -> NotFinite:
    """What ends a run on NaN: the problem, and what is kept. The bad step was left out, so the state is good."""
    try:
        save(bench, step)
    except (NotFinite, SaveFailed) as why:
        last = checkpoints.last_step(bench.folder.checkpoints)
        kept = f"{why} The last saved step is {last}." if last else f"{why} Nothing was saved before."
    else:
        kept = f"Saved as it is without it, at step {step}."
    return NotFinite(f"{problem} {kept} Go on with: {bench.folder.resume_command}")


def keep_preset(bench: Bench) -> None:
    """The run's preset as it is now, for the next one to resume it."""
    try:
        bench.folder.keep_preset(bench.config)
    except SaveFailed as problem:
        bench.emit(events.Note(text=f"The run's preset stays as it was; the training goes on. {problem}"))
