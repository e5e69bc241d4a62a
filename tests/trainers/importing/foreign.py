"""Another trainer's settings in a file, imported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from PIL import Image

from trainers.importing import Imported, import_preset

LEAST = {
    "pretrained_model_name_or_path": "owner/sd15",
    "output_name": "fox",
    "train_data_dir": "img",
    "network_module": "networks.lora",
}


def imported(folder: Path, settings: dict[str, Any], name: str = "fox.json") -> Imported:
    path = folder / name
    path.write_text(json.dumps(settings), encoding="utf-8")
    return import_preset(path)


def photos(folder: Path, count: int) -> Path:
    folder.mkdir(parents=True)
    for i in range(count):
        Image.new("RGB", (8, 8)).save(folder / f"{i}.png")
    return folder
