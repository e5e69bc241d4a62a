"""No argument of another trainer is dropped in silence: it is carried over, named as lost, or named as not needed."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from lora_core.errors import ConfigError
from tests.trainers.importing.foreign import LEAST, imported, photos
from trainers.importing import Imported, import_preset
from trainers.setting_names import COUNTERPARTS

# sd-scripts: every argument of train_network.py and sdxl_train_network.py, with a value that is not its default
KOHYA: dict[str, Any] = {
    # logging, models, metadata
    **{"console_log_level": "DEBUG", "console_log_file": "log.txt", "console_log_simple": True, "v2": True},
    **{
        "v_parameterization": True,
        "pretrained_model_name_or_path": "other/model",
        "tokenizer_cache_dir": "t",
    },
    **{f"metadata_{name}": "said" for name in ("title", "author", "description", "license", "tags")},
    **{f"metadata_{name}": "said" for name in ("usage_hint", "thumbnail", "merged_from", "trigger_phrase")},
    **{"metadata_preprocessor": "p", "metadata_is_negative_embedding": "yes"},
    # pictures and captions
    **{"train_data_dir": "other", "cache_info": True, "shuffle_caption": True, "caption_separator": ";"},
    **{
        "caption_extension": ".cap",
        "caption_extention": ".cap",
        "keep_tokens": 2,
        "keep_tokens_separator": "|||",
    },
    **{
        "secondary_separator": ";;;",
        "enable_wildcard": True,
        "caption_prefix": "p, ",
        "caption_suffix": ", s",
    },
    **{"color_aug": True, "flip_aug": True, "face_crop_aug_range": "2.0,4.0", "random_crop": True},
    **{"debug_dataset": True, "resolution": "768", "cache_latents": True, "vae_batch_size": 4},
    **{
        "cache_latents_to_disk": True,
        "skip_cache_check": True,
        "enable_bucket": True,
        "min_bucket_reso": 320,
    },
    **{"max_bucket_reso": 1536, "bucket_reso_steps": 32, "bucket_no_upscale": True, "token_warmup_min": 2},
    **{"token_warmup_step": 100, "alpha_mask": True, "dataset_class": "a.B", "caption_dropout_rate": 0.1},
    **{"caption_dropout_every_n_epochs": 3, "caption_tag_dropout_rate": 0.2, "reg_data_dir": "reg"},
    **{
        "in_json": "m.json",
        "dataset_repeats": 2,
        "resize_interpolation": "area",
        "skip_image_resolution": 64,
    },
    # training
    **{
        "output_dir": "out",
        "output_name": "other",
        "huggingface_repo_id": "a/b",
        "huggingface_repo_type": "model",
    },
    **{"huggingface_path_in_repo": "x", "huggingface_token": "t", "huggingface_repo_visibility": "private"},
    **{"save_state_to_huggingface": True, "resume_from_huggingface": True, "async_upload": True},
    **{
        "save_precision": "fp16",
        "save_every_n_epochs": 2,
        "save_every_n_steps": 100,
        "save_n_epoch_ratio": 5,
    },
    **{"save_last_n_epochs": 2, "save_last_n_epochs_state": 2, "save_last_n_steps": 2, "save_state": True},
    **{
        "save_last_n_steps_state": 2,
        "save_state_on_train_end": True,
        "resume": "state",
        "train_batch_size": 2,
    },
    **{"max_token_length": 225, "mem_eff_attn": True, "torch_compile": True, "dynamo_backend": "eager"},
    **{
        "xformers": True,
        "sdpa": True,
        "vae": "vae.safetensors",
        "max_train_steps": 900,
        "max_train_epochs": 7,
    },
    **{"max_data_loader_n_workers": 2, "persistent_data_loader_workers": True, "seed": 5},
    **{"gradient_checkpointing": True, "gradient_accumulation_steps": 2, "mixed_precision": "bf16"},
    **{"full_fp16": True, "full_bf16": True, "fp8_base": True, "fp8_base_unet": True, "ddp_timeout": 5},
    **{"ddp_gradient_as_bucket_view": True, "ddp_static_graph": True, "clip_skip": 2, "logging_dir": "l"},
    **{"log_with": "wandb", "log_prefix": "x", "log_tracker_name": "n", "wandb_run_name": "r"},
    **{"log_tracker_config": "c", "wandb_api_key": "k", "log_config": True, "noise_offset": 0.05},
    **{"noise_offset_random_strength": True, "multires_noise_iterations": 6, "ip_noise_gamma": 0.1},
    **{"ip_noise_gamma_random_strength": True, "adaptive_noise_scale": 0.01, "zero_terminal_snr": True},
    **{"min_timestep": 100, "max_timestep": 900, "loss_type": "huber", "huber_schedule": "constant"},
    **{"huber_c": 0.2, "huber_scale": 2.0, "lowram": True, "highvram": True, "sample_at_first": True},
    **{"config_file": "gone.toml", "output_config": True, "prior_loss_weight": 0.5, "masked_loss": True},
    # optimizer, schedule, loss
    **{"optimizer_type": "Prodigy", "use_8bit_adam": True, "use_lion_optimizer": True, "learning_rate": 3e-4},
    **{
        "max_grad_norm": 0.5,
        "optimizer_args": ["d_coef=0.5"],
        "lr_scheduler_type": "x.Y",
        "lr_scheduler": "cosine",
    },
    **{
        "lr_scheduler_args": ["a=1"],
        "lr_decay_steps": 0.2,
        "fused_backward_pass": True,
        "lr_scheduler_timescale": 9,
    },
    **{"lr_scheduler_min_lr_ratio": 0.1, "min_snr_gamma": 5, "scale_v_pred_loss_like_noise_pred": True},
    **{"v_pred_like_loss": 0.5, "debiased_estimation_loss": True, "weighted_captions": True},
    # network
    **{
        "no_metadata": True,
        "save_model_as": "ckpt",
        "unet_lr": 5e-5,
        "text_encoder_lr": 1e-5,
        "cpu_offload_checkpointing": True,
    },
    **{"network_weights": "a.safetensors", "network_module": "networks.dylora", "network_dim": 32},
    **{"network_alpha": 16, "network_dropout": 0.1, "network_args": ["conv_dim=4"], "dim_from_weights": True},
    **{"network_train_unet_only": True, "network_train_text_encoder_only": True, "training_comment": "c"},
    **{"scale_weight_norms": 1.0, "base_weights": ["a.safetensors"], "base_weights_multiplier": [0.5]},
    **{"no_half_vae": True, "skip_until_initial_step": True, "initial_epoch": 2, "initial_step": 50},
    **{"validation_seed": 1, "validation_split": 0.1, "max_validation_steps": 3},
    **{"stop_text_encoder_training": 200, "no_token_padding": True, "dataset_config": "gone.toml"},
    # DeepSpeed, SDXL
    **{
        "deepspeed": True,
        "zero_stage": 3,
        "offload_optimizer_device": "cpu",
        "offload_optimizer_nvme_path": "/n",
    },
    **{"offload_param_device": "cpu", "offload_param_nvme_path": "/n", "zero3_init_flag": True},
    **{"zero3_save_16bit_model": True, "fp16_master_weights_and_gradients": True},
    **{"cache_text_encoder_outputs": True, "cache_text_encoder_outputs_to_disk": True},
    **{"disable_mmap_load_safetensors": True, "fused_optimizer_groups": 4},
}
TOGETHER: dict[str, dict[str, Any]] = {  # has an effect only with others
    "multires_noise_discount": {"multires_noise_iterations": 6, "multires_noise_discount": 0.5},
    "sample_every_n_steps": {"sample_prompts": "a fox", "sample_every_n_steps": 50},
    "sample_every_n_epochs": {"sample_prompts": "a fox", "sample_every_n_epochs": 2},
    "sample_prompts": {"sample_prompts": "a fox", "sample_every_n_steps": 50},
    "sample_sampler": {"sample_prompts": "a", "sample_every_n_steps": 5, "sample_sampler": "euler"},
    "conditioning_data_dir": {"masked_loss": True, "conditioning_data_dir": "masks"},
    "lr_warmup_steps": {"lr_scheduler": "cosine", "lr_warmup_steps": 50},
    "lr_scheduler_num_cycles": {"lr_scheduler": "cosine_with_restarts", "lr_scheduler_num_cycles": 3},
    "lr_scheduler_power": {"lr_scheduler": "polynomial", "lr_scheduler_power": 2},
    "validate_every_n_steps": {"validation_split": 0.1, "validate_every_n_steps": 50},
    "validate_every_n_epochs": {"validation_split": 0.1, "validate_every_n_epochs": 2},
    "min_bucket_reso": {"enable_bucket": True, "min_bucket_reso": 320},
    "max_bucket_reso": {"enable_bucket": True, "max_bucket_reso": 1536},
    "bucket_reso_steps": {"enable_bucket": True, "bucket_reso_steps": 32},
    "bucket_no_upscale": {"enable_bucket": True, "bucket_no_upscale": True},
}
# diffusers' train_dreambooth_lora.py and train_dreambooth_lora_sdxl.py
DIFFUSERS: dict[str, Any] = {
    **{"pretrained_model_name_or_path": "other/model", "pretrained_vae_model_name_or_path": "vae"},
    **{
        "revision": "fp16",
        "variant": "bf16",
        "dataset_name": "d",
        "dataset_config_name": "c",
        "image_column": "i",
    },
    **{"instance_data_dir": "other", "cache_dir": "c", "caption_column": "text", "repeats": 2},
    **{
        "instance_prompt": "b",
        "num_validation_images": 2,
        "do_edm_style_training": True,
        "output_dir": "o/other",
    },
    **{"output_kohya_format": True, "seed": 3, "resolution": 768, "center_crop": True, "random_flip": True},
    **{"train_text_encoder": True, "train_batch_size": 2, "sample_batch_size": 2, "num_train_epochs": 3},
    **{"max_train_steps": 900, "checkpointing_steps": 100, "checkpoints_total_limit": 2},
    **{"resume_from_checkpoint": "latest", "gradient_accumulation_steps": 2, "gradient_checkpointing": True},
    **{"learning_rate": 3e-4, "scale_lr": True, "lr_scheduler": "linear", "snr_gamma": 5.0},
    **{"dataloader_num_workers": 2, "optimizer": "prodigy", "use_8bit_adam": True, "adam_beta1": 0.8},
    **{"adam_beta2": 0.99, "prodigy_beta3": 0.9, "prodigy_decouple": "False", "adam_weight_decay": 0.1},
    **{"adam_weight_decay_text_encoder": 0.1, "adam_epsilon": 1e-6, "prodigy_use_bias_correction": "False"},
    **{"prodigy_safeguard_warmup": "False", "max_grad_norm": 0.5, "push_to_hub": True, "hub_token": "t"},
    **{"hub_model_id": "m", "logging_dir": "l", "allow_tf32": True, "report_to": "wandb"},
    **{"mixed_precision": "fp16", "prior_generation_precision": "fp16", "local_rank": 1},
    **{"enable_xformers_memory_efficient_attention": True, "enable_npu_flash_attention": True, "rank": 8},
    **{"lora_alpha": 16, "lora_dropout": 0.1, "use_dora": True, "image_interpolation_mode": "bilinear"},
    **{"tokenizer_name": "t", "tokenizer_max_length": 50, "text_encoder_use_attention_mask": True},
    **{
        "validation_images": ["a.png"],
        "class_labels_conditioning": "timesteps",
        "pre_compute_text_embeddings": True,
    },
    **{"crops_coords_top_left_h": 8, "crops_coords_top_left_w": 8, "lora_layers": "attn.to_q"},
    **{"skip_final_inference": True, "validation_scheduler": "DDPMScheduler"},
}
PRIOR = {"with_prior_preservation": True, "class_data_dir": "cls", "class_prompt": "a"}
DIFFUSERS_TOGETHER: dict[str, dict[str, Any]] = {
    "with_prior_preservation": PRIOR,
    "class_data_dir": PRIOR,
    "class_prompt": PRIOR,
    "prior_loss_weight": {**PRIOR, "prior_loss_weight": 0.5},
    "num_class_images": {**PRIOR, "num_class_images": 20},
    "validation_prompt": {"validation_prompt": "a fox"},
    "validation_epochs": {"validation_prompt": "a fox", "validation_epochs": 9},
    "lr_warmup_steps": {"lr_scheduler": "cosine", "lr_warmup_steps": 50},
    "lr_num_cycles": {"lr_scheduler": "cosine_with_restarts", "lr_num_cycles": 3},
    "lr_power": {"lr_scheduler": "polynomial", "lr_power": 2.0},
    "text_encoder_lr": {"train_text_encoder": True, "text_encoder_lr": 1e-5},
}


SAID = {  # what it is named by where it is a short word for another
    "caption_extention": 'caption_extension = ".cap"',
    "use_8bit_adam": "AdamW8bit",
    "lr_scheduler_num_cycles": "not 3 times",
    "lr_num_cycles": "not 3 times",
}


def accounted(without: Imported, found: Imported, name: str) -> bool:
    """In the preset itself, or by its name in what is said of it."""
    said = "\n".join(line for line in found.text.splitlines() if line.startswith("#"))
    named = SAID[name] in said if name in SAID else re.search(rf"\b{name}\b", said) is not None
    return named or found.config != without.config


@pytest.mark.parametrize("name", [*KOHYA, *TOGETHER])
def test_every_argument_of_sd_scripts(tmp_path: Path, name: str) -> None:
    given = TOGETHER.get(name, {name: KOHYA.get(name)})
    rest = {key: value for key, value in given.items() if key != name} if name in TOGETHER else {}
    without = imported(tmp_path, {**LEAST, **rest})
    assert accounted(without, imported(tmp_path, {**LEAST, **given}), name)


@pytest.mark.parametrize("name", [*DIFFUSERS, *DIFFUSERS_TOGETHER])
def test_every_argument_of_diffusers(tmp_path: Path, name: str) -> None:
    least = {"pretrained_model_name_or_path": "a/b", "instance_data_dir": "p", "instance_prompt": "x"}
    photos(tmp_path / "p", 3)
    given = DIFFUSERS_TOGETHER.get(name, {name: DIFFUSERS.get(name)})
    rest = (
        {k: v for k, v in given.items() if k != name and given is not PRIOR}
        if name in DIFFUSERS_TOGETHER
        else {}
    )
    without = imported(tmp_path, {**least, **rest})
    assert accounted(without, imported(tmp_path, {**least, **given}), name)


def test_the_answers_to_a_wrong_name_are_where_the_importer_carries_it(tmp_path: Path) -> None:
    """setting_names tells people where a foreign name went: it must be there that its value goes."""
    elsewhere = {"max_train_epochs", "cache_text_encoder_outputs", "save_last_n_steps", "caption_extension"}
    elsewhere |= {
        "dataset_config",
        "reg_data_dir",
        "min_snr_gamma",
        "text_encoder_lr",
        "multires_noise_discount",
    }
    checked = 0
    for name in (KOHYA.keys() | TOGETHER.keys()) & COUNTERPARTS.keys() - elsewhere:
        given = TOGETHER.get(name, {name: KOHYA.get(name)})
        without = imported(tmp_path, LEAST).config.model_dump()
        found = imported(tmp_path, {**LEAST, **given}).config.model_dump()
        table, _, key = COUNTERPARTS[name].rpartition(".")
        there, before = (found[table][key], without[table][key]) if table else (found[key], without[key])
        assert there != before, name
        checked += 1
    assert checked > 30


SUBSETS = """
[general]
caption_extension = ".cap"
whatever = 3
[[datasets]]
resolution = 512
network_multiplier = 0.5
  [[datasets.subsets]]
  image_dir = "girl"
  keep_tokens_separator = "|||"
  strange = "x"
  [[datasets.subsets]]
  is_reg = true
  image_dir = "reg"
  class_tokens = "girl"
  num_repeats = 2
  flip_aug = true
