"""What a file's metadata tells people: who made it, what calls it up, how it was trained (keys: see metadata).

Metadata is foreign text and often wrong or damaged: nothing here raises, values are cut down to a line, and paths of
another's disk to their last name.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

from lora_core.formats.metadata import without_paths
from lora_core.plain_text import plain

MOST_TRIGGERS = 8
MAX_TAGS = 2**20  # characters of ss_tag_frequency; 40,000 tags fit
LONGEST = 200  # characters of a value
THUMBNAIL = "modelspec.thumbnail"

# what it is called -> the keys that say it, the best first
_FACTS: dict[str, tuple[str, ...]] = {
    "title": ("modelspec.title", "ss_output_name"),
    "author": ("modelspec.author",),
    "license": ("modelspec.license",),
    "description": ("modelspec.description", "ss_training_comment"),
    "date": ("modelspec.date",),
    "base_model": ("ss_sd_model_name", "ss_base_model_version"),
    "prediction_type": ("modelspec.prediction_type",),
    "resolution": ("ss_resolution", "modelspec.resolution"),
    "network": ("ss_network_module",),
    "network_args": ("ss_network_args",),
    "images": ("ss_num_train_images",),
    "regularisation_images": ("ss_num_reg_images",),
    "steps": ("ss_steps", "ss_max_train_steps"),
    "epochs": ("ss_epoch", "ss_num_epochs"),
    "batch_size": ("ss_total_batch_size", "ss_batch_size_per_device"),
    "optimizer": ("ss_optimizer",),
    "learning_rate": ("ss_learning_rate",),
    "unet_learning_rate": ("ss_unet_lr",),
    "text_encoder_learning_rate": ("ss_text_encoder_lr",),
    "scheduler": ("ss_lr_scheduler",),
    "noise_offset": ("ss_noise_offset",),
    "min_snr_gamma": ("ss_min_snr_gamma",),
    "clip_skip": ("ss_clip_skip",),
    "seed": ("ss_seed",),
}
_NOTHING = ("", "none", "null")  # kohya writes Python's None


def facts_said(metadata: Mapping[str, str]) -> dict[str, str]:
    """The facts that the metadata states, by the names above."""
    found = {name: _first(metadata, keys) for name, keys in _FACTS.items()}
    return {name: text for name, text in found.items() if text}


def trigger_words(metadata: Mapping[str, str]) -> tuple[str, ...]:
    """The words that call a LoRA up: said by its maker, else the commonest tags."""
    said = metadata.get("modelspec.trigger_phrase", "")
    words = said[: 2**14].split(",") if said.strip() else commonest_tags(metadata, 2 * MOST_TRIGGERS)
    shown = dict.fromkeys(word for w in words if (word := plain(w)))
    return tuple(shown)[:MOST_TRIGGERS]


def commonest_tags(metadata: Mapping[str, str], most: int = 20) -> dict[str, int]:
    """ss_tag_frequency: {"10_rex": {"rex": 12, "dog": 9}} -> tag and how often, the commonest first."""
    text = metadata.get("ss_tag_frequency", "")
    if len(text) > MAX_TAGS:
        return {}
    try:
        folders = json.loads(text or "{}")
    except (ValueError, RecursionError):
        return {}  # a caption's worth of information: not worth a refusal
    counts: dict[str, int] = {}
    for tags in folders.values() if isinstance(folders, dict) else ():
        for tag, count in tags.items() if isinstance(tags, dict) else ():
            if type(count) is int:
                counts[tag.strip()] = counts.get(tag.strip(), 0) + count
    return {tag: counts[tag] for tag in sorted(counts, key=lambda tag: (-counts[tag], tag))[:most]}


def _first(metadata: Mapping[str, str], keys: tuple[str, ...]) -> str:
    texts = (metadata.get(key, "")[: 10 * LONGEST] for key in keys)
    said = next((text for text in texts if text.strip().casefold() not in _NOTHING), "")
    if "/" in said or "\\" in said:
        said = without_paths(said)
    return plain(said, LONGEST)
