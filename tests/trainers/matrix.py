"""Settings of all kinds, for what must hold whatever a run is set to: a resumed run is the straight one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tests.trainers.runs import base_folder, config, pictures
from trainers.config import TrainConfig

Tables = dict[str, dict[str, Any]]
CLASS = {"class_images": "class", "class_prompt": "a cat", "prior_weight": 0.7}
MODEL = {"class_from": "model", "class_prompt": "a cat"}
TAGS = {"shuffle_tags": True, "keep_tokens": 1, "tag_dropout": 0.3, "caption_dropout": 0.2}
WORDS = {"new_tokens": {"<fox>": "cat", "<look>": 2}}
SAYING = {"prompt": "a <fox> in <look>", "captions": False}
RANDOM = {"images": "odd", "crop": "random", "flip": True, "buckets": False}
SHOWN: Tables = {
    "preview": {"every": 2, "prompts": ["a cat"], "steps": 1},
    "validation": {"share": 0.3, "every": 2},
    "report": {"unrelated_prompts": ["a dog"], "seeds": [0], "steps": 1},
}
NOISE = {"noise_offset": 0.1, "pyramid_noise": 0.3, "input_perturbation": 0.1, "loss_weighting": "min_snr"}

ALONE: dict[str, Tables] = {
    "accumulation": {"train": {"gradient_accumulation": 2}},
    "average": {"train": {"ema_decay": 0.9}, **SHOWN},
    "dora": {"lora": {"variant": "dora"}},
    "lora+": {"train": {"lora_plus_ratio": 4.0}},
    "noise": {"train": NOISE},
    "tags": {"data": TAGS},
    "texts not kept": {"train": {"cache_text": False, "text_encoder_learning_rate": 0.0}},
    "class": {"data": CLASS},
    "class from the model": {"data": MODEL, **SHOWN},
    "shapes and masks": {
        "data": {"images": "odd", "masked_loss": True, "flip": True},
        "train": {"batch_size": 2},
    },
    "resolutions": {"data": {"images": "odd", "more_resolutions": [96], "upscale": False}},
    "random crops": {"data": RANDOM, "train": {"cache_latents": False}},
    "encoder has stopped": {"train": {"text_encoder_stop": 0.25}},
    "encoder will stop": {"train": {"text_encoder_stop": 6.0}},
    "words": {"lora": WORDS, "data": SAYING},
    "words until the encoder stops": {"lora": WORDS, "data": SAYING, "train": {"text_encoder_stop": 0.5}},
    "dropout": {"lora": {"dropout": 0.2}},
    "channels last": {"train": {"channels_last": True}},
    "checkpointed": {"lora": {"dropout": 0.2}, "train": {"gradient_checkpointing": True}},
    "bf16": {"train": {"base_dtype": "bf16"}},
    "fp8": {"train": {"quantize": "fp8"}},
    "loha": {"lora": {"kind": "loha"}},
    "lokr": {"lora": {"kind": "lokr", "decompose_both": True, "variant": "dora"}},
    "pissa": {"lora": {"init": "pissa"}},
    "pissa_niter_4": {"lora": {"init": "pissa_niter_4"}},
    "olora": {"lora": {"init": "olora"}},
    "random": {"lora": {"init": "random"}},
    "whole modules": {"lora": {"bias": "all", "modules_to_save": ["conv_in"]}},
    "convolutions": {"lora": {"targets": ["attention", "feed-forward", "conv"], "dropout": 0.1}},
    "schedule": {"train": {"schedule": "cosine", "warmup_steps": 5}},
    "replicated": {"lora": {"text_encoder_layer_replication": [[0, 2], [1, 2]]}},
}
TOGETHER: dict[str, Tables] = {
    "a": {
        "lora": {"variant": "dora", "dropout": 0.1},
        "data": {**TAGS, **CLASS, "images": "odd", "masked_loss": True, "flip": True},
        "train": {"batch_size": 2, "gradient_accumulation": 2, "ema_decay": 0.9, "text_encoder_stop": 0.25, **NOISE},
    },
    "b": {
        "lora": {**WORDS, "dropout": 0.1, "bias": "all"},
        "data": {**RANDOM, **MODEL, **SAYING},
        "train": {"cache_latents": False, "channels_last": True, "schedule": "cosine", "text_encoder_stop": 6.0},
        **SHOWN,
    },
    "c": {
        "lora": {"kind": "lokr", "variant": "dora", "targets": ["attention", "conv"]},
        "data": {"images": "odd", "more_resolutions": [96]},
        "train": {"base_dtype": "bf16", "gradient_checkpointing": True, "text_encoder_learning_rate": 0.0},
    },
}  # fmt: skip


def make_place(place: Path) -> Path:
    """A base, pictures with captions, pictures of the class, and pictures of three shapes, one with a mask."""
    base_folder(place / "base")
    pictures(place / "images", 5, caption="a zxq cat, smile, {red|blue}, tall")
    pictures(place / "class", 3, seed=1)
    (place / "odd").mkdir()
    rng = np.random.default_rng(1)
    for i, (width, height) in enumerate([(64, 64), (96, 64), (64, 112), (64, 64), (96, 64)]):
        Image.fromarray(rng.integers(0, 255, (height, width, 3), np.uint8)).save(place / "odd" / f"{i}.png")
    Image.fromarray(rng.integers(0, 255, (64, 64), np.uint8)).save(place / "odd" / "0.mask.png")
    return place


def matrix_config(tmp: Path, place: Path, tables: Tables, **train: Any) -> TrainConfig:
    """Runs in `tmp`, of what lies in `place`; `train`: where the tables say nothing of it."""
    data = {"images": "images", **tables.get("data", {})}
    data |= {name: place / data[name] for name in ("images", "class_images") if name in data}
    train = {"batch_size": 1, **train, **tables.get("train", {})}
    return config(tmp, place / "base", **{**tables, "data": data, "train": train})
