"""Other trainers' settings as a preset of ours: kohya's sd-scripts, its GUI, and diffusers' two DreamBooth scripts.

    found = import_preset(Path("fox.toml"))
    found.text                 # the preset, with what could not be carried over as comments at its top

A setting is carried over by its meaning, not by its name: a learning rate of one part, an alpha that nobody wrote but
that the other trainer would have used, epochs as the steps they come to. Whatever has no counterpart is named with its
value. Nothing of a file is run: a command line is cut into words and read.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from lora_core.errors import ConfigError
from lora_core.safe_writes import write_atomic
from trainers import presets
from trainers.config import TrainConfig
from trainers.importing import diffusers_script, kohya, kohya_gui
from trainers.importing.carrying import Carrying
from trainers.importing.reading import Given, read
from trainers.importing.writing import written

READERS: dict[str, Callable[[Given], Carrying]] = {
    "kohya": kohya.carry,
    "kohya_gui": kohya_gui.carry,
    "diffusers": diffusers_script.carry,
}


@dataclass(frozen=True)
class Imported:
    """`text` is the whole preset; `config` what it means; `losses` a line for each thing that did not come along."""

    text: str
    config: TrainConfig
    losses: tuple[str, ...]


def import_preset(file: Path) -> Imported:
    """Raises ConfigError: it cannot be read, is no training's settings, or what it says contradicts itself."""
    given = read(file)
    carrying = READERS[given.kind](given)
    text = written(carrying, given)
    try:
        config = presets.parse(text, file.absolute().parent)
    except ConfigError as problem:
        raise ConfigError(
            f"{file.name} says what cannot be trained here. {problem} Change it there, and import it again."
        ) from None
    return Imported(text, config, tuple(carrying.losses()))


def run(file: Path, out: Path | None) -> list[str]:
    """`launch.py --import-preset`: write the preset, or without `out` say it -> the lines to print.

    Raises ConfigError where `out` is there already, SaveFailed if it cannot be written.
    """
    if out is not None and out.exists():
        raise ConfigError(f"{out} is there already. Choose another --out, or remove it first.")
    found = import_preset(file)
    if out is None:
        return [found.text]
    write_atomic(out, lambda partial: _write_text(partial, found.text))
    return [f"Written: {out}", *found.losses]


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
