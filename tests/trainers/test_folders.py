"""One folder or several, kohya's inside them: repeats, prompts, classes, and how a preset spells them."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from lora_core.errors import ConfigError
from trainers import presets
from trainers.batches import Feeder, turns
from trainers.config import TrainConfig
from trainers.config_data import DatasetSettings, DataSettings
from trainers.dataset import Dataset
from trainers.scan import scan


def folder(path: Path, *names: str, size: tuple[int, int] = (64, 64)) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    for name in names:
        Image.new("RGB", size, "red").save(path / name)
    return path


def scanned(**data: Any) -> Dataset:
    return scan(DataSettings.model_validate(data), 64)


def told(dataset: Dataset) -> list[tuple[str, str, int]]:
    return [(e.path.name, e.caption, e.source.repeats) for e in dataset.examples]


def test_kohyas_folders(tmp_path: Path) -> None:
    folder(tmp_path / "10_sks dog", "a.png", "b.png")
    (tmp_path / "10_sks dog" / "b.txt").write_text("a dog lying down", encoding="utf-8")
    folder(tmp_path / "3_sks_cat", "c.png")
    folder(tmp_path / "2019_paris", "d.png")  # a year
    folder(tmp_path / "class" / "2_dog", "e.png")
    dataset = scanned(
        images=tmp_path,
        prompt="never",
        class_images=tmp_path / "class",
        class_prompt="a dog",
        masked_loss=False,
    )
    assert told(dataset) == [
        ("a.png", "sks dog", 10),
        ("b.png", "a dog lying down", 10),
        ("c.png", "sks_cat", 3),
        ("e.png", "dog", 2),
    ]
    assert [(r.folder.name, r.used) for r in dataset.reports] == [
        (tmp_path.name, []),  # of 2019_paris
        ("10_sks dog", ["a.png", "b.png"]),
        ("3_sks_cat", ["c.png"]),
        ("2_dog", ["e.png"]),
    ]
    assert Counter(e.path.name for e in turns(dataset.instances)) == {"a.png": 10, "b.png": 10, "c.png": 3}


def test_pictures_beside_kohyas_folders_are_used_as_well(tmp_path: Path) -> None:
    folder(tmp_path / "2_sks dog", "a.png")
    folder(tmp_path, "own.png")
    assert told(scanned(images=tmp_path, prompt="mine")) == [("own.png", "mine", 1), ("a.png", "sks dog", 2)]


def test_what_lies_beside_kohyas_folders_is_named(tmp_path: Path) -> None:
    """kohya reads no other folder there, and neither do we: but it is said."""
    folder(tmp_path / "10_sks dog", "a.png")
    folder(tmp_path / "10_sks dog" / "3_deeper", "x.png")
    folder(tmp_path / "no number", "b.png")
    folder(tmp_path / "class" / "1_dog", "e.png")
    folder(tmp_path / "masks", "a.png")
    (tmp_path / "notes.md").write_text("x", encoding="utf-8")
    data = {"images": tmp_path, "class_images": tmp_path / "class", "class_prompt": "a dog"}
    dataset = scanned(**data, masked_loss=True, masks=tmp_path / "masks")
    assert told(dataset) == [("a.png", "sks dog", 10), ("e.png", "dog", 1)]
    assert [(r.folder, r.used, r.other) for r in dataset.reports] == [
        (tmp_path, [], ["no number/", "notes.md"]),
        (tmp_path / "10_sks dog", ["a.png"], ["3_deeper/"]),
        (tmp_path / "class" / "1_dog", ["e.png"], []),
    ]
    folder(tmp_path, "own.png")
    beside = scanned(**data, prompt="mine").reports[0]
    assert (beside.used, beside.other) == (["own.png"], ["masks/", "no number/", "notes.md"])


def test_no_repeats_are_refused(tmp_path: Path) -> None:
    folder(tmp_path / "0_dog", "a.png")
    with pytest.raises(ConfigError, match="asks for 0 repeats"):
        scanned(images=tmp_path)


PRESET = """
name = "two"
[data]
prompt = "a photo of sks dog"
shuffle_tags = true
prior_weight = 0.5
[[dataset]]
images = "dogs"
repeats = 3
class_images = "class"
class_prompt = "a dog"
[[dataset]]
images = "cats"
prompt = "a photo of zxq cat"
weight = 0.25
shuffle_tags = false
resolution = 96
class_images = "class"
class_prompt = "a dog"
"""


def two(tmp: Path) -> TrainConfig:
    (tmp / "two.toml").write_text(PRESET, encoding="utf-8")
    folder(tmp / "dogs", "a.png", "b.png")
    folder(tmp / "cats", "c.png", size=(96, 64))
    folder(tmp / "class", "d.png")
    return presets.load(tmp / "two.toml")


def test_several_datasets_have_what_is_theirs_and_the_rest_of_data(tmp_path: Path) -> None:
    config = two(tmp_path)
    dogs, cats = config.datasets
    assert (dogs.images, dogs.prompt, dogs.shuffle_tags, dogs.repeats) == (
        tmp_path / "dogs",
        "a photo of sks dog",
        True,
        3,
    )
    assert (cats.prompt, cats.shuffle_tags, cats.weight, cats.resolution) == (
        "a photo of zxq cat",
        False,
        0.25,
        96,
    )
    dataset = scan(config.data, 64, datasets=config.datasets)
    assert [(e.caption, e.plan.bucket, e.source.weight) for e in dataset.examples] == [
        ("a photo of sks dog", (64, 64), 1.0),
        ("a photo of sks dog", (64, 64), 1.0),
        ("a photo of zxq cat", (112, 80), 0.25),
        ("a dog", (64, 64), 1.0),  # the class of both, once
    ]
    drawn = Counter(e.path.name for e in turns(dataset.instances))
    assert drawn == {"a.png": 3, "b.png": 3, "c.png": 1}
    feeder = Feeder(dataset, None, None, batch_size=2, seed=0)
    rows = [row for _ in range(70) for row in feeder.draw("instance")]
    shown = Counter(example.path.name for example, _, _ in rows)
    assert 50 <= shown["a.png"] <= 64
    assert 17 <= shown["c.png"] <= 23  # a third as often, alone in its bucket


def test_datasets_are_dumped_and_read_back_and_set(tmp_path: Path) -> None:
    config = two(tmp_path)
    copy = tmp_path / "copy.toml"
    copy.write_text(presets.dump(config), encoding="utf-8")
    assert presets.load(copy) == config
    changed = presets.load(copy, ["data.flip=true", "dataset.1.repeats=7"])
    assert [d.flip for d in changed.datasets] == [True, True]  # what a folder has from [data] follows it
    assert [d.repeats for d in changed.datasets] == [3, 7]
    with pytest.raises(ConfigError, match="there is no 2 among 2 such tables"):
        presets.load(copy, ["dataset.2.repeats=7"])
    with pytest.raises(ConfigError, match=r"no setting dataset.repeat\. Did you mean"):
        presets.load(copy, ["dataset.0.repeat=7"])


UNDONE = """
name = "two"
[data]
prompt = "a photo of sks dog"
trigger = "sks"
masked_loss = true
masks = "masks"
resolution = 96
class_images = "class"
class_prompt = "a dog"
[[dataset]]
images = "dogs"
[[dataset]]
images = "cats"
trigger = ""
masked_loss = false
masks = ""
resolution = ""
class_images = ""
class_prompt = ""
"""


def test_a_folder_takes_away_what_data_has(tmp_path: Path) -> None:
    (tmp_path / "two.toml").write_text(UNDONE, encoding="utf-8")
    folder(tmp_path / "dogs", "a.png")
    folder(tmp_path / "cats", "c.png")
    folder(tmp_path / "class", "d.png")
    folder(tmp_path / "masks", "a.png")
    config = presets.load(tmp_path / "two.toml")
    dogs, cats = config.datasets
    assert (dogs.masks, dogs.class_images, dogs.trigger) == (tmp_path / "masks", tmp_path / "class", "sks")
    for name in ("masks", "class_images", "class_prompt", "trigger", "resolution"):
        assert getattr(cats, name) is None
    assert cats.prompt == "a photo of sks dog"
    dataset = scan(config.data, 64, datasets=config.datasets)
    assert [(e.path.name, e.masked, e.plan.bucket) for e in dataset.examples] == [
        ("a.png", True, (96, 96)),
        ("c.png", False, (64, 64)),
        ("d.png", False, (96, 96)),
    ]
    copy = tmp_path / "copy.toml"
    copy.write_text(presets.dump(config), encoding="utf-8")
    assert presets.load(copy) == config
    again = presets.load(copy, ['dataset.0.trigger=""', "dataset.1.trigger="])
    assert [d.trigger for d in again.datasets] == [None, "sks"]  # no value at all: as [data] has it


@pytest.mark.parametrize(
    ("line", "instead", "says"),
    [
        ('masks = ""', "", r'dataset\.masks has no effect .* or set it to ""\.'),
        ('class_prompt = ""', 'class_prompt = " "', r"dataset\.class_prompt is empty"),
        ('class_images = ""', "", r"without dataset\.class_prompt"),
        ('class_prompt = ""', "", r'dataset\.class_prompt has no effect .* or set it to ""\.'),
        ('images = "cats"', 'images = ""', 'dataset.images = "" must be a path'),
    ],
)
def test_half_of_it_is_refused_with_what_else_to_take_away(
    tmp_path: Path, line: str, instead: str, says: str
) -> None:
    (tmp_path / "two.toml").write_text(UNDONE.replace(line, instead), encoding="utf-8")
    with pytest.raises(ConfigError, match=says):
        presets.load(tmp_path / "two.toml")


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"data": {"images": "x"}, "dataset": [{"images": "y"}]}, "leave one of them out"),
    ({"data": {"prompt": "x"}}, "data.images is missing. Folder with"),
    ({"dataset": [{"repeats": 2}]}, "The setting dataset.images is missing"),
    ({"dataset": [{"images": "y", "repeats": 0}]}, "dataset.repeats = 0 must be at least 1."),
    ({"dataset": [3]}, "must be a table"),
    ({"data": {"images": "x", "background": "clear"}}, "must be a colour"),
    ({"data": {"images": "x", "background": "#ffffff00"}}, "without transparency"),
    ({"data": {"images": "x", "masks": "m"}}, "data.masks has no effect"),
    ({"data": {"images": "x", "buckets": False, "bucket_min": 64}}, "data.bucket_min has no effect"),
    ({"data": {"images": "x", "tag_dropout": 1.5}}, "data.tag_dropout = 1.5 must be at most 1"),
    ({"data": {"images": "x", "more_resolutions": [100]}}, "must be a multiple of 8"),
    ({"dataset": [{"images": "y", "crop": "random"}]}, 'data.crop = "random" makes a new picture each time'),
]


@pytest.mark.parametrize(("table", "sentence"), WRONG, ids=[s[:30] for _, s in WRONG])
def test_what_is_wrong_is_said(table: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError) as problem:
        TrainConfig.model_validate({"name": "x", **table})
    assert sentence in str(problem.value)


def test_a_missing_class_folder_is_named(tmp_path: Path) -> None:
    config = two(tmp_path)
    (tmp_path / "class" / "d.png").unlink()
    (tmp_path / "class").rmdir()
    with pytest.raises(ConfigError, match=r"dataset.class_images must be a folder .*class does not exist"):
        scan(config.data, 64, datasets=config.datasets)


def test_every_setting_of_a_folder_has_a_description() -> None:
    for key, field in DatasetSettings.model_fields.items():
        assert (field.description or "").endswith((".", "?")), key
