"""Other trainers' settings: carried over by their meaning, and what is not carried over is named."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lycoris.config import PRESET
from lycoris.kohya import create_network
from torch import nn

import launch
from lora_core.errors import ConfigError
from lora_core.targets import find_targets
from tests.small_models import small_pipeline
from tests.trainers.importing.foreign import LEAST, imported, photos
from trainers import presets
from trainers.config import TrainConfig
from trainers.importing import import_preset
from trainers.importing.reading import arguments


def at(config: TrainConfig, setting: str) -> Any:
    value: Any = config
    for part in setting.split("."):
        value = value[int(part)] if part.isdecimal() else getattr(value, part)
    return value


@pytest.mark.parametrize(
    ("given", "setting", "value"),
    [
        # what a file leaves out is what sd-scripts would have used
        ({}, "lora.rank", 4),
        ({}, "lora.alpha", 1.0),
        ({}, "lora.init", "kaiming"),
        ({}, "lora.targets", ("attention", "feed-forward", "projection")),
        ({}, "train.steps", 1600),
        ({}, "train.learning_rate", 2e-6),
        ({}, "train.base_dtype", "fp32"),
        ({}, "train.schedule", "constant"),
        ({}, "save.dtype", "fp32"),
        ({}, "data.buckets", False),
        ({}, "data.wildcards", False),
        ({}, "data.caption_lines", "first"),
        ({"network_dim": 128, "network_alpha": 64}, "lora.alpha", 64.0),
        ({"network_dim": "32"}, "lora.rank", 32),
        ({"learning_rate": 1e-4}, "train.learning_rate", 1e-4),
        ({"learning_rate": "1e-4"}, "train.learning_rate", 1e-4),
        ({"learning_rate": 1e-4, "unet_lr": 2e-4}, "train.learning_rate", 2e-4),
        ({"learning_rate": 1e-4, "unet_lr": 2e-4}, "train.text_encoder_learning_rate", 1e-4),
        ({"learning_rate": 1e-4, "text_encoder_lr": 5e-5}, "train.text_encoder_learning_rate", 5e-5),
        ({"learning_rate": 1e-4, "text_encoder_lr": 0}, "train.text_encoder_learning_rate", 0.0),
        ({"text_encoder_lr": [1e-5, 2e-5]}, "train.text_encoder_2_learning_rate", 2e-5),
        ({"network_train_unet_only": True}, "train.text_encoder_learning_rate", 0.0),
        ({"cache_text_encoder_outputs": True}, "train.text_encoder_learning_rate", 0.0),
        ({"optimizer_type": "Prodigy", "learning_rate": 1.0}, "train.learning_rate", 1e-4),
        (
            {"optimizer_type": "prodigyplus.ProdigyPlusScheduleFree", "unet_lr": 1},
            "train.learning_rate",
            1e-4,
        ),
        ({"optimizer_type": "DAdaptAdam", "unet_lr": 1.0, "text_encoder_lr": 0.5}, "train.rates", {}),
        (
            {"optimizer_type": "DAdaptAdam", "unet_lr": 1.0, "text_encoder_lr": 0.5},
            "train.text_encoder_learning_rate",
            5e-5,
        ),
        ({"optimizer_type": "some.OtherOptimizer", "learning_rate": 1.0}, "train.learning_rate", 1e-4),
        ({"optimizer_type": "Adafactor", "learning_rate": 3e-5}, "train.learning_rate", 1e-4),
        (
            {
                "optimizer_type": "Adafactor",
                "learning_rate": 3e-5,
                "optimizer_args": ["relative_step=False", "scale_parameter=False"],
            },
            "train.learning_rate",
            3e-5,
        ),
        ({"optimizer_type": "PagedLion8bit", "learning_rate": 1e-5}, "train.learning_rate", 3 * 1e-5),
        ({"use_lion_optimizer": True, "learning_rate": 1e-5}, "train.learning_rate", 3 * 1e-5),
        ({"masked_loss": True}, "data.mask_floor", 0.0),
        ({"alpha_mask": True}, "data.mask_floor", 0.0),
        ({"metadata_author": "me"}, "save.author", "me"),
        ({"validation_split": 0.1, "validate_every_n_steps": 30}, "validation.every", 30),
        ({"validation_split": 0.1}, "validation.share", 0.1),
        ({"optimizer_type": "Lion", "learning_rate": 1e-5}, "train.learning_rate", 3 * 1e-5),
        ({"optimizer_args": ["weight_decay=0.1", "betas=0.9,0.999"]}, "train.weight_decay", 0.1),
        ({"lr_scheduler": "cosine", "lr_warmup_steps": 100}, "train.warmup_steps", 100),
        ({"lr_scheduler": "cosine", "lr_warmup_steps": 0.05}, "train.warmup_steps", 80),
        ({"lr_scheduler": "constant", "lr_warmup_steps": 100}, "train.warmup_steps", 0),
        ({"lr_scheduler": "constant_with_warmup", "lr_warmup_steps": 7}, "train.warmup_steps", 7),
        ({"lr_scheduler": "cosine_with_restarts", "lr_scheduler_num_cycles": 1}, "train.schedule", "cosine"),
        ({"max_train_steps": 900}, "train.steps", 900),
        ({"train_batch_size": 3}, "train.batch_size", 3),
        ({"gradient_accumulation_steps": 4}, "train.gradient_accumulation", 4),
        ({"max_grad_norm": 0}, "train.max_grad_norm", 1e9),
        ({"mixed_precision": "bf16"}, "train.base_dtype", "bf16"),
        ({"v_parameterization": True}, "prediction", "v_prediction"),
        ({"fp8_base": True}, "train.quantize", "fp8"),
        ({"min_snr_gamma": 5}, "train.loss_weighting", "min_snr"),
        ({"min_snr_gamma": 0}, "train.loss_weighting", "uniform"),
        ({"noise_offset": 0.05}, "train.noise_offset", 0.05),
        ({"multires_noise_iterations": 6, "multires_noise_discount": 0.4}, "train.pyramid_noise", 0.4),
        ({"ip_noise_gamma": 0.1}, "train.input_perturbation", 0.1),
        ({"save_precision": "fp16"}, "save.dtype", "fp16"),
        ({"save_every_n_steps": 250}, "save.every", 250),
        ({"seed": "42"}, "seed", 42),
        ({"resolution": "512,512"}, "data.resolution", 512),
        ({"resolution": 768}, "data.resolution", 768),
        ({"resolution": "512,768"}, "data.resolution", 624),
        ({"enable_bucket": True}, "data.bucket_min", 256),
        ({"enable_bucket": True, "max_bucket_reso": 2048}, "data.bucket_max", 2048),
        ({"enable_bucket": True, "bucket_no_upscale": True}, "data.upscale", False),
        ({"shuffle_caption": True}, "data.shuffle_tags", True),
        ({"keep_tokens": "2"}, "data.keep_tokens", 2),
        ({"caption_dropout_rate": 0.1}, "data.caption_dropout", 0.1),
        ({"caption_tag_dropout_rate": 0.2}, "data.tag_dropout", 0.2),
        ({"enable_wildcard": True}, "data.wildcards", True),
        ({"enable_wildcard": True}, "data.caption_lines", "variants"),
        ({"flip_aug": True}, "data.flip", True),
        ({"random_crop": True}, "data.crop", "random"),
        ({"random_crop": True}, "train.cache_latents", False),
        ({"prior_loss_weight": 0.5}, "data.prior_weight", 0.5),
        ({"caption_prefix": "inkwash, "}, "data.trigger", "inkwash"),
        ({"network_args": ["loraplus_lr_ratio=16"]}, "train.lora_plus_ratio", 16.0),
        ({"network_module": "lycoris.kohya", "network_args": ["algo=loha"]}, "lora.kind", "loha"),
        ({"network_module": "lycoris.kohya", "network_args": ["algo=lokr", "factor=8"]}, "lora.factor", 8),
        (
            {"network_module": "lycoris.kohya", "network_args": "algo=locon dora_wd=True"},
            "lora.variant",
            "dora",
        ),
        ({"network_module": "lycoris.kohya", "network_args": ["rs_lora=True"]}, "lora.rank_stabilized", True),
        ({"sample_prompts": "a fox --s 20 --l 6", "sample_every_n_steps": 50}, "preview.prompts", ("a fox",)),
        ({"sample_prompts": "a fox --s 20 --l 6", "sample_every_n_steps": 50}, "preview.guidance", 6.0),
    ],
)
def test_kohyas_arguments(tmp_path: Path, given: dict[str, Any], setting: str, value: Any) -> None:
    found = imported(tmp_path, {**LEAST, **given})
    assert at(found.config, setting) == value


@pytest.mark.parametrize(
    ("module", "args", "ours"),
    [
        ("networks.lora", [], None),
        ("networks.lora", ["conv_dim=2", "conv_alpha=1"], None),
        *(
            ("lycoris.kohya", [f"preset={name}", "algo=locon", "conv_dim=2", "conv_alpha=1"], name)
            for name in (
                "full",
                "full-lin",
                "attn-mlp",
                "unet-only",
                "unet-transformer-only",
                "unet-convblock-only",
            )
        ),
    ],
)
def test_the_layers_and_ranks_are_those_of_the_other_program(
    tmp_path: Path, module: str, args: list[str], ours: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """LyCORIS itself says which layers a preset has and with which rank; sd-scripts' own network is what its attn-mlp
    is, and with conv_dim also the resnets."""
    given = {**LEAST, "network_module": module, "network_args": args, "network_dim": 8, "network_alpha": 4}
    config = imported(tmp_path, given).config
    pipe = small_pipeline("sd1")
    model, lora = pipe.unet, config.lora.lora_config("unet")
    found = {path: (lora.rank_at(path), lora.alpha_at(path)) for path, _ in find_targets(model, lora)}
    if ours is not None:
        theirs = lycoris_layers(pipe, ours, monkeypatch)
        assert {path.replace(".", "_"): value for path, value in found.items()} == theirs
    else:
        assert found == sd_scripts_layers(model, conv=bool(args))


def lycoris_layers(pipe: Any, preset: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, tuple[int, float]]:
    """As LyCORIS had it until 3.4 listed the class of another model's time embedding, which SD's has too: since then
    "full" ends in "duplicated lora name" there."""
    modules = [name for name in PRESET[preset]["unet_target_module"] if name != "TimestepEmbedding"]
    monkeypatch.setitem(PRESET[preset], "unet_target_module", modules)
    network = create_network(
        1.0,
        8,
        4.0,
        pipe.vae,
        pipe.text_encoder,
        pipe.unet,
        preset=preset,
        algo="locon",
        conv_dim=2,
        conv_alpha=1,
    )
    found = {lora.lora_name: (lora.lora_dim, float(lora.alpha)) for lora in network.unet_loras}
    return {name.removeprefix("lora_unet_"): value for name, value in found.items()}


def sd_scripts_layers(unet: nn.Module, *, conv: bool) -> dict[str, tuple[int, float]]:
    """networks/lora.py, by its own rule: in modules of these classes every Linear and 1x1 Conv2d has the rank; with
    conv_dim every other Conv2d has that one."""
    classes = {"Transformer2DModel", *(("ResnetBlock2D", "Downsample2D", "Upsample2D") if conv else ())}
    found = {}
    for outer, block in unet.named_modules():
        if type(block).__name__ in classes:
            for inner, layer in block.named_modules():
                path = f"{outer}.{inner}"
                if isinstance(layer, nn.Linear) or (
                    isinstance(layer, nn.Conv2d) and layer.kernel_size == (1, 1)
                ):
                    found[path] = (8, 4.0)
                elif isinstance(layer, nn.Conv2d) and conv:
                    found[path] = (2, 1.0)
    return found


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"scale_weight_norms": 1.0}, "scale_weight_norms = 1.0"),
        ({"clip_skip": 2}, "clip_skip = 2"),
        ({"max_token_length": 225}, "max_token_length = 225"),
        ({"color_aug": True}, "color_aug = true"),
        ({"loss_type": "huber"}, 'loss_type = "huber"'),
        ({"zero_terminal_snr": True}, "zero_terminal_snr = true"),
        ({"network_args": ["block_dims=1,2,3"]}, 'network_args block_dims = "1,2,3" (it is not 25 numbers'),
        ({"network_args": ["rank_dropout=0.1"]}, 'network_args rank_dropout = "0.1" (lora.dropout drops'),
        ({"network_module": "networks.oft"}, 'network_module = "networks.oft"'),
        ({"network_module": "lycoris.kohya", "network_args": ["algo=ia3"]}, 'network_args algo = "ia3"'),
        ({"network_module": "lycoris.kohya", "network_args": ["use_tucker=True"]}, "use_tucker"),
        ({"optimizer_type": "AdamW8bit"}, 'optimizer_type = "AdamW8bit"'),
        ({"optimizer_type": "Prodigy"}, "finds by itself"),
        ({"optimizer_args": ["betas=0.9,0.98"]}, 'optimizer_args betas = "0.9,0.98"'),
        ({"lr_scheduler": "linear"}, 'lr_scheduler = "linear"'),
        ({"lr_scheduler": "cosine_with_restarts", "lr_scheduler_num_cycles": 4}, "not 4 times"),
        ({"max_train_epochs": 10}, "max_train_epochs = 10"),
        ({"save_every_n_epochs": 2}, "save_every_n_epochs = 2"),
        ({"resume": "state"}, 'resume = "state"'),
        ({"pretrained_model_name_or_path": "x.ckpt"}, "can run code"),
        ({"caption_extension": ".cap"}, 'caption_extension = ".cap"'),
        ({"reg_data_dir": "reg"}, 'reg_data_dir = "reg"'),
        ({"resolution": "512,768"}, 'resolution = "512,768"'),
        ({"learning_rate": "fast"}, 'learning_rate = "fast"'),
        ({"keep_tokens": "many"}, 'keep_tokens = "many"'),
        ({"never_heard_of": [1, 2]}, "never_heard_of = [1, 2]"),
        ({"sample_prompts": "a --n blurry", "sample_every_n_steps": 5}, 'sample_prompts --n = "blurry"'),
    ],
)
def test_what_is_not_carried_over_is_named_with_its_value(
    tmp_path: Path, given: dict[str, Any], named: str
) -> None:
    found = imported(tmp_path, {**LEAST, **given})
    (line,) = [line for line in found.losses if named in line]
    comments = [line for line in found.text.splitlines() if line.startswith("#")]
    assert any(named in comment for comment in comments), line


def test_what_is_switched_off_or_about_the_program_is_no_loss(tmp_path: Path) -> None:
    off = {
        "scale_weight_norms": 0,
        "clip_skip": 1,
        "max_token_length": 75,
        "resume": "",
        "vae": None,
        "color_aug": False,
        "huber_scale": 1,
        "huber_c": "0.10",
        "max_timestep": "1000",
    }
    found = imported(tmp_path, {**LEAST, **off, "xformers": True, "max_data_loader_n_workers": 8})
    assert found.losses == ()
    assert "Not needed here: xformers = true, max_data_loader_n_workers = 8" in found.text


TOML_PROMPTS = """
[prompt]
width = 768
scale = 6
[[prompt.subset]]
prompt = "a fox"
sample_steps = 20
[[prompt.subset]]
prompt = "a hare"
sample_steps = 20
"""
JSON_PROMPTS = '[{"prompt": "a fox", "scale": 6, "sample_steps": 20, "width": 768}, {"prompt": "a hare"}]'
TEXT_PROMPTS = "# two\na fox --w 768 --l 6 --s 20\na hare\n"


@pytest.mark.parametrize(
    ("name", "text"), [("p.toml", TOML_PROMPTS), ("p.json", JSON_PROMPTS), ("p.txt", TEXT_PROMPTS)]
)
def test_files_of_prompts(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8")
    found = imported(tmp_path, {**LEAST, "sample_prompts": name, "sample_every_n_steps": 50})
    preview = found.config.preview
    assert (preview.prompts, preview.every) == (("a fox", "a hare"), 50)
    assert (preview.steps, preview.guidance) == (20, 6.0)
    assert any('sample_prompts --w = "768"' in line for line in found.losses)
    gone = imported(tmp_path, {**LEAST, "sample_prompts": f"no_{name}", "sample_every_n_steps": 50})
    assert any("is not here to read" in line for line in gone.losses)
    assert gone.config.preview.prompts == ()


def test_epochs_are_counted_and_class_pictures_take_no_turns(tmp_path: Path) -> None:
    photos(tmp_path / "img" / "10_sks dog", 6)
    photos(tmp_path / "img" / "5_sks cat", 2)
    photos(tmp_path / "reg" / "1_dog", 3)
    given = {**LEAST, "max_train_epochs": 4, "train_batch_size": 2, "save_every_n_epochs": 2}
    config = imported(tmp_path, given).config
    assert config.train.steps == 4 * 35
    assert config.save.every == 70
    assert config.data.images == tmp_path / "img"
    with_class = imported(tmp_path, {**given, "reg_data_dir": "reg"}).config
    assert (
        with_class.train.steps == 140
    )  # as often each picture of the subject: there twice the steps, in turns
    assert with_class.data.class_images == tmp_path / "reg" / "1_dog"
    assert with_class.data.class_prompt == "dog"
    halved = imported(tmp_path, {**LEAST, "max_train_steps": 1000, "reg_data_dir": "reg"})
    assert halved.config.train.steps == 500
    counted = {"lr_scheduler": "cosine", "lr_warmup_steps": 100, "save_every_n_steps": 200}
    there = imported(tmp_path, {**LEAST, "max_train_steps": 1000, "reg_data_dir": "reg", **counted}).config
    assert (there.train.warmup_steps, there.save.every) == (50, 100)
    assert any("max_train_steps = 1000" in line for line in halved.losses)


DATASETS = """
[general]
shuffle_caption = true
enable_bucket = true
keep_tokens = 1

