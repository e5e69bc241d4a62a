"""From the Train tab's few answers to a preset and its overrides: what the command line would have been told."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lora_core.errors import ConfigError
from trainers import presets
from trainers.config import TrainConfig

CHANGES_NOTHING = ('data.images="."',)  # for a look at a preset that names no pictures of the user's


@dataclass(frozen=True)
class Plan:
    """`noun` is what the subject is ("dog"); `prompt` is what every picture without a caption is called.

    settings     the expert's own lines, each as `--set` takes it; they are said last
    prediction   as TrainConfig has it
    """

    preset: str = "demo"
    name: str = "my-first-lora"
    noun: str = "animal"
    prompt: str = "a zxq animal"
    base: str = "demo"
    steps: int = 450
    rank: int = 16
    keep_class: bool = True
    token: str = "zxq"
    settings: str = ""
    prediction: str = "auto"

    def changed(self, **changes: Any) -> Plan:
        """A prompt that nobody has worded follows its words; a preset brings its own numbers."""
        after = replace(self, **changes)
        worded = self.prompt != subject_prompt(self.token, self.noun, self.base)
        if not worded and "prompt" not in changes:
            after = replace(after, prompt=subject_prompt(after.token, after.noun, after.base))
        if after.preset != self.preset:
            shipped = presets.load(after.preset, CHANGES_NOTHING)
            after = replace(
                after,
                steps=shipped.train.steps,
                rank=shipped.lora.rank,
                keep_class=shipped.data.has_class,
            )
        return after

    def on_base(self, base: str, family: str) -> Plan:
        """For another base model: with a preset that is meant for it, where this one is not."""
        usual = {"demo": "demo"}.get(base) or {"sdxl": "sdxl_subject"}.get(family, "sd15_subject")
        kept = self.preset if _meant_for(self.preset) == _meant_for(usual) else usual
        return self.changed(base=base, preset=kept)

    def config(self, pictures: Path) -> TrainConfig:
        """The preset with the answers on top, whole. Raises ConfigError."""
        return presets.load(self.preset, self.overrides(pictures))

    def overrides(self, pictures: Path) -> list[str]:
        """As `--set` takes them. Raises ConfigError for an answer that is missing."""
        for what, value in (
            ("name for the LoRA", self.name),
            ("word for what it is", self.noun),
            ("prompt", self.prompt),
        ):
            if not value.strip():
                raise ConfigError(
                    f"There is no {what}. Fill it in, such as: my_dog, dog, a photo of sks dog."
                )
        shipped = presets.load(self.preset, CHANGES_NOTHING)
        settings: dict[str, object] = {
            "name": slug(self.name),
            "base": self.base,
            "prediction": self.prediction,
            "data.images": str(pictures),
            "data.prompt": self.prompt.strip(),
            "train.steps": self.steps,
            "train.warmup_steps": min(shipped.train.warmup_steps, self.steps // 10),
            "lora.rank": self.rank,
            "lora.alpha": float(self.rank),
            "preview.every": max(1, self.steps // 5),
            "preview.prompts": [f"{self.prompt.strip()}{scene}" for scene in scenes(self.base)],
            "report.subject_prompts": [f"{self.prompt.strip()}{scenes(self.base)[0]}"],
            "report.unrelated_prompts": [],
        }
        if shipped.data.has_class and self.keep_class:
            settings["data.class_prompt"] = class_prompt(self.noun.strip(), self.base)
        chosen = [f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in settings.items()]
        if not self.keep_class:
            chosen += ["data.class_prompt=", "data.class_count=", "data.class_images="]
        return [*chosen, "report.judge=", *own_lines(self.settings)]


def own_lines(text: str) -> list[str]:
    """The settings among the lines; empty ones and comments are none."""
    return [line.strip() for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]


def _meant_for(preset: str) -> str:
    """The base a preset is made for: "demo", the hub id of SDXL, or that of SD 1.5."""
    return presets.load(preset, CHANGES_NOTHING).base


def scenes(base: str) -> tuple[str, ...]:
    """Where a preview puts the subject; the included model knows backgrounds and nothing else."""
    return (" on a blue background", " on a yellow background") if base == "demo" else ("", ", on a beach")


def subject_prompt(token: str, noun: str, base: str) -> str:
    """ "a zxq animal" for the included model, whose captions are like that; "a photo of sks dog" elsewhere."""
    words = f"{token.strip()} {noun.strip()}".strip()
    return f"{article(words)} {words}" if base == "demo" else f"a photo of {words}"


def class_prompt(noun: str, base: str) -> str:
    named = f"{article(noun)} {noun}"
    return f"{named} on a white background" if base == "demo" else f"a photo of {named}"


def article(words: str) -> str:
    return "an" if words[:1].lower() in "aeiou" else "a"


def slug(name: str) -> str:
    """A file name of it: spaces and everything unusual become hyphens."""
    plain = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-._")[:60]
    if not plain:
        raise ConfigError(f'"{name}" leaves nothing for a file name. Use letters and digits, such as my_dog.')
    return plain
