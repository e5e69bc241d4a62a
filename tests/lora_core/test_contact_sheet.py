"""Contact sheets: the same pictures as separate runs, in batches of whatever size memory allows."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from lora_core import GenerationRequest, LivePipeline
from lora_core.contact_sheet import Cell, cells_of_loras, cells_of_seeds, render, sheet
from lora_core.errors import ConfigError, LoraError, Stopped
from lora_core.generation import GeneratedImage
from tests.lora_core.test_pipeline import random_adapter
from tests.small_models import small_pipeline

ASK = GenerationRequest(prompt="a cat", steps=2)


@pytest.fixture(scope="module")
def live() -> Iterator[LivePipeline]:
    live = LivePipeline(small_pipeline("sd1"))
    live.load(random_adapter(live, 1, variant="dora"), name="ink", weight=0.6)
    live.load(random_adapter(live, 2), name="cat", weight=0.3)
    yield live
    live.unload()


def pixels(picture: GeneratedImage) -> torch.Tensor:
    return torch.tensor(list(picture.image.tobytes())).int()


def alone(live: LivePipeline, cell: Cell) -> GeneratedImage:
    request = GenerationRequest(prompt="a cat", steps=2, mixes=[cell.weights], seeds=[cell.seed])
    return live.generate(request)[0]


CELLS = [
    *cells_of_loras(["ink", "cat"], [0, 1], seed=4),
    *cells_of_seeds([9, 4], {"ink": 0.5, "cat": {"unet": 1.0, "text_encoder": 0.2}}, [0.5, 1]),
]


@pytest.mark.parametrize("batch", [1, 3, None])
def test_each_cell_is_the_picture_of_a_run_of_its_own(live: LivePipeline, batch: int | None) -> None:
    before = live.weights
    pictures = render(live, ASK, CELLS, batch=batch)
    assert live.weights == before
    assert [p.seed for p in pictures] == [4, 4, 4, 4, 9, 9, 4, 4]
    for cell, picture in zip(CELLS, pictures, strict=True):
        assert (
            pixels(picture) - pixels(alone(live, cell))
        ).abs().max() <= 1  # sums of another batch size, in bytes
    far = [
        (pixels(a) - pixels(b)).abs().max() > 1 for a, b in itertools.combinations(pictures, 2)
    ]  # in other batches even the same picture may differ by a byte
    assert far.count(False) == 1  # both LoRAs at 0 is the same picture, once from each


def test_out_of_memory_halves_the_batch_and_keeps_what_is_done(
    live: LivePipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, sizes = live.generate, list[int]()

    def short(request: GenerationRequest, **options: Any) -> list[GeneratedImage]:
        sizes.append(len(request.mixes or ()))
        if sizes[-1] > 2:
            raise torch.OutOfMemoryError("no memory left, for this test")
        return real(request, **options)

    monkeypatch.setattr(live, "generate", short)
    pictures = render(live, ASK, CELLS[:5], batch=5)
    assert sizes == [5, 2, 2, 1]
    monkeypatch.undo()
    for cell, picture in zip(CELLS, pictures, strict=False):
        assert (pixels(picture) - pixels(alone(live, cell))).abs().max() <= 1

    def none(*_: Any, **__: Any) -> list[GeneratedImage]:
        raise torch.OutOfMemoryError("no memory left, for this test")

    monkeypatch.setattr(live, "generate", none)
    with pytest.raises(LoraError, match="even one picture"):
        render(live, ASK, CELLS[:2])


def test_stopping_and_counting(live: LivePipeline) -> None:
    seen: list[tuple[int, int]] = []

    def on_step(done: int, of: int) -> bool:
        seen.append((done, of))
        return len(seen) < 3

    with pytest.raises(Stopped):
        render(live, ASK, CELLS[:4], batch=2, on_step=on_step)
    assert seen == [(2, 8), (4, 8), (6, 8)]


def test_the_page_has_a_label_for_each_row_and_column(live: LivePipeline) -> None:
    cells = CELLS[:4]
    pictures = render(live, ASK, cells)
    page = sheet(pictures, cells, columns=2)
    side = pictures[0].image.width
    assert page.width > 2 * side
    assert page.height > 2 * side
    corner = page.crop((page.width - side, page.height - side, page.width, page.height))
    assert corner.tobytes() == pictures[3].image.convert("RGB").tobytes()
    others = [Cell(seed=c.seed, weights=c.weights, row="x" * 9, column=c.column) for c in cells]
    assert sheet(pictures, others, columns=2).tobytes() != page.tobytes()


def test_what_cannot_be_is_said(live: LivePipeline) -> None:
    with pytest.raises(ConfigError, match="count and mixes"):
        render(live, GenerationRequest(prompt="a cat", count=2), CELLS)
    with pytest.raises(ConfigError, match="batch"):
        render(live, ASK, CELLS, batch=0)
    with pytest.raises(ConfigError, match="cell"):
        render(live, ASK, [])
    with pytest.raises(ConfigError, match="seeds"):
        GenerationRequest(prompt="a cat", seeds=[1])
    with pytest.raises(ConfigError, match="seeds"):
        GenerationRequest(prompt="a cat", mixes=[{}, {}], seeds=[1])
