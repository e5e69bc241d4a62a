"""What is taken out of foreign settings, piece by piece, until nothing is left that has not been accounted for."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

from trainers.setting_names import COUNTERPARTS

NOTHING: tuple[Any, ...] = (
    None,
    "",
    False,
    0,
    "0",
    "0.0",
    "None",
    "none",
    [],
    {},
)  # switched off, there as here
Value = TypeVar("Value")
Rule = tuple[str, Callable[[Any], Any]]  # our setting, and how the value is read


def counterparts(readers: Mapping[str, Callable[[Any], Any]]) -> dict[str, Rule]:
    """Of what has one setting of ours of the same meaning and unit: how the value is read."""
    return {name: (COUNTERPARTS[name], reader) for name, reader in readers.items()}


class Carrying:
    """`given` shrinks as settings are taken; `preset` grows. Three lists say what did not simply come along.

    left      has no counterpart
    changed   came along, and is not quite the same
    idle      is about how the other program runs and not about what it trains
    """

    def __init__(self, given: Mapping[str, Any]) -> None:
        self.given = dict(given)
        self.preset: dict[str, Any] = {}
        self.left: list[str] = []
        self.changed: list[str] = []
        self.idle: list[str] = []

    def take(self, *names: str, default: Any = None) -> Any:
        """The first of these that says something; all of them are taken away."""
        found = [value for name in names if (value := self.given.pop(name, None)) not in (None, "")]
        return found[0] if found else default

    def number(self, name: str, default: float | None = None) -> float | None:
        """Like `take`; what is no number is left with that reason."""
        value = self.take(name)
        return default if value is None else self.read(name, value, finite, default)

    def read(self, name: str, value: Any, reader: Callable[[Any], Value], default: Value) -> Value:
        """The value read; what cannot be is left with that reason."""
        try:
            return reader(value)
        except (TypeError, ValueError, OverflowError):
            self.leave(name, value, "it is no number")
            return default

    def whole(self, name: str, default: int | None = None) -> int | None:
        value = self.number(name)
        return default if value is None else int(value)

    def yes(self, name: str, *, default: bool = False) -> bool:
        value = self.take(name)
        return default if value is None else is_yes(value)

    def set(self, setting: str, value: Any) -> None:
        *tables, key = setting.split(".")
        inner = self.preset
        for table in tables:
            inner = inner.setdefault(table, {})
        inner[key] = value

    def apply(self, rules: Mapping[str, Rule], given: Mapping[str, Any] | None = None) -> None:
        """Settings that have a counterpart of the same meaning and unit."""
        self.given.update(given or {})
        for name, (setting, read) in rules.items():
            value = self.take(name)
            if value is None:
                continue
            try:
                self.set(setting, read(value))
            except (TypeError, ValueError, OverflowError) as problem:
                self.leave(name, value, f"{setting} cannot be that ({problem})")

    def leave(self, name: str, value: Any, why: str = "") -> None:
        self.left.append(_line(name, value, why))

    def leave_if(self, name: str, why: str, *, harmless: Iterable[Any] = ()) -> None:
        """Take it away, and name it unless it says nothing."""
        value = self.given.pop(name, None)
        if value not in NOTHING and not _same(value, harmless):
            self.leave(name, value, why)

    def change(self, name: str, value: Any, how: str) -> None:
        self.changed.append(_line(name, value, how))

    def finish(self, idle: Iterable[str]) -> None:
        """Everything not taken so far: idle, or left. What is switched off is neither."""
        known = set(idle)
        for name, value in self.given.items():
            if value in NOTHING:
                continue
            if name in known:
                self.idle.append(_line(name, value, ""))
            else:
                self.leave(name, value)
        self.given = {}

    def losses(self) -> list[str]:
        return [
            *(f"not carried over: {line}" for line in self.left),
            *(f"not quite the same: {line}" for line in self.changed),
        ]


def finite(value: Any) -> float:
    number = float(value)
    if number - number != 0:
        raise ValueError("not finite")
    return number


def is_yes(value: Any) -> bool:
    return value.strip().lower() in ("true", "1", "yes", "on") if isinstance(value, str) else bool(value)


def whole(value: Any) -> int:
    return int(float(value))


def text(value: Any) -> str:
    return str(value).strip()


def _same(value: Any, harmless: Iterable[Any]) -> bool:
    return any(_plain(value) == _plain(other) for other in harmless)


def _plain(value: Any) -> Any:
    """1, 1.0 and "1" are the same."""
    said = str(value).strip().lower()
    try:
        return float(said)
    except ValueError:
        return said


def _line(name: str, value: Any, why: str) -> str:
    shown = json.dumps(value, ensure_ascii=False, default=str)
    shown = shown if len(shown) <= 200 else shown[:197] + "..."
    return f"{name} = {shown}" + (f" ({why})" if why else "")
