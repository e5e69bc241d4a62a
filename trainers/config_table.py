"""The types a preset's fields are made of and the table they sit in, which says plainly what is wrong."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    ValidationError,
    model_validator,
)
from pydantic_core import PydanticCustomError

from lora_core.errors import ConfigError, did_you_mean
from trainers.setting_names import near

LIST_COMMAND = "python launch.py --list-settings"

_DEVICE_NAMES = re.compile(
    r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE
)  # Windows has no such files


def _check_path(value: Any) -> Any:
    if isinstance(value, str | Path):
        text = str(value)
        if value == "" or any(ord(c) < 32 or 0xD800 <= ord(c) < 0xE000 for c in text):
            raise PydanticCustomError("path", "must be a path: not empty, no control characters, valid UTF-8")
    return value


def check_slug(value: str) -> str:
    plain = re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", value) and not value.endswith(".")
    if not plain or _DEVICE_NAMES.fullmatch(value):
        raise PydanticCustomError(
            "slug",
            "must be usable as a file name: 1 to 64 letters, digits, dots, hyphens and underscores, "
            "beginning with a letter or digit, not a device name",
        )
    return value


def _absolute_base(value: str) -> str:
    return str(Path(value).expanduser().absolute()) if value.startswith(("./", "../", "~")) else value


AnyPath = Annotated[
    Path,
    Field(strict=False),
    BeforeValidator(_check_path),
    AfterValidator(lambda p: p.expanduser().absolute()),
]
BaseName = Annotated[str, Field(min_length=1), AfterValidator(_absolute_base)]
Strings = Annotated[tuple[str, ...], Field(strict=False)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Seeds = Annotated[tuple[Seed, ...], Field(strict=False)]
Numbers = Annotated[tuple[int, ...], Field(strict=False)]

# (start, end) pairs of layers, end not included
Ranges = Annotated[tuple[Annotated[tuple[int, int], Field(strict=False)], ...], Field(strict=False)]
Count = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(ge=1)]
Dtype = Literal["fp16", "bf16", "fp32"]


class Table(BaseModel):
    """A table of a preset: frozen, no unknown keys, no silent conversions; mistakes are a ConfigError."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        validate_default=True,
        use_attribute_docstrings=True,
    )
    table: ClassVar[str] = ""

    @classmethod
    def path_fields(cls) -> set[str]:
        """The settings that are paths."""
        return {
            key
            for key, field in cls.model_fields.items()
            if field.annotation is Path
            or any(get_args(part)[:1] == (Path,) for part in get_args(field.annotation))
        }

    @classmethod
    def tables(cls) -> dict[str, type[Table]]:
        """The tables inside this one, by name."""
        kinds = {key: field.annotation for key, field in cls.model_fields.items()}
        return {
            key: kind for key, kind in kinds.items() if isinstance(kind, type) and issubclass(kind, Table)
        }

    @model_validator(mode="wrap")
    @classmethod
    def _say_it_plainly(cls, data: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        try:
            return handler(data)
        except ValidationError as problem:
            raise ConfigError(sentences(problem, cls)) from None


_TYPES = {
    "int_type": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": 'text in quotes, such as "..."',
    "tuple_type": 'a list, such as ["..."]',
    "dict_type": "a table of name = value",
    "model_type": "a table",
    "path_type": 'a path in quotes, such as "..."',
    "finite_number": "a finite number",
}
_RANGES = {
    "greater_than_equal": ("at least", "ge"),
    "greater_than": ("more than", "gt"),
    "less_than_equal": ("at most", "le"),
    "less_than": ("less than", "lt"),
    "multiple_of": ("a multiple of", "multiple_of"),
}


def sentences(problem: ValidationError, table: type[BaseModel]) -> str:
    """One line per mistake; a setting is named as `--set` spells it, such as train.steps."""
    return "\n".join(_sentence(error, table) for error in problem.errors(include_url=False))


def _sentence(error: Any, table: type[BaseModel]) -> str:
    prefix = getattr(table, "table", "")
    key, *inside = error["loc"] or ("",)
    where = ".".join(str(part) for part in (prefix, key, *inside) if part != "")
    kind, found, facts = error["type"], error["input"], error.get("ctx", {})
    if kind == "extra_forbidden":
        close = near(str(key), prefix, _settings())
        if close:
            *others, last = close
            return f"There is no setting {where}. Did you mean {', '.join(others) + ' or ' if others else ''}{last}?"
        return f"There is no setting {where}. {LIST_COMMAND}{' ' + prefix if prefix else ''} shows all there are."
    if kind == "missing":
        return f"The setting {where} is missing. {_meaning(table, str(key))}".strip()
    if kind in _TYPES:
        return f"{where or 'a preset'} = {_shown(found)} must be {_TYPES[kind]}."
    if kind in _RANGES:
        words, fact = _RANGES[kind]
        return f"{where} = {_shown(found)} must be {words} {facts[fact]}."
    if kind == "literal_error":
        options = [option.strip(" '") for option in str(facts["expected"]).replace(" or ", ", ").split(",")]
        hint = did_you_mean(str(found), options)
        known = "" if "Known" in hint else f" Known: {', '.join(options)}."
        return f"{where} = {_shown(found)} is unknown.{hint}{known}"
    if kind == "string_too_short":
        return f"{where} is empty. {_meaning(table, str(key))}".strip()
    return f"{where} = {_shown(found)} {error['msg'][:1].lower()}{error['msg'][1:]}."


def _settings() -> dict[str, list[str]]:
    """Table -> its settings, "" the top, of all tables there are."""
    kinds, found = list(Table.__subclasses__()), {}
    while kinds:
        kind = kinds.pop()
        kinds += kind.__subclasses__()
        if kind.table or kind.tables():  # not what tables are made of
            found[kind.table] = list(kind.model_fields)
    return found


def _meaning(table: type[BaseModel], key: str) -> str:
    field = table.model_fields.get(key)
    return (field.description or "").strip() if field else ""


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    text = f'"{value}"' if isinstance(value, str) else repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
