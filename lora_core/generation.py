"""What to draw, what was drawn, and the PNG that remembers it."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image, PngImagePlugin

from lora_core.errors import ConfigError, FileRefused, did_you_mean
from lora_core.parameters import Parameters, Weights, parameters_text, parse_parameters
from lora_core.safe_files import write_atomic
from lora_core.samplers import SAMPLERS

__all__ = [
    "GeneratedImage",
    "GenerationRequest",
    "Parameters",
    "Weights",
    "free_name",
    "parameters_text",
    "parse_parameters",
    "read_png_parameters",
    "save_png",
    "settled",
]

MAX_SEED = 2**63 - 1
MAX_SIDE = 8192  # pixels
MAX_PIXELS = 64_000_000
PNG_KEY = "parameters"


@dataclass(frozen=True, kw_only=True)
class GenerationRequest:
    """One call for pictures, checked at birth. Raises ConfigError.

    seed            of the first picture; None or -1 draws one
    guidance        classifier-free guidance scale; 1 is without
    sampler         a name of samplers.SAMPLERS; None is the model's own scheduler
    width, height   pixels, multiples of 8; None is the model's own size
    count           pictures, each with the next seed
    mixes           one weights-dict per picture instead; these pictures share their seed, to be compared
    seeds           with mixes: a seed for each picture in place of the shared one
    """

    prompt: str
    negative_prompt: str = ""
    seed: int | None = 0
    steps: int = 25
    guidance: float = 7.5
    width: int | None = None
    height: int | None = None
    count: int = 1
    sampler: str | None = None
    mixes: tuple[Weights, ...] | list[Weights] | None = None
    seeds: tuple[int, ...] | list[int] | None = None

    def __post_init__(self) -> None:
        for name, text in (("prompt", self.prompt), ("negative_prompt", self.negative_prompt)):
            if not isinstance(text, str):
                raise ConfigError(f"{name} is {_kind(text)}; text was expected. Put it in quotes.")
            if any("\ud800" <= letter <= "\udfff" for letter in text):
                raise ConfigError(f"{name} holds half a character, which no file can keep. Type it again.")
        if self.seed is not None:
            _whole("seed", self.seed, -1, MAX_SEED, "leave it out or give -1 for a random one")
        _whole("steps", self.steps, 1, 1000, "20 to 30 are usual")
        _whole("count", self.count, 1, 1000, "it is the number of pictures")
        _number("guidance", self.guidance, 0, 100, "7.5 is usual, 1 is without guidance")
        for name, side in (("width", self.width), ("height", self.height)):
            if side is not None:
                _whole(name, side, 8, MAX_SIDE, "512 is usual")
                if side % 8:
                    near = max(8, round(side / 8) * 8)
                    raise ConfigError(f"{name} = {side} must be a multiple of 8: {near} is the nearest.")
        if self.sampler is not None and self.sampler not in SAMPLERS:
            hint = did_you_mean(str(self.sampler), SAMPLERS)
            raise ConfigError(f"sampler = {_kind(self.sampler)} is unknown.{hint}")
        if self.mixes is not None:
            self._check_mixes(self.mixes)
        if self.seeds is not None:
            self._check_seeds(self.seeds)

    def _check_mixes(self, mixes: tuple[Weights, ...] | list[Weights]) -> None:
        if not isinstance(mixes, tuple | list) or not all(isinstance(mix, Mapping) for mix in mixes):
            raise ConfigError(
                'mixes must be a list with one dict per picture, such as [{"ink": 0.8}, {"ink": 0}].'
            )
        if not mixes:
            raise ConfigError("mixes is empty; give one dict of weights per picture, or leave mixes out.")
        if self.count not in (1, len(mixes)):
            raise ConfigError(
                f"count = {self.count} contradicts {len(mixes)} mixes: there is one picture per mix. Leave "
                "count out."
            )
        object.__setattr__(
            self, "mixes", tuple(dict(mix) for mix in mixes)
        )  # a request never changes afterwards

    def _check_seeds(self, seeds: tuple[int, ...] | list[int]) -> None:
        if self.mixes is None:
            raise ConfigError(
                "seeds go with mixes, one for each. Give mixes too, or seed and count for seeds in a row."
            )
        if not isinstance(seeds, tuple | list) or len(seeds) != len(self.mixes):
            raise ConfigError(
                f"seeds is {_kind(seeds)}; a list with one seed for each of the {len(self.mixes)} mixes was expected."
            )
        for i, seed in enumerate(seeds):
            _whole(f"seeds[{i}]", seed, 0, MAX_SEED, "a picture among others needs a fixed one")
        object.__setattr__(self, "seeds", tuple(seeds))


def settled(seed: int | None) -> int:
    """The seed itself, or one drawn for None and -1."""
    return random.randrange(2**32) if seed is None or seed < 0 else seed


Steps = tuple[tuple[int, dict[str, float | dict[str, Any]]], ...]


@dataclass(frozen=True)
class GeneratedImage:
    """A picture, and the text from which it can be made again.

    weights   of the LoRAs at the last step
    history   (step, weights) for each step, counted from 1, at which they were other than before
    """

    image: Image.Image
    seed: int
    parameters: str
    weights: dict[str, float | dict[str, Any]] = field(default_factory=dict)
    history: Steps = ()


def save_png(image: GeneratedImage, path: Path | str) -> None:
    """The picture with its parameters inside; the file appears whole or not at all. Raises SaveFailed."""
    info = PngImagePlugin.PngInfo()
    info.add_text(PNG_KEY, image.parameters)  # tEXt, or iTXt where Latin-1 cannot spell it
    write_atomic(Path(path), lambda partial: image.image.save(partial, format="PNG", pnginfo=info))


def free_name(folder: Path, picture: GeneratedImage, kind: str = "") -> Path:
    """A file that does not exist yet: nothing is written over."""
    number = 0
    while True:
        path = folder / f"{number:05d}-{picture.seed}{'-' + kind if kind else ''}.png"
        if not path.exists():
            return path
        number += 1


def read_png_parameters(path: Path | str) -> str:
    """The `parameters` text of a picture. Raises FileRefused for a file that is no PNG or has none."""
    path = Path(path)
    try:
        with Image.open(path, formats=["PNG"]) as image:
            text = image.info.get(PNG_KEY)
            if text is None and image.width * image.height <= MAX_PIXELS:
                image.load()  # some programs write the text behind the pixels
                text = image.info.get(PNG_KEY)
    except (
        OSError,
        SyntaxError,
        ValueError,
        Image.DecompressionBombError,
        Image.DecompressionBombWarning,
    ) as problem:
        raise FileRefused(
            f"{path.name} cannot be read as a PNG ({problem}). Choose a PNG made by an image generator."
        ) from problem
    if not isinstance(text, str):
        raise FileRefused(
            f"{path.name} carries no generation settings. Choose a PNG as it was saved, not a copy of the "
            "pixels."
        )
    return str(text)


def _whole(name: str, value: object, low: int, high: int, hint: str) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise ConfigError(f"{name} is {_kind(value)}; a whole number was expected ({hint}).")
    if not low <= value <= high:
        raise ConfigError(f"{name} = {value} is out of range: use {low} to {high} ({hint}).")


def _number(name: str, value: object, low: float, high: float, hint: str) -> None:
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise ConfigError(f"{name} is {_kind(value)}; a number was expected ({hint}).")
    if not low <= value <= high:  # NaN fails this too
        raise ConfigError(f"{name} = {value} is out of range: use {low} to {high} ({hint}).")


def _kind(value: object) -> str:
    return f"{value!r}"[:60]
