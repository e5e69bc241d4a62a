"""The imported preset as a TOML file that says at its top what did not come along."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lora_core.plain_text import sentence
from trainers import presets
from trainers.importing.carrying import Carrying
from trainers.importing.reading import Given

PROGRAMS = {
    "kohya": "kohya's sd-scripts",
    "kohya_gui": "kohya_ss",
    "diffusers": "diffusers' DreamBooth script",
}


PATHS = ("images", "class_images", "masks", "start_from")


def anchored(table: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Paths that lie beside the file, or where the program was started, made absolute: presets may lie elsewhere."""
    found: dict[str, Any] = {}
    for key, value in table.items():
        if isinstance(value, dict):
            value = anchored(value, folder)
        elif isinstance(value, list) and value and all(isinstance(v, dict) for v in value):
            value = [anchored(v, folder) for v in value]
        elif key in PATHS or (key == "base" and value.startswith(("./", "../"))):
            places = [place / value for place in (folder, Path.cwd()) if (place / value).exists()]
            value = str(places[0].resolve()) if places else value
        found[key] = value
    return found


def written(carrying: Carrying, given: Given) -> str:
    said = [f"Imported from {given.file.name}, settings of {PROGRAMS[given.kind]}."]
    for title, lines in (
        ("Could not be carried over:", carrying.left),
        ("Carried over, and not quite the same:", carrying.changed),
    ):
        said += ["", title, *(f"  {line}" for line in lines)] if lines else []
    if carrying.idle:
        said += ["", "Not needed here: " + ", ".join(carrying.idle)]
    comments = []
    for line in said:
        depth = "#   " if line.startswith("  ") else "# "
        comments.append((depth + sentence(line.strip())).rstrip())
    return "\n".join(comments) + "\n\n" + presets.spell(anchored(carrying.preset, given.folder))
