"""A mix with its files, as a small TOML file:

    [weights]
    "ink" = 0.8
    "cat" = {"unet" = 0.7, "text_encoder" = 0.5, "text_encoder_2" = 0.5, "curve" = [[0.0, 1.0], [1.0, 0.0]]}

    [files]
    "ink" = "ink.safetensors"

A weight is what `AdapterWeight.parse` takes, so that a file written by hand may say less than ours do.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_core.errors import ConfigError, did_you_mean
from lora_core.mix import AdapterWeight, Mix
from lora_core.safe_writes import write_atomic

MAX_BYTES = 2**20
_TABLES = ("weights", "files")


def save_mix(path: Path | str, mix: Mix, *, files: Mapping[str, str] | None = None) -> None:
    """Write `mix`, and where the files of its LoRAs are (spelled as the caller likes; not looked at here).

    Atomic; `read_mix` gives back exactly the same. Raises SaveFailed, and ConfigError for what no file can
    hold: a name with half a character, a weight that is not finite, a file for a LoRA that is not in the mix.
    """
    path, files = Path(path), dict(files or {})
    weights = {name: weight.plain for name, weight in mix.items()}
    lines = ["[weights]", *(f"{_toml(name)} = {_toml(weight)}" for name, weight in weights.items())]
    if files:
        lines += ["", "[files]", *(f"{_toml(name)} = {_toml(file)}" for name, file in files.items())]
    try:
        data = ("\n".join(lines) + "\n").encode()
    except UnicodeEncodeError as problem:
        raise ConfigError(
            f"The mix cannot be saved in {path.name}: a name holds half a character. Rename that LoRA's file."
        ) from problem
    _parsed(path, data)  # what could not be read again is not written

    def write(target: Path) -> None:
        target.write_bytes(data)

    write_atomic(path, write, needed=len(data))


def read_mix(path: Path | str) -> tuple[Mix, dict[str, str]]:
    """-> the mix, and LoRA name -> file for those that have one. Raises ConfigError naming the file and the key."""
    path = Path(path)
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as problem:
        raise ConfigError(f"The mix {path} cannot be read: {problem.strerror}. Check the path.") from problem
    return _parsed(path, data)


def _parsed(path: Path, data: bytes) -> tuple[Mix, dict[str, str]]:
    if len(data) > MAX_BYTES:
        raise ConfigError(f"{path.name} is larger than 1 MiB: no mix is. Choose the .toml file of a mix.")
    try:
        table = tomllib.loads(data.decode("utf-8-sig"))
    except (ValueError, RecursionError) as problem:  # TOML's and UTF-8's errors are ValueErrors
        raise ConfigError(
            f"The mix {path.name} is not TOML: {problem}. Correct it, or save the mix anew."
        ) from problem
    for key in table:
        if key not in _TABLES:
            raise ConfigError(f'{path.name}: "{key}" is no part of a mix.{did_you_mean(key, _TABLES)}')
    weights, files = (table.get(key, {}) for key in _TABLES)
    for key, value in zip(_TABLES, (weights, files), strict=True):
        if not isinstance(value, dict):
            raise ConfigError(
                f'{path.name}: {key} must be a table. Write [{key}] and below it lines such as "ink" = ...'
            )
    try:
        mix = {name: AdapterWeight.parse(name, value) for name, value in weights.items()}
    except ConfigError as problem:
        raise ConfigError(f"{path.name}: {problem}") from problem
    for name, file in files.items():
        if name not in mix:
            raise ConfigError(
                f'{path.name}: [files] names "{name}", which has no weight.{did_you_mean(name, mix)}'
            )
        if not isinstance(file, str):
            raise ConfigError(f'{path.name}: the file of "{name}" is {file!r}. Write its path, in quotes.')
    return mix, files


def _toml(value: Any) -> str:
    """One value on one line. JSON's strings are TOML's, but for DEL, which TOML wants escaped."""
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_toml(key)} = {_toml(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return repr(value)  # the shortest spelling that reads back as the same float
