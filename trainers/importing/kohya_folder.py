"""What kohya says of one folder of pictures, or of a dataset of several: shuffling, flips, sizes, buckets."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainers.folders import kohya_folders, picture_files
from trainers.importing.carrying import Carrying, counterparts, finite, is_yes, text, whole

FOLDER_RULES = counterparts(  # of each folder
    {
        "shuffle_caption": is_yes,
        "keep_tokens": whole,
        "caption_dropout_rate": finite,
        "caption_tag_dropout_rate": finite,
        "flip_aug": is_yes,
        "alpha_mask": is_yes,
        "class_tokens": text,
        "num_repeats": whole,
    }
)
DATASET_ONLY = (
    "resolution",
    "batch_size",
    "enable_bucket",
    "bucket_no_upscale",
    "bucket_reso_steps",
    "max_bucket_reso",
)
UNSEEN = (
    "image_dir",
    "is_reg",
    "metadata_file",
    "conditioning_data_dir",
    "subsets",
    "min_bucket_reso",
    *DATASET_ONLY,
)
LEFT = {  # of each folder, with the reason
    "color_aug": "vary the colours of the files themselves",
    "face_crop_aug_range": 'crop the files themselves, or set data.crop = "random"',
    "caption_suffix": "nothing is put behind captions: write it into them",
    "keep_tokens_separator": "a number of tags is kept: data.keep_tokens",
    "secondary_separator": "tags stand between commas",
    "caption_separator": "tags stand between commas",
    "caption_dropout_every_n_epochs": "set data.caption_dropout to one share of that number",
    "token_warmup_min": "all tags are shown from the first step on",
    "token_warmup_step": "all tags are shown from the first step on",
    "skip_image_resolution": "take these pictures out; --look names small ones",
    "resize_interpolation": "pictures are resized by Lanczos",
    "custom_attributes": "",
    "weighted_captions": "brackets are text",
}
HARMLESS = {"caption_separator": (",",), "token_warmup_min": (1,), "keep_tokens_separator": ("",)}
NAMES = (
    *FOLDER_RULES,
    *DATASET_ONLY,
    *LEFT,
    "min_bucket_reso",
    "random_crop",
    "enable_wildcard",
    "caption_prefix",
    "caption_extension",
    "caption_extention",
)
IDLE = ("cache_info", "debug_dataset")


@dataclass(frozen=True)
class Counted:
    """`pictures` and `batches` of an epoch, repeats counted; None where the folders are not there to look at."""

    pictures: int | None
    batches: int | None
    has_class: bool


def carry_folder(c: Carrying, given: Mapping[str, Any], table: str) -> None:
    inner = Carrying({k: v for k, v in given.items() if k not in UNSEEN})
    inner.apply(
        {name: (f"{table}.{to.partition('.')[2]}", read) for name, (to, read) in FOLDER_RULES.items()}
    )
    found = inner.preset.get(table, {})
    found = {k: v for k, v in found.items() if v not in (False, 0, 0.0, "")}
    c.preset.setdefault(table, {}).update(found)
    wildcards = inner.yes("enable_wildcard")
    if not wildcards:  # there a caption is then its first line, word for word
        c.set(f"{table}.wildcards", False)
        c.set(f"{table}.caption_lines", "first")
    if inner.yes("random_crop"):
        c.set(f"{table}.crop", "random")
        c.set("train.cache_latents", False)
    if prefix := inner.take("caption_prefix"):
        c.set(f"{table}.trigger", text(prefix).rstrip(", "))
        c.change("caption_prefix", prefix, "a trigger here: a caption that has it already stays as it is")
    _caption_files(inner)
    for name, why in LEFT.items():
        inner.leave_if(name, why, harmless=HARMLESS.get(name, ()))
    inner.finish(IDLE)
    c.left += inner.left


def _caption_files(c: Carrying) -> None:
    extension = c.take("caption_extension", "caption_extention", default=".txt")
    if extension not in (".txt", ".caption", "txt", "caption"):
        c.leave("caption_extension", extension, "captions are .txt files, or .caption: rename them")


def carry_dataset(c: Carrying, given: Mapping[str, Any]) -> None:
    """What is one for all pictures."""
    c.set("train.batch_size", max(1, c.read("batch_size", given.get("batch_size") or 1, whole, 1)))
    carry_resolution(c, given.get("resolution"))
    if not is_yes(given.get("enable_bucket") or False):
        c.set("data.buckets", False)
        return
    for name, key, usual in (
        ("min_bucket_reso", "bucket_min", 256),
        ("max_bucket_reso", "bucket_max", 1024),
        ("bucket_reso_steps", "bucket_step", 64),
    ):
        c.set(f"data.{key}", c.read(name, given.get(name) or usual, whole, usual))
    c.set("data.upscale", not is_yes(given.get("bucket_no_upscale") or False))


def carry_resolution(c: Carrying, value: Any) -> None:
    """512, "512", "512,768", [512, 768]; two sides become the square of the same area."""
    if value in (None, ""):
        return
    sides = value if isinstance(value, list | tuple) else str(value).split(",")
    numbers = [c.read("resolution", side, whole, 0) for side in sides]
    if not numbers or min(numbers) <= 0:
        return
    side = round((numbers[0] * numbers[-1]) ** 0.5 / 8) * 8
    c.set("data.resolution", side)
    if len(set(numbers)) > 1:
        c.change(
            "resolution", value, f"{side} here: the square of that area; buckets keep the pictures' shapes"
        )


def count_pictures(folder: Path) -> int | None:
    """Of an epoch; None where there are none to be seen."""
    if not folder.is_dir():
        return None
    inside = kohya_folders(folder)
    if not inside:
        return len(picture_files(folder)) or None
    return sum(repeats * len(picture_files(path)) for path, repeats, _ in inside) or None


def batches_of(pictures: int | None, size: int) -> int | None:
    """Of one dataset, the last of them perhaps smaller; none of another dataset's are in it."""
    return None if pictures is None else math.ceil(pictures / size)
