"""A contact sheet: one LoRA per row or one seed per row, one weight per column, all from one prompt.

    cells = cells_of_loras(["ink", "cat"], [0, 0.5, 1], seed=3)    # 2 rows of 3
    pictures = render(pipe, GenerationRequest(prompt="a cat in the snow"), cells)
    sheet(pictures, cells, columns=3).save("sheet.png")

Cells with different seeds and different mixes share a batch, as many as memory has room for. Each picture is what a
run of its own would give, up to the float sums of another batch size.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image, ImageDraw, ImageFont

from lora_core.batch_size import batch_that_fits, ran_out_of_memory
from lora_core.errors import ConfigError, LoraError
from lora_core.generation import GeneratedImage, GenerationRequest
from lora_core.mix import AdapterWeight, WeightValue

if TYPE_CHECKING:
    from lora_core.denoise import OnStep
    from lora_core.pipeline import LivePipeline

MAX_PAGE = 4096  # pixels, of the pictures' side of a sheet
GAP = 4  # pixels between pictures

OnCell = Callable[[int, GeneratedImage], None]  # index in the cells, picture


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One picture of a sheet.

    weights   as `LivePipeline.set_weights` takes them; loaded LoRAs that are not named keep what they have
    row       label of its row, drawn left of the row's first cell
    column    label of its column, drawn above the column's first cell
    """

    seed: int
    weights: Mapping[str, WeightValue]
    row: str
    column: str


def cells_of_loras(names: Sequence[str], weights: Sequence[float], seed: int) -> list[Cell]:
    """A row per LoRA, worn alone with the others of `names` at 0; a column per weight; one seed for all.

    Raises ConfigError without names or weights, or for a weight that is no number.
    """
    _some("names", names, "a LoRA")
    _some("weights", weights, "a weight")
    _numbers(weights)
    return [
        Cell(
            seed=seed,
            weights={other: weight if other == name else 0.0 for other in names},
            row=name,
            column=f"{weight:g}",
        )
        for name in names
        for weight in weights
    ]


def cells_of_seeds(
    seeds: Sequence[int], mix: Mapping[str, WeightValue], factors: Sequence[float]
) -> list[Cell]:
    """A row per seed, a column per factor on every weight of `mix`. Raises ConfigError for what is empty or wrong."""
    _some("seeds", seeds, "a seed")
    _some("factors", factors, "a factor")
    full = {name: AdapterWeight.parse(name, value) for name, value in mix.items()}
    _numbers(factors)
    return [
        Cell(
            seed=seed,
            weights={name: weight.scaled(factor).plain for name, weight in full.items()},
            row=f"seed {seed}",
            column=f"{factor:g}",
        )
        for seed in seeds
        for factor in factors
    ]


# --- the pictures ------------------------------------------------------------------------------------------


def render(
    pipe: LivePipeline,
    request: GenerationRequest,
    cells: Sequence[Cell],
    *,
    batch: int | None = None,
    on_cell: OnCell | None = None,
    on_step: OnStep | None = None,
) -> list[GeneratedImage]:
    """-> one picture per cell, in their order, each handed to `on_cell` as soon as its batch is done.

    Everything but seed and weights is the `request`'s. See `rendered` for `batch`, `on_step` and what is raised.
    """
    pictures: list[GeneratedImage] = []
    for picture in rendered(pipe, request, cells, batch=batch, on_step=on_step):
        pictures.append(picture)
        if on_cell is not None:
            on_cell(len(pictures) - 1, picture)
    return pictures


def rendered(
    pipe: LivePipeline,
    request: GenerationRequest,
    cells: Sequence[Cell],
    *,
    batch: int | None = None,
    on_step: OnStep | None = None,
) -> Iterator[GeneratedImage]:
    """`render`, picture by picture.

    batch     at most so many pictures at a time; None: as many as fit. Where memory runs out all the same it is
              halved, and only the pictures of that batch are begun again
    on_step   (done, all), counted in steps of single pictures over the whole sheet; False ends it with Stopped

    Raises ConfigError as `checked` does and for a batch that is none, before anything is drawn; LoraError where
    there is no memory for one picture; else as `generate` does.
    """
    checked(request, cells)
    if batch is not None and (isinstance(batch, bool) or not isinstance(batch, int) or batch < 1):
        raise ConfigError(
            f"batch = {batch!r} is no number of pictures: use 1 or more, or None for what fits."
        )
    return _rendered(pipe, request, cells, batch, on_step)


def checked(request: GenerationRequest, cells: Sequence[Cell]) -> GenerationRequest:
    """-> the request for all cells at once. Raises ConfigError for one that itself says how many pictures it wants,
    for a seed that is none, and without cells."""
    if request.mixes is not None or request.count != 1:
        raise ConfigError(
            "The cells of a contact sheet say how many pictures there are and what they wear: leave count and mixes "
            "out of the request."
        )
    _some("cells", cells, "a cell")
    return replace(
        request, mixes=tuple(cell.weights for cell in cells), seeds=tuple(cell.seed for cell in cells)
    )


