"""The trainings of benchmarks.likeness, and the one judge of them all."""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from PIL import Image

from benchmarks.train_sides import Peer, write_first_lora
from lora_core.pipeline import LivePipeline
from lora_core.safe_files import write_atomic
from trainers import class_images, presets, report
from trainers.config import ReportSettings, TrainConfig
from trainers.control import StopRequest
from trainers.demo_data import TOKEN
from trainers.demo_scenes import DEMO, things, with_article
from trainers.dreambooth import train

Figures = dict[str, float]  # of one finished LoRA
SIDES = ("ours", "reference", "class-free")
SUBJECTS = ("fox", "owl", "cupcake", "guitar", "teapot")
SPACES = ("thumbnail", "latent")


@dataclass(frozen=True)
class Setting:
    subjects: tuple[str, ...]
    seeds: int
    steps: int
    tiny: bool
    folder: Path
    kept: Path  # each training's file and figures: what is there is not done again

    def file(self, subject: str, seed: int, side: str) -> Path:
        return self.kept / f"{subject}-{seed}-{side}-{self.steps}.safetensors"

    def preset(self, subject: str, seed: int, side: str = "ours") -> TrainConfig:
        """presets/demo.toml for another subject, without previews, from the beginning that all sides of a seed share:
        another draw would set two trainings apart that are alike."""
        kind = things()[subject].kind
        demo = presets.load("demo").model_dump()
        pictures = DEMO / "subjects" / subject
        words = with_article(kind)
        demo["name"] = f"{subject}-{seed}-{side}"
        demo["base"] = str(DEMO / "base")  # diffusers knows no "demo"
        demo["output"], demo["seed"] = self.folder / "runs", seed
        demo["lora"]["start_from"] = self.folder / f"beginning-{seed}.safetensors"
        demo["data"] |= {"images": pictures / "train", "class_prompt": f"{words} on a white background"}
        if side == "class-free":
            demo["data"] |= {"class_from": "model", "class_count": 0}
        else:
            demo["data"]["class_images"] = self.folder / "class" / kind
        demo["train"] |= {"steps": self.steps, "base_dtype": "fp32"}
        demo["train"]["warmup_steps"] = min(demo["train"]["warmup_steps"], self.steps - 1)
        demo["preview"]["every"] = 0
        demo["report"] |= {
            "judge": pictures / "judge",
            "subject_prompts": (f"{with_article(f'{TOKEN} {kind}')} on a blue background",),
        }
        if self.tiny:
            demo["data"]["class_count"] = min(demo["data"]["class_count"], 2)
            demo["preview"]["steps"] = demo["report"]["steps"] = 2
            demo["report"]["seeds"] = (0,)
        return TrainConfig.model_validate(demo)


class Judge:
    """The figures of the trainer's report for any file, all in one pipeline: the same prompts, seeds and views."""

    def __init__(self) -> None:
        self.live = LivePipeline.open("demo")
        self._before: dict[str, list[Image.Image]] = {}

    def fill_class(self, config: TrainConfig) -> None:
        """The class pictures that both sides are given."""
        data = config.datasets[0].model_copy(update={"resolution": self.live.resolution})
        if data.class_images is not None:
            class_images.fill(
                data.class_images, data, config.preview, self.live, StopRequest(), lambda _: None
            )

    def draw_beginning(self, config: TrainConfig) -> None:
        """The first LoRA of a seed."""
        file, parts = config.lora.start_from, ("unet", "text_encoder")
        if file is None or file.exists():
            return
        models = {part: self.live.models[part] for part in parts}
        wanted = {part: config.lora.lora_config(part) for part in parts}
        write_first_lora(models, wanted, file, seed=config.seed)

    def figures(self, config: TrainConfig, lora: Path) -> Figures:
        found = self._shown(config.report, lora)
        of_class = ReportSettings.model_validate(
            {
                **config.report.model_dump(),
                "judge": None,
                "subject_prompts": (),
                "unrelated_prompts": (config.data.class_prompt,),
            }
        )
        moved = self._shown(of_class, lora)
        obeyed, asked = found["obedience_trained"].split(" of ")
        return {
            "obedience": int(obeyed) / int(asked),
            **{f"base {space}": found[f"likeness_{space}_base"] for space in SPACES},
            **{f"likeness {space}": found[f"likeness_{space}_trained"] for space in SPACES},
            **{f"drift {space}": found[f"moved_{space}_unrelated"] for space in SPACES},
            **{f"class drift {space}": moved[f"moved_{space}_unrelated"] for space in SPACES},
        }

    def _shown(self, settings: ReportSettings, lora: Path) -> dict[str, Any]:
        wanted = report.shots(settings, report.judge_views(settings))
        side, stop = self.live.resolution, StopRequest()
        key = settings.model_dump_json()
        if key not in self._before:
            self._before[key] = report.render(self.live, wanted, settings, side, stop)
        coverage = self.live.load(lora, name="judged")
        if coverage.matched < coverage.total or coverage.unused:
            raise RuntimeError(f"of {lora} only {coverage.matched} of {coverage.total} layers were read")
        after = report.render(self.live, wanted, settings, side, stop)
        self.live.unload()
        return report.figures(wanted, self._before[key], after, settings, self.live.pipeline.vae)


def make(setting: Setting) -> None:
    """What is lacking. What another call is at is left to it, and waited for in the end."""
    judge = Judge()
    setting.kept.mkdir(parents=True, exist_ok=True)
    for waits in (False, True):
        for turn in _turns(setting):
            lock = FileLock(setting.file(*turn).with_suffix(".lock"), timeout=-1 if waits else 0)
            with contextlib.suppress(Timeout), lock:
                _have(setting, judge, *turn)


def figures(setting: Setting) -> dict[str, dict[str, Figures]]:
    """What there is, by side, of each subject and seed."""
    found: dict[str, dict[str, Figures]] = {side: {} for side in SIDES}
    for subject, seed, side in _turns(setting):
        judged = setting.file(subject, seed, side).with_suffix(".json")
        if judged.exists():
            found[side][f"{subject} {seed}"] = json.loads(judged.read_text(encoding="utf-8"))
    return found


def _have(setting: Setting, judge: Judge, subject: str, seed: int, side: str) -> None:
    lora, config = setting.file(subject, seed, side), setting.preset(subject, seed, side)
    began = time.perf_counter()
    if not lora.exists():
        judge.fill_class(config)
        judge.draw_beginning(config)
        _copy(trained(config, side), lora)
    took, judged = time.perf_counter() - began, lora.with_suffix(".json")
    if judged.exists():
        return
    made = judge.figures(config, lora)
    judged.write_text(json.dumps(made) + "\n", encoding="utf-8")
    shown = ", ".join(f"{name} {value:.4g}" for name, value in made.items())
    print(f"{subject}, seed {seed}, {side}, {took:.0f} s: {shown}", file=sys.stderr, flush=True)


def _copy(made: Path, path: Path) -> None:
    def copy(target: Path) -> None:
        shutil.copyfile(made, target)

    write_atomic(path, copy)


def _turns(setting: Setting) -> Iterator[tuple[str, int, str]]:
    """The sides one after the other, so that a run that is stopped has as many of each."""
    for seed in range(setting.seeds):
        for subject in setting.subjects:
            for side in SIDES:
                yield subject, seed, side


def trained(config: TrainConfig, side: str) -> Path:
    """-> the finished file."""
    if side != "reference":
        return train(config.model_copy(update={"report": ReportSettings()}))  # the judge makes one of all
    peer = Peer(config)  # has taken its first step
    for _ in range(config.train.steps - 1):
        peer.step()
    return peer.write(config.output / config.name)
