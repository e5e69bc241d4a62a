"""What makes a LoRA useless though nothing is wrong: sentences for before the first step, each with what to change.

Here are those about settings; trainers.advice_data has those about pictures and words. Only what is surely amiss is
said: who is warned of what is usual reads no warnings.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from trainers.advice_data import about_captions, about_pictures, about_twins, about_words
from trainers.bench import Bench
from trainers.config import TrainConfig
from trainers.dataset import Dataset, Example
from trainers.largest import Largest

WEAK = (
    1 / 32
)  # alpha/rank: Adam makes up for some of it, and below this a LoRA hardly moves in a usual training
RATES = (2e-6, 5e-3)  # of the UNet that LoRAs are trained at, with room on both sides
NEAR = (0.6, 1.7)  # of the base's resolution
MUTE = 0.5  # of the prompts left empty
FILLED = 0.6  # of the batch size that batches should have on average


def warnings_about(
    bench: Bench, dataset: Dataset, held_out: tuple[Example, ...], step: Largest
) -> tuple[str, ...]:
    config, pipeline = bench.config, bench.live.pipeline
    return (
        *about_settings(config),
        *about_size(dataset, bench.live.resolution),
        *about_batches(config, step),
        *about_pictures(config, dataset),
        *about_twins(config, dataset, held_out),
        *about_captions(dataset),
        *about_words(config, dataset, pipeline),
        *about_vae(bench.live.family.key, pipeline.vae),
    )


def about_settings(config: TrainConfig) -> Iterator[str]:
    lora, train = config.lora, config.train
    alpha = lora.rank if lora.alpha is None else lora.alpha
    strength = alpha / (lora.rank**0.5 if lora.rank_stabilized else lora.rank)
    if strength < WEAK and lora.kind != "lokr":  # a LoKr of full factors has no scale
        yield (
            f"lora.alpha = {alpha:g} at lora.rank = {lora.rank} weakens the LoRA to {strength:.2g}: it may show "
            f"nothing. Set lora.alpha to {lora.rank} or half of it, and with it a lower learning rate."
        )
    rates = {"learning_rate": train.learning_rate}
    if (words := train.rate_of("text_encoder")) != train.learning_rate:
        rates["text_encoder_learning_rate"] = words
    if (words := train.rate_of("text_encoder_2")) not in rates.values():
        rates["text_encoder_2_learning_rate"] = words
    rates |= {f'rates."{block}"': rate for block, rate in train.rates.items()}
    for name, rate in rates.items():
        if rate and not RATES[0] <= rate <= RATES[1]:
            far = "far below" if rate < RATES[0] else "far above"
            yield (
                f"train.{name} = {rate:g} is {far} what LoRAs are trained at: 1e-4 is usual, and half of it for text "
                "encoders."
            )
    for folder in config.datasets:
        if folder.caption_dropout >= MUTE:
            yield (
                f"data.caption_dropout = {folder.caption_dropout:g} leaves that share of the prompts empty: the LoRA "
                "hardly learns when to show. 0.05 to 0.1 are usual."
            )
            break
    if config.data.prior_weight != 1 and not any(
        d.has_class or d.class_from == "model" for d in config.datasets
    ):
        yield (
            f"data.prior_weight = {config.data.prior_weight:g} has no effect: there are no class pictures. Set "
            "data.class_prompt and data.class_count (100 is usual), or leave it out."
        )


def about_size(dataset: Dataset, resolution: int) -> Iterator[str]:
    """`resolution`: side in pixels of the pictures the base was made for."""
    sides = {e.source.settings.resolution or dataset.resolution for e in dataset.instances}
    for side in sorted(side for side in sides if not NEAR[0] <= side / resolution <= NEAR[1]):
        yield (
            f"Pictures are trained at {side} pixels, and this base model was made for {resolution}: it draws badly "
            f"at a size so far from its own, and the LoRA learns that. Set data.resolution = {resolution}, or leave "
            "it out."
        )


def about_batches(config: TrainConfig, step: Largest) -> Iterator[str]:
    batch = config.train.batch_size
    if step.mean_pictures < FILLED * batch:
        yield (
            f"A batch holds {step.mean_pictures:.1f} pictures on average and not train.batch_size = {batch}, since "
            "few have one shape. Crop more of them alike, set data.buckets = false, or lower the batch size and the "
            "learning rate."
        )


def about_vae(family: str, vae: Any) -> Iterator[str]:
    if family == "sdxl" and vae.dtype == torch.float16 and not getattr(vae.config, "force_upcast", False):
        yield (
            "SDXL's own VAE overflows in fp16, and this one does not ask to be run in fp32. Unless it is one that was "
            'made for fp16, set train.base_dtype = "bf16".'
        )
