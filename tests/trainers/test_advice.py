"""Warnings of what makes a LoRA useless: each is said where it holds, with what to change, and only there."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from tests.small_models import small_pipeline
from tests.trainers.runs import config, pictures
from trainers import advice, advice_data
from trainers.config import TrainConfig
from trainers.dataset import Dataset
from trainers.held_out import look_for
from trainers.largest import largest
from trainers.scan import scan

GOOD: dict[str, Any] = {
    "train": {"steps": 300, "learning_rate": 1e-4},
    "data": {"prompt": "a photo of a cat"},
}


@pytest.fixture(scope="module")
def words() -> Any:
    return small_pipeline("sd1")


@pytest.fixture(scope="module")
def clip() -> Any:
    """With CLIP's own vocabulary."""
    return small_pipeline("sd1", clip_vocabulary=True)


def read(settings: TrainConfig) -> Dataset:
    return scan(settings.data, settings.data.resolution or 64, datasets=settings.datasets)


def about(settings: TrainConfig, pipe: Any, resolution: int = 64) -> list[str]:
    dataset, held_out = look_for(settings, read(settings))
    return [
        *advice.about_settings(settings),
        *advice.about_size(dataset, resolution),
        *advice.about_batches(settings, largest(dataset, settings)),
        *advice_data.about_pictures(settings, dataset),
        *advice_data.about_twins(settings, dataset, held_out),
        *advice_data.about_captions(dataset),
        *advice_data.about_words(settings, dataset, pipe),
    ]


def with_good(**tables: dict[str, Any]) -> dict[str, Any]:
    return {name: {**GOOD.get(name, {}), **tables.get(name, {})} for name in GOOD.keys() | tables.keys()}


# --- settings -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("table", "setting", "value", "says", "remedy"),
    [
        ("lora", "alpha", 1.0, None, ""),  # at rank 4
        ("lora", "rank", 128, "lora.alpha = 1 at lora.rank = 128", "Set lora.alpha to 128"),
        ("train", "learning_rate", 1e-2, "train.learning_rate = 0.01 is far above", "1e-4 is usual"),
        ("train", "learning_rate", 1e-8, "train.learning_rate = 1e-08 is far below", "1e-4 is usual"),
        ("train", "text_encoder_learning_rate", 0.1, "text_encoder_learning_rate = 0.1 is far above", "half of it"),
        ("train", "rates", {"unet.down.1": 0.1}, 'train.rates."unet.down.1" = 0.1 is far above', "1e-4"),
        ("train", "steps", 6, "seen 3.0 times: too seldom", "Raise train.steps to 100"),
        ("train", "steps", 90_000, "by heart", "lower train.steps"),
        ("train", "batch_size", 5, "train.batch_size = 5 is more than the 4 pictures", "Lower it to 4"),
        ("data", "captions", False, "3.txt is not read, since data.captions = false", "Set it to true"),
        ("data", "caption_dropout", 0.9, "leaves that share of the prompts empty", "0.05 to 0.1"),
        ("data", "prior_weight", 0.5, "data.prior_weight = 0.5 has no effect", "Set data.class_prompt"),
        ("data", "resolution", 256, "trained at 256 pixels", "Set data.resolution = 64"),
        ("data", "class_prompt", "a photo of a cat", "opposite ways", "Put a word of its own"),
    ],
)  # fmt: skip
def test_a_setting(
    tmp_path: Path, words: Any, table: str, setting: str, value: Any, says: str | None, remedy: str
) -> None:
    pictures(tmp_path / "images", 4, side=256)
    (tmp_path / "images" / "3.txt").write_text("another cat\n")
    changes = with_good()
    if setting == "rank":
        changes["lora"] = {"alpha": 1.0}
    if setting == "class_prompt":
        pictures(tmp_path / "class", 1, seed=9)
        changes["data"]["class_images"] = tmp_path / "class"
    changes.setdefault(table, {})[setting] = value
    found = about(config(tmp_path, "demo", **changes), words)
    assert len(found) == (says is not None), found
    if says is not None:
        assert says in found[0]
        assert remedy in found[0]


