"""Examples -> tensors: one picture to train on, what can be seen of it, and what the losses weigh."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from lora_core.errors import ConfigError
from trainers.buckets import CropPlan, Size, View, apply, plan_crop
from trainers.captions import draw
from trainers.folders import Kind, Source
from trainers.images import decode_layers, decode_mask, read_bytes
from trainers.sampler import Draw
from trainers.scan_report import ScanReport


@dataclass(frozen=True)
class Example:
    """One picture to train on, at one resolution.

    lines          its captions: one of them is drawn each time
    original_size  width and height after EXIF
    plan           its bucket and the crop from the middle
    mask           the file, or None: its own opacity where `masked`
    """

    path: Path
    lines: tuple[str, ...]
    original_size: Size
    plan: CropPlan
    source: Source
    masked: bool = False
    mask: Path | None = None

    @property
    def kind(self) -> Kind:
        return self.source.kind

    @property
    def caption(self) -> str:
        """The first of its captions, as it is written."""
        return self.lines[0]

    def words(self, turn: Draw) -> str:
        """This turn's prompt."""
        if self.kind == "class":
            return self.caption
        return draw(self.lines, self.source.settings, turn.words_rng())

    def view(self, turn: Draw) -> View:
        """This turn's crop and flip."""
        settings, rng = self.source.settings, turn.rng()
        plan = self.plan
        if settings.crop == "random":
            plan = plan_crop(self.original_size, plan.bucket, rng)
        return View(plan, settings.flip and rng.random() < 0.5)

    def views(self) -> tuple[View, ...]:
        """Every view a cache has to hold. Raises ConfigError for random crops, which have no end."""
        if self.source.settings.crop == "random":
            raise ConfigError(
                'Latents of data.crop = "random" cannot be kept: set train.cache_latents = false.'
            )
        return tuple(
            View(self.plan, flip) for flip in ((False, True) if self.source.settings.flip else (False,))
        )


@dataclass(frozen=True)
class Bytes:
    """What an example is made of, as it lies on the disk: its picture's file, and its mask's."""

    picture: bytes
    mask: bytes | None


@dataclass(frozen=True)
class Dataset:
    """What `scan` found: examples in the order of their folders and names, and one report per folder."""

    instances: tuple[Example, ...]
    classes: tuple[Example, ...]
    reports: tuple[ScanReport, ...]
    resolution: int

    @property
    def examples(self) -> tuple[Example, ...]:
        return self.instances + self.classes


def read(example: Example) -> Bytes:
    """Raises BadImage."""
    return Bytes(read_bytes(example.path), read_bytes(example.mask) if example.mask else None)


def layers(example: Example, data: Bytes) -> tuple[Image.Image, Image.Image | None]:
    """-> the picture, and its mask (mode L, white is learnt) if it has one. Raises BadImage."""
    image, opacity = decode_layers(data.picture, example.path, example.source.settings.background)
    if not example.masked:
        return image, None
    if example.mask is None or data.mask is None:
        return image, opacity
    return image, decode_mask(data.mask, example.mask)


def pixels(image: Image.Image, view: View) -> Tensor:
    """An opened picture -> its view as (3, height, width) fp32, -1 to 1."""
    cut = torch.from_numpy(np.array(apply(image, view)))  # (height, width, 3) uint8
    return cut.permute(2, 0, 1).float() / 127.5 - 1


def coverage(mask: Image.Image, view: View, latent: tuple[int, int]) -> Tensor:
    """A mask -> its view as (1, h, w) fp32, 0 to 1: how much of the pixels of each latent it has."""
    cut = torch.from_numpy(np.array(apply(mask, view, Image.Resampling.BILINEAR)))
    return F.adaptive_avg_pool2d(cut[None].float() / 255, latent)
