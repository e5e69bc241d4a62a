"""Whole runs over everything a dataset can have at once: cached is uncached, resumed is straight, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from lora_core import read_adapter
from lora_core.errors import Stopped
from lora_core.safe_files import read_tensors
from tests.trainers.runs import Recorder, base_folder, config, events_in, losses_of, pictures, refusal
from trainers import presets
from trainers.config import TrainConfig
from trainers.dreambooth import train
from trainers.kept_tensors import KeptTensors

SIZES = [(64, 64), (96, 64), (64, 112), (64, 64), (96, 64)]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return base_folder(tmp_path_factory.mktemp("fed") / "base")


def photos(folder: Path) -> Path:
    """Three shapes, two masks, captions with lines, tags and wildcards."""
    folder.mkdir()
    rng = np.random.default_rng(1)
    for i, (width, height) in enumerate(SIZES):
        Image.fromarray(rng.integers(0, 255, (height, width, 3), np.uint8)).save(folder / f"{i}.png")
    Image.fromarray(rng.integers(0, 255, (64, 64), np.uint8)).save(folder / "0.mask.png")
    Image.fromarray(rng.integers(0, 255, (64, 96), np.uint8)).save(folder / "1.mask.png")
    (folder / "1.txt").write_text("a {red|blue} cat, smile\na cat, {day|night}, forest\n", encoding="utf-8")
    (folder / "2.txt").write_text("a cat, tall, thin\n", encoding="utf-8")
    return folder


def everything(tmp: Path, base: Path, data: dict[str, Any], **tables: dict[str, Any]) -> TrainConfig:
    folder = tmp / "everything"
    if not folder.exists():
        photos(folder)
        pictures(tmp / "class", 3, seed=1)
    return config(
        tmp,
        base,
        data={
            "images": folder,
            "class_images": tmp / "class",
            "class_prompt": "a cat",
            "flip": True,
            "masked_loss": True,
            "trigger": "zxq",
            "caption_dropout": 0.2,
            "prior_weight": 0.5,
            **data,
        },
        **{"lora": {"dropout": 0.1}, **tables},
    )


TAGS = {"shuffle_tags": True, "keep_tokens": 1, "tag_dropout": 0.2}


@pytest.mark.parametrize(
    ("data", "text"),
    [
        ({}, {"text_encoder_learning_rate": 0.0}),
        (TAGS, {"text_encoder_learning_rate": 0.0}),
        (TAGS, {}),
        ({}, {"text_encoder_stop": 3.0}),
    ],
    ids=["counted", "endless", "trained", "stopped"],
)
def test_a_cached_run_is_the_uncached_run_bit_for_bit(
    tmp_path: Path, base: Path, data: dict[str, Any], text: dict[str, Any]
) -> None:
    common = {"steps": 8, **text}
    cached = losses_of(everything(tmp_path, base, data, train=common))
    uncached = {**common, "cache_latents": False, "cache_text": False}
    assert losses_of(everything(tmp_path, base, data, train=uncached)) == cached
    again = everything(tmp_path, base, data, train=common)
    assert losses_of(again) == cached
    assert len(set(cached)) == 8


@pytest.mark.parametrize("kept", [True, False])
def test_resumed_in_mid_epoch_with_pictures_waiting(tmp_path: Path, base: Path, kept: bool) -> None:
    """Three shapes in batches of three: at step 4 some wait for others of their shape. Where latents are not kept, the
    pictures of the next step are being opened when the run is saved."""
    data = TAGS if kept else {**TAGS, "crop": "random"}
    steps = {"steps": 9, "batch_size": 3, "gradient_accumulation": 2, "cache_latents": kept}
    settings = everything(tmp_path, base, data, train=steps)
    straight = Recorder()
    whole = train(settings, listeners=[straight])
    first = Recorder(stop_at=4)
    with pytest.raises(Stopped):
        train(settings, stop=first.stop, listeners=[first])
    second = Recorder()
    torch.manual_seed(999)
    resumed = train(settings, resume=tmp_path / "runs" / "small-2", listeners=[second])
    assert {**first.losses, **second.losses} == straight.losses
    a, b = read_tensors(whole), read_tensors(resumed)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_with_square_pictures_buckets_change_nothing(tmp_path: Path, base: Path) -> None:
    pictures(tmp_path / "images", 3, side=80)
    plain = losses_of(config(tmp_path, base, data={"buckets": False}))
    assert losses_of(config(tmp_path, base)) == plain


def test_a_mask_changes_what_is_learnt_and_a_white_one_does_not(tmp_path: Path, base: Path) -> None:
    pictures(tmp_path / "images", 2)
    plain = losses_of(config(tmp_path, base))
    masked = {"masked_loss": True, "masks": tmp_path / "masks"}
    (tmp_path / "masks").mkdir()
    for i in range(2):
        Image.new("L", (64, 64), 255).save(tmp_path / "masks" / f"{i}.png")
    assert losses_of(config(tmp_path, base, data=masked)) == plain
    for i in range(2):
        Image.new("L", (64, 64), 0).save(tmp_path / "masks" / f"{i}.png")
        half = Image.new("L", (64, 64), 0)
        half.paste(255, (0, 0, 32, 64))
        half.save(tmp_path / "masks" / f"{i}.png")
    assert losses_of(config(tmp_path, base, data=masked)) != plain
    floored = losses_of(config(tmp_path, base, data={**masked, "mask_floor": 1.0}))
    assert floored == pytest.approx(plain, rel=1e-6)


def test_several_folders_train_and_the_file_tells(tmp_path: Path, base: Path) -> None:
    """Kohya's folder among them; repeats, tags and buckets in the metadata, and no folder of the disk."""
    pictures(tmp_path / "kohya" / "3_zxq dog", 2)
    photos(tmp_path / "cats")
    table = {
        **config(tmp_path, base, train={"steps": 2}).model_dump(exclude={"data", "dataset"}),
        "data": {"resolution": 64, "prompt": "a wqx cat"},
        "dataset": [
            {"images": tmp_path / "kohya"},
            {"images": tmp_path / "cats", "weight": 0.5, "flip": True},
        ],
    }
    settings = TrainConfig.model_validate(table)
    lora = train(settings)
    metadata = read_adapter(lora).metadata
    assert metadata["ss_num_train_images"] == "11"  # two pictures three times, and five
    assert metadata["ss_dataset_dirs"] == (
        '{"3_zxq dog": {"n_repeats": 3, "img_count": 2}, "cats": {"n_repeats": 1, "img_count": 5}}'
    )
    assert '"3_zxq dog": {"zxq dog": 2}' in metadata["ss_tag_frequency"]
    assert '"tall": 1' in metadata["ss_tag_frequency"]
    assert '{"resolution": [80, 48], "count": 2}' in metadata["ss_bucket_info"]
    assert not [k for k, v in metadata.items() if str(tmp_path) in v]
    assert presets.load(lora.parent / "preset.toml") == settings


