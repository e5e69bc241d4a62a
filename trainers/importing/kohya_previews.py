"""kohya's sample_prompts: a text, or a file of lines, TOML or JSON, with each prompt's own steps, scale and seed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lora_core.errors import ConfigError
from trainers.importing.carrying import Carrying, Rule, finite, whole
from trainers.importing.reading import table_of, text_of

FLAGS = {"negative_prompt": "n", "width": "w", "height": "h", "sample_steps": "s", "scale": "l", "seed": "d"}


def carry(c: Carrying, folder: Path) -> None:
    prompts, every = c.take("sample_prompts"), c.preset.pop("preview", {}).get("every")
    sampler = c.take("sample_sampler")
    lines = _prompt_lines(c, prompts, folder)
    if sampler and lines and every:
        c.leave("sample_sampler", sampler, "previews use the base's own sampler")
    if not (every and lines):
        return
    c.set("preview.every", every)
    c.set("preview.prompts", [line.partition(" --")[0].strip() for line in lines])
    flags = [dict(pair.partition(" ")[::2] for pair in line.split(" --")[1:]) for line in lines]
    numbers: dict[str, Rule] = {
        "s": ("preview.steps", whole),
        "l": ("preview.guidance", finite),
        "d": ("preview.seed", whole),
    }
    for flag, (setting, read) in numbers.items():
        values = {f[flag].strip() for f in flags if flag in f}
        if len(values) == 1:
            c.apply({f"sample_prompts --{flag}": (setting, read)}, {f"sample_prompts --{flag}": values.pop()})
        elif values:
            c.leave(f"sample_prompts --{flag}", sorted(values), "one for all previews")
    for flag, why in {
        "n": "previews have no negative prompt",
        "w": "previews have the training's size",
    }.items():
        for value in sorted({f[flag].strip() for f in flags if flag in f}):
            c.leave(f"sample_prompts --{flag}", value, why)


def _prompt_lines(c: Carrying, prompts: Any, folder: Path) -> list[str]:
    """Of a file of prompts, or of the text itself."""
    if prompts is None:
        return []
    named = folder / str(prompts)
    kind = named.suffix.lower()
    if "\n" not in str(prompts) and kind in (".txt", ".toml", ".json"):
        if not named.is_file():
            c.leave("sample_prompts", prompts, "the file is not here to read: write preview.prompts")
            return []
        if kind != ".txt":
            return _of_table(c, prompts, table_of(named, text_of(named)) if kind == ".toml" else _json(named))
        prompts = text_of(named)
    lines = [line.strip() for line in str(prompts).splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


def _json(file: Path) -> Any:
    try:
        return json.loads(text_of(file))
    except ValueError as problem:
        raise ConfigError(f"{file.name} is not valid JSON: {problem}.") from problem


def _of_table(c: Carrying, file: Any, found: Any) -> list[str]:
    """A list of prompts with their settings by name, in TOML with what they share -> lines as in a text file."""
    shared = found.get("prompt", {}) if isinstance(found, dict) else {}
    each = shared.get("subset", []) if isinstance(shared, dict) else []
    each = found if isinstance(found, list) else each
    lines = []
    for one in each:
        said = {**{k: v for k, v in shared.items() if k != "subset"}, **one} if isinstance(one, dict) else {}
        if isinstance(said.get("prompt"), str):
            flags = [f" --{flag} {said[name]}" for name, flag in FLAGS.items() if said.get(name) is not None]
            lines.append(" ".join(said["prompt"].split()) + "".join(flags))
    if len(lines) < len(each) or not lines:
        c.leave(
            "sample_prompts", file, "not every entry in it is a table with a prompt: write preview.prompts"
        )
    return lines