def test_what_is_usual_is_not_warned_of(tmp_path: Path, words: Any) -> None:
    pictures(tmp_path / "images", 4)
    for tables in (
        {},
        {"lora": {"rank": 32, "alpha": 1.0}},
        {"lora": {"rank": 128, "alpha": 1.0, "rank_stabilized": True}},
        {"lora": {"rank": 128, "alpha": 1.0, "kind": "lokr"}},
        {"train": {"learning_rate": 1.5e-3}, "data": {"caption_dropout": 0.1}},
        {"data": {"class_from": "model", "class_prompt": "a cat", "prior_weight": 0.5}},
    ):
        assert about(config(tmp_path, "demo", **with_good(**tables)), words) == []


def test_a_large_set_need_not_come_often(tmp_path: Path, words: Any) -> None:
    """3 times each of 1,000 pictures is a training; not to see all of them is none."""
    pictures(tmp_path / "images", 1)
    dataset = read(config(tmp_path, "demo", **GOOD))
    many = tuple(
        type(e)(e.path.with_name(f"{i}.png"), e.lines, e.original_size, e.plan, e.source)
        for e in dataset.instances
        for i in range(1000)
    )
    large = Dataset(many, (), dataset.reports, 64)

    def said(steps: int) -> list[str]:
        settings = config(tmp_path, "demo", **with_good(train={"steps": steps, "batch_size": 2}))
        return [s for s in advice_data.about_pictures(settings, large) if "seldom" in s]

    assert said(1500) == []
    assert len(said(400)) == 1


def test_sdxls_vae_in_half_precision() -> None:
    vae = small_pipeline("sdxl").vae
    assert not list(advice.about_vae("sdxl", vae))
    vae.to(torch.float16)
    assert not list(advice.about_vae("sdxl", vae))  # asks for fp32 itself, and gets it
    vae.register_to_config(force_upcast=False)
    (said,) = advice.about_vae("sdxl", vae)
    assert 'Set train.base_dtype = "bf16"' in said.replace("set", "Set")
    assert not list(advice.about_vae("sd1", vae))


# --- pictures -------------------------------------------------------------------------------------------------


def test_a_picture_alone_in_its_bucket_or_in_the_folder(tmp_path: Path, words: Any) -> None:
    pictures(tmp_path / "images", 3)
    Image.new("RGB", (128, 64)).save(tmp_path / "images" / "wide.png")
    (said,) = about(config(tmp_path, "demo", **GOOD), words)
    assert "wide.png is the only picture of its shape" in said
    assert "data.buckets = false" in said
    assert about(config(tmp_path, "demo", **with_good(data={"buckets": False})), words) == []
    pictures(tmp_path / "one" / "images", 1)
    (said,) = about(config(tmp_path / "one", "demo", **GOOD), words)
    assert "one picture alone" in said
    assert "Four or more" in said


def test_batches_that_cannot_be_filled(tmp_path: Path, words: Any) -> None:
    (tmp_path / "images").mkdir()
    for i, shape in enumerate([(64, 64), (128, 64), (64, 128), (96, 64)] * 2):
        Image.effect_noise(shape, 50 + i).convert("RGB").save(tmp_path / "images" / f"{i}.png")
    settings = config(tmp_path, "demo", **with_good(train={"batch_size": 8}))
    (said,) = about(settings, words)
    assert "and not train.batch_size = 8" in said
    assert "data.buckets = false" in said
    assert about(config(tmp_path, "demo", **GOOD), words) == []  # batches of two


def test_pictures_that_are_mostly_too_small(tmp_path: Path, words: Any) -> None:
    pictures(tmp_path / "images", 4, side=32)
    (said,) = about(config(tmp_path, "demo", **GOOD), words)
    assert "4 of 4 pictures are enlarged more than 1.5 times" in said
    assert "data.upscale = false" in said
    assert about(config(tmp_path, "demo", **with_good(data={"upscale": False})), words) == []


def test_one_picture_twice(tmp_path: Path, words: Any) -> None:
    """To learn from, and to be judged by."""
    pictures(tmp_path / "images", 4)
    pictures(tmp_path / "judge", 2, seed=7)
    tables = with_good(
        validation={"images": tmp_path / "judge"},
        report={"judge": tmp_path / "judge", "subject_prompts": ["a photo of a cat"]},
    )
    assert about(config(tmp_path, "demo", **tables), words) == []
    shutil.copy(tmp_path / "images" / "1.png", tmp_path / "judge" / "view.png")
    (said,) = about(config(tmp_path, "demo", **tables), words)
    assert "1.png is trained on and judged by" in said
    shutil.copy(tmp_path / "images" / "0.png", tmp_path / "images" / "again.png")
    twice, _ = about(config(tmp_path, "demo", **tables), words)
    assert "0.png, again.png are one picture: it counts 2 times. Take out" in twice


