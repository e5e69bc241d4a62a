"""40 steps are 15 and 25, bit for bit, with all that a run carries along; and what an average of the weights is."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lora_core import read_adapter
from lora_core.errors import FileRefused, Stopped
from lora_core.safe_files import read_header, read_tensors
from tests.trainers.runs import Recorder, base_folder, config, pictures
from trainers import checkpoints
from trainers.config import TrainConfig
from trainers.dreambooth import train


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return base_folder(tmp_path_factory.mktemp("resume") / "base")


PLAIN: dict[str, Any] = {"lora": {"dropout": 0.1}}
EVERYTHING: dict[str, Any] = {
    "lora": {"dropout": 0.1, "variant": "dora", "ranks": {"unet.mid": 2}},
    "data": {"flip": True},
    "train": {
        "gradient_accumulation": 2,
        "schedule": "cosine",
        "warmup_steps": 3,
        "lora_plus_ratio": 4.0,
        "ema_decay": 0.9,
        "noise_offset": 0.1,
        "pyramid_noise": 0.3,
        "input_perturbation": 0.1,
        "loss_weighting": "min_snr",
        "log_every": 4,
    },
}


@pytest.mark.parametrize("tables", [PLAIN, EVERYTHING], ids=["plain", "everything"])
def test_forty_steps_are_fifteen_and_twenty_five(tmp_path: Path, base: Path, tables: dict[str, Any]) -> None:
    """Of 7 pictures: the 15th step ends in the middle of an epoch. The last state is compared, not only the file."""
    pictures(tmp_path / "images", 7)
    train_table = {"steps": 40, "batch_size": 1, **tables.get("train", {})}
    settings = config(tmp_path, base, **{**tables, "train": train_table})
    straight = Recorder()
    whole = train(settings, listeners=[straight])
    first = Recorder(stop_at=15)
    stopping = config(tmp_path, base, **{**tables, "train": {**train_table, "log_every": 1}})
    with pytest.raises(Stopped):
        train(stopping, stop=first.stop, listeners=[first])
    for spoil in (torch.manual_seed, random.seed, np.random.seed):
        spoil(999)  # chance must come from the checkpoint, not from this process
    second = Recorder()
    run = tmp_path / "runs" / "small-2"
    resumed = train(settings, resume=run, listeners=[second])
    assert list(second.losses) == list(range(16, 41))
    assert {**first.losses, **second.losses} == straight.losses
    assert same(whole, resumed)
    assert same(*(checkpoints.state_path(file.parent / "checkpoints", 40) for file in (whole, resumed)))


def same(one: Path, other: Path) -> bool:
    a, b = read_tensors(read_header(one)), read_tensors(read_header(other))
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_every_generator_of_the_process_goes_on(tmp_path: Path) -> None:
    tensors, facts = checkpoints.get_chance()
    drawn = [random.gauss(0, 1), np.random.normal(), float(torch.rand(()))]
    for spoil in (torch.manual_seed, random.seed, np.random.seed):
        spoil(5)
    checkpoints.set_chance(tensors, checkpoints.json.loads(checkpoints.json.dumps(facts)))
    assert [random.gauss(0, 1), np.random.normal(), float(torch.rand(()))] == drawn


# --- the average ---------------------------------------------------------------------------------------------


def averaged(tmp: Path, base: Path, **save: Any) -> TrainConfig:
    return config(
        tmp,
        base,
        train={"steps": 5, "batch_size": 1, "ema_decay": 0.3},
        save={"every": 1, "keep": 9, **save},
    )


def test_the_file_holds_the_average_or_the_last_step_as_one_likes(tmp_path: Path, base: Path) -> None:
    """Against the sum written out, over the weights of every step."""
    pictures(tmp_path / "images", 2)
    last = train(averaged(tmp_path, base, ema=False))
    states = [read_tensors(read_header(p)) for _, p in checkpoints.saved_steps(last.parent / "checkpoints")]
    average = train(averaged(tmp_path, base))
    found, plain = read_adapter(average), read_adapter(last)
    name = "lora.layers.0.factors.up"
    path = next(p for p, d in plain.deltas.items() if torch.equal(d.tensors()["up"], states[-1][name]))
    expected: torch.Tensor | None = None
    for n, state in enumerate(states, 1):
        p = state[name].double()
        decay = min(0.3, (1 + n) / (10 + n))
        expected = (0 if expected is None else decay * expected) + (
            1 - decay
        ) * p  # the up factor begins at 0
    assert expected is not None
    torch.testing.assert_close(found.deltas[path].tensors()["up"].double(), expected, rtol=1e-5, atol=1e-9)
    assert not torch.equal(plain.deltas[path].tensors()["up"], found.deltas[path].tensors()["up"])


def test_previews_with_the_average_leave_the_training_as_it_was(tmp_path: Path, base: Path) -> None:
    pictures(tmp_path / "images", 2)
    plain, shown = Recorder(), Recorder()
    train(averaged(tmp_path, base), listeners=[plain])
    preview = {"every": 1, "prompts": ["a zxq cat"], "steps": 1}
    made = {}
    for ema in (True, False):
        settings = averaged(tmp_path, base).model_copy(
            update={"preview": TrainConfig.model_fields["preview"].annotation(**preview, ema=ema)}  # type: ignore[misc]
        )
        file = train(settings, listeners=[shown])
        made[ema] = (file.parent / "previews" / "step-000003-0.png").read_bytes()
    assert shown.losses == plain.losses
    assert made[True] != made[False]


def test_an_average_neither_appears_nor_is_lost_on_the_way(tmp_path: Path, base: Path) -> None:
    pictures(tmp_path / "images", 1)
    settings = config(tmp_path, base, train={"steps": 3, "batch_size": 1})
    recorder = Recorder(stop_at=1)
    with pytest.raises(Stopped):
        train(settings, stop=recorder.stop, listeners=[recorder])
    other = settings.model_copy(update={"train": settings.train.model_copy(update={"ema_decay": 0.9})})
    with pytest.raises(FileRefused, match=r"saved without an average.*train\.ema_decay"):
        train(other, resume=tmp_path / "runs" / "small")
