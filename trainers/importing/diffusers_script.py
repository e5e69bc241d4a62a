"""diffusers' examples/dreambooth: train_dreambooth_lora.py and train_dreambooth_lora_sdxl.py, by their arguments.

Defaults as of 2026: rank 4, alpha = rank, rate 5e-4 (SDXL 1e-4, its text encoders 5e-6), batch 4, random crops of a
square, weight decay 1e-2 (SDXL 1e-4), no text encoder, gaussian beginnings, the attentions alone.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from trainers.folders import picture_files
from trainers.importing.carrying import Carrying, counterparts, is_yes, text, whole
from trainers.importing.reading import Given
from trainers.importing.shared import PRECISIONS, carry_base, carry_name, carry_optimizer, carry_schedule

RULES = counterparts(
    {
        "rank": whole,
        "lora_alpha": float,
        "lora_dropout": float,
        "seed": whole,
        "instance_data_dir": text,
        "instance_prompt": text,
        "random_flip": is_yes,
        "gradient_accumulation_steps": whole,
        "gradient_checkpointing": is_yes,
        "adam_weight_decay": float,
        "max_grad_norm": float,
        "checkpoints_total_limit": whole,
    }
)
_IDLE = """
    enable_xformers_memory_efficient_attention dataloader_num_workers allow_tf32 report_to logging_dir
    push_to_hub hub_token hub_model_id local_rank prior_generation_precision sample_batch_size
    pre_compute_text_embeddings enable_npu_flash_attention class_data_dir class_prompt
    num_class_images cache_dir output_kohya_format final_validation_prompt
