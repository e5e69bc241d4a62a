"""Pictures are opened a step ahead: the right ones, with the same content, and nothing else is ahead."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.small_models import small_pipeline
from tests.trainers.runs import pictures
from trainers.batches import Feeder
from trainers.buckets import View
from trainers.config_data import DataSettings
from trainers.dataset import Dataset, Example, layers, pixels, read
from trainers.images import BadImage
from trainers.scan import scan

DRAWINGS = 2


def cropped(tmp_path: Path, **changes: Any) -> Dataset:
    pictures(tmp_path / "images", 5, side=96)
    pictures(tmp_path / "class", 3, side=80, seed=1)
    table = {
        "images": tmp_path / "images",
        "prompt": "x",
        "crop": "random",
        "flip": True,
        "class_images": tmp_path / "class",
        "class_prompt": "y",
    }
    return scan(DataSettings.model_validate(table), 64)


def feeder(dataset: Dataset, vae: Any = None) -> Feeder:
    return Feeder(dataset, vae, None, batch_size=2, seed=0)


def views(feeder: Feeder) -> set[tuple[Example, View]]:
    """Of the next step, which is drawn."""
    return {
        (example, view)
        for _ in range(DRAWINGS)
        for kind in ("instance", "class")
        for example, view, _ in feeder.draw(kind)
    }


def test_what_is_opened_is_what_comes_and_whose_turn_it_is_stays(tmp_path: Path) -> None:
    dataset = cropped(tmp_path)
    ours, plain = feeder(dataset, small_pipeline("sd1").vae), feeder(dataset)
    generator = torch.Generator().manual_seed(0)
    views(plain)
    for _ in range(6):
        ours.next(generator, 1000, DRAWINGS)
        assert ours.state() == plain.state()
        opened = dict(ours._ahead._coming)
        assert opened.keys() == views(plain)
        for (example, view), coming in opened.items():
            assert torch.equal(coming.result().pixels, pixels(layers(example, read(example))[0], view))


def test_a_picture_that_is_lost_is_missed_in_its_own_step(tmp_path: Path) -> None:
    dataset = cropped(tmp_path)
    ours, plain = feeder(dataset, small_pipeline("sd1").vae), feeder(dataset)
    generator = torch.Generator().manual_seed(0)
    now, then = views(plain), views(plain)
    lost = next(iter({example.path for example, _ in then} - {example.path for example, _ in now}))
    lost.unlink()
    ours.next(generator, 1000, DRAWINGS)
    with pytest.raises(BadImage, match=lost.name):
        ours.next(generator, 1000, DRAWINGS)
