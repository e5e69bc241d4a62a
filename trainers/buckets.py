"""In which shape a picture is trained on, and which part of it: scaled until it covers a bucket, then cut to that.

Buckets have about as many pixels as the square of the resolution, sides in steps of 64 (an 8-fold VAE, and a UNet that
halves three times), and any shape between the shortest and the longest side. A square picture is in the square.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from functools import cached_property

from PIL import Image

from lora_core.errors import ConfigError
from trainers.config_data import DataSettings

Size = tuple[int, int]  # width, height in pixels, as Pillow has it
TimeIds = tuple[int, int, int, int, int, int]
SMALL_MODEL = 256  # pixels: below it a step of 64 would leave the square alone


@dataclass(frozen=True)
class Buckets:
    """The shapes in which pictures are trained at one resolution. Every size is in pixels."""

    resolution: int
    step: int
    shortest: int
    longest: int
    several: bool = True
    upscale: bool = True

    @classmethod
    def of(cls, settings: DataSettings, resolution: int) -> Buckets:
        """Raises ConfigError where the square itself would be too long or too short."""
        shortest, longest = settings.bucket_min or resolution // 2, settings.bucket_max or 2 * resolution
        if not shortest <= resolution <= longest:
            raise ConfigError(
                f"data.bucket_min = {shortest} and data.bucket_max = {longest} leave out the square of "
                f"{resolution} pixels that is trained on: choose one below and one above it."
            )
        step = settings.bucket_step or (64 if resolution >= SMALL_MODEL else 8)
        return cls(resolution, step, shortest, longest, settings.buckets, settings.upscale)

    @cached_property
    def shapes(self) -> tuple[Size, ...]:
        """The square first, then by width."""
        found = [(self.resolution, self.resolution)]
        if self.several:
            for width in range(-(-self.shortest // self.step) * self.step, self.longest + 1, self.step):
                height = min(self.longest, self.resolution**2 // width) // self.step * self.step
                if height >= self.shortest:
                    found.append((width, height))
        return tuple(dict.fromkeys(found))

    def fit(self, size: Size) -> Size:
        """The bucket of a picture: the shape nearest to its own, and where nothing is enlarged no longer than it."""
        ratio = math.log(size[0] / size[1])
        bucket = min(self.shapes, key=lambda s: (abs(math.log(s[0] / s[1]) - ratio), -s[0] * s[1]))
        if self.upscale or all(own >= side for own, side in zip(size, bucket, strict=True)):
            return bucket
        if not self.several:
            size = (min(size), min(size))
        width, height = (
            min(side, max(self.step, own // self.step * self.step))
            for own, side in zip(size, bucket, strict=True)
        )
        return width, height


@dataclass(frozen=True)
class CropPlan:
    """`resized` (width, height) covers the bucket; `box` (left, top, right, bottom) is cut out of it."""

    resized: Size
    box: tuple[int, int, int, int]

    @property
    def bucket(self) -> Size:
        left, top, right, bottom = self.box
        return right - left, bottom - top

    @property
    def lost(self) -> float:
        """Share of the picture that is cut off."""
        return 1 - math.prod(self.bucket) / math.prod(self.resized)


@dataclass(frozen=True)
class View:
    """One way to look at a picture: a crop, and whether it is then mirrored."""

    plan: CropPlan
    flip: bool = False

    def time_ids(self, original: Size) -> TimeIds:
        """What SDXL is told (arXiv 2307.01952 section 2.2): original height and width, the crop's top and
        left in the resized picture, height and width of the result. Mirrored, left is the other side's."""
        left, top, right, bottom = self.plan.box
        if self.flip:
            left, right = self.plan.resized[0] - right, self.plan.resized[0] - left
        return original[1], original[0], top, left, bottom - top, right - left


def plan_crop(original: Size, bucket: Size, rng: random.Random | None = None) -> CropPlan:
    """Scaled to cover the bucket, which is cut from the middle, or anywhere with an `rng`."""
    scale = max(side / own for side, own in zip(bucket, original, strict=True))
    width, height = (max(side, round(own * scale)) for side, own in zip(bucket, original, strict=True))
    free = width - bucket[0], height - bucket[1]
    left, top = (rng.randint(0, room) for room in free) if rng else (room // 2 for room in free)
    return CropPlan((width, height), (left, top, left + bucket[0], top + bucket[1]))


def apply(image: Image.Image, view: View, filter: Image.Resampling = Image.Resampling.LANCZOS) -> Image.Image:
    """-> the bucket's part. Cut and scaled in one go: a picture of 20,000 x 20 would need gigabytes in between."""
    left, top, right, bottom = view.plan.box
    across, down = image.width / view.plan.resized[0], image.height / view.plan.resized[1]
    source = (left * across, top * down, min(right * across, image.width), min(bottom * down, image.height))
    cut = image.resize((right - left, bottom - top), filter, box=source)
    return cut.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if view.flip else cut
