"""Which part of a picture is trained on: scaled until it covers the square, then cut to it."""

from __future__ import annotations

import random
from dataclasses import dataclass

from PIL import Image

Size = tuple[int, int]  # width, height in pixels, as Pillow has it
TimeIds = tuple[int, int, int, int, int, int]


@dataclass(frozen=True)
class CropPlan:
    """`resized` (width, height) covers the square; `box` (left, top, right, bottom) is cut out of it."""

    resized: Size
    box: tuple[int, int, int, int]


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


def plan_crop(original: Size, resolution: int, rng: random.Random | None = None) -> CropPlan:
    """The short side becomes `resolution`; the square is cut from the middle, or anywhere with an `rng`."""
    scale = resolution / min(original)
    width, height = (max(resolution, round(side * scale)) for side in original)
    free = width - resolution, height - resolution
    left, top = (rng.randint(0, room) for room in free) if rng else (room // 2 for room in free)
    return CropPlan((width, height), (left, top, left + resolution, top + resolution))


def apply(image: Image.Image, view: View) -> Image.Image:
    """-> the square. Cut and scaled in one go: a picture of 20,000 x 20 would need gigabytes in between."""
    left, top, right, bottom = view.plan.box
    across, down = image.width / view.plan.resized[0], image.height / view.plan.resized[1]
    source = (left * across, top * down, min(right * across, image.width), min(bottom * down, image.height))
    square = image.resize((right - left, bottom - top), Image.Resampling.LANCZOS, box=source)
    return square.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if view.flip else square
