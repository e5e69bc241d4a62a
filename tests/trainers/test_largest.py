"""The largest step, against pixels counted by hand and against what the training's own feeder draws."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.trainers.runs import config, pictures
from trainers.batches import Feeder
from trainers.config import TrainConfig
from trainers.dataset import Dataset
from trainers.largest import Largest, largest
from trainers.scan import scan


def read(settings: TrainConfig) -> Dataset:
    return scan(settings.data, 64, datasets=settings.datasets)


def sizes(found: Largest) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    return [e.plan.bucket for e in found.instances], [e.plan.bucket for e in found.classes]


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        # two of 96 x 96 are 18,432 pixels; four of 64 x 64, in one call with the class, are 16,384
        ({"more_resolutions": [96]}, ([(96, 96)] * 2, [(64, 64)] * 2)),
        # two of 80 x 80 are 12,800: the smaller pictures make the larger call
        ({"more_resolutions": [80]}, ([(64, 64)] * 2, [(64, 64)] * 2)),
    ],
)
def test_pictures_and_class_of_one_shape_are_one_call(
    tmp_path: Path, data: dict[str, Any], expected: tuple[Any, Any]
) -> None:
    pictures(tmp_path / "images", 4)
    pictures(tmp_path / "class", 4)
    own = {"class_images": tmp_path / "class", "class_prompt": "a cat", **data}
    settings = config(tmp_path, "demo", data=own, train={"steps": 30})
    # the class is of 64 pixels whatever the pictures are trained at
    assert sizes(largest(read(settings), settings)) == expected


def test_a_class_without_pictures_counts_each_picture_twice(tmp_path: Path) -> None:
    """Where only one of two folders has it: 2 x 2 x 64 x 64 pixels are more than 2 x 80 x 80."""
    pictures(tmp_path / "a", 4)
    pictures(tmp_path / "b", 4)
    tables = [
        {"images": tmp_path / "a", "class_from": "model", "class_prompt": "a cat"},
        {"images": tmp_path / "b", "resolution": 80},
    ]
    table = config(tmp_path, "demo", train={"steps": 40}).model_dump(exclude_unset=True)
    table["data"] = {"prompt": "a zxq cat", "resolution": 64}
    settings = TrainConfig.model_validate({**table, "dataset": tables})
    assert sizes(largest(read(settings), settings))[0] == [(64, 64)] * 2


def test_one_shape_alone_is_always_as_large(tmp_path: Path) -> None:
    pictures(tmp_path / "images", 3)
    settings = config(tmp_path, "demo", train={"steps": 10, "batch_size": 2})
    found = largest(read(settings), settings)
    assert (found.mean_work, found.mean_pictures) == (1.0, 2.0)


@pytest.mark.parametrize("batch", [1, 2, 4, 8])
def test_no_step_of_the_training_is_larger(tmp_path: Path, batch: int) -> None:
    """A rare shape never fills its batch: against the draws of the feeder itself."""
    pictures(tmp_path / "images", 7)
    for i, side in enumerate((96, 128, 128)):
        Image.new("RGB", (side, 64)).save(tmp_path / "images" / f"wide-{i}.png")
    settings = config(tmp_path, "demo", train={"steps": 60, "batch_size": batch})
    dataset = read(settings)
    found = largest(dataset, settings)
    feeder = Feeder(dataset, None, None, batch_size=batch, seed=settings.seed)
    drawn = [[e.plan.bucket for e, _, _ in feeder.draw("instance")] for _ in range(60)]
    pixels = [sum(math.prod(bucket) for bucket in rows) for rows in drawn]
    own = sum(math.prod(bucket) for bucket in sizes(found)[0])
    assert own == max(pixels)
    assert found.mean_work == pytest.approx(sum(pixels) / 60 / own)
    assert found.mean_pictures == pytest.approx(sum(map(len, drawn)) / 60)
