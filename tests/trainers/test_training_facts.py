"""What a finished file says of its training, and what is said before the first step of who will not read it."""

from __future__ import annotations

import base64
import io
import json
import time
from datetime import datetime
from pathlib import Path

from PIL import Image

from lora_core import read_adapter
from lora_core.safe_files import tensors_sha256
from tests.small_models import save_ldm_single_file, small_pipeline
from tests.trainers.runs import SIDE, Recorder, base_folder, config, pictures
from trainers import presets
from trainers.dreambooth import train
from trainers.events import Finished, Note, Step


def test_metadata_tells_the_training_and_no_folder(tmp_path: Path) -> None:
    base = base_folder(tmp_path / "base")
    pictures(tmp_path / "images", 3, caption="a zxq cat")
    began = time.time()
    save = {"author": "Ann", "description": "Two\nlines."}
    preview = {"every": 3, "prompts": ["a zxq cat"], "steps": 1}
    train_more = {"gradient_accumulation": 2, "text_encoder_learning_rate": 5e-4}
    settings = config(tmp_path, base, save=save, preview=preview, train=train_more)
    metadata = read_adapter(train(settings)).metadata
    expected = {
        "ss_num_train_images": "3",
        "ss_num_reg_images": "0",
        "ss_network_dim": "4",
        "ss_base_model_version": "sd_v1",
        "ss_learning_rate": "0.001",
        "ss_unet_lr": "0.001",
        "ss_text_encoder_lr": "0.0005",
        "ss_steps": "6",
        "ss_max_train_steps": "6",
        "ss_num_batches_per_epoch": "2",
        "ss_epoch": "6",  # 6 steps of 2 batches, 2 batches an epoch
        "ss_num_epochs": "6",
        "ss_batch_size_per_device": "2",
        "ss_total_batch_size": "4",
        "ss_gradient_accumulation_steps": "2",
        "ss_gradient_checkpointing": "False",
        "ss_mixed_precision": "no",
        "ss_seed": "3",
        "ss_resolution": f"({SIDE}, {SIDE})",
        "ss_clip_skip": "None",
        "ss_noise_offset": "None",
        "ss_min_snr_gamma": "None",
        "ss_lr_scheduler": "constant",
        "ss_output_name": "small",
        "ss_sd_model_name": "base",
        "modelspec.trigger_phrase": "a zxq cat",
        "modelspec.author": "Ann",
        "modelspec.description": "Two\nlines.",
    }
    assert {key: metadata[key] for key in expected} == expected
    assert float(metadata["ss_network_alpha"]) == 6
    started, finished = (float(metadata[f"ss_training_{which}_at"]) for which in ("started", "finished"))
    assert began - 1 <= started < finished <= time.time()
    assert abs(datetime.fromisoformat(metadata["modelspec.date"]).timestamp() - finished) < 2
    assert int(metadata["ss_session_id"]) > 0
    told = {f"a zxq cat {letter}": 1 for letter in "abc"}
    assert json.loads(metadata["ss_tag_frequency"]) == {"images": told}
    assert json.loads(metadata["ss_bucket_info"]) == {
        "buckets": {"0": {"resolution": [SIDE, SIDE], "count": 3}},
        "mean_img_ar_error": 0.0,
    }
    assert json.loads(metadata["ss_dataset_dirs"]) == {"images": {"n_repeats": 1, "img_count": 3}}
    (tmp_path / "again.toml").write_text(metadata["loom.preset"], encoding="utf-8")
    again = presets.load(tmp_path / "again.toml")  # folders are cut to their names, all else is as it was
    for table in ("lora", "train", "save", "preview", "report"):
        assert getattr(again, table) == getattr(settings, table)
    assert (again.seed, again.data.prompt, again.data.images.name) == (3, "a zxq cat", "images")
    assert metadata["modelspec.thumbnail"].startswith("data:image/jpeg;base64,")
    assert not [k for k, v in metadata.items() if str(tmp_path) in v]


def test_the_finished_file_shows_the_report_and_keeps_its_hash(tmp_path: Path) -> None:
    base = base_folder(tmp_path / "base")
    pictures(tmp_path / "images", 2)
    shown = {"subject_prompts": ["a zxq cat"], "seeds": [0], "steps": 1}
    recorder = Recorder()
    lora = train(config(tmp_path, base, report=shown, train={"steps": 1}), listeners=[recorder])
    metadata = read_adapter(lora).metadata
    data = base64.b64decode(metadata["modelspec.thumbnail"].partition(",")[2])
    assert Image.open(io.BytesIO(data)).size == (SIDE, SIDE)
    finished = next(e for e in recorder.seen if isinstance(e, Finished))
    assert tensors_sha256(lora) == metadata["sshs_model_hash"] == finished.sha256
    plain = train(config(tmp_path, base, report=shown, train={"steps": 1}, save={"thumbnail": False}))
    assert "modelspec.thumbnail" not in read_adapter(plain).metadata


def test_what_other_programs_will_not_read_is_said_before_the_first_step(tmp_path: Path) -> None:
    base = base_folder(tmp_path / "base")
    pictures(tmp_path / "images", 1)
    for change, said in (
        ({}, []),
        ({"lora": {"variant": "dora"}}, ["layers are DoRA along outputs"]),
        ({"save": {"spelling": "diffusers"}}, ["The diffusers spelling is for diffusers"]),
    ):
        recorder = Recorder()
        train(config(tmp_path, base, train={"steps": 1}, **change), listeners=[recorder])
        first = next(i for i, e in enumerate(recorder.seen) if isinstance(e, Step))
        notes = [str(e) for e in recorder.seen[:first] if isinstance(e, Note) and "finished file" in str(e)]
        assert len(notes) == len(said), notes
        assert all(part in note for part, note in zip(said, notes, strict=True))


def test_a_silent_base_is_tried_out_and_the_file_says_what_it_was_trained_as(tmp_path: Path) -> None:
    """SD 2.x in one file; trained the other way, it says the other thing."""
    base = save_ldm_single_file(small_pipeline("sd2", clip_vocabulary=True), tmp_path / "sd2.safetensors")
    pictures(tmp_path / "images", 1)
    said = {}
    for prediction in ("auto", "epsilon"):
        recorder = Recorder()
        settings = config(tmp_path, base, train={"steps": 1}).model_copy(update={"prediction": prediction})
        metadata = read_adapter(train(settings, listeners=[recorder])).metadata
        said[prediction] = [metadata[k] for k in ("ss_base_model_version", "modelspec.prediction_type")]
        notes = [e.text for e in recorder.seen if isinstance(e, Note) and "predicts" in e.text]
        assert len(notes) == (prediction == "auto")
    assert said == {"auto": ["sd_v2_v", "v"], "epsilon": ["sd_v2", "epsilon"]}
