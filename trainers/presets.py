"""Presets: TOML files that spell a TrainConfig.

    # A subject from five photographs.      <- the first comment line is the description
    extends = "sd15_subject.toml"           <- beside this file; or a shipped preset by its name without .toml
    name = "my_dog"
    [data]
    images = "photos"                       <- relative to this file, wherever the program was started
    [train]
    steps = 400

Tables are merged key by key, the extending file last; lists are replaced whole. On top come overrides,
spelled `train.steps=400`, whose paths are relative to the current folder as on any command line.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from lora_core.errors import ConfigError, did_you_mean
from trainers.config import TrainConfig
from trainers.config_data import DatasetSettings
from trainers.config_table import Table

PRESETS = Path(__file__).resolve().parent.parent / "presets"
MAX_PRESET_BYTES = 1 << 20  # real ones are a hundredth of this
Toml = dict[str, Any]


def load(path_or_name: str | Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """A preset file, or a shipped preset by name, with overrides on top -> the checked config.

    Raises ConfigError: no such file, not TOML (line named), extends in a circle, settings unknown or at odds.
    """
    path = find(path_or_name)
    table = _read_with_bases(path, ())
    for override in overrides:
        _apply(table, override)
    try:
        return TrainConfig.model_validate(table)
    except ConfigError as problem:
        raise ConfigError(f"{path.name}: {problem}") from None


def parse(text: str, folder: Path) -> TrainConfig:
    """A preset's text, as if it were a file in `folder`. Raises ConfigError."""
    table = tomllib.loads(text)
    _anchor_paths(table, folder)
    return TrainConfig.model_validate(table)


def find(path_or_name: str | Path) -> Path:
    """-> the preset's absolute path. A name without a folder or .toml means a shipped preset."""
    path = Path(path_or_name).expanduser()
    if path.is_file():
        return path.absolute()
    shipped = {name: where for name, where, _ in list_presets()}
    if str(path_or_name) in shipped:
        return shipped[str(path_or_name)]
    raise ConfigError(f"There is no preset {path_or_name}.{did_you_mean(path.stem, shipped)}")


def ancestors(path_or_name: str | Path) -> list[str]:
    """Names of what a preset extends, and of what that extends, the nearest first. Raises ConfigError like `load`."""
    found, path = list[str](), find(path_or_name)
    while isinstance(base := _read(path).get("extends"), str):
        beside = path.parent / base
        path = beside if beside.is_file() else find(base)
        if path.stem in found:
            break  # in a circle: `load` says so
        found.append(path.stem)
    return found


def list_presets() -> list[tuple[str, Path, str]]:
    """The shipped presets: (name, path, description), by name. The description is the first comment line."""
    found = []
    for path in sorted(PRESETS.glob("*.toml")):
        lines = path.read_text(encoding="utf-8-sig").splitlines()
        comment = next((line for line in lines if line.startswith("#")), "")
        found.append((path.stem, path, comment.lstrip("# ").strip()))
    return found


def dump(config: TrainConfig) -> str:
    """TOML text that loads back to an equal config. What is None is left out: TOML has no word for it."""
    table: Toml = {}
    for key, value in config:
        if isinstance(value, BaseModel):
            table[key] = {k: v for k, v in value if v is not None}
        elif key == "dataset":
            common = dict(
                config.data
            )  # what a folder has from there is left out, so that --set data.* still reaches it
            table[key] = [
                {k: "" if v is None else v for k, v in folder if common.get(k) != v} for folder in value
            ]
        else:
            table[key] = value
    return spell(table)


def spell(table: Mapping[str, Any]) -> str:
    """TOML text of a preset's tables: single settings, [tables] of settings, lists of tables as [[tables]]."""
    top, tables = [], []
    for key, value in table.items():
        parts = value if isinstance(value, list) and all(isinstance(v, Mapping) for v in value) else [value]
        title = f"[{key}]" if parts is not value else f"[[{key}]]"
        if parts is value or isinstance(value, Mapping):
            tables += ["\n".join([title, *(f"{k} = {_toml(v)}" for k, v in part.items())]) for part in parts]
        else:
            top.append(f"{key} = {_toml(value)}")
    return "\n\n".join(filter(None, ["\n".join(top), *tables])) + "\n"