[[datasets]]
resolution = 512
batch_size = 4
keep_tokens = 2

  [[datasets.subsets]]
  image_dir = "girl"
  class_tokens = "hoge girl"
  num_repeats = 3

  [[datasets.subsets]]
  image_dir = "boy"
  keep_tokens = 3
  flip_aug = true

  [[datasets.subsets]]
  is_reg = true
  image_dir = "reg"
  class_tokens = "human"

[[datasets]]
resolution = [768, 768]
batch_size = 2

  [[datasets.subsets]]
  image_dir = "girl"
  color_aug = true
"""


def test_a_dataset_config(tmp_path: Path) -> None:
    """The nearest setting counts: the subset's, the dataset's, the general one."""
    for name, count in (("girl", 2), ("boy", 4), ("reg", 1)):
        photos(tmp_path / name, count)
    (tmp_path / "data.toml").write_text(DATASETS)
    lines = '[a]\npretrained_model_name_or_path = "x/y"\nmax_train_epochs = 2\nlearning_rate = 1e-4\n[b]\n'
    (tmp_path / "fox.toml").write_text(lines + 'dataset_config = "data.toml"\nkeep_tokens = 9\n')
    found = import_preset(tmp_path / "fox.toml")
    config = found.config
    assert [d.images.name for d in config.dataset] == ["girl", "boy", "girl"]
    assert [d.keep_tokens for d in config.dataset] == [2, 3, 1]
    assert [d.resolution for d in config.dataset] == [512, 512, 768]
    assert [d.repeats for d in config.dataset] == [3, 1, 1]
    assert [d.flip for d in config.dataset] == [False, True, False]
    assert config.dataset[0].prompt == "hoge girl"
    assert all(d.shuffle_tags for d in config.dataset)
    assert {d.class_prompt for d in config.dataset} == {"human"}
    assert config.train.batch_size == 4
    # an epoch: the first dataset's (2 x 3 + 4) / 4, rounded up, and the second's 2 / 2
    assert config.train.steps == 2 * (3 + 1)
    assert any('batch_size of further datasets = ["2"]' in line for line in found.losses)
    assert any("girl: color_aug = true" in line for line in found.losses)
    alone = import_preset(
        tmp_path / "data.toml"
    ).config  # by itself, with the other settings still to be said
    assert alone.dataset == config.dataset


GUI = {
    **{
        "LoRA_type": "LyCORIS/LoKr",
        "LyCORIS_preset": "attn-mlp",
        "factor": 8,
        "conv_dim": 4,
        "conv_alpha": 1,
    },
    **{"network_dim": 16, "network_alpha": 8, "max_resolution": "768,768", "epoch": 3, "max_train_steps": ""},
    **{"lr_warmup": 10, "lr_scheduler": "cosine", "optimizer": "AdamW8bit", "learning_rate": 0.0001},
    **{
        "unet_lr": 0.0002,
        "text_encoder_lr": 0.0,
        "train_data_dir": "img",
        "output_name": "my fox",
        "seed": "0",
    },
    **{"pretrained_model_name_or_path": "owner/sdxl", "sdxl": True, "keep_tokens": "0", "min_snr_gamma": 5},
    **{
        "additional_parameters": "--noise_offset=0.04 --log_prefix=xl",
        "caption_extension": ".txt",
        "vae": "",
    },
    **{
        "stop_text_encoder_training": 0,
        "use_scalar": False,
        "decompose_both": False,
        "scale_weight_norms": 0,
    },
}


def test_the_gui_has_its_own_names_and_units(tmp_path: Path) -> None:
    photos(tmp_path / "img" / "20_fox", 5)
    found = imported(tmp_path, GUI)
    config = found.config
    assert config.name == "my-fox"
    assert (config.lora.kind, config.lora.factor, config.lora.rank, config.lora.alpha) == ("lokr", 8, 16, 8.0)
    assert config.lora.targets == ("attention", "feed-forward", "projection")
    assert config.train.steps == 300
    assert config.train.warmup_steps == 30  # ten per cent
    assert config.train.learning_rate == 2e-4
    assert config.train.text_encoder_learning_rate == 0
    assert config.train.noise_offset == 0.04
    assert config.data.resolution == 768
    odd = {**GUI, "train_batch_size": 3, "gradient_accumulation_steps": 2}
    assert imported(tmp_path, odd).config.train.steps == 50  # 100 / 3 / 2 x 3, rounded up once, at the end
    named = "\n".join(found.losses)
    assert "optimizer_type" in named
    assert "output_name" in named
    assert len(found.losses) == 2, named
    stops = imported(tmp_path, {**GUI, "text_encoder_lr": 1e-4, "stop_text_encoder_training": 40})
    assert stops.config.train.text_encoder_stop == 0.4
    both_zero = imported(tmp_path, {**GUI, "unet_lr": 0, "LoRA_type": "Standard"}).config
    assert (both_zero.train.learning_rate, both_zero.train.rate_of("text_encoder")) == (1e-4, 1e-4)
    assert both_zero.lora.kind == "lora"


COMMAND = r"""
# how the fox was trained
export MODEL_NAME="owner/sd15"
export INSTANCE_DIR="photos"

