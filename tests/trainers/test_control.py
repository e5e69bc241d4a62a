"""A running training is told things through files: it acts between steps, and what it learns is the same."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from filelock import FileLock
from PIL import Image

from launch import main as launch_main
from lora_core import GenerationRequest, LivePipeline, read_adapter
from lora_core.errors import ConfigError, LoraError, SaveFailed, Stopped
from lora_core.generation import read_png_parameters
from lora_core.parameters import parse_parameters
from lora_core.safe_files import read_tensors
from tests.trainers.runs import Recorder, base_folder, config, events_in, pictures
from tests.trainers.test_bad_input import ROOT, launch, preset_file, read, wait_for
from trainers import checkpoints, presets, previews
from trainers.control import Commands, Orders, Sample, StopRequest, listening, signals_ask
from trainers.dreambooth import train
from trainers.events import Continued, Note, Paused, Preview, Saved, Step, StepsChanged, TrainEvent
from trainers.run_folder import RunFolder

DROPOUT: dict[str, Any] = {"lora": {"dropout": 0.1}}  # chance that a picture in between could disturb


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return base_folder(tmp_path_factory.mktemp("control") / "base")


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory, base: Path) -> tuple[dict[int, float], Path]:
    """The losses and the file of a run that nobody disturbs."""
    tmp = tmp_path_factory.mktemp("straight")
    pictures(tmp / "images", 3)
    recorder = Recorder()
    return recorder.losses, train(config(tmp, base, **DROPOUT), listeners=[recorder])


def at_step(number: int, act: Callable[[], None]) -> Callable[[TrainEvent], None]:
    return lambda event: act() if isinstance(event, Step) and event.step == number else None


def of_kind(recorder: Recorder, kind: type[TrainEvent]) -> list[Any]:
    return [event for event in recorder.seen if isinstance(event, kind)]


def same_file(a: Path, b: Path) -> bool:
    ours, theirs = read_tensors(a), read_tensors(b)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


def disturbed(tmp: Path, base: Path, *listeners: Callable[[TrainEvent], None]) -> tuple[Recorder, Path]:
    pictures(tmp / "images", 3)
    recorder = Recorder()
    return recorder, train(config(tmp, base, **DROPOUT), listeners=[recorder, *listeners])


def test_a_pause_holds_the_steps_and_changes_nothing(
    tmp_path: Path, base: Path, straight: tuple[dict[int, float], Path]
) -> None:
    commands, held = Commands(tmp_path / "runs" / "small"), []

    def go_on() -> None:
        held.append(len(recorder.losses))
        commands.unpause()

    def go_on_later(event: TrainEvent) -> None:
        if isinstance(event, Paused):
            threading.Timer(1.5, go_on).start()

    pictures(tmp_path / "images", 3)
    recorder = Recorder()
    file = train(
        config(tmp_path, base, **DROPOUT), listeners=[recorder, at_step(2, commands.pause), go_on_later]
    )
    assert held == [2]
    assert [e.step for e in of_kind(recorder, Paused)] == [2]
    assert [e.step for e in of_kind(recorder, Continued)] == [2]
    assert recorder.losses == straight[0]
    assert same_file(file, straight[1])


def test_a_pause_is_no_part_of_the_time_left(tmp_path: Path, base: Path) -> None:
    commands = Commands(tmp_path / "runs" / "small")
    etas: dict[int, float] = {}

    def watch(event: TrainEvent) -> None:
        if isinstance(event, Step):
            etas[event.step] = event.eta_s
        if isinstance(event, Paused):
            threading.Timer(4, commands.unpause).start()

    disturbed(tmp_path, base, at_step(1, commands.pause), watch)
    assert etas[2] < etas[1] + 4  # 4 s in the first two of six steps would have been 8 s more


def test_save_now(tmp_path: Path, base: Path, straight: tuple[dict[int, float], Path]) -> None:
    commands = Commands(tmp_path / "runs" / "small")
    recorder, file = disturbed(tmp_path, base, at_step(3, commands.save))
    run = tmp_path / "runs" / "small"
    assert [e.step for e in of_kind(recorder, Saved)] == [3, 6]  # done once: the command is consumed
    assert [step for step, _ in checkpoints.saved_steps(run / "checkpoints")] == [3, 6]
    saved = of_kind(recorder, Saved)[0]
    assert read_adapter(saved.lora).metadata["ss_steps"] == "3"
    assert same_file(file, straight[1])


def test_sample_now(tmp_path: Path, base: Path, straight: tuple[dict[int, float], Path]) -> None:
    """Own prompt and settings; what is left out is as in the previews. The result does not know of it."""
    commands = Commands(tmp_path / "runs" / "small")

    def ask() -> None:
        commands.sample("a zxq cat on the moon", seed=7, steps=3, guidance=2.5)
        commands.sample("a dog", steps=2)

    recorder, file = disturbed(tmp_path, base, at_step(2, ask))
    folder = tmp_path / "runs" / "small" / "previews"
    made = [parse_parameters(read_png_parameters(folder / f"sample-000002-{i}.png")) for i in (0, 1)]
    assert made[0]["prompt"] == "a zxq cat on the moon"
    fields = made[0]["fields"]
    assert (fields["Seed"], fields["Steps"], fields["CFG scale"]) == ("7", "3", "2.5")
    assert made[1]["prompt"] == "a dog"
    assert (made[1]["fields"]["Seed"], made[1]["fields"]["CFG scale"]) == ("0", "7.5")
    told = of_kind(recorder, Preview)
    assert [e.prompts for e in told] == [("a zxq cat on the moon",), ("a dog",)]
    assert told[0].paths == (str(folder / "sample-000002-0.png"),)
    assert recorder.losses == straight[0]
    assert same_file(file, straight[1])


def test_what_cannot_be_sampled_is_said_and_the_training_goes_on(
    tmp_path: Path, base: Path, straight: tuple[dict[int, float], Path]
) -> None:
    control = tmp_path / "runs" / "small" / "control"
    bad = {
        "sample-1.json": '{"prompt": "a cat", "sed": 3}',
        "sample-2.json": '{"prompt": "a cat", "steps": 0}',
        "sample-3.json": '{"prompt": "a cat"',
        "sample-4.json": '{"seed": 1}',
        "sample-5.json": '{"prompt": "a cat", "seed": "many"}',
        "sample-6.json": '{"prompt": "a cat", "weight": "much"}',
        "sing": "",
    }

    def ask() -> None:
        for name, text in bad.items():
            (control / name).write_text(text)

    recorder, file = disturbed(tmp_path, base, at_step(2, ask))
    notes = [e.text for e in of_kind(recorder, Note)][-7:]
    assert any("sample-6.json was not done: its weight is 'much'" in note for note in notes)
    notes = [note for note in notes if "sample-6" not in note]
    assert 'sample-1.json was not done: "sed" is no setting of a sample. Did you mean "seed"' in notes[0]
    assert "not JSON" in notes[1]
    assert "no prompt" in notes[2]
    assert "steps" in notes[3]
    assert "seed" in notes[4]
    assert not of_kind(recorder, Preview)
    assert same_file(file, straight[1])


def test_a_preview_that_fails_leaves_the_training_as_it_was(
    tmp_path: Path,
    base: Path,
    straight: tuple[dict[int, float], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Dropout is on again: a disk that is full for one picture is no other training."""
    problems = iter([SaveFailed("the disk is full"), torch.OutOfMemoryError("too large")])

    def fail(*_: object) -> None:
        raise next(problems)

    monkeypatch.setattr(previews, "save_png", fail)
    commands = Commands(tmp_path / "runs" / "small")

    def ask() -> None:
        commands.sample("a cat", steps=1)
        commands.sample("a cat", steps=1)

    recorder, file = disturbed(tmp_path, base, at_step(2, ask))
    notes = [e.text for e in of_kind(recorder, Note)][-2:]
    assert "the disk is full" in notes[0]
    assert "out of memory" in notes[1]
    assert recorder.losses == straight[0]
    assert same_file(file, straight[1])


