"""What the trainer's tests share: small bases on disk, pictures, configs, and losses read from events."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from lora_core.errors import LoraError
from tests.small_models import small_pipeline
from trainers.config import TrainConfig
from trainers.control import StopRequest
from trainers.demo_scenes import DEMO
from trainers.dreambooth import train
from trainers.events import Step, TrainEvent

SIDE = 64


def base_folder(path: Path, family: str = "sd1", prediction: str = "epsilon") -> Path:
    pipe = small_pipeline(family)
    pipe.scheduler.register_to_config(prediction_type=prediction)
    pipe.save_pretrained(path)
    return path


def demo_folder(path: Path, prediction: str) -> Path:
    """The demo base. For epsilon its betas are made plain: zero-terminal ones are v-prediction's alone."""
    shutil.copytree(DEMO / "base", path)
    if prediction == "epsilon":
        file = path / "scheduler" / "scheduler_config.json"
        facts = {
            **json.loads(file.read_text()),
            "prediction_type": "epsilon",
            "rescale_betas_zero_snr": False,
        }
        file.write_text(json.dumps(facts))
    return path


def pictures(
    folder: Path, count: int, *, caption: str | None = None, seed: int = 0, side: int = SIDE
) -> Path:
    """Noise pictures of exactly the resolution, so that no crop or resampling is in play."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    for i in range(count):
        Image.fromarray(rng.integers(0, 255, (side, side, 3), dtype=np.uint8)).save(folder / f"{i}.png")
        if caption:
            (folder / f"{i}.txt").write_text(f"{caption} {'abcdefgh'[i]}\n", encoding="utf-8")
    return folder


def config(tmp: Path, base: Path | str, **tables: dict[str, Any]) -> TrainConfig:
    """A small run: attention of UNet and text encoder, alpha not rank. On a card as on a CPU: exact, each loss told."""
    table: dict[str, Any] = {
        "name": "small",
        "base": str(base),
        "output": tmp / "runs",
        "seed": 3,
        "lora": {"rank": 4, "alpha": 6.0},
        "data": {"images": tmp / "images", "prompt": "a zxq cat", "resolution": SIDE},
        "train": {"steps": 6, "batch_size": 2, "learning_rate": 1e-3, "base_dtype": "fp32", "log_every": 1},
        "save": {"dtype": "fp32"},
    }
    for name, values in tables.items():
        table[name] = {**table.get(name, {}), **values}
    return TrainConfig.model_validate(table)


class Recorder:
    """Losses by step; asks to stop after `stop_at`."""

    def __init__(self, stop_at: int | None = None) -> None:
        self.losses: dict[int, float] = {}
        self.seen: list[TrainEvent] = []
        self.stop, self._stop_at = StopRequest(), stop_at

    def __call__(self, event: TrainEvent) -> None:
        self.seen.append(event)
        if isinstance(event, Step):
            self.losses[event.step] = event.loss
            if event.step == self._stop_at:
                self.stop.ask()


def losses_of(settings: TrainConfig) -> list[float]:
    recorder = Recorder()
    train(settings, listeners=[recorder])
    return list(recorder.losses.values())


def events_in(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "events.jsonl").read_text(encoding="utf-8").splitlines()]


def refusal(settings: TrainConfig) -> str:
    """The sentence a run that must not succeed ends with."""
    try:
        train(settings)
    except LoraError as problem:
        return str(problem)
    raise AssertionError("the run succeeded")
