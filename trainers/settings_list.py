"""Every setting of a preset with its default and its meaning: `launch.py --list-settings [TABLE]`."""

from __future__ import annotations

import textwrap
from typing import Literal, get_args, get_origin

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from lora_core.errors import ConfigError, did_you_mean
from trainers import presets
from trainers.config import DatasetSettings, TrainConfig
from trainers.config_table import Table

WIDTH = 110


def listed(wanted: str = "") -> list[str]:
    """The lines to print, of one table or of all. Raises ConfigError for a table that does not exist."""
    tables: dict[str, type[Table]] = {"": TrainConfig, **TrainConfig.tables(), "dataset": DatasetSettings}
    if wanted and wanted not in tables:
        raise ConfigError(f"A preset has no table [{wanted}].{did_you_mean(wanted, filter(None, tables))}")
    lines: list[str] = []
    for name, table in tables.items():
        if wanted in ("", name):
            lines += [*([""] if lines else []), *_table(name, table)]
    return lines


def _table(name: str, table: type[Table]) -> list[str]:
    title = f"[[{name}]]" if name == "dataset" else f"[{name}]" if name else "the top of a preset"
    lines = [f"{title}  {' '.join((table.__doc__ or '').split())}"]
    for key, field in table.model_fields.items():
        if key not in {*TrainConfig.tables(), "dataset"}:
            lines += [f"  {_value(key, field)}", *_wrapped(field.description or "")]
    return lines


def _value(key: str, field: FieldInfo) -> str:
    """`kind = "lora"  of "lora", "loha", "lokr"`"""
    default = field.get_default(call_default_factory=True)
    if default is PydanticUndefined:
        said = f"{key}  must be given"
    elif default is None:
        said = f"{key}  left out"
    else:
        said = presets.spell({"x": {key: default}}).splitlines()[1]
    choices = get_args(field.annotation) if get_origin(field.annotation) is Literal else ()
    return said + (f"  of {', '.join(map(str, choices))}" if choices else "")


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(" ".join(text.split()), WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6)
