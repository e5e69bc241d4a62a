"""Where class pictures that a run makes for itself are kept."""

from __future__ import annotations

from pathlib import Path

from trainers.class_images import class_folder
from trainers.config_data import FolderSettings


def test_they_are_shared_by_what_makes_them_alike_and_by_nothing_else(tmp_path: Path) -> None:
    out = tmp_path / "runs"
    settings = FolderSettings(images=tmp_path, class_prompt="a dog", class_count=4, resolution=512)
    bases = [tmp_path / "one" / "model.safetensors", tmp_path / "two" / "model.safetensors"]  # of one name
    others = [
        class_folder(settings, out, bases[1]),
        class_folder(settings.model_copy(update={"class_prompt": "a cat"}), out, bases[0]),
        class_folder(settings.model_copy(update={"resolution": 256}), out, bases[0]),
    ]
    first = class_folder(settings, out, bases[0])
    assert first == class_folder(settings.model_copy(update={"class_count": 9}), out, bases[0])
    assert len({first, *others}) == 4
    assert first is not None
    assert "a-dog" in first.name
    kept = settings.model_copy(update={"class_images": tmp_path / "mine"})
    assert class_folder(kept, out, bases[0]) == tmp_path / "mine"