"""
IDLE = frozenset(_IDLE.split())
REASONS: dict[str, tuple[str, tuple[Any, ...]]] = {
    "adam_beta1": ("", (0.9,)),
    "adam_beta2": ("", (0.999,)),
    "adam_epsilon": ("", (1e-8,)),
    "num_validation_images": ("a preview is one picture for each prompt", ()),
    "adam_weight_decay_text_encoder": ("one decay for all", ()),
    "pretrained_vae_model_name_or_path": ("pictures are encoded by the base's own VAE", ()),
    "revision": ("the hub's newest is taken", ("main",)),
    "variant": ("whatever the base has is taken", ("fp16",)),
    "resume_from_checkpoint": (
        "its states hold what only it can read; lora.start_from goes on from its LoRA",
        (),
    ),
    "tokenizer_max_length": ("prompts are cut at 77 tokens", (77,)),
    "prodigy_beta3": ("", ()),
    "prodigy_decouple": ("", (True,)),
    "prodigy_use_bias_correction": ("", (True,)),
    "prodigy_safeguard_warmup": ("", (True,)),
    "image_interpolation_mode": ("", ("lanczos",)),
    "lora_layers": ("set lora.targets", ()),
    "dataset_name": ("pictures are read from a folder: save it as one, with a .txt beside each", ()),
    "caption_column": ("captions are .txt files beside the pictures", ()),
    "do_edm_style_training": ("the base's own noise schedule is trained on", ()),
    "text_encoder_use_attention_mask": ("prompts are padded to 77 tokens, as the base was trained", ()),
    "class_labels_conditioning": ("no such base is trained here", ()),
    "validation_images": ("previews begin at noise", ()),
}


def carry(given: Given) -> Carrying:
    c = Carrying(given.settings)
    sdxl = "sdxl" in given.script or "sd_xl" in given.script
    output = c.take("output_dir")
    carry_name(c, Path(text(output)).name if output else None, given.file.stem)
    if output and str(Path(text(output)).parent) != ".":
        c.set("output", str(Path(text(output)).parent))
    carry_base(c, given.folder, "stabilityai/stable-diffusion-xl-base-1.0" if sdxl else "./sd15")
    c.set("lora.rank", 4)
    c.set("lora.targets", ["attention"])
    c.set("data.captions", False)  # the script knows one prompt alone
    if sdxl:
        c.set("train.weight_decay", 1e-4)  # its default, SD 1's is ours
    c.apply(RULES)
    if is_yes(c.take("use_dora", default=False)):
        c.set("lora.variant", "dora")
    _data(c, sdxl=sdxl)
    c.set("train.base_dtype", PRECISIONS.get(text(c.take("mixed_precision", default="no")), "auto"))
    c.set("save.spelling", "kohya" if c.yes("output_kohya_format") else "diffusers")
    c.set("save.dtype", "fp32")
    per_epoch = _length(c, given.folder)
    _rates(c, sdxl=sdxl)
    if gamma := c.number("snr_gamma"):
        c.set("train.loss_weighting", "min_snr")
        c.set("train.snr_gamma", gamma)
    if prompt := c.take("validation_prompt"):
        epochs = c.whole("validation_epochs", 50) or 50
        c.set("preview.prompts", [text(p) for p in prompt] if isinstance(prompt, list) else [text(prompt)])
        c.set("preview.every", epochs * per_epoch if per_epoch else 100)
        if not per_epoch:
            c.change(
                "validation_epochs",
                epochs,
                "every 100 steps here: there are no pictures to count an epoch by",
            )
    else:
        c.take("validation_epochs")
    for name, (why, harmless) in REASONS.items():
        c.leave_if(name, why, harmless=harmless)
    c.finish(IDLE)
    return c


def _data(c: Carrying, *, sdxl: bool) -> None:
    data = c.preset.setdefault("data", {})
    if "images" not in data:
        c.leave("instance_data_dir", None, "no folder of pictures is named: set data.images")
        data["images"] = "images"
    if "prompt" not in data:
        data["captions"] = True
    c.set("data.resolution", c.whole("resolution", 1024 if sdxl else 512))
    c.set("data.buckets", False)
    if not c.yes("center_crop"):
        c.set("data.crop", "random")
        c.set("train.cache_latents", False)
    c.set("train.batch_size", c.whole("train_batch_size", 4))
    if c.yes("with_prior_preservation"):
        c.apply(counterparts({"class_data_dir": text, "class_prompt": text, "prior_loss_weight": float}))
        c.set("data.class_count", c.whole("num_class_images", 100))
    c.take("prior_loss_weight")


def _length(c: Carrying, folder: Path) -> int | None:
    """-> optimizer steps of an epoch, where the pictures can be counted."""
    train, data = c.preset["train"], c.preset["data"]
    count = len(picture_files(folder / data["images"]))
    repeats = c.whole("repeats", 1) or 1
    pictures = max(count * repeats, data.get("class_count", 0)) if count else 0
    batches = math.ceil(pictures / train["batch_size"])
    per_epoch = math.ceil(batches / train.get("gradient_accumulation", 1)) if pictures else None
    steps, epochs = c.whole("max_train_steps"), c.whole("num_train_epochs", 1) or 1
    if not steps and per_epoch is None:
        c.leave("num_train_epochs", epochs, "there are no pictures to count an epoch by: set train.steps")
    total = steps or epochs * (per_epoch or 500)
    c.set("train.steps", total)
    c.given.setdefault("lr_warmup_steps", 500)
    carry_schedule(c, total)
    c.set("save.every", c.whole("checkpointing_steps", 500))
    return per_epoch


def _rates(c: Carrying, *, sdxl: bool) -> None:
    rate = c.number("learning_rate", 1e-4 if sdxl else 5e-4) or 1e-4
    words = c.number("text_encoder_lr", 5e-6 if sdxl else None)
    if c.yes("scale_lr"):
        train = c.preset["train"]
        factor = train["batch_size"] * train.get("gradient_accumulation", 1)
        rate *= factor
        c.change("scale_lr", True, f"the rate is {factor} times what it was, for one device")
    replaced = carry_optimizer(c, rate)
    c.set("train.learning_rate", replaced or rate)
    if not c.yes("train_text_encoder"):
        c.set("train.text_encoder_learning_rate", 0.0)
    elif words:
        c.set("train.text_encoder_learning_rate", words)
