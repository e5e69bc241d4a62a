"""The bar the demo base must pass, measured; written with a contact sheet to presets/demo/README.md.

    python -m trainers.demo_base --check

For every training object one picture of "a OBJECT on a COLOUR background" (25 steps, one guidance; object i
gets colour i mod 10 and seed i) must be nearer to that object's own picture on that colour than to those of nine
random other objects, in 8 x 8 thumbnails and in the VAE's latents; and the named colour must be the nearest of
the ten at the picture's edge. The same figures for shuffled captions are chance.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

from lora_core.pipeline import LivePipeline
from trainers.demo_scenes import COLOURS, DEMO, SIZE, Scene, Thing, centred, training_things
from trainers.measures import distances, embed, nearest_colour

GUIDANCE = 4.0
STEPS = 25
OTHERS = 9


@dataclass(frozen=True)
class Figures:
    """Shares of the training objects, 0..1."""

    likeness_thumbnail: float
    likeness_latent: float
    colour: float
    chance_thumbnail: float
    chance_latent: float
    chance_colour: float
    objects: int

    def table(self) -> str:
        rows = (
            ("object nearest of ten, 8×8 thumbnails", self.likeness_thumbnail, self.chance_thumbnail),
            ("object nearest of ten, VAE latents", self.likeness_latent, self.chance_latent),
            ("named background colour nearest of ten", self.colour, self.chance_colour),
        )
        lines = [
            f"| {what} | {100 * got:.0f} of 100 | {100 * chance:.0f} of 100 |" for what, got, chance in rows
        ]
        return "\n".join(
            [f"| {self.objects} objects | demo base | shuffled captions |", "|---|---|---|", *lines]
        )


def wanted_scenes() -> list[Scene]:
    colours = list(COLOURS)
    return [centred(thing, colours[i % len(colours)]) for i, thing in enumerate(training_things())]


def generate_all(pipe: LivePipeline, scenes: list[Scene], guidance: float = GUIDANCE) -> list[Image.Image]:
    """One picture per scene, seed i; twelve prompts share a batch, which LivePipeline's one prompt cannot."""
    pictures: list[Image.Image] = []
    for start in range(0, len(scenes), 12):
        part = scenes[start : start + 12]
        pictures += pipe.pipeline(
            prompt=[scene.caption() for scene in part],
            num_inference_steps=STEPS,
            guidance_scale=guidance,
            generator=[torch.Generator("cpu").manual_seed(start + i) for i in range(len(part))],
        ).images
    return pictures


def share_nearest(pictures: list[Image.Image], scenes: list[Scene], vae: object) -> dict[str, float]:
    """Share of pictures nearer to their scene's object than to `OTHERS` random ones on the same background."""
    hits = {"thumbnail": 0, "latent": 0}
    things = training_things()
    made = embed(pictures, vae)
    for i, scene in enumerate(scenes):
        rivals: list[Thing] = random.Random(i).sample([t for t in things if t != scene.thing], OTHERS)
        candidates = embed([centred(t, scene.colour).draw() for t in (scene.thing, *rivals)], vae)
        for space in hits:
            nearest = int(distances(made[space][i : i + 1], candidates[space]).argmin())
            hits[space] += nearest == 0
    return {space: n / len(scenes) for space, n in hits.items()}


def measure(pipe: LivePipeline, guidance: float = GUIDANCE) -> tuple[Figures, list[Image.Image]]:
    torch.manual_seed(0)
    scenes = wanted_scenes()
    pictures = generate_all(pipe, scenes, guidance)
    order = random.Random(7).sample(range(len(scenes)), len(scenes))
    shuffled = [pictures[i] for i in order]
    near, chance = (share_nearest(p, scenes, pipe.pipeline.vae) for p in (pictures, shuffled))
    obeyed, by_chance = (
        sum(nearest_colour(p) == s.colour for p, s in zip(ps, scenes, strict=True)) / len(scenes)
        for ps in (pictures, shuffled)
    )
    figures = Figures(
        near["thumbnail"],
        near["latent"],
        obeyed,
        chance["thumbnail"],
        chance["latent"],
        by_chance,
        len(scenes),
    )
    return figures, pictures


def sheet(pictures: list[Image.Image], columns: int = 12) -> Image.Image:
    rows = -(-len(pictures) // columns)
    page = Image.new("RGB", (columns * SIZE, rows * SIZE), "white")
    for i, picture in enumerate(pictures):
        page.paste(picture, (i % columns * SIZE, i // columns * SIZE))
    return page


def check(folder: Path) -> Figures:
    """Measure `folder`; for the shipped base also write the sheet and the figures into its README."""
    figures, pictures = measure(LivePipeline.open(folder))
    page = sheet(pictures)
    if folder.resolve() == (DEMO / "base").resolve():
        page.save(DEMO / "contact_sheet.png", optimize=True)
        readme = DEMO / "README.md"
        before, rest = readme.read_text(encoding="utf-8").split("<!-- figures -->", 1)
        after = rest.split("<!-- end of figures -->", 1)[1]
        text = f"{before}<!-- figures -->\n{figures.table()}\n<!-- end of figures -->{after}"
        readme.write_text(text, encoding="utf-8")
    print(figures.table())
    return figures