def test_a_picture_to_learn_in_the_class(tmp_path: Path, words: Any) -> None:
    pictures(tmp_path / "images", 4)
    pictures(tmp_path / "class", 4, seed=7)
    tables = with_good(data={"class_images": tmp_path / "class", "class_prompt": "a cat"})
    assert about(config(tmp_path, "demo", **tables), words) == []
    shutil.copy(tmp_path / "images" / "1.png", tmp_path / "class")
    (said,) = about(config(tmp_path, "demo", **tables), words)
    assert "1.png is a picture to learn and one of the class" in said


# --- captions that are not read -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("files", "says", "remedy"),
    [
        ({"0.txt": "a cat"}, None, ""),
        ({"0.txt": "a cat", "0.caption": "a cat"}, None, ""),
        ({"0.txt": "a cat", "0.caption": "a dog"}, "0.caption is not read, since 0.txt comes first", "Keep"),
        ({"0.txt": b"\xff\xfe\x00"}, "0.txt is not UTF-8", "save it as UTF-8"),
        ({"0.tags": "cat"}, "0.tags is not read", "Rename"),
        ({"0.png.txt": "a cat", "1.tags": "cat"}, "0.png.txt and 1 more are not read", "Rename"),
        ({"0.txt": "a cat", "0.tags": "cat"}, None, ""),  # it has one that is read
        ({"0.json": "{}", "0.xmp": "<x/>"}, None, ""),  # a camera's
        ({"metadata.jsonl": "{}"}, "metadata.jsonl in images is not read", "one beside each picture"),
        ({"00.txt": "a cat"}, "00.txt is read by no picture, and 0.png and 3 more have no caption", "the same name"),
    ],
)  # fmt: skip
def test_a_caption_that_nobody_reads(
    tmp_path: Path, words: Any, files: dict[str, str | bytes], says: str | None, remedy: str
) -> None:
    pictures(tmp_path / "images", 4)
    for name, content in files.items():
        (tmp_path / "images" / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    found = about(config(tmp_path, "demo", **GOOD), words)
    assert len(found) == (says is not None), found
    if says is not None:
        assert says in found[0]
        assert remedy in found[0]


# --- words ----------------------------------------------------------------------------------------------------


def test_a_word_that_a_frozen_encoder_does_not_know(tmp_path: Path, words: Any) -> None:
    pictures(tmp_path / "images", 4)
    frozen = {**GOOD["train"], "text_encoder_learning_rate": 0.0}
    for data in ({"prompt": "a zxqwv cat"}, {"prompt": "a cat", "trigger": "zxqwv"}):
        (said,) = about(config(tmp_path, "demo", train=frozen, data=data), words)
        assert '"zxqwv" is in every caption' in said
        assert "Raise that to 5e-5" in said
        assert "lora.new_tokens" in said
        assert about(config(tmp_path, "demo", train=GOOD["train"], data=data), words) == []
        new = {"new_tokens": {"zxqwv": "cat"}}
        assert about(config(tmp_path, "demo", train=frozen, data=data, lora=new), words) == []


@pytest.mark.parametrize("word", ["sks", "zxqwv", "ohwx"])
def test_a_word_that_previews_ask_for_and_no_caption_has(tmp_path: Path, clip: Any, word: str) -> None:
    pictures(tmp_path / "images", 4, caption="a photo of a dog")
    look = {"every": 100, "prompts": [f"a photo of {word} dog on a beach", f"{word} dog, watercolor"]}
    said = about(config(tmp_path, "demo", **with_good(preview=look)), clip)
    assert len(said) == 1
    assert f'"{word}" is in every prompt of the previews or the report, and in no caption' in said[0]
    assert f'Set data.trigger = "{word}"' in said[0]
    assert about(config(tmp_path, "demo", **with_good(preview=look, data={"trigger": word})), clip) == []


def test_usual_words_of_previews_need_not_be_in_captions(tmp_path: Path, clip: Any) -> None:
    pictures(tmp_path / "images", 4, caption="sks")
    for prompt in ("portrait of a corgi wearing sunglasses, sks", "an astronaut in watercolor style, by sks"):
        settings = config(tmp_path, "demo", **with_good(preview={"every": 100, "prompts": [prompt]}))
        assert about(settings, clip) == []
