"""Pictures that are not trained on: which they are, and what is measured with them (trainers.validation)."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

from lora_core.errors import ConfigError
from trainers.batches import Batch
from trainers.config import TrainConfig
from trainers.dataset import Dataset, Example
from trainers.scan import scan

MOST = 16  # pictures, and prompts
TIMES = (0.1, 0.3, 0.5, 0.7, 0.9)  # of the timesteps there are


@dataclass(frozen=True)
class Probe:
    """What is measured. Each batch is one latent at all TIMES."""

    held_out: tuple[Batch, ...] = ()
    prompts: tuple[Batch, ...] = ()  # on latents of pictures that are trained on

    def __bool__(self) -> bool:
        return bool(self.held_out or self.prompts)


def hold_out(dataset: Dataset, share: float, seed: int) -> tuple[Dataset, tuple[Example, ...]]:
    """-> the dataset without so many of its pictures, and those. The same ones for the same folder and seed."""
    paths = sorted({example.path for example in dataset.instances})
    count = max(1, round(share * len(paths)))
    if count >= len(paths):
        raise ConfigError(
            f"validation.share = {share} of {len(paths)} pictures leaves none to learn from: add pictures, or leave it "
            "out."
        )
    kept = set(random.Random(f"validation {seed}").sample(paths, count))
    rest = tuple(e for e in dataset.instances if e.path not in kept)
    return replace(dataset, instances=rest), tuple(e for e in dataset.instances if e.path in kept)


def look_for(config: TrainConfig, dataset: Dataset) -> tuple[Dataset, tuple[Example, ...]]:
    """-> what is trained on, and what is held out, as [validation] says: a folder of its own, or a share."""
    wanted = config.validation
    if wanted.share:
        return hold_out(dataset, wanted.share, config.seed)
    if wanted.images is None:
        return dataset, ()
    plain = {
        "images": wanted.images,
        "class_images": None,
        "class_count": 0,
        "class_prompt": None,
        "class_from": "images",
    }
    like_the_first = config.datasets[0].model_copy(update=plain)
    return dataset, scan(config.data, dataset.resolution, datasets=[like_the_first]).instances


def drift_prompts(config: TrainConfig) -> list[str]:
    """What the LoRA should leave alone: the class, and the report's unrelated prompts."""
    classes = [d.class_prompt for d in config.datasets if d.class_prompt is not None]
    return list(dict.fromkeys([*classes, *config.report.unrelated_prompts]))[:MOST]
