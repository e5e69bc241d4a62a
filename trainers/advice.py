"""What makes a LoRA useless though nothing is wrong: sentences for before the first step, each with what to change."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from trainers.bench import Bench
from trainers.captions import sidecars
from trainers.config import TrainConfig
from trainers.dataset import Dataset

WEAK = (
    1 / 32
)  # alpha/rank; Adam makes up for some of it, and below this the LoRA hardly moves in a usual training
RATES = (2e-6, 5e-3)  # of the UNet that LoRAs are trained at, with room on both sides
VIEWS = (8, 1000)  # how often each picture is seen


def warnings_about(bench: Bench, dataset: Dataset) -> tuple[str, ...]:
    config, pipeline = bench.config, bench.live.pipeline
    return (
        *about_settings(config),
        *about_pictures(config, dataset),
        *about_words(config, dataset, pipeline),
        *about_vae(bench.live.family.key, pipeline.vae),
    )


def about_settings(config: TrainConfig) -> Iterator[str]:
    lora, train = config.lora, config.train
    alpha = lora.rank if lora.alpha is None else lora.alpha
    strength = alpha / (lora.rank**0.5 if lora.rank_stabilized else lora.rank)
    if strength < WEAK and lora.kind != "lokr":  # a LoKr of full factors has no scale
        yield (
            f"lora.alpha = {alpha:g} at lora.rank = {lora.rank} weakens the LoRA to {strength:.2g}: it "
            f"may show nothing. "
            f"Set lora.alpha to {lora.rank} or half of it, and with it a lower learning rate."
        )
    rates = {"learning_rate": train.learning_rate}
    if (words := train.rate_of("text_encoder")) != train.learning_rate:
        rates["text_encoder_learning_rate"] = words
    for name, rate in rates.items():
        if rate and not RATES[0] <= rate <= RATES[1]:
            far = "far below" if rate < RATES[0] else "far above"
            yield (
                f"train.{name} = {rate:g} is {far} what LoRAs are trained at: 1e-4 is usual, and half of it for text "
                "encoders."
            )


def about_pictures(config: TrainConfig, dataset: Dataset) -> Iterator[str]:
    shown = config.train.steps * config.train.batch_size * config.train.gradient_accumulation
    count = len({example.path for example in dataset.instances})
    each = shown / count
    if each < VIEWS[0]:
        yield (
            f"Each of the {count} pictures is seen {each:.1f} times: too seldom to be learnt. Raise "
            f"train.steps to "
            f"{-(-50 * count * config.train.steps // shown)} or so."
        )
    if each > VIEWS[1]:
        yield (
            f"Each of the {count} pictures is seen {each:,.0f} times: they would be learnt by heart. 50 "
            f"to 300 are "
            "usual; lower train.steps, or save often and take an early one."
        )
    if count == 1:
        yield "There is one picture alone: it would be learnt by heart, with its background. Four or more are usual."
    buckets = Counter(example.plan.bucket for example in dataset.instances)
    for bucket, number in buckets.items():
        if number == 1 and len(buckets) > 1:
            name = next(e.path.name for e in dataset.instances if e.plan.bucket == bucket)
            yield (
                f"{name} is the only picture of its shape, {bucket[0]} x {bucket[1]}: what is special "
                f"about it is learnt "
                "with the shape. Crop it like others, or set data.buckets = false."
            )
    unread = unread_captions(dataset)
    if unread:
        yield (
            f"{unread[0].name} and {len(unread) - 1} more caption files are not read, since "
            f"data.captions = false. "
            if len(unread) > 1
            else f"The caption file {unread[0].name} is not read, since data.captions = false. "
        ) + "Set it to true, if they are meant."


def unread_captions(dataset: Dataset) -> list[Path]:
    """Files beside pictures that have only the prompt of all."""
    mute = [e.path for e in dataset.instances if not e.source.settings.captions]
    return sorted({path for picture in mute for path in sidecars(picture)[:1]})


def about_words(config: TrainConfig, dataset: Dataset, pipeline: Any) -> Iterator[str]:
    captions = {line for example in dataset.instances for line in example.lines}
    same = sorted(captions & {folder.class_prompt for folder in config.datasets if folder.has_class})
    if same:
        yield (
            f'"{same[0]}" is the prompt of pictures to learn and of the class: the two pull in opposite '
            f"ways. Put a word "
            'of its own into data.prompt, such as "a photo of sks dog", and leave it out of '
            "data.class_prompt."
        )
    if config.train.trains_text_encoder:
        return
    for word in words_of_all(captions):
        pieces = pipeline.tokenizer.tokenize(word)
        if len(pieces) > 1 and word not in config.lora.new_tokens:
            yield (
                f'"{word}" is in every caption and no word the text encoder knows: it reads '
                f"{' + '.join(pieces)}, and with "
                "train.text_encoder_learning_rate = 0 it cannot learn it. Raise that to 5e-5, or make it "
                "a word of its "
                f'own: lora.new_tokens = {{ "{word}" = "thing" }}.'
            )


def words_of_all(captions: Sequence[str] | set[str]) -> list[str]:
    """The words that every caption has, in the order of the first."""
    split = [[word.strip(".,;:!?\"'()[]{}|") for word in caption.split()] for caption in sorted(captions)]
    if not split:
        return []
    common = set(split[0]).intersection(*split[1:])
    return [word for word in dict.fromkeys(split[0]) if word in common and len(word) > 1]


def about_vae(family: str, vae: Any) -> Iterator[str]:
    if family == "sdxl" and vae.dtype == torch.float16 and not getattr(vae.config, "force_upcast", False):
        yield (
            "SDXL's own VAE overflows in fp16, and this one does not ask to be run in fp32. Unless it is "
            "one that was made "
            'for fp16, set train.base_dtype = "bf16".'
        )
