"""Whatever a run is set to, it may be stopped and goes on bit for bit: eight steps are three and five, with many
settings at once, and with each alone (slow)."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch

from lora_core.errors import Stopped
from tests.trainers.matrix import ALONE, TOGETHER, Tables, make_place, matrix_config
from tests.trainers.runs import Recorder
from tests.trainers.test_failures import short_of_memory
from tests.trainers.test_resume import same
from trainers import checkpoints
from trainers.dreambooth import train
from trainers.events import Note


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_place(tmp_path_factory.mktemp("matrix"))


def check(tmp: Path, place: Path, tables: Tables) -> Recorder:
    """The last state is compared, not only file and losses -> what the resumed run said."""
    settings = matrix_config(tmp, place, tables, steps=8)
    straight, first, second = Recorder(), Recorder(stop_at=3), Recorder()
    whole = train(settings, listeners=[straight])
    with pytest.raises(Stopped):
        train(settings, stop=first.stop, listeners=[first])
    for spoil in (torch.manual_seed, random.seed, np.random.seed):
        spoil(999)  # chance must come from the checkpoint, not from this process
    resumed = train(settings, resume=tmp / "runs" / "small-2", listeners=[second])
    assert list(second.losses) == [4, 5, 6, 7, 8]
    assert {**first.losses, **second.losses} == straight.losses
    assert same(whole, resumed)
    assert same(*(checkpoints.state_path(file.parent / "checkpoints", 8) for file in (whole, resumed)))
    return second


@pytest.mark.parametrize("name", TOGETHER)
def test_many_settings_at_once(tmp_path: Path, place: Path, name: str) -> None:
    check(tmp_path, place, TOGETHER[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", ALONE)
def test_each_setting_alone(tmp_path: Path, place: Path, name: str) -> None:
    check(tmp_path, place, ALONE[name])


def test_after_a_lack_of_memory(tmp_path: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Dropout draws for each piece of a batch: the resumed run has them from its first step on, and a step that is done
    again draws as it would have. Neither whole batches nor kept activations fit."""
    short_of_memory(monkeypatch, lambda at, batch: len(batch) <= 2 and at.checkpointed)
    tables: Tables = {"lora": {"dropout": 0.2}, "train": {"batch_size": 3, "input_perturbation": 0.1}}
    resumed = check(tmp_path, place, tables)
    assert not [e for e in resumed.seen if isinstance(e, Note) and "out of memory" in e.text]
