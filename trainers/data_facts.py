"""The pictures of a training in kohya's words, for a LoRA file's metadata. Names only: no folder of the user's disk."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

from trainers.batches import turns
from trainers.buckets import Size
from trainers.config import TrainConfig
from trainers.dataset import Dataset, Example


def data_facts(config: TrainConfig, dataset: Dataset) -> dict[str, Any]:
    """Counts, folders, tags, buckets and what is done to captions; of several folders' settings, the first's."""
    data, first = config.data, config.datasets[0]
    side = dataset.resolution
    return {
        "ss_num_train_images": len(turns(dataset.instances)),  # kohya counts the repeats
        "ss_num_reg_images": len(turns(dataset.classes)),
        "ss_resolution": f"({side}, {side})",
        "ss_enable_bucket": data.buckets,
        "ss_bucket_no_upscale": not data.upscale,
        "ss_min_bucket_reso": data.bucket_min or side // 2 if data.buckets else None,
        "ss_max_bucket_reso": data.bucket_max or 2 * side if data.buckets else None,
        "ss_bucket_info": json.dumps(_buckets(dataset)),
        "ss_shuffle_caption": first.shuffle_tags,
        "ss_keep_tokens": first.keep_tokens,
        "ss_caption_dropout_rate": first.caption_dropout,
        "ss_caption_tag_dropout_rate": first.tag_dropout,
        "ss_flip_aug": first.flip,
        "ss_random_crop": first.crop == "random",
        "ss_dataset_dirs": json.dumps(_folders(dataset.instances)),
        "ss_reg_dataset_dirs": json.dumps(_folders(dataset.classes)),
        "ss_tag_frequency": json.dumps(_tags(dataset.instances)),
    }


def _folders(examples: tuple[Example, ...]) -> dict[str, dict[str, int]]:
    found: dict[str, dict[str, int]] = {}
    for e in examples:
        folder = found.setdefault(e.source.folder.name, {"n_repeats": e.source.repeats, "img_count": 0})
        folder["img_count"] += 1
    return found


def _tags(examples: tuple[Example, ...]) -> dict[str, dict[str, int]]:
    """What stands between commas, counted; a picture at several resolutions is one."""
    pictures = {e.path: e for e in examples}
    found: dict[str, Counter[str]] = {}
    for e in pictures.values():
        tags = [tag for line in e.lines for part in line.split(",") if (tag := part.strip())]
        found.setdefault(e.source.folder.name, Counter()).update(tags)
    return {folder: dict(counts) for folder, counts in found.items()}


def _buckets(dataset: Dataset) -> dict[str, Any]:
    """Sizes trained on, how many pictures each, and how far their shapes were from these."""
    counts = Counter(e.plan.bucket for e in dataset.instances)
    listed = {
        str(i): {"resolution": list(size), "count": n} for i, (size, n) in enumerate(sorted(counts.items()))
    }
    errors = [abs(_ratio(e.original_size) - _ratio(e.plan.bucket)) for e in dataset.instances]
    return {"buckets": listed, "mean_img_ar_error": round(sum(errors) / len(errors), 6) if errors else 0.0}


def _ratio(size: Size) -> float:
    return size[0] / size[1]
