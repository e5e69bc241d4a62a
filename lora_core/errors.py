"""What can go wrong, in sentences: what was found, what was expected, what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from lora_core.plain_text import sentence


class LoraError(Exception):
    """Base of every error a user may meet. `str(error)` is one message for a tired artist, no traceback needed."""


class AboutFile(LoraError):
    """Quotes names out of a file: nothing in it may steer a terminal."""

    def __init__(self, text: str) -> None:
        super().__init__(sentence(text))


class FileRefused(AboutFile):
    """A file is damaged, unsafe, or not what was asked for. Nothing was changed."""


class WrongFamily(AboutFile):
    """A LoRA and a base model do not belong together."""


class NotFinite(AboutFile):
    """NaN or Inf where numbers are needed."""


class ConfigError(LoraError):
    """A setting is unknown, out of range, or contradicts another."""


class NothingMatched(ConfigError):
    """Targets that name no layer of the model."""


class PredictionUnclear(LoraError):
    """Neither its files nor a try tell what a base model's UNet predicts: somebody has to say it."""


class NotLoaded(LoraError):
    """A LoRA is named that is not loaded."""


class SaveFailed(LoraError):
    """A file could not be written; what was there before is untouched."""


class Stopped(LoraError):
    """Work was asked to stop, and did; what it had is kept."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """' Did you mean "rank"?' or the list of what is known, to end an error with."""
    known = sorted(set(known))
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    if close:
        return f' Did you mean "{close[0]}"?'
    return f" Known: {', '.join(known)}." if known else ""