def test_sdxl_is_told_the_bucket(tmp_path: Path) -> None:
    base = base_folder(tmp_path / "base", "sdxl")
    photos(tmp_path / "images")
    settings = config(
        tmp_path, base, data={"resolution": 128, "bucket_step": 32}, train={"steps": 4, "batch_size": 2}
    )
    assert read_adapter(train(settings)).family == "sdxl"
    frozen = settings.model_copy(
        update={"train": settings.train.model_copy(update={"text_encoder_learning_rate": 0.0})}
    )
    run = train(frozen).parent
    notes = " ".join(e.get("text", "") for e in events_in(run))
    assert "Prompts (text_encoder): 6 encoded" in notes
    assert "Prompts (text_encoder_2): 6 encoded" in notes


# --- what goes wrong -------------------------------------------------------------------------------------------


def test_nan_and_damage_in_the_cache_are_found_named_and_made_anew(tmp_path: Path, base: Path) -> None:
    pictures(tmp_path / "images", 3)
    settings = config(tmp_path, base, train={"steps": 3, "text_encoder_learning_rate": 0.0})
    run = train(settings).parent
    whole = {e["step"]: e["loss"] for e in events_in(run) if e["event"] == "Step"}
    files = KeptTensors(run / "cache")
    mine = sorted((run / "cache").glob("*.safetensors"))
    assert len(mine) == 4
    for path in mine:  # of every kind
        poisoned = {n: t.fill_(float("nan")) for n, t in read_tensors(path).items()}
        files.save(path.stem, poisoned)
    for path in (run / "checkpoints").glob("*"):
        path.unlink()
    (run / "small.safetensors").unlink()
    recorder = Recorder()
    train(settings, resume=run, listeners=[recorder])
    assert recorder.losses == whole
    notes = [e["text"] for e in events_in(run) if e["event"] == "Note"]
    for name in ("0.png", "1.png", "2.png", "a zxq cat"):
        assert any(f"what was kept of {name} was damaged or not finite" in note for note in notes)


def test_a_picture_of_nan_is_refused_by_name(tmp_path: Path, base: Path) -> None:
    pictures(tmp_path / "images", 2)
    values = np.ones((64, 64), np.float32)
    values[3, 4] = np.nan
    Image.fromarray(values).save(tmp_path / "images" / "depth.tif")
    said = refusal(config(tmp_path, base, data={"bad_images": "refuse"}))
    assert "depth.tif: its pixels are NaN or infinite in places; save it as PNG or JPEG" in said


def test_a_missing_class_folder_is_refused_before_anything_is_trained(tmp_path: Path, base: Path) -> None:
    pictures(tmp_path / "images", 2)
    (tmp_path / "class").write_text("no folder", encoding="utf-8")
    wanted = {"class_images": tmp_path / "class", "class_prompt": "a cat"}
    said = refusal(config(tmp_path, base, data=wanted))
    assert "data.class_images must be a folder with pictures" in said
    assert "is a file" in said
    assert "cannot be made" in refusal(config(tmp_path, base, data={**wanted, "class_count": 2}))
    (tmp_path / "class").unlink()
    assert "class does not exist" in refusal(config(tmp_path, base, data=wanted))
    assert not (tmp_path / "class").exists()