def _rendered(
    pipe: LivePipeline,
    request: GenerationRequest,
    cells: Sequence[Cell],
    batch: int | None,
    on_step: OnStep | None,
) -> Iterator[GeneratedImage]:
    done = 0
    with _decoding_one_by_one(pipe.pipeline.vae):
        batch = batch or batch_that_fits(pipe, request)
        while done < len(cells):
            batches = -(-(len(cells) - done) // batch)
            size = -(-(len(cells) - done) // batches)  # of equal size: 9 + 8 takes less memory than 16 + 1
            part = cells[done : done + size]

            def counted(step: int, steps: int, before: int = done, now: int = size) -> bool | None:
                return on_step(before * steps + now * step, len(cells) * steps) if on_step else None

            pictures = _or_no_memory(pipe, checked(request, part), counted)
            if pictures is None:
                if size == 1:
                    raise LoraError(
                        f"There is not enough memory for even one picture at a time; {done} of {len(cells)} are done. "
                        "Choose a smaller width and height, or close what else uses the memory."
                    )
                batch = size // 2
                continue
            done += len(part)
            yield from pictures


def _or_no_memory(
    pipe: LivePipeline, request: GenerationRequest, on_step: OnStep
) -> list[GeneratedImage] | None:
    try:
        return pipe.generate(request, on_step=on_step)
    except RuntimeError as problem:
        if not ran_out_of_memory(problem):
            raise
    # Only here, where the exception has let go of the tensors in its frames, is there something to give back.
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return None


@contextmanager
def _decoding_one_by_one(vae: Any) -> Iterator[None]:
    """Full-sized pictures need far more memory in the decoder than latents in the UNet, and are no faster together."""
    before = getattr(vae, "use_slicing", None)
    if before is None:
        yield
        return
    vae.use_slicing = True
    try:
        yield
    finally:
        vae.use_slicing = before


# --- the page ----------------------------------------------------------------------------------------------


def sheet(images: Sequence[GeneratedImage], cells: Sequence[Cell], columns: int) -> Image.Image:
    """-> one RGB page: the pictures in rows of `columns`, labelled at the left and at the top.

    Pictures keep their size up to a page of about MAX_PAGE pixels, beyond which all are scaled down. Where there
    are fewer images than cells (it was stopped) the places of the others stay gray. Raises ConfigError.
    """
    _some("images", images, "a picture")
    if len(images) > len(cells):
        raise ConfigError(
            f"There are {len(images)} pictures for {len(cells)} cells. Give both as they were rendered."
        )
    if isinstance(columns, bool) or not isinstance(columns, int) or not 1 <= columns <= len(cells):
        raise ConfigError(
            f"columns = {columns!r} is out of range: use 1 to {len(cells)}, the number of cells."
        )
    lines = [cells[start : start + columns] for start in range(0, len(cells), columns)]
    width, height = images[0].image.size
    scale = min(1.0, MAX_PAGE / (columns * (width + GAP)), MAX_PAGE / (len(lines) * (height + GAP)))
    width, height = max(1, int(width * scale)), max(1, int(height * scale))

    size = max(14, height // 24)
    font = ImageFont.load_default(size)
    pad = size / 2
    longest = max(font.getlength(line[0].row) for line in lines)
    left = int(2 * pad + min(longest, max(width, 12 * size)))  # a long name does not push the pictures away
    top = int(size + 2 * pad)
    page = Image.new(
        "RGB", (left + columns * (width + GAP) - GAP, top + len(lines) * (height + GAP) - GAP), "white"
    )
    draw = ImageDraw.Draw(page)
    for i, cell in enumerate(lines[0]):
        middle = left + i * (width + GAP) + width / 2
        draw.text((middle, top / 2), _shortened(cell.column, font, width), "black", font, anchor="mm")
    for i, line in enumerate(lines):
        middle = top + i * (height + GAP) + height / 2
        label = _shortened(line[0].row, font, left - 2 * pad)
        draw.text((left - pad, middle), label, "black", font, anchor="rm")
    for i in range(len(cells)):
        corner = (left + i % columns * (width + GAP), top + i // columns * (height + GAP))
        if i >= len(images):
            page.paste("lightgray", (*corner, corner[0] + width, corner[1] + height))
            continue
        picture = images[i].image
        if picture.size != (width, height):
            picture = picture.resize((width, height), Image.Resampling.LANCZOS)
        page.paste(picture, corner)
    return page


def _shortened(text: str, font: Any, room: float) -> str:
    text = " ".join(text.split())  # a label is one line
    if font.getlength(text) <= room:
        return text
    while text and font.getlength(text + "…") > room:
        text = text[:-1]
    return text + "…"


def _numbers(given: Sequence[Any]) -> None:
    for value in given:
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise ConfigError(
                f"{value!r} is no weight for a column of the contact sheet: use numbers, usually between -1 and 2."
            )


def _some(what: str, given: Sequence[Any], one: str) -> None:
    if not given:
        raise ConfigError(f"A contact sheet without {what} has no pictures: give at least {one}.")
