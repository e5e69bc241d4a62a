"""What launch.py does with files. Each command is a frozen value; its `run` does it and yields a line for each thing
done or found. Nothing is begun that could be refused at once, and nothing is left behind where something fails."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import is_dataclass
from typing import Any, Protocol, TypeVar, get_type_hints

Value = TypeVar("Value")


class Command(Protocol):
    def run(self) -> Iterator[str]:
        """Raises ConfigError for what makes no sense together, LoraError for what cannot be done."""
        ...


def built(kind: type[Value], flags: Mapping[str, Any]) -> Value:
    """A value out of flat flags, named as its fields are. A field that is such a value itself takes its own from among
    them; one that has no flag keeps its default."""
    given: dict[str, Any] = {}
    for name, hint in get_type_hints(kind).items():
        if is_dataclass(hint):
            given[name] = built(hint, flags)  # type: ignore[arg-type]
        elif name in flags:
            given[name] = tuple(flags[name]) if isinstance(flags[name], list) else flags[name]
    return kind(**given)
