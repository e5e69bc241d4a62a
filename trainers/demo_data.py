"""The small pictures shipped to train on: what the demo base has never seen.

    python -m trainers.demo_base --data                       # views of the held-out subjects, and of the style
    python -m trainers.demo_base --sprites FOLDER --noto TTF  # the sprites themselves, from their sources

Each of the twelve held-out subjects gets twelve composed views: 5 to train on, 7 to judge by. The style is the
training objects as Noto Color Emoji draws them: 24 objects to train on, 12 others to judge by.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from trainers.demo_scenes import DEMO, Scene, random_scene, things, training_things

TOKEN = "zxq"  # no word; the vocabulary spells it in letters
SPRITE = 96  # pixels


def write_views() -> None:
    for thing in (t for t in things().values() if t.held_out):
        rng = random.Random(f"views:{thing.name}")
        scenes = [random_scene(thing, rng) for _ in range(12)]
        for part, chosen in (("train", scenes[:5]), ("judge", scenes[5:])):
            _write(
                DEMO / "subjects" / thing.name / part,
                chosen,
                "fluent",
                lambda s: s.caption(f"{TOKEN} {s.thing.kind}"),
            )
    rng = random.Random("style")
    models = rng.sample(training_things(), 36)
    scenes = [random_scene(thing, rng) for thing in models]
    for part, chosen in (("train", scenes[:24]), ("judge", scenes[24:])):
        _write(DEMO / "style" / part, chosen, "noto", lambda s: s.caption(f"{TOKEN} {s.thing.name}"))


def _write(folder: Path, scenes: list[Scene], style: str, caption: Callable[[Scene], str]) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for i, scene in enumerate(scenes):
        scene.draw(style).save(folder / f"{i:02d}.png", optimize=True)
        (folder / f"{i:02d}.txt").write_text(caption(scene) + "\n", encoding="utf-8")


def write_sprites(fluent: Path, noto: Path) -> None:
    """`fluent`: folder of 256-pixel .webp named by code point; `noto`: NotoColorEmoji.ttf (bitmaps of 109)."""
    font = ImageFont.truetype(noto, 109)
    for thing in things().values():
        with Image.open(fluent / f"{thing.code}.webp") as source:
            _save(source.convert("RGBA"), "fluent", thing.name)
        canvas = Image.new("RGBA", (136, 136), (0, 0, 0, 0))
        text = "".join(chr(int(code, 16)) for code in thing.code.split("-"))
        ImageDraw.Draw(canvas).text((0, 4), text, font=font, embedded_color=True)
        box = canvas.getbbox()
        if box is None:
            raise ValueError(f"the font draws nothing for {thing.name} ({thing.code})")
        drawn = canvas.crop(box)
        side = max(drawn.size)
        square = Image.new("RGBA", (side, side), (0, 0, 0, 0))
        square.paste(drawn, ((side - drawn.width) // 2, (side - drawn.height) // 2))
        _save(square, "noto", thing.name)


def _save(image: Image.Image, style: str, name: str) -> None:
    folder = DEMO / "sprites" / style
    folder.mkdir(parents=True, exist_ok=True)
    small = image.resize((SPRITE, SPRITE), Image.Resampling.LANCZOS)
    small.save(folder / f"{name}.webp", quality=88, method=6)
