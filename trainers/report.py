"""Before and after: a sheet to look at, and DreamBooth's figures for the same prompts and seeds.

likeness      distance of subject pictures to the held-out views, base against trained (smaller is nearer)
obedience     share of pictures whose edge has the background colour their prompt names
drift         how far unrelated prompts moved, against how far the subject's moved
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from lora_core.generation import GenerationRequest
from lora_core.pipeline import LivePipeline
from lora_core.safe_files import write_atomic
from trainers.captions import own_caption
from trainers.config import ReportSettings
from trainers.control import StopRequest
from trainers.folders import picture_files
from trainers.images import open_image
from trainers.measures import distances, embed, named_background, nearest_colour


@dataclass(frozen=True)
class Shot:
    """One picture of the report. `view` is the held-out picture its prompt describes, where there is one."""

    prompt: str
    seed: int
    subject: bool
    view: int | None = None


def judge_views(settings: ReportSettings) -> list[tuple[Path, str | None]]:
    """Held-out pictures with their captions."""
    if settings.judge is None:
        return []
    return [(p, own_caption(p).text) for p in picture_files(settings.judge)]


def shots(settings: ReportSettings, views: Sequence[tuple[Path, str | None]]) -> list[Shot]:
    """Every prompt with every seed: the captions of the held-out views, the subject's and the unrelated prompts."""
    captioned = [(caption, i) for i, (_, caption) in enumerate(views) if caption]
    return [
        *(Shot(caption, seed, True, i) for caption, i in captioned for seed in settings.seeds),
        *(Shot(prompt, seed, True) for prompt in settings.subject_prompts for seed in settings.seeds),
        *(Shot(prompt, seed, False) for prompt in settings.unrelated_prompts for seed in settings.seeds),
    ]


def render(
    pipe: LivePipeline, wanted: Sequence[Shot], settings: ReportSettings, resolution: int, stop: StopRequest
) -> list[Image.Image]:
    """One picture per shot; pictures of one prompt with consecutive seeds share a batch. Raises Stopped."""
    pictures: list[Image.Image] = []
    while len(pictures) < len(wanted):
        first, run = wanted[len(pictures)], 1
        rest = wanted[len(pictures) :]
        while run < min(8, len(rest)) and (rest[run].prompt, rest[run].seed) == (
            first.prompt,
            first.seed + run,
        ):
            run += 1
        request = GenerationRequest(
            prompt=first.prompt,
            seed=first.seed,
            steps=settings.steps,
            guidance=settings.guidance,
            count=run,
            width=resolution,
            height=resolution,
        )
        pictures += [image.image for image in pipe.generate(request, on_step=lambda *_: not stop.asked)]
    return pictures


def figures(
    wanted: Sequence[Shot],
    before: Sequence[Image.Image],
    after: Sequence[Image.Image],
    settings: ReportSettings,
    vae: Any,
) -> dict[str, Any]:
    """The numbers, by space where they are distances. Only what can be measured is in it."""
    size = after[0].size
    old, new = embed(before, vae, size), embed(after, vae, size)
    subject = [i for i, s in enumerate(wanted) if s.subject]
    unrelated = [i for i, s in enumerate(wanted) if not s.subject]
    result: dict[str, Any] = {"pictures": len(wanted), "seeds": list(settings.seeds)}
    views = judge_views(settings)
    if views and subject:
        held_out = embed([open_image(path) for path, _ in views], vae, size)
        for space in new:
            base, trained = (
                [_to_views(distances(made[space], held_out[space])[i], wanted[i]) for i in subject]
                for made in (old, new)
            )
            result[f"likeness_{space}_base"] = round(sum(base) / len(base), 4)
            result[f"likeness_{space}_trained"] = round(sum(trained) / len(trained), 4)
            nearer = sum(t < b for t, b in zip(trained, base, strict=True))
            result[f"likeness_{space}_nearer"] = f"{nearer} of {len(subject)}"
    for name, pictures in (("base", before), ("trained", after)):
        colours = [
            (named_background(s.prompt), p) for s, p in zip(wanted, pictures, strict=True) if s.subject
        ]
        named = [(colour, picture) for colour, picture in colours if colour]
        if named:
            obeyed = sum(nearest_colour(picture) == colour for colour, picture in named)
            result[f"obedience_{name}"] = f"{obeyed} of {len(named)}"
    for space in new:
        moved = (old[space] - new[space]).square().mean(1).sqrt()
        if subject:
            result[f"moved_{space}_subject"] = round(float(moved[subject].mean()), 4)
        if unrelated:
            result[f"moved_{space}_unrelated"] = round(float(moved[unrelated].mean()), 4)
    return result


def _to_views(row: Tensor, shot: Shot) -> float:
    """A shot that describes one view is compared with that one, any other with all views on average."""
    return float(row[shot.view]) if shot.view is not None else float(row.mean())


def sheet(
    wanted: Sequence[Shot],
    before: Sequence[Image.Image],
    after: Sequence[Image.Image],
    path: Path,
    *,
    rows: int = 12,
) -> None:
    """Prompt, base and trained side by side, one row per prompt and as many seeds as there are."""
    by_prompt: dict[str, list[int]] = {}
    for i, shot in enumerate(wanted):
        by_prompt.setdefault(shot.prompt, []).append(i)
    shown = (
        list(by_prompt.items())[:rows] if len(by_prompt) <= rows else _spread(list(by_prompt.items()), rows)
    )
    side = max(96, min(192, before[0].width))
    count = max(len(indices) for _, indices in shown)
    text, gap, head = 300, 8, 28
    page = Image.new(
        "RGB", (text + 2 * (count * (side + 2) + gap), head + len(shown) * (side + gap)), "white"
    )
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(size=15)
    for part, (title, pictures) in enumerate((("base model", before), ("with the LoRA", after))):
        left = text + part * (count * (side + 2) + gap)
        draw.text((left, 6), title, fill="black", font=font)
        for row, (_, indices) in enumerate(shown):
            for column, i in enumerate(indices):
                small = pictures[i].resize((side, side), Image.Resampling.LANCZOS)
                page.paste(small, (left + column * (side + 2), head + row * (side + gap)))
    for row, (prompt, _) in enumerate(shown):
        top = head + row * (side + gap) + side // 2 - 20
        draw.multiline_text((8, top), _wrap(prompt, 36), fill="black", font=font)
    write_atomic(path, lambda target: page.save(target, "PNG", optimize=True))


def write(path: Path, result: dict[str, Any]) -> None:
    text = json.dumps(result, indent=2) + "\n"
    write_atomic(path, lambda target: _write_text(target, text))


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def _spread(items: list[tuple[str, list[int]]], rows: int) -> list[tuple[str, list[int]]]:
    """`rows` of them, evenly taken, the last included."""
    return [items[round(i * (len(items) - 1) / (rows - 1))] for i in range(rows)]


def _wrap(text: str, width: int) -> str:
    lines = [""]
    for word in text.split():
        if len(lines[-1]) + len(word) >= width:
            lines.append("")
        lines[-1] += word + " "
    return "\n".join(lines[:4])
