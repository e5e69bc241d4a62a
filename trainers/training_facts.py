"""What a finished LoRA says of its training, in kohya's and modelspec's words: those that are true of our run.

Names only: no folder of the user's disk leaves the machine in a file.
"""

from __future__ import annotations

import time
import zlib
from dataclasses import dataclass
from datetime import UTC, datetime

from lora_core.models import OpenedBase
from trainers import presets
from trainers.batches import turns
from trainers.config import TrainConfig
from trainers.data_facts import data_facts
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
    train, now = config.train, time.time()
    per_epoch = max(1, -(-len(turns(dataset.instances)) // train.batch_size))  # batches
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
        "ss_num_batches_per_epoch": per_epoch,
        "ss_num_epochs": -(-train.steps * train.gradient_accumulation // per_epoch),
        "ss_epoch": ran.step * train.gradient_accumulation // per_epoch,
        "ss_steps": ran.step,
        "ss_max_train_steps": train.steps,
        "ss_seed": config.seed,
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
        **data_facts(config, dataset),
        "modelspec.date": datetime.fromtimestamp(now, UTC).isoformat(timespec="seconds"),
        "loom.preset": presets.dump(without_folders(config)),
    }
    v = opened.pipeline.scheduler.config.get("prediction_type") == "v_prediction"
    said = {
        "modelspec.prediction_type": "v" if v else None,  # from which follow sd_v2_v and 768-v, with SD 2.x
        "modelspec.trigger_phrase": next((p for d in config.datasets if (p := d.trigger or d.prompt)), None),
        "modelspec.author": config.save.author,
        "modelspec.description": config.save.description,
        "loom.quantized_base": None if opened.quantised is None else opened.quantised.kind,
    }
    return {key: str(value) for key, value in (words | {k: v for k, v in said.items() if v}).items()}