def test_a_child_is_paused_sampled_saved_and_stopped_through_its_folder(
    tmp_path: Path, base: Path, straight: tuple[dict[int, float], Path]
) -> None:
    """A real process. While paused it still answers; stopping leaves 130 and a run that goes on to the same file."""
    pictures(tmp_path / "images", 3)
    preset, run = preset_file(tmp_path, base), tmp_path / "runs" / "small"
    endless = ["--set", "lora.dropout=0.1", "--set", "train.steps=100000"]
    child = subprocess.Popen(
        [sys.executable, "launch.py", "--train", str(preset), *endless],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    commands = Commands(run)

    def told(event: str) -> bool:
        return f'"event": "{event}"' in read(run / "events.jsonl")

    try:
        wait_for((run / "control").is_dir, child)
        commands.pause()  # heard while it is still getting ready, obeyed after the first step
        wait_for(lambda: told("Paused"), child)
        commands.sample("a cat", steps=1)
        commands.save()
        wait_for(lambda: told("Preview") and told("Saved"), child)
        assert {e["step"] for e in events_in(run) if "step" in e} == {1}
        commands.stop()
        out, _ = child.communicate(timeout=60)
    finally:
        child.kill()
    assert child.returncode == 130
    assert "--resume" in out
    assert not told("Continued")
    assert not (run / "control").exists()  # nobody listens any more
    result = launch("--train", "--resume", str(run), "--set", "train.steps=6")
    assert result.returncode == 0, result.stderr
    assert same_file(run / "small.safetensors", straight[1])


COSINE: dict[str, Any] = {**DROPOUT, "train": {"schedule": "cosine", "steps": 6, "text_encoder_stop": 0.5}}


@pytest.mark.parametrize("wanted", [4, 8])
def test_more_or_fewer_steps_while_it_runs(tmp_path: Path, base: Path, wanted: int) -> None:
    """The rate does not depend on the number of steps here: so the run is the one that had it from the start."""
    pictures(tmp_path / "images", 3)
    straight = train(config(tmp_path, base, **DROPOUT, train={"steps": wanted}))
    recorder, commands = Recorder(), Commands(tmp_path / "runs" / "small-2")
    orders = [recorder, at_step(3, lambda: commands.steps(wanted))]
    file = train(config(tmp_path, base, **DROPOUT), listeners=orders)
    assert sorted(recorder.losses) == list(range(1, wanted + 1))
    (changed,) = of_kind(recorder, StepsChanged)
    assert (changed.step, changed.steps, changed.before) == (3, wanted, 6)
    assert same_file(file, straight)
    assert read_adapter(file).metadata["ss_steps"] == str(wanted)
    assert presets.load(file.parent / "preset.toml").train.steps == wanted


def test_a_run_whose_steps_were_changed_resumes_as_itself(tmp_path: Path, base: Path) -> None:
    """With a schedule and a text encoder's end that know the number, killed after the change: the same as if it had
    not been."""
    pictures(tmp_path / "images", 3)
    whole, commands = Recorder(), Commands(tmp_path / "runs" / "small")
    orders = [whole, at_step(3, lambda: commands.steps(8))]
    straight = train(config(tmp_path, base, **COSINE), listeners=orders)
    again, first = Commands(tmp_path / "runs" / "small-2"), Recorder(stop_at=5)
    orders = [first, at_step(3, lambda: again.steps(8))]
    with pytest.raises(Stopped):
        train(config(tmp_path, base, **COSINE), stop=first.stop, listeners=orders)
    run = tmp_path / "runs" / "small-2"
    (run / "checkpoints" / "step-000005.safetensors").unlink()  # as if killed and not stopped
    second = Recorder()
    file = train(RunFolder.reopen(run)[1], resume=run, listeners=[second])
    assert sorted(second.losses) == [4, 5, 6, 7, 8]
    assert {**first.losses, **second.losses} == whole.losses
    assert same_file(file, straight)


def test_steps_that_cannot_be_are_said_and_change_nothing(
    tmp_path: Path, base: Path, straight: tuple[dict[int, float], Path]
) -> None:
    commands, file = Commands(tmp_path / "runs" / "small"), tmp_path / "runs" / "small" / "control" / "steps"
    with pytest.raises(ConfigError, match="at least one step"):
        commands.steps(0)
    acts = [lambda: commands.steps(2), lambda: file.write_text("many"), lambda: file.write_text("0")]
    recorder, lora = disturbed(tmp_path, base, *(at_step(i + 3, act) for i, act in enumerate(acts)))
    notes = [e.text for e in of_kind(recorder, Note) if "number of steps was not changed" in e.text]
    assert "3 are done and 2 were asked for" in notes[0]
    assert "'many'" in notes[1]
    assert "'0'" in notes[2]
    assert not of_kind(recorder, StepsChanged)
    assert recorder.losses == straight[0]
    assert same_file(lora, straight[1])


def test_nothing_that_lies_in_the_folder_ends_a_training(
    tmp_path: Path, base: Path, straight: tuple[dict[int, float], Path]
) -> None:
    """Folders in the place of files, links to nowhere, what no parser can read, a LoRA that is not there."""
    control = tmp_path / "runs" / "small" / "control"

    def ask() -> None:
        for name in ("save", "steps", "sample-1.json"):
            (control / name).mkdir()
            (control / name / "inside").touch()
        (control / "sample-2.json").symlink_to("nowhere")
        (control / "sample-3.json").write_text("[" * 100_000)
        (control / "sample-4.json").write_text('{"prompt": "a cat <lora:ink:0.5>", "steps": 1}')
        (control / "sing").touch()

    recorder, file = disturbed(tmp_path, base, at_step(2, ask))
    notes = [e.text for e in of_kind(recorder, Note)]
    for name in ("sample-1.json", "sample-2.json", "sample-3.json"):
        assert len([note for note in notes if f"{name} was not done: it is not JSON" in note]) == 1
    assert len([note for note in notes if "The number of steps was not changed" in note]) == 1
    assert (
        len([note for note in notes if "The preview of step 2 was not made" in note and "ink" in note]) == 1
    )
    (strange,) = [note for note in notes if "sing" in note]
    assert "control/sing is no order; known are pause, save" in strange
    assert [e.step for e in of_kind(recorder, Saved)] == [2, 6]  # a folder named save is as good as a file
    assert recorder.losses == straight[0]
    assert same_file(file, straight[1])


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_orders_as_other_programs_write_them(tmp_path: Path, encoding: str) -> None:
    """PowerShell writes UTF-16 or a byte order mark, and ends its lines with two characters."""
    with listening(tmp_path / "control", StopRequest()) as orders:
        (tmp_path / "control" / "steps").write_text("1200\r\n", encoding=encoding)
        (tmp_path / "control" / "sample-1.json").write_text('{"prompt": "ä cat"}\r\n', encoding=encoding)
        assert orders.take_steps(pytest.fail) == 1200
        assert orders.take_samples(pytest.fail) == [Sample("ä cat")]
        assert not orders.waiting


def test_what_is_no_text_is_no_number_of_steps(tmp_path: Path) -> None:
    said: list[str] = []
    with listening(tmp_path / "control", StopRequest()) as orders:
        for data in (b"12\xe9", b"\xff\xfe1", b"1" * 5000, b""):
            (tmp_path / "control" / "steps").write_bytes(data)
            assert orders.take_steps(said.append) is None
            assert not orders.waiting  # it does not lie there for every step to look at
    assert len(said) == 4
    assert all(len(text) < 200 for text in said)


@pytest.mark.parametrize("variant", ["lora", "dora"])
def test_a_sample_at_a_weight_is_the_pipelines(tmp_path: Path, base: Path, variant: str) -> None:
    """Worn by the form that trains, at any weight, as the saved file is worn by a pipeline of its own."""
    commands = Commands(tmp_path / "runs" / "small")
    weights = (0.0, 0.4, 1.0, -1.5)

    def ask() -> None:
        for weight in weights:
            commands.sample("a zxq cat", weight=weight, steps=2)
        commands.save()

    pictures(tmp_path / "images", 2)
    fast = {"lora": {"variant": variant}, "train": {"learning_rate": 3e-2}}
    train(config(tmp_path, base, **fast), listeners=[at_step(4, ask)])
    run = tmp_path / "runs" / "small"
    live = LivePipeline.open(base, device="cpu")
    live.load(run / "checkpoints" / "small-000004.safetensors", name="it")
    made = []
    for i, weight in enumerate(weights):
        live.set_weights({"it": weight})
        (expected,) = live.generate(GenerationRequest(prompt="a zxq cat", seed=0, steps=2, guidance=7.5))
        found = np.asarray(Image.open(run / "previews" / f"sample-000004-{i}.png")).astype(int)
        assert np.abs(found - np.asarray(expected.image).astype(int)).max() <= 2
        made.append(found)
    gaps = [np.abs(a - b).mean() for a in made for b in made if a is not b]
    assert min(gaps) > 2  # and they are different pictures


def test_a_second_signal_leaves_at_once(tmp_path: Path, base: Path) -> None:
    """While the first is still waiting for its step to end."""
    pictures(tmp_path / "images", 1)
    slow = ["--set", "train.batch_size=64", "--set", "train.gradient_accumulation=50"]
    child = subprocess.Popen(
        [sys.executable, "launch.py", "--train", str(preset_file(tmp_path, base)), *slow],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        wait_for(lambda: '"event": "Started"' in read(tmp_path / "runs/small/events.jsonl"), child)
        child.send_signal(signal.SIGINT)
        time.sleep(0.3)
        assert child.poll() is None  # the step takes longer than that
        asked = time.monotonic()
        child.send_signal(signal.SIGTERM)
        assert child.wait(5) == 130
        assert time.monotonic() - asked < 1
    finally:
        child.kill()


@pytest.mark.parametrize(
    ("word", "does"),
    [
        ("pause", ["pause"]),
        ("save", ["save"]),
        ("stop", ["stop"]),
        ("continue", []),
        ("steps=1200", ["steps"]),
        ("sample=a cat", Sample("a cat")),
        ("sample=a cat@0.8", Sample("a cat", weight=0.8)),
        ("sample=mail me@home, 2@-1", Sample("mail me@home, 2", weight=-1.0)),
        ("sample=a = b", Sample("a = b")),
    ],
)
def test_tell_from_a_terminal(
    tmp_path: Path, word: str, does: list[str] | Sample, capsys: pytest.CaptureFixture[str]
) -> None:
    with FileLock(tmp_path / ".lock"), listening(tmp_path / "control", StopRequest()) as orders:
        assert launch_main(["--tell", str(tmp_path), word]) == 0
        found = sorted(path.name for path in (tmp_path / "control").iterdir())
        if isinstance(does, Sample):
            assert orders.take_samples(pytest.fail) == [does]
        else:
            assert found == does
        if does == ["steps"]:
            assert orders.take_steps(pytest.fail) == 1200
    assert len(capsys.readouterr().out.splitlines()) == 1


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["pause"], 1, "No training is at work"),
        ([], 2, "Say what"),
        (["puase"], 2, 'Did you mean "pause"'),
        (["pause", "steps=many"], 2, "must be a number"),
        (["pause", "steps=" + "9" * 5000], 2, "must be a number"),
        (["pause", "steps=0"], 2, "at least one step"),
        (["pause", "steps=2000000000"], 2, "at most 1,000,000,000"),
        (["pause", "sample=a cat@200"], 2, "its weight is 200"),
        (["pause", "sample= @1"], 2, "no prompt"),
        (["steps"], 2, "needs a value"),
        (["sample"], 2, "needs a value"),
    ],
)
def test_tell_refuses_with_a_sentence(
    tmp_path: Path, words: list[str], code: int, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """As a process that was killed leaves it: its folder of orders is there, and its lock is free."""
    (tmp_path / "control").mkdir()
    (tmp_path / ".lock").touch()
    assert launch_main(["--tell", str(tmp_path), *words]) == code
    assert says in capsys.readouterr().err
    assert not list(tmp_path.glob("control/*"))  # all or nothing


def test_a_signal_ends_a_pause(tmp_path: Path, base: Path) -> None:
    commands, recorder = Commands(tmp_path / "runs" / "small"), Recorder()
    pictures(tmp_path / "images", 1)
    interrupt = threading.Timer(0.5, lambda: os.kill(os.getpid(), signal.SIGINT))

    def on_pause(event: TrainEvent) -> None:
        if isinstance(event, Paused):
            interrupt.start()

    with pytest.raises(Stopped, match="Stopped at step 1 of 6"):
        train(config(tmp_path, base), listeners=[recorder, at_step(1, commands.pause), on_pause])
    assert not of_kind(recorder, Continued)


def test_stale_commands_are_cleared_at_start_and_resume(tmp_path: Path, base: Path) -> None:
    """What a killed process was told and did not do is not done to the next one."""
    pictures(tmp_path / "images", 1)
    settings = config(tmp_path, base, train={"steps": 2, "batch_size": 1})
    run = RunFolder.create(settings)

    def leave_stale() -> None:
        run.control.mkdir()
        for name in ("pause", "stop", "save"):
            (run.control / name).touch()
        (run.control / "sample-1.json").write_text('{"prompt": "a cat"}')

    leave_stale()
    recorder = Recorder()
    assert train(settings, listeners=[recorder]).parent == run.root  # the folder was never trained in
    leave_stale()
    again = Recorder()
    longer = settings.model_copy(update={"train": settings.train.model_copy(update={"steps": 4})})
    train(longer, resume=run.root, listeners=[again])
    for seen in (recorder, again):
        assert not of_kind(seen, Paused)
        assert not of_kind(seen, Preview)
        assert len(of_kind(seen, Saved)) == 1
    assert sorted(again.losses) == [3, 4]


def test_a_run_stopped_before_its_first_save_is_resumed_at_its_beginning(
    tmp_path: Path, base: Path, straight: tuple[dict[int, float], Path]
) -> None:
    pictures(tmp_path / "images", 3)
    stop = StopRequest()
    stop.ask()
    with pytest.raises(Stopped, match="before the first step"):
        train(config(tmp_path, base, **DROPOUT), stop=stop)
    run = tmp_path / "runs" / "small"
    (said,) = (e for e in events_in(run) if e["event"] == "Interrupted")
    assert (said["step"], said["path"]) == (0, "")
    assert str(run) in said["resume"]
    assert same_file(train(config(tmp_path, base, **DROPOUT), resume=run), straight[1])


def test_commands_are_refused_where_nobody_listens(tmp_path: Path) -> None:
    commands = Commands(tmp_path)
    for command in (commands.pause, commands.save, commands.stop, lambda: commands.sample("a cat")):
        with pytest.raises(LoraError, match="No training listens"):
            command()
    commands.unpause()  # there is nothing to take back
    with listening(tmp_path / "control", StopRequest()) as orders:
        assert not orders.waiting
        with pytest.raises(ConfigError, match="no prompt"):
            commands.sample("  ")
        commands.sample("ä cat", seed=5)
        commands.sample("b")
        assert orders.waiting
        assert orders.take_samples(pytest.fail) == [Sample("ä cat", seed=5), Sample("b")]
        assert not orders.waiting
        (tmp_path / "control").rmdir()  # somebody tidies up
        assert not orders.waiting
        assert not orders.hold()


def test_stop_through_the_folder_and_then_a_signal_is_no_second_signal(tmp_path: Path) -> None:
    """The second signal leaves at once, unsaved; the page's own stop must not count as the first."""
    stop = StopRequest()
    with listening(tmp_path / "control", stop), signals_ask(stop):
        Commands(tmp_path).stop()
        assert stop.asked
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.05)
    assert stop.asked


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="Windows has none")
def test_a_closed_terminal_asks_and_never_leaves_at_once() -> None:
    """It says so twice, itself and through its shell; and a session that ends says SIGTERM as well."""
    stop = StopRequest()
    with signals_ask(stop):
        for number in (signal.SIGHUP, signal.SIGHUP, signal.SIGTERM, signal.SIGHUP):
            os.kill(os.getpid(), number)
            time.sleep(0.05)
    assert stop.asked


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="Windows has none")
def test_nohup_holds() -> None:
    stop, before = StopRequest(), signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with signals_ask(stop):
            os.kill(os.getpid(), signal.SIGHUP)
            time.sleep(0.05)
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
    assert not stop.asked


def test_commands_are_light() -> None:
    """The page imports them; it must not wait for torch."""
    code = "import sys, trainers.control, trainers.run_folder, trainers.events; print('torch' in sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert result.stdout == "False\n"


def test_a_look_into_the_folder_costs_next_to_nothing(tmp_path: Path) -> None:
    orders = Orders(tmp_path, StopRequest())
    began = time.perf_counter()
    for _ in range(1000):
        _ = orders.waiting
    assert (time.perf_counter() - began) / 1000 < 0.002  # a step takes a hundred times as long at the least


def test_events_of_a_command_are_json(tmp_path: Path) -> None:
    line = json.loads(Preview(step=3, paths=("a.png",), prompts=("ä",)).line())
    assert (line["event"], line["step"], line["prompts"]) == ("Preview", 3, ["ä"])
    assert "step 3" in str(Paused(step=3))
    assert "step 3" in str(Continued(step=3))