accelerate launch train_dreambooth_lora.py \
  --pretrained_model_name_or_path=$MODEL_NAME  \
  --instance_data_dir=${INSTANCE_DIR} \
  --output_dir="out/fox" \
  --instance_prompt="a photo of sks dog" \
  --with_prior_preservation --class_prompt "a photo of dog" --class_data_dir=cls --prior_loss_weight=0.8 \
  --resolution=512 --train_batch_size=1 --gradient_accumulation_steps=2 \
  --lr_scheduler="cosine" --lr_warmup_steps=0 --max_train_steps=400 \
  --validation_prompt="A photo of sks dog in a bucket" --validation_epochs=10 --seed="7" --use_dora \
  --report_to wandb --num_validation_images=4 --adam_beta2 0.99
"""


def test_diffusers_command_line(tmp_path: Path) -> None:
    photos(tmp_path / "photos", 5)
    path = tmp_path / "train.sh"
    path.write_text(COMMAND)
    found = import_preset(path)
    config = found.config
    assert (config.name, config.output.name, config.base) == ("fox", "out", "owner/sd15")
    assert (config.data.images, config.data.prompt) == (tmp_path / "photos", "a photo of sks dog")
    assert not config.data.captions  # the script reads none
    assert (config.data.crop, config.data.buckets, config.train.cache_latents) == ("random", False, False)
    assert (config.data.class_prompt, config.data.class_count, config.data.prior_weight) == (
        "a photo of dog",
        100,
        0.8,
    )
    assert (config.lora.rank, config.lora.alpha, config.lora.variant) == (4, None, "dora")
    assert (config.train.learning_rate, config.train.text_encoder_learning_rate) == (5e-4, 0.0)
    assert (config.train.steps, config.train.schedule, config.train.warmup_steps) == (400, "cosine", 0)
    assert (config.save.spelling, config.save.dtype, config.save.every) == ("diffusers", "fp32", 500)
    assert config.preview.every == 10 * 50  # the larger folder is an epoch: 100 class pictures, two at a time
    assert config.seed == 7
    assert [line for line in found.losses if "adam_beta2 = " in line]
    assert [line for line in found.losses if "num_validation_images" in line]
    assert len(found.losses) == 2


def test_the_sdxl_script_has_other_defaults(tmp_path: Path) -> None:
    path = tmp_path / "train.txt"
    words = "--instance_data_dir p --instance_prompt x --train_text_encoder --scale_lr --snr_gamma 5 --center_crop"
    path.write_text(
        f"python train_dreambooth_lora_sdxl.py {words} --output_kohya_format --max_train_steps 50"
    )
    config = import_preset(path).config
    assert config.data.resolution == 1024
    assert config.train.learning_rate == pytest.approx(4e-4)  # scaled by the batch of four
    assert config.train.text_encoder_learning_rate == 5e-6
    assert (config.train.loss_weighting, config.train.snr_gamma) == ("min_snr", 5.0)
    assert (config.data.crop, config.train.cache_latents) == ("center", True)
    assert config.train.weight_decay == 1e-4
    assert config.save.spelling == "kohya"


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("python train_network.py --a=1 --b 2 --c", {"a": "1", "b": "2", "c": True}),
        ("--a \"two words\" --b='x y'", {"a": "two words", "b": "x y"}),
        ("train_network.py ^\r\n --a 1 ^\r\n --b", {"a": "1", "b": True}),
        (
            r'train_network.py --a="C:\my models\x.safetensors" --b D:\y',
            {"a": r"C:\my models\x.safetensors", "b": r"D:\y"},
        ),
        ('$x = "5"\ntrain_network.py --a $x `\n --b ${y}', {"a": "5", "b": "${y}"}),
        (
            '--network_args "conv_dim=4" "algo=loha" --x 1',
            {"network_args": ["conv_dim=4", "algo=loha"], "x": "1"},
        ),
        ("--network_args=conv_dim=4", {"network_args": ["conv_dim=4"]}),
        ("# --a 1\n--b 2", {"b": "2"}),
        ("--a $(rm -rf /) --b `id`", {"a": ["$(rm", "-rf", "/)"], "b": "`id`"}),
    ],
)
def test_command_lines_are_read_and_never_run(line: str, found: dict[str, Any]) -> None:
    assert arguments(line)[1] == found


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("x.toml", "a = = 1", "is not valid TOML"),
        ("x.json", "{", "is not valid JSON"),
        ("x.json", "[1]", "no table"),
        ("x.txt", "just words", "holds no arguments"),
        ("x.sh", '--a "open', "quote is left open"),
        ("x.toml", "[[datasets]]\nresolution = 512\n", "no [[datasets.subsets]]"),
        ("x.json", '{"network_dim": 5000, "train_data_dir": "x"}', "5000"),
    ],
)
def test_what_cannot_be_imported_says_why(tmp_path: Path, name: str, text: str, says: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=re.escape(says)):
        import_preset(tmp_path / name)


NAMES = [
    *LEAST,
    "resolution",
    "learning_rate",
    "network_args",
    "sample_prompts",
    "x\ny",
    "seed",
    "é",
    "unet_lr",
]
NAMES += [
    "text_encoder_lr",
    "optimizer_args",
    "min_snr_gamma",
    "save_every_n_steps",
    "train_batch_size",
    "output_dir",
]
WORDS = st.text(max_size=30)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.dictionaries(
        st.sampled_from(
            [*LEAST, "resolution", "learning_rate", "network_args", "sample_prompts", "x\ny", "seed", "é"]
        ),
        st.one_of(
            st.none(),
            st.booleans(),
            st.integers(-9, 9),
            st.text(max_size=30),
            st.lists(st.text(max_size=5), max_size=3),
        ),
    )
)
def test_whatever_a_file_holds_is_a_preset_or_a_sentence(tmp_path: Path, given: dict[str, Any]) -> None:
    """And no value becomes a line of the preset that nobody wrote."""
    try:
        found = imported(tmp_path, given)
    except ConfigError:
        return
    body = found.text[found.text.index("\n\n") :]
    table = tomllib.loads(found.text)
    assert TrainConfig.model_validate(presets.parse(found.text, tmp_path).model_dump()) == found.config
    assert table.keys() <= set(TrainConfig.model_fields)
    assert body


def test_an_imported_preset_is_what_is_trained(tmp_path: Path) -> None:
    found = imported(tmp_path, {**LEAST, "network_dim": 8, "learning_rate": 1e-4})
    path = tmp_path / "mine.toml"
    path.write_text(found.text, encoding="utf-8")
    assert presets.load(path) == found.config


def test_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, out = tmp_path / "fox.json", tmp_path / "presets" / "mine.toml"
    path.write_text(json.dumps({**LEAST, "scale_weight_norms": 1}))
    assert launch.main(["--import-preset", str(path)]) == 0
    said = capsys.readouterr().out
    assert "#   scale_weight_norms = 1" in said
    assert presets.parse(said, tmp_path).name == "fox"
    out.parent.mkdir()
    assert launch.main(["--import-preset", str(path), "--out", str(out)]) == 0
    assert (
        capsys.readouterr().out
        == f"Written: {out}\nnot carried over: scale_weight_norms = 1 (nothing limits the norms: raise "
        "train.weight_decay or lower the rate, and save often)\n"
    )
    assert presets.load(out).lora.rank == 4
    assert launch.main(["--import-preset", str(path), "--out", str(out)]) == 2
    assert "is there already" in capsys.readouterr().err
    assert launch.main(["--import-preset", str(tmp_path / "no.toml")]) == 2
