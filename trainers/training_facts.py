"""What a finished LoRA says of its training, in kohya's and modelspec's words: those that are true of our run.

Names only: no folder of the user's disk leaves the machine in a file.
"""

from __future__ import annotations

import json
import time
import zlib
from collections import Counter
from dataclasses import dataclass
from datetime import UTC, datetime

from lora_core.models import OpenedBase
from trainers import presets
from trainers.config import TrainConfig
from trainers.dataset import Dataset
from trainers.report_page import without_folders


@dataclass(frozen=True)
class Ran:
    """How far a run has come. `began`: seconds since 1970; `mixed_precision`: accelerate's word for it."""

    step: int
    began: float
    mixed_precision: str


def facts(config: TrainConfig, opened: OpenedBase, ran: Ran, dataset: Dataset) -> dict[str, str]:
    """Metadata of the file, less what its tensors say themselves (lora_core.formats.metadata)."""
    train, count, now = config.train, len(dataset.instances), time.time()
    per_epoch = max(1, -(-count // train.batch_size))  # batches
    captions = Counter(example.caption for example in dataset.instances)
    folder = config.data.images.name
    text_rates = [train.rate_of(c) for c in opened.family.components if c != "unet"]
    words: dict[str, object] = {
        "ss_session_id": zlib.crc32(f"{config.name} {ran.began}".encode()),
        "ss_training_started_at": ran.began,
        "ss_training_finished_at": now,
        "ss_output_name": config.name,
        "ss_sd_model_name": opened.name,
        "ss_learning_rate": train.learning_rate,
        "ss_unet_lr": train.learning_rate,
        "ss_text_encoder_lr": text_rates if len(set(text_rates)) > 1 else text_rates[0],
        "ss_num_train_images": count,
        "ss_num_reg_images": len(dataset.classes),
        "ss_num_batches_per_epoch": per_epoch,
        "ss_num_epochs": -(-train.steps * train.gradient_accumulation // per_epoch),
        "ss_epoch": ran.step * train.gradient_accumulation // per_epoch,
        "ss_steps": ran.step,
        "ss_max_train_steps": train.steps,
        "ss_seed": config.seed,
        "ss_resolution": f"({dataset.resolution}, {dataset.resolution})",
        "ss_clip_skip": None,
        "ss_batch_size_per_device": train.batch_size,
        "ss_total_batch_size": train.batch_size * train.gradient_accumulation,
        "ss_gradient_accumulation_steps": train.gradient_accumulation,
        "ss_gradient_checkpointing": train.gradient_checkpointing,
        "ss_mixed_precision": ran.mixed_precision,
        "ss_cache_latents": train.cache_latents,
        "ss_lr_scheduler": train.schedule,
        "ss_lr_warmup_steps": train.warmup_steps,
        "ss_optimizer": f"torch.optim.AdamW(weight_decay={train.weight_decay})",
        "ss_max_grad_norm": train.max_grad_norm,
        "ss_prior_loss_weight": config.data.prior_weight,
        "ss_min_snr_gamma": train.snr_gamma if train.loss_weighting != "uniform" else None,
        "ss_noise_offset": train.noise_offset or None,
        "ss_multires_noise_discount": train.pyramid_noise or None,
        "ss_ip_noise_gamma": train.input_perturbation or None,
        "ss_network_dropout": config.lora.dropout,
        "ss_tag_frequency": json.dumps({folder: dict(captions)}),
        "ss_dataset_dirs": json.dumps({folder: {"n_repeats": 1, "img_count": count}}),
        "ss_bucket_info": json.dumps(buckets(dataset)),
        "modelspec.date": datetime.fromtimestamp(now, UTC).isoformat(timespec="seconds"),
        "loom.preset": presets.dump(without_folders(config)),
    }
    said = {
        "modelspec.trigger_phrase": config.data.prompt,
        "modelspec.author": config.save.author,
        "modelspec.description": config.save.description,
        "loom.quantized_base": None if opened.quantised is None else opened.quantised.kind,
    }
    return {key: str(value) for key, value in (words | {k: v for k, v in said.items() if v}).items()}


def buckets(dataset: Dataset) -> dict[str, object]:
    """kohya's ss_bucket_info: sizes trained on, how many pictures each, and how far their shapes were from these."""
    sizes: Counter[tuple[int, int]] = Counter()
    errors = []
    for example in dataset.instances:
        left, top, right, bottom = example.plan.box
        sizes[right - left, bottom - top] += 1
        width, height = example.original_size
        errors.append(abs(width / height - (right - left) / (bottom - top)))
    listed = {
        str(i): {"resolution": list(size), "count": n} for i, (size, n) in enumerate(sorted(sizes.items()))
    }
    return {"buckets": listed, "mean_img_ar_error": round(sum(errors) / len(errors), 6) if errors else 0.0}