def _read_with_bases(path: Path, chain: tuple[Path, ...]) -> Toml:
    """The file's table on top of what it extends."""
    real = path.resolve()
    if real in chain:
        circle = " -> ".join(p.name for p in (*chain[chain.index(real) :], real))
        raise ConfigError(f"Presets extend each other in a circle: {circle}. Take one extends line out.")
    table = _read(path)
    base = table.pop("extends", None)
    _anchor_paths(table, path.parent)
    if base is None:
        return table
    if not isinstance(base, str):
        raise ConfigError(
            f'{path.name}: extends must be the name of one preset in quotes, such as "base.toml".'
        )
    beside = path.parent / base
    try:
        found = beside if beside.is_file() else find(base)
    except ConfigError as problem:
        raise ConfigError(f'{path.name} extends "{base}", which is not beside it. {problem}') from None
    return _merge(_read_with_bases(found, (*chain, real)), table)


def _read(path: Path) -> Toml:
    try:
        if path.stat().st_size > MAX_PRESET_BYTES:
            raise ConfigError(f"{path.name} is larger than 1 MiB: no preset is. Choose a .toml preset file.")
        text = path.read_text(encoding="utf-8-sig")
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as problem:
        raise ConfigError(
            f"{path.name} is not valid TOML: {problem}.{_line_of(text, str(problem))}"
        ) from problem
    except UnicodeDecodeError as problem:
        raise ConfigError(
            f"{path.name} is not UTF-8 text (byte {problem.start}): save it as UTF-8."
        ) from problem
    except OSError as problem:
        raise ConfigError(f"{path} cannot be read: {problem.strerror}.") from problem


def _line_of(text: str, message: str) -> str:
    """The line a TOML error names, quoted. The number is only in the message: `(at line 3, column 5)`."""
    _, found, place = message.rpartition("(at line ")
    number = int(place.split(",")[0]) if found else 0
    lines = text.splitlines()
    return f" The line reads: {lines[number - 1].strip()}" if 0 < number <= len(lines) else ""


def _anchor_paths(table: Toml, folder: Path) -> None:
    """Make one file's relative paths absolute, in place.

    `base` is a path only if it begins with a dot: a bare "demo" or "owner/model" is a name.
    """
    base = table.get("base")
    if isinstance(base, str) and base.startswith(("./", "../")):
        table["base"] = str(folder / base)
    models: dict[str, type[Table]] = {"": TrainConfig, "dataset": DatasetSettings, **TrainConfig.tables()}
    for name, model in models.items():
        found = table.get(name) if name else table
        for part in found if isinstance(found, list) else [found]:
            if isinstance(part, dict):
                for key in model.path_fields() & part.keys():
                    if isinstance(part[key], str) and part[key]:  # anything else is for TrainConfig to refuse
                        part[key] = str(folder / Path(part[key]).expanduser())


def _merge(under: Toml, over: Mapping[str, Any]) -> Toml:
    merged = dict(under)
    for key, value in over.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def _apply(table: Toml, override: str) -> None:
    """`a.b=value` into the table, in place. No value at all (`lora.alpha=`) takes the setting out again.

    A value that is not TOML is taken as text, because shells eat quotes: `data.prompt=a photo of sks dog`.
    """
    key, equals, value = (part.strip() for part in override.partition("="))
    try:
        if not equals:
            raise ConfigError(f'"{override}" is no setting: write it as name=value, such as train.steps=400.')
        nested: Any = tomllib.loads(f"{key} = 0")
    except tomllib.TOMLDecodeError:
        raise ConfigError(f'"{key}" is no name of a setting: write it as train.steps=400.') from None
    path: list[str] = []
    while isinstance(nested, dict):
        ((part, nested),) = nested.items()
        path.append(part)
    *tables, last = path
    inner: Any = table
    for depth, part in enumerate(tables, 1):
        inner = _numbered(inner, part, override) if isinstance(inner, list) else inner.setdefault(part, {})
        if isinstance(inner, list) and depth < len(tables):
            continue
        if not isinstance(inner, dict):
            raise ConfigError(f"{override}: {'.'.join(path[:depth])} is one value, with no settings inside.")
    if value:
        inner[last] = _value(value)
    else:
        inner.pop(last, None)


def _numbered(tables: list[Any], part: str, override: str) -> Any:
    """One of several [[tables]], counted from 0 as in dataset.0.repeats."""
    if part.isdecimal() and int(part) < len(tables):
        return tables[int(part)]
    raise ConfigError(f"{override}: there is no {part} among {len(tables)} such tables, counted from 0.")


def _value(text: str) -> Any:
    try:
        parsed = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text
    return parsed["value"] if len(parsed) == 1 else text


def _toml(value: Any) -> str:
    """One value. JSON's strings are TOML's, but for DEL, which TOML wants escaped."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str | Path):
        return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, Mapping):
        pairs = (f"{_toml(k)} = {_toml(v)}" for k, v in value.items())
        return "{" + ", ".join(pairs) + "}"
    if isinstance(value, tuple | list):
        return "[" + ", ".join(_toml(v) for v in value) + "]"
    return repr(value)
