"""From the Train tab's few answers to a preset and its overrides: what the command line would have been told."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

from lora_core.errors import ConfigError
from trainers import presets


@dataclass(frozen=True)
class Plan:
    """`noun` is what the subject is ("dog"); `prompt` is what every picture without a caption is called."""

    preset: str
    name: str
    noun: str
    prompt: str
    base: str
    steps: int
    rank: int
    keep_class: bool = True

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
        shipped = presets.load(self.preset, ['data.images="."'])
        settings: dict[str, object] = {
            "name": slug(self.name),
            "base": self.base,
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
        return [*chosen, "report.judge="]


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
