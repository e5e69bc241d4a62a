"""What other trainers call our settings, and the names that a wrong one is near to.

`COUNTERPARTS` is one table for two readers: the importer takes from it where a value goes, and an unknown setting in a
preset is answered from it, because people write the names they know: train.lr, network_dim, data.flip_aug.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping

COUNTERPARTS = {
    # sd-scripts, and diffusers where it has the same word
    "output_name": "name",
    "pretrained_model_name_or_path": "base",
    "output_dir": "output",
    "v_parameterization": "prediction",
    "network_dim": "lora.rank",
    "network_alpha": "lora.alpha",
    "network_dropout": "lora.dropout",
    "network_weights": "lora.start_from",
    "algo": "lora.kind",
    "dora_wd": "lora.variant",
    "rs_lora": "lora.rank_stabilized",
    "block_dims": "lora.rank_pattern",
    "conv_block_dims": "lora.rank_pattern",
    "conv_dim": "lora.rank_pattern",
    "block_alphas": "lora.alpha_pattern",
    "conv_block_alphas": "lora.alpha_pattern",
    "conv_alpha": "lora.alpha_pattern",
    "unet_lr": "train.learning_rate",
    "text_encoder_lr": "train.text_encoder_learning_rate",
    "block_lr": "train.rates",
    "down_lr_weight": "train.rates",
    "mid_lr_weight": "train.rates",
    "up_lr_weight": "train.rates",
    "loraplus_lr_ratio": "train.lora_plus_ratio",
    "loraplus_unet_lr_ratio": "train.lora_plus_ratio",
    "stop_text_encoder_training": "train.text_encoder_stop",
    "max_train_steps": "train.steps",
    "max_train_epochs": "train.steps",
    "train_batch_size": "train.batch_size",
    "gradient_accumulation_steps": "train.gradient_accumulation",
    "gradient_checkpointing": "train.gradient_checkpointing",
    "lr_scheduler": "train.schedule",
    "lr_warmup_steps": "train.warmup_steps",
    "mixed_precision": "train.base_dtype",
    "fp8_base": "train.quantize",
    "fp8_base_unet": "train.quantize",
    "min_snr_gamma": "train.snr_gamma",
    "noise_offset": "train.noise_offset",
    "multires_noise_discount": "train.pyramid_noise",
    "ip_noise_gamma": "train.input_perturbation",
    "max_grad_norm": "train.max_grad_norm",
    "cache_text_encoder_outputs": "train.cache_text",
    "seed": "seed",
    "train_data_dir": "data.images",
    "reg_data_dir": "data.class_images",
    "caption_extension": "data.captions",
    "resolution": "data.resolution",
    "enable_bucket": "data.buckets",
    "min_bucket_reso": "data.bucket_min",
    "max_bucket_reso": "data.bucket_max",
    "bucket_reso_steps": "data.bucket_step",
    "bucket_no_upscale": "data.upscale",
    "shuffle_caption": "data.shuffle_tags",
    "keep_tokens": "data.keep_tokens",
    "caption_prefix": "data.trigger",
    "caption_dropout_rate": "data.caption_dropout",
    "caption_tag_dropout_rate": "data.tag_dropout",
    "enable_wildcard": "data.wildcards",
    "class_tokens": "data.prompt",
    "flip_aug": "data.flip",
    "random_crop": "data.crop",
    "alpha_mask": "data.masked_loss",
    "masked_loss": "data.masked_loss",
    "conditioning_data_dir": "data.masks",
    "prior_loss_weight": "data.prior_weight",
    "image_dir": "dataset.images",
    "num_repeats": "dataset.repeats",
    "validation_split": "validation.share",
    "validate_every_n_steps": "validation.every",
    "save_every_n_steps": "save.every",
    "save_precision": "save.dtype",
    "save_last_n_steps": "save.keep",
    "sample_every_n_steps": "preview.every",
    "sample_prompts": "preview.prompts",
    "metadata_author": "save.author",
    "metadata_description": "save.description",
    # diffusers' DreamBooth scripts
    "rank": "lora.rank",
    "lora_alpha": "lora.alpha",
    "lora_dropout": "lora.dropout",
    "use_dora": "lora.variant",
    "instance_data_dir": "data.images",
    "instance_prompt": "data.prompt",
    "class_data_dir": "data.class_images",
    "class_prompt": "data.class_prompt",
    "num_class_images": "data.class_count",
    "with_prior_preservation": "data.class_count",
    "center_crop": "data.crop",
    "random_flip": "data.flip",
    "train_text_encoder": "train.text_encoder_learning_rate",
    "learning_rate": "train.learning_rate",
    "num_train_epochs": "train.steps",
    "snr_gamma": "train.snr_gamma",
    "adam_weight_decay": "train.weight_decay",
    "checkpointing_steps": "save.every",
    "checkpoints_total_limit": "save.keep",
    "validation_prompt": "preview.prompts",
    "validation_epochs": "preview.every",
    # kohya_ss
    "max_resolution": "data.resolution",
    "lr_warmup": "train.warmup_steps",
    "lora_type": "lora.kind",
    # OneTrainer and SimpleTuner
    "lora_rank": "lora.rank",
    "lora_decompose": "lora.variant",
    "dropout_probability": "lora.dropout",
    "base_model_name": "base",
    "epochs": "train.steps",
    "learning_rate_scheduler": "train.schedule",
    "learning_rate_warmup_steps": "train.warmup_steps",
    "stop_training_after": "train.text_encoder_stop",
    "clip_grad_norm": "train.max_grad_norm",
    "offset_noise_weight": "train.noise_offset",
    "perturbation_noise_weight": "train.input_perturbation",
    "latent_caching": "train.cache_latents",
    "masked_training": "data.masked_loss",
    "unmasked_weight": "data.mask_floor",
    "aspect_ratio_bucketing": "data.buckets",
    "sample_after": "preview.every",
    "vae_cache_disable": "train.cache_latents",
    # the words one says
    "lr": "train.learning_rate",
    "te_lr": "train.text_encoder_learning_rate",
    "bs": "train.batch_size",
    "dim": "lora.rank",
    "model": "base",
    "epoch": "train.steps",
    "scheduler": "train.schedule",
    "warmup": "train.warmup_steps",
    "repeats": "dataset.repeats",
    "instance_images": "data.images",
    "trigger_word": "data.trigger",
}


def near(key: str, table: str, known: Mapping[str, Collection[str]]) -> list[str]:
    """At most three settings that `key`, found in `table`, may mean: what another trainer calls so and what another
    table has by that name; else names like it, of this table or else of any. `known`: table -> its settings, "" the
    top."""
    found = [_in(table, COUNTERPARTS.get(key.lower(), ""), known)]
    found += [
        f"{other}.{key}".lstrip(".")
        for other, names in known.items()
        if key in names and not (other == "dataset" and key in known["data"])
    ]
    if not any(found):
        found = [f"{table}.{name}".lstrip(".") for name in difflib.get_close_matches(key, known[table])]
    if not found:
        everywhere = {name: f"{other}.{name}".lstrip(".") for other, names in known.items() for name in names}
        everywhere |= COUNTERPARTS
        found = [everywhere[name] for name in difflib.get_close_matches(key, everywhere, cutoff=0.8)]
    return list(dict.fromkeys(filter(None, found)))[:3]


def _in(table: str, name: str, known: Mapping[str, Collection[str]]) -> str:
    """What [data] has for all folders, a [[dataset]] has for its own."""
    home, _, key = name.rpartition(".")
    return f"dataset.{key}" if (home, table) == ("data", "dataset") and key in known["dataset"] else name
