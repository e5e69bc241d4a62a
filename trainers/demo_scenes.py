"""The pictures the demo base is made from: one object on one background, and a caption that says so.

    "a dog on a striped red background"

The objects are Fluent Emoji 3D sprites (MIT) under `presets/demo/sprites/fluent`; the same objects drawn in
another hand (Noto Color Emoji, OFL) lie beside them and are never shown to the base: they are a *style* to
teach it. Twelve objects are held out of the training altogether: they are *subjects* to teach it.
"""

from __future__ import annotations

import random
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from PIL import Image, ImageDraw

DEMO = Path(__file__).resolve().parent.parent / "presets" / "demo"
SIZE = 64  # pixels, width and height of every scene

COLOURS: dict[
    str, tuple[int, int, int]
] = {  # chosen far apart, so that "the nearest named colour" means something
    "red": (214, 40, 40),
    "orange": (247, 140, 20),
    "yellow": (250, 220, 50),
    "green": (45, 160, 70),
    "blue": (45, 95, 215),
    "purple": (125, 55, 165),
    "pink": (250, 150, 195),
    "brown": (115, 70, 40),
    "gray": (135, 135, 135),
    "white": (245, 245, 245),
}
PATTERNS = ("plain", "striped", "checkered", "dotted")
PATTERN_WEIGHTS = (55, 15, 15, 15)


@dataclass(frozen=True)
class Thing:
    """One drawable object. `kind` is the class word a DreamBooth prompt uses: animal, food or object."""

    name: str
    kind: str
    code: str
    plural: bool = False
    held_out: bool = False


@dataclass(frozen=True)
class Scene:
    """What one picture shows; `caption()` says it in words, `draw()` paints it."""

    thing: Thing
    colour: str
    pattern: str
    scale: float  # sprite side / picture side
    x: float  # 0 left .. 1 right, of the free room
    y: float
    flip: bool

    def caption(self, noun: str | None = None) -> str:
        return f"{self.noun(noun)} on {self.background()}"

    def noun(self, noun: str | None = None) -> str:
        if noun is None and self.thing.plural:
            return self.thing.name
        return with_article(noun or self.thing.name)

    def background(self) -> str:
        words = [w for w in (self.pattern, self.colour) if w != "plain"]
        return with_article(" ".join([*words, "background"]))

    def draw(self, style: str = "fluent") -> Image.Image:
        """-> RGB picture of SIZE x SIZE."""
        canvas = paint_background(self.colour, self.pattern)
        side = round(self.scale * SIZE)
        sprite = load_sprite(self.thing.name, style).resize((side, side), Image.Resampling.LANCZOS)
        if self.flip:
            sprite = sprite.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        room = SIZE - side
        canvas.paste(sprite, (round(self.x * room), round(self.y * room)), sprite)
        return canvas


def with_article(words: str) -> str:
    return ("an " if words[0] in "aeiou" and not words.startswith("uni") else "a ") + words


@cache
def things() -> dict[str, Thing]:
    """Every object by name, training and held-out."""
    table = tomllib.loads((DEMO / "objects.toml").read_text(encoding="utf-8"))
    return {
        name: Thing(name=name, held_out=part == "held_out", **row)
        for part in ("training", "held_out")
        for name, row in table[part].items()
    }


def training_things() -> list[Thing]:
    return [t for t in things().values() if not t.held_out]


@cache
def load_sprite(name: str, style: str) -> Image.Image:
    with Image.open(DEMO / "sprites" / style / f"{name}.webp") as image:
        return image.convert("RGBA")


def paint_background(colour: str, pattern: str) -> Image.Image:
    """A pattern is drawn in the named colour and a lighter (for light colours: darker) tone of it."""
    base = COLOURS[colour]
    towards = 255 if sum(base) < 480 else 90
    tone = tuple(round(c + (towards - c) * 0.35) for c in base)
    canvas = Image.new("RGB", (SIZE, SIZE), base)
    draw = ImageDraw.Draw(canvas)
    step = SIZE // 8
    if pattern == "striped":
        for x in range(0, SIZE, 2 * step):
            draw.rectangle((x, 0, x + step - 1, SIZE), fill=tone)
    elif pattern == "checkered":
        for x in range(0, SIZE, step):
            for y in range(0, SIZE, step):
                if (x + y) // step % 2:
                    draw.rectangle((x, y, x + step - 1, y + step - 1), fill=tone)
    elif pattern == "dotted":
        for x in range(step // 2, SIZE, step * 2):
            for y in range(step // 2, SIZE, step * 2):
                draw.ellipse((x, y, x + step - 1, y + step - 1), fill=tone)
    elif pattern != "plain":
        raise ValueError(f"pattern {pattern!r} is unknown; known: {', '.join(PATTERNS)}")
    return canvas


def random_scene(thing: Thing, rng: random.Random) -> Scene:
    return Scene(
        thing=thing,
        colour=rng.choice(list(COLOURS)),
        pattern=rng.choices(PATTERNS, PATTERN_WEIGHTS)[0],
        scale=rng.uniform(0.7, 0.94),
        x=rng.random(),
        y=rng.random(),
        flip=rng.random() < 0.5,
    )


def centred(thing: Thing, colour: str) -> Scene:
    """The plainest picture of a thing: what the check compares generated images with."""
    return Scene(thing, colour, "plain", 0.82, 0.5, 0.5, flip=False)


def training_scenes(per_thing: int, seed: int = 0) -> Iterator[Scene]:
    """`per_thing` scenes of each training object, in a fixed order for a seed."""
    for thing in training_things():
        rng = random.Random(f"{seed}:{thing.name}")
        for _ in range(per_thing):
            yield random_scene(thing, rng)
