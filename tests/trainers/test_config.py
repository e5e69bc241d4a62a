"""TrainConfig refuses contradictions and mistakes, each with a sentence that says what to do."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import ValidationError

from lora_core.config import BIASES, INITS, KINDS, VARIANTS
from lora_core.errors import ConfigError
from lora_core.targets import find_targets
from tests.small_models import small_pipeline
from trainers.config import LoraSettings, TrainConfig, TrainSettings
from trainers.config_data import DatasetSettings
from trainers.diffusion import WEIGHTINGS
from trainers.setting_names import COUNTERPARTS


def config(**changes: Any) -> TrainConfig:
    tables: dict[str, Any] = {"name": "dog", "data": {"images": "photos", "prompt": "a photo of sks dog"}}
    for key, value in changes.items():
        tables[key] = {**tables.get(key, {}), **value} if isinstance(value, dict) else value
    return TrainConfig(**tables)


def test_the_least_config_is_complete() -> None:
    made = config()
    assert (made.base, made.seed, made.train.batch_size) == ("demo", 0, 1)
    assert (made.train.learning_rate, made.train.weight_decay, made.train.max_grad_norm) == (1e-4, 1e-2, 1.0)
    assert made.data.images == Path.cwd() / "photos"
    assert made.output == Path.cwd() / "runs"
    assert not made.data.has_class
    assert made.train.trains_text_encoder


def test_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        config().train.steps = 3  # type: ignore[misc]


WRONG = [
    ({"data": {"class_count": 100}}, "data.class_prompt"),
    ({"data": {"class_images": "c"}}, "data.class_prompt"),
    ({"data": {"class_prompt": "a dog"}}, "no effect without class pictures"),
    ({"data": {"class_prompt": "a", "class_count": 1, "prior_weight": 0.0}}, "data.prior_weight = 0"),
    ({"data": {"class_prompt": "a", "class_images": "photos"}}, "one folder"),
    ({"data": {"prompt": None, "captions": False}}, "would have no words"),
    ({"data": {"prompt": "  "}}, "data.prompt is empty"),
    ({"data": {"crop": "random"}}, "train.cache_latents = false"),
    ({"data": {"resolution": 500}}, "data.resolution = 500 must be a multiple of 8"),
    ({"data": {"images": ""}}, 'data.images = "" must be a path'),
    ({"data": {"images": "a\0b"}}, "must be a path"),
    (
        {"train": {"steps": 10, "warmup_steps": 10}},
        "train.warmup_steps = 10 leaves nothing of train.steps = 10",
    ),
    ({"train": {"steps": "many"}}, 'train.steps = "many" must be a whole number.'),
    ({"train": {"steps": True}}, "train.steps = true must be a whole number."),
    ({"train": {"steps": 4.5}}, "train.steps = 4.5 must be a whole number."),
    ({"train": {"steps": 0}}, "train.steps = 0 must be at least 1."),
    ({"train": {"learning_rate": float("nan")}}, "train.learning_rate = nan must be a finite number."),
    ({"train": {"learning_rate": 0.0}}, "train.learning_rate = 0.0 must be more than 0"),
    ({"train": {"gradient_checkpointing": 1}}, "train.gradient_checkpointing = 1 must be true or false."),
    ({"train": {"loss_weighting": "min-snr"}}, 'Did you mean "min_snr"? Known: uniform, min_snr'),
    ({"train": {"stepz": 1}}, "There is no setting train.stepz. Did you mean train.steps?"),
    (
        {"train": {"zzz": 1}},
        "There is no setting train.zzz. python launch.py --list-settings train shows all there are.",
    ),
    ({"zzz": 1}, "There is no setting zzz. python launch.py --list-settings shows all there are."),
    ({"bse": "x"}, "There is no setting bse. Did you mean base?"),
    ({"lora": {"rank": 0}}, "[lora] rank = 0 is out of range"),
    ({"lora": {"rank_pattern": {"to_q": 0}}}, "[lora] rank_pattern.to_q = 0 is out of range"),
    ({"lora": {"rank_pattern": {"(": 4}}}, '[lora] rank_pattern: "(" is no regular expression'),
    ({"lora": {"dropout": 1.5}}, "[lora] dropout = 1.5 must be at least 0 and below 1: it is the share"),
    ({"lora": {"kind": "lokar"}}, 'Did you mean "lokr"?'),
    ({"lora": {"bias": "lora"}}, 'Did you mean "lora_only"?'),
    ({"lora": {"factor": 8}}, 'factor = 8 is about LoKr, and kind = "lora"'),
    ({"lora": {"kind": "lokr", "factor": 0}}, "factor = 0 must be at least 1"),
    ({"lora": {"kind": "loha", "decompose_both": True}}, "decompose_both = true is about LoKr"),
    ({"lora": {"kind": "loha", "init": "kaiming"}}, 'init = "kaiming" is a beginning of kind = "lora"'),
    ({"lora": {"layers_pattern": ["layers"]}}, "says what layers_to_transform counts in"),
    ({"lora": {"layers_to_transform": []}}, "layers_to_transform is empty"),
    ({"lora": {"layers_to_transform": [-1]}}, "layers_to_transform = -1 must count from 0"),
    ({"lora": {"text_encoder_layers_to_transform": [-2]}}, "layers_to_transform = -2 must count from 0"),
    ({"lora": {"kind": "loha"}, "train": {"lora_plus_ratio": 16.0}}, "train.lora_plus_ratio = 16.0 is about"),
    ({"train": {"lora_plus_ratio": 0.5}}, "train.lora_plus_ratio = 0.5 must be at least 1"),
    (
        {
            "lora": {"text_encoder_modules_to_save": ["final_layer_norm"]},
            "train": {"text_encoder_learning_rate": 0.0},
        },
        "has no effect with train.text_encoder_learning_rate = 0",
    ),
    ({"lora": {"kind": "lokr"}, "save": {"spelling": "peft"}}, 'has no words for lora.kind = "lokr"'),
    ({"lora": {"bias": "all"}, "save": {"spelling": "diffusers"}}, 'no words for lora.bias = "all"'),
    ({"lora": {"rank_pattern": {"to_q": "x"}}}, 'lora.rank_pattern.to_q = "x" must be a whole number.'),
    ({"lora": {"targets": "attention"}}, 'lora.targets = "attention" must be a list'),
    ({"lora": {"targets": []}}, "need an entry"),
    ({"lora": {"text_encoder_targets": []}}, "need an entry"),
    ({"lora": {"init": "gausian"}}, 'Did you mean "gaussian"?'),
    ({"preview": {"every": 5}}, "preview.prompts is empty"),
    ({"report": {"seeds": []}}, "report.seeds is empty"),
    ({"report": {"judge": "views"}}, "report.subject_prompts"),
    ({"name": "../x"}, 'name = "../x" must be usable as a file name'),
    ({"name": "con.safetensors"}, "device name"),
    ({"name": ""}, "must be usable as a file name"),
    ({"base": ""}, "base is empty."),
    ({"seed": -1}, "seed = -1 must be at least 0."),
    ({"train": 3}, "train = 3 must be a table."),
]


@pytest.mark.parametrize(("changes", "sentence"), WRONG, ids=[str(changes)[:50] for changes, _ in WRONG])
def test_what_is_wrong_is_said(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError) as problem:
        config(**changes)
    said = str(problem.value)
    assert sentence in said
    assert not any(
        jargon in said for jargon in ("pydantic", "validation error", "Input should", "type=", "Value error")
    )


def test_every_mistake_of_a_table_is_named_at_once() -> None:
    with pytest.raises(ConfigError) as problem:
        TrainSettings(**{"steps": "x", "batch_size": 0, "scedule": "cosine"})
    said = str(problem.value).splitlines()
    assert len(said) == 3
    assert ["train.steps" in said[0], "train.batch_size" in said[1], "train.schedule?" in said[2]] == [
        True
    ] * 3


@pytest.mark.parametrize(
    ("table", "key", "ours"),
    [
        # as other trainers call it, wherever it is written
        ("train", "lr", "train.learning_rate"),
        ("train", "max_train_steps", "train.steps"),
        ("", "network_dim", "lora.rank"),
        ("train", "network_dim", "lora.rank"),
        ("lora", "unet_lr", "train.learning_rate"),
        ("train", "text_encoder_lr", "train.text_encoder_learning_rate"),
        ("train", "train_batch_size", "train.batch_size"),
        ("data", "flip_aug", "data.flip"),
        ("data", "num_repeats", "dataset.repeats"),
        ("train", "clip_grad_norm", "train.max_grad_norm"),
        ("lora", "LoRA_type", "lora.kind"),
        ("train", "max_train_step", "train.steps"),
        # right, in the wrong table
        ("", "resolution", "data.resolution"),
        ("train", "resolution", "data.resolution"),
        ("lora", "learning_rate", "train.learning_rate"),
        ("train", "masks", "data.masks"),
        # nearly right; at most three
        ("data", "trainlearning_rate", "train.learning_rate"),
        (
            "train",
            "text_encoder_rate",
            "train.text_encoder_stop, train.text_encoder_learning_rate or train.text_encoder_2_stop",
        ),
    ],
)
def test_an_unknown_setting_is_answered_with_what_it_may_mean(table: str, key: str, ours: str) -> None:
    with pytest.raises(ConfigError) as problem:
        config(**({table: {key: 1}} if table else {key: 1}))
    name = f"{table}.{key}".lstrip(".")
    assert str(problem.value) == f"There is no setting {name}. Did you mean {ours}?"


def test_a_folders_own_setting_is_suggested_to_a_folder() -> None:
    with pytest.raises(ConfigError, match=r"no setting dataset.flip_aug. Did you mean dataset.flip\?"):
        TrainConfig(name="x", dataset=[{"images": "a", "flip_aug": True}])  # type: ignore[arg-type, list-item]


def test_every_counterpart_is_a_setting_that_there_is() -> None:
    tables = {"": TrainConfig, "dataset": DatasetSettings, **TrainConfig.tables()}
    for name in COUNTERPARTS.values():
        table, _, key = name.rpartition(".")
        assert key in tables[table].model_fields, name


def test_missing_settings_are_named_with_their_meaning() -> None:
    with pytest.raises(ConfigError, match=r"data.images is missing. Folder with the pictures to learn."):
        TrainConfig(name="x", data={"prompt": "x"})  # type: ignore[arg-type]


def test_every_setting_has_a_description() -> None:
    for name, model in {"": TrainConfig, **TrainConfig.tables()}.items():
        for key, field in model.model_fields.items():
            assert (field.description or "").endswith((".", "?")), f"{name}.{key} has no description"


def test_choices_are_those_the_code_knows() -> None:
    assert get_args(TrainSettings.model_fields["loss_weighting"].annotation) == tuple(WEIGHTINGS)
    assert get_args(LoraSettings.model_fields["init"].annotation) == INITS
    assert get_args(LoraSettings.model_fields["variant"].annotation) == VARIANTS
    assert get_args(LoraSettings.model_fields["kind"].annotation) == KINDS
    assert get_args(LoraSettings.model_fields["bias"].annotation) == BIASES


def test_path_fields_are_all_found() -> None:
    found = {name: model.path_fields() for name, model in TrainConfig.tables().items() if model.path_fields()}
    assert found == {
        "lora": {"start_from"},
        "data": {"images", "class_images", "masks"},
        "validation": {"images"},
        "report": {"judge"},
    }
    assert TrainConfig.path_fields() == {"output"}


@pytest.mark.parametrize(
    ("targets", "own", "expected"),
    [
        (("attention",), None, ("attention",)),
        (("attention", "conv"), None, ("attention",)),
        (("conv", "projection"), None, ("attention",)),
        (("all-linear+conv",), None, ("all-linear+conv",)),
        (("attention",), ("feed-forward",), ("feed-forward",)),
    ],
)
def test_text_encoder_targets_always_match(
    targets: tuple[str, ...], own: tuple[str, ...] | None, expected: tuple[str, ...]
) -> None:
    """The UNet's groups that a text encoder lacks are not asked of it: find_targets would refuse them."""
    settings = LoraSettings(rank=4, alpha=8.0, targets=targets, text_encoder_targets=own)
    pipe = small_pipeline("sdxl")
    for component in ("text_encoder", "text_encoder_2"):
        made = settings.lora_config(component)
        assert made.targets == expected
        assert (made.rank, made.alpha) == (4, 8.0)
        assert find_targets(getattr(pipe, component), made)
    assert settings.lora_config("unet").targets == targets
    assert find_targets(pipe.unet, settings.lora_config("unet"))
