"""Between two looks at the loss nothing asks a tensor what it holds: on a GPU each such question waits for the device.

There is no GPU here, but the questions are the same: whatever reads a value or makes a shape depend on one.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from lora_core import algebra
from tests.trainers.runs import base_folder, config, pictures
from trainers import dreambooth
from trainers.batches import Feeder
from trainers.config import TrainConfig
from trainers.dreambooth import train
from trainers.watch import Watch

ASKING = {
    "_local_scalar_dense",  # item(), bool(), float(), int()
    "nonzero",
    "is_nonzero",
    "equal",
    "masked_select",
    "repeat_interleave",
    "_unique2",
    "unique_dim",
    "unique_consecutive",
    "bincount",
}
READING = ("tolist", "numpy", "item", "__array__")  # on a CPU these look past the dispatcher


class Questions(TorchDispatchMode):
    """Where in our sources each was asked, while `on`."""

    def __init__(self) -> None:
        super().__init__()
        self.on, self.found, self.steps = False, list[str](), 0

    def note(self, what: str) -> None:
        if self.on:
            stack = [f for f in traceback.extract_stack() if f.filename != __file__]
            outside = [f for f in stack if "/torch/" not in f.filename]
            self.found.append(f"{what}: " + " < ".join(f"{f.filename}:{f.lineno}" for f in outside[-1:-7:-1]))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.partition("::")[2]
        by_mask = name in ("index", "index_put", "index_put_") and any(
            i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1]
        )
        if name in ASKING or by_mask:
            self.note(name)
        return func(*args, **(kwargs or {}))


class Readings(TorchFunctionMode):
    def __init__(self, questions: Questions) -> None:
        super().__init__()
        self.questions = questions

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in READING:
            self.questions.note(func.__name__)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def questions(monkeypatch: pytest.MonkeyPatch) -> Iterator[Questions]:
    """Heard from the second step, when no prompt is new any more, until the losses are read."""
    asked = Questions()

    class Listening(Watch):
        def keep(self, *given: Any) -> torch.Tensor:
            bad = super().keep(*given)
            asked.on, asked.steps = True, asked.steps + 1
            return bad

        def read(self, *, scaled: bool) -> Any:
            asked.on = False
            return super().read(scaled=scaled)

    def next_unheard(feeder: Feeder, *given: Any) -> Any:
        before, asked.on = asked.on, False
        try:
            return drawing(feeder, *given)
        finally:
            asked.on = before

    drawing = Feeder.next  # on the CPU, which may be asked
    monkeypatch.setattr(Feeder, "next", next_unheard)
    monkeypatch.setattr(dreambooth, "Watch", Listening)
    # a CPU looks whether any norm cancels; this is how a GPU, which is not asked, goes about it
    monkeypatch.setattr(algebra, "_with_dense", lambda *given: algebra._with_nearest_dense(*given[:3]))
    with asked, Readings(asked):
        yield asked


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    tmp = tmp_path_factory.mktemp("bases")
    return {family: base_folder(tmp / family, family) for family in ("sd1", "sdxl")}


CLASS = {"class_prompt": "a cat", "prior_weight": 0.7}
RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "everything that trains": (
        "sd1",
        {
            "lora": {"new_tokens": {"<zxq>": "cat"}, "dropout": 0.1, "bias": "lora_only"},
            "data": {"class_images": "class", **CLASS, "prompt": "a <zxq> cat"},
            "train": {
                "gradient_accumulation": 2,
                "ema_decay": 0.9,
                "lora_plus_ratio": 4.0,
                "loss_weighting": "min_snr",
                "schedule": "cosine",
                "warmup_steps": 1,
            },
        },
    ),
    "class of the model, masks and noises": (
        "sd1",
        {
            "data": {"class_from": "model", **CLASS, "masked_loss": True, "flip": True},
            "train": {
                "noise_offset": 0.1,
                "pyramid_noise": 0.3,
                "input_perturbation": 0.1,
                "base_dtype": "bf16",
                "gradient_checkpointing": True,
                "channels_last": True,
            },
        },
    ),
    "dora on every layer, encoders kept": (
        "sd1",
        {
            "lora": {"variant": "dora", "targets": ["all-linear+conv"], "modules_to_save": ["conv_in"]},
            "data": {"class_from": "model", **CLASS},
            "train": {"text_encoder_learning_rate": 0.0, "loss_weighting": "min_snr_floored"},
        },
    ),
    "prompts without end for a kept encoder": (
        "sd1",
        {
            "data": {"shuffle_tags": True, "prompt": ", ".join("abcdefghijk")},
            "train": {"text_encoder_learning_rate": 0.0},
        },
    ),
    "loha": ("sd1", {"lora": {"kind": "loha"}}),
    "lokr as dora": ("sd1", {"lora": {"kind": "lokr", "variant": "dora"}}),
    "two encoders, one of them kept": (
        "sdxl",
        {"train": {"text_encoder_2_learning_rate": 0.0, "ema_decay": 0.9}},
    ),
}


def run_of(tmp_path: Path, bases: dict[str, Path], name: str, **train_settings: Any) -> TrainConfig:
    """Three steps whose losses are read once, at their end."""
    family, tables = RUNS[name]
    pictures(tmp_path / "images", 3)
    pictures(tmp_path / "class", 2, seed=1)
    (tmp_path / "images" / "0.mask.png").write_bytes((tmp_path / "images" / "1.png").read_bytes())
    data = dict(tables.get("data", {}))
    if "class_images" in data:
        data["class_images"] = tmp_path / data["class_images"]
    steps = {"steps": 3, "log_every": 100, **tables.get("train", {}), **train_settings}
    return config(tmp_path, bases[family], lora=tables.get("lora", {}), data=data, train=steps)


@pytest.mark.parametrize("name", RUNS)
def test_nothing_is_asked_in_a_step(
    tmp_path: Path, bases: dict[str, Path], questions: Questions, name: str
) -> None:
    train(run_of(tmp_path, bases, name))
    assert questions.steps == 3
    assert questions.found == [], "\n".join(questions.found)
