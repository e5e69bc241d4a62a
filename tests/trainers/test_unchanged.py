"""A run is resumed on the pictures and captions it was saved with, or it says what has changed."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from lora_core.errors import ConfigError, Stopped
from tests.small_models import small_pipeline
from tests.trainers.runs import Recorder, base_folder, config, pictures
from trainers.config import TrainConfig
from trainers.dreambooth import train
from trainers.events import Note
from trainers.unchanged import compare, settings_changed


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return base_folder(tmp_path_factory.mktemp("unchanged") / "base")


def stopped(tmp: Path, base: Path, cached: bool) -> tuple[TrainConfig, Path]:
    pictures(tmp / "images", 3, caption="a zxq cat")
    settings = config(tmp, base, train={"batch_size": 1, "cache_latents": cached})
    recorder = Recorder(stop_at=3)
    with pytest.raises(Stopped):
        train(settings, stop=recorder.stop, listeners=[recorder])
    return settings, tmp / "runs" / "small"


def repaint(folder: Path) -> None:
    Image.new("RGB", (64, 64), "red").save(folder / "1.png")


def reword(folder: Path) -> None:
    (folder / "1.txt").write_text("a zxq dog\n")


def swap(folder: Path) -> None:
    (folder / "1.png").rename(folder / "9.png")
    (folder / "1.txt").rename(folder / "9.txt")


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize(
    ("change", "says"),
    [
        (repaint, "changed, or its caption was: images/1.png"),
        (reword, "changed, or its caption was: images/1.png"),
        (swap, "gone: images/1.png; new: images/9.png"),
    ],
)
def test_what_has_changed_is_named_and_refused_or_said(
    tmp_path: Path, base: Path, change: Callable[[Path], None], says: str, cached: bool
) -> None:
    settings, run = stopped(tmp_path, base, cached)
    shutil.copytree(tmp_path / "images", tmp_path / "kept")
    change(tmp_path / "images")
    with pytest.raises(ConfigError, match=r"cannot go on exactly.*data.changed=\"say\"") as problem:
        train(settings, resume=run)
    assert says in str(problem.value)
    knowing = settings.model_copy(update={"data": settings.data.model_copy(update={"changed": "say"})})
    recorder = Recorder(stop_at=4)
    with pytest.raises(Stopped):
        train(knowing, resume=run, stop=recorder.stop, listeners=[recorder])
    assert any(says in e.text for e in recorder.seen if isinstance(e, Note))
    assert sorted(recorder.losses) == [4]


def test_what_is_put_back_is_as_it_was(tmp_path: Path, base: Path) -> None:
    settings, run = stopped(tmp_path, base, cached=True)
    shutil.copytree(tmp_path / "images", tmp_path / "kept")
    repaint(tmp_path / "images")
    with pytest.raises(ConfigError):
        train(settings, resume=run)
    shutil.copyfile(tmp_path / "kept" / "1.png", tmp_path / "images" / "1.png")
    recorder = Recorder()
    train(settings, resume=run, listeners=[recorder])
    assert sorted(recorder.losses) == [4, 5, 6]


@pytest.mark.parametrize(
    ("part", "says"),
    [
        ("vae", "All pictures are shown otherwise"),
        ("unet", "The base model is another"),
        ("text_encoder", "another"),
    ],
)
def test_another_base(tmp_path: Path, base: Path, part: str, says: str) -> None:
    """Like the one of the run, but for the last tensor of one part."""
    settings, run = stopped(tmp_path, base, cached=True)
    other = small_pipeline("sd1")
    with torch.no_grad():
        list(getattr(other, part).parameters())[-1 if part != "vae" else 0].mul_(1.5)
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(ConfigError, match=says):
        train(settings.model_copy(update={"base": str(tmp_path / "other")}), resume=run)


def test_other_settings_are_named(tmp_path: Path, base: Path) -> None:
    """Also after a process that had them was killed before it saved."""
    settings, run = stopped(tmp_path, base, cached=True)
    other = {"learning_rate": 2e-4, "steps": 5}
    for _ in range(2):
        recorder = Recorder()
        changed = settings.model_copy(update={"train": settings.train.model_copy(update=other)})
        train(changed, resume=run, listeners=[recorder])
        (said,) = [e.text for e in recorder.seen if isinstance(e, Note) and "Other settings" in e.text]
        assert "than when the run was saved: train.steps = 5, before 6; train.learning_rate = 0.0002" in said
        assert "before 0.001." in said
        assert sorted(recorder.losses) == [4, 5]
        (run / "checkpoints" / "step-000005.safetensors").unlink()
    recorder = Recorder()
    train(settings, resume=run, listeners=[recorder])
    assert not [e for e in recorder.seen if isinstance(e, Note) and "Other settings" in e.text]


def test_settings_of_single_folders_are_named() -> None:
    before = (
        '[[dataset]]\nrepeats = 1\n[[dataset]]\nprompt = "ä"\n[lora]\nrank = 4\nranks = {"unet.mid" = 2}\n'
    )
    now = '[[dataset]]\nrepeats = 3\n[[dataset]]\nprompt = "ä"\n[lora]\nrank = 4\nalpha = 2.0\n'
    assert settings_changed(before, before) == ""
    assert settings_changed("", now) == ""  # a state of an earlier version
    assert settings_changed(before, now) == (
        "Other settings than when the run was saved: dataset.0.repeats = 3, before 1; lora.ranks.unet.mid = left out, "
        "before 2; lora.alpha = 2.0, before left out."
    )


def test_nothing_changed_is_nothing_said() -> None:
    assert compare({"a/1.png": "x"}, {"a/1.png": "x"}) == ""
    assert "a/1.png" in compare({"a/1.png": "x"}, {"a/1.png": "y"})
    assert "All pictures" in compare({"1": "x", "2": "x"}, {"1": "y", "2": "y"})
