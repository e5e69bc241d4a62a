"""Who else hears what the trainer states: programs through `--json`, TensorBoard through its own files."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import launch
from lora_core.errors import SaveFailed, Stopped
from tests.trainers.runs import Recorder, base_folder, config, events_in, pictures, refusal
from tests.trainers.test_bad_input import ROOT, preset_file
from trainers import dreambooth
from trainers.dreambooth import train
from trainers.event_log import EventLog
from trainers.events import Note, TrainEvent


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return base_folder(tmp_path_factory.mktemp("listeners") / "base")


def test_json_is_one_event_per_line_and_nothing_else(
    tmp_path: Path, base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pictures(tmp_path / "images", 1)
    words = ["--train", str(preset_file(tmp_path, base)), "--set", "train.steps=2", "--json"]
    assert launch.main(words) == 0
    said = capsys.readouterr().out.splitlines()
    ours = [json.loads(line) for line in said]
    theirs = events_in(tmp_path / "runs" / "small")
    for event in (*ours, *theirs):
        event.pop("time")
    assert ours == theirs
    kinds = [event["event"] for event in ours]
    assert kinds[0] == "TakenUp"
    assert kinds[-1] == "Finished"
    assert kinds.count("Step") == 2


@pytest.mark.parametrize("words", [[], ["--json"]], ids=["console", "json"])
def test_a_pipe_that_nobody_reads_any_more_costs_nothing(
    tmp_path: Path, base: Path, words: list[str]
) -> None:
    """`| head`, or a program that watched and has died. A real pipe, whose other end is closed at the first word."""
    pictures(tmp_path / "images", 1)
    child = subprocess.Popen(
        [sys.executable, "launch.py", "--train", str(preset_file(tmp_path, base)), *words],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert child.stdout is not None
    assert child.stderr is not None
    try:
        child.stdout.readline()
        child.stdout.close()
        with child.stderr:
            said = child.stderr.read()
        assert child.wait(120) == 0
    finally:
        child.kill()
    run = tmp_path / "runs" / "small"
    assert [e["step"] for e in events_in(run) if e["event"] == "Step"] == [1, 2, 3, 4, 5, 6]
    assert (run / "small.safetensors").exists()
    assert "Traceback" not in said
    assert "Exception ignored" not in said
    if words:
        assert any("json_lines is told no more" in e.get("text", "") for e in events_in(run))
    else:
        assert "Finished in" in said  # the terminal is still there


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has it")
def test_a_disk_that_is_full_for_the_events_is_said_once(tmp_path: Path) -> None:
    heard: list[TrainEvent] = []
    log = EventLog(Path("/dev/full"), heard.append)
    notes = [Note(text=str(i)) for i in range(3)]
    for note in notes:
        log(note)
    log.close()
    assert heard[1:] == notes
    assert "/dev/full cannot be written (No space left on device); the training goes on." in str(heard[0])


def test_a_place_where_no_events_can_be_written_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "events.jsonl").mkdir()
    with pytest.raises(SaveFailed, match=r"events\.jsonl cannot be written: Is a directory"):
        EventLog(tmp_path / "events.jsonl")


def test_a_mistake_of_ours_is_in_the_events_too(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pictures(tmp_path / "images", 1)

    def broken(*_: object) -> None:
        raise ZeroDivisionError("of ours")

    monkeypatch.setattr(dreambooth, "batch_loss", broken)
    with pytest.raises(ZeroDivisionError):
        train(config(tmp_path, base))
    assert events_in(tmp_path / "runs" / "small")[-1]["reason"] == "ZeroDivisionError: of ours"


def test_without_tensorboard_a_sentence_and_nothing_begun(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    said = refusal(config(tmp_path, base, report={"tensorboard": True}))
    assert "lora-loom[tensorboard]" in said
    assert not (tmp_path / "runs").exists()


def test_tensorboard_reads_back_every_step_once(tmp_path: Path, base: Path) -> None:
    """As if killed after its fourth step, last saved at the second: what had been written of three and four
    is purged when the run goes on."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # noqa: PLC0415

    pictures(tmp_path / "images", 2)
    wanted = config(
        tmp_path,
        base,
        train={"steps": 6, "batch_size": 1},
        save={"every": 2},
        preview={"every": 2, "prompts": ["a cat"], "steps": 1},
        report={"tensorboard": True},
    )
    recorder = Recorder(stop_at=4)
    with pytest.raises(Stopped):
        train(wanted, stop=recorder.stop, listeners=[recorder])
    run = tmp_path / "runs" / "small"
    (run / "checkpoints" / "step-000004.safetensors").unlink()
    again = Recorder()
    train(wanted, resume=run, listeners=[again])
    losses: dict[int, float] = {**recorder.losses, **again.losses}
    assert sorted(again.losses) == [3, 4, 5, 6]
    read: Any = EventAccumulator(str(run / "tensorboard"))
    read.Reload()
    assert [e.step for e in read.Scalars("loss")] == list(range(1, 7))
    assert [e.value for e in read.Scalars("loss")] == pytest.approx(
        [losses[i] for i in range(1, 7)], rel=1e-6
    )
    assert [e.value for e in read.Scalars("learning_rate")] == pytest.approx([1e-3] * 6)
    assert [e.step for e in read.Images("a cat")] == [2, 4, 6]