"""


def test_nothing_in_a_dataset_config_is_dropped(tmp_path: Path) -> None:
    (tmp_path / "data.toml").write_text(SUBSETS)
    found = import_preset(tmp_path / "data.toml")
    named = "\n".join(found.losses)
    for line in (
        'caption_extension = ".cap"',
        "whatever = 3",
        "network_multiplier = 0.5",
        'keep_tokens_separator = "|||"',
        'strange = "x"',
        "reg: num_repeats = 2 (each once)",
        "reg: flip_aug = true",
    ):
        assert line in named
    assert found.config.data.class_prompt == "girl"


def test_the_settings_of_a_config_file_that_a_command_line_names(tmp_path: Path) -> None:
    """The command line's own words count more, as there."""
    (tmp_path / "more.toml").write_text(
        '[a]\nnetwork_dim = 24\nlearning_rate = 2e-4\ntrain_data_dir = "img"\n'
    )
    path = tmp_path / "train.sh"
    path.write_text("accelerate launch train_network.py --config_file more --learning_rate 5e-5\n")
    config = import_preset(path).config
    assert (config.lora.rank, config.train.learning_rate) == (24, 5e-5)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.sh", "accelerate launch flux_train_network.py --network_dim 4"),
        ("b.sh", "python train_dreambooth_lora_sd3.py --instance_data_dir x"),
        ("c.json", '{"LoRA_type": "Flux1", "max_resolution": "512,512"}'),
        ("d.json", '{"LoRA_type": "Standard", "sd3_checkbox": true}'),
        ("e.toml", 'network_module = "networks.lora_flux"'),
    ],
)
def test_settings_of_other_models_are_refused(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=r"trains another kind of model \(.*SD 1.x, 2.x and SDXL"):
        import_preset(tmp_path / name)
