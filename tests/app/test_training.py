"""The training as the app sees it. Real child processes on a small base; the stories of others written by hand."""

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
from types import SimpleNamespace
from typing import Any

import pytest

from app import teaching
from app import training as app_training
from app.training import Training, TrainView
from lora_core import read_adapter
from lora_core.errors import ConfigError, LoraError
from tests.trainers.runs import base_folder, config, events_in, pictures
from trainers import presets
from trainers.run_folder import RunFolder

ROOT = Path(__file__).resolve().parents[2]
ENDLESS = ["train.steps=100000"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return base_folder(tmp_path_factory.mktemp("training") / "base")


@pytest.fixture
def preset(tmp_path: Path, base: Path) -> Path:
    pictures(tmp_path / "images", 3)
    path = tmp_path / "preset.toml"
    path.write_text(presets.dump(config(tmp_path, base)), encoding="utf-8")
    return path


@pytest.fixture
def training(tmp_path: Path) -> Any:
    made = Training(tmp_path / "runs")
    yield made
    if made._child is not None:
        made._child.kill()
        made._child.wait()


def until(training: Training, wanted: Callable[[TrainView], bool], seconds: float = 240) -> TrainView:
    end = time.monotonic() + seconds
    while True:
        view = training.view()
        if view is not None and wanted(view):
            return view
        assert time.monotonic() < end, f"waited in vain: {view}"
        assert view is None or view.state != "failed", view.error
        time.sleep(0.1)


def ended(training: Training) -> TrainView:
    end = time.monotonic() + 120
    while training.current() is not None:
        assert time.monotonic() < end, "it does not end"
        time.sleep(0.1)
    view = training.view()
    assert view is not None
    return view


def pid_of(run: Path) -> int:
    return int([e["pid"] for e in events_in(run) if e["event"] == "TakenUp"][-1])


def test_from_start_to_lora(tmp_path: Path, preset: Path, training: Training) -> None:
    """Paused at a step, seen by a server that was started later, sampled, given fewer steps by the page, and gone on
    with to the end."""
    run = training.start(preset, ["train.steps=40", "save.every=15"])
    assert run == tmp_path / "runs" / "small"
    view = training.view()
    assert view is not None
    assert (view.state, view.step, view.steps, view.name) == ("starting", 0, 40, "small")
    with pytest.raises(LoraError, match="small is being trained"):
        training.start(preset)
    until(training, lambda v: (run / "control").exists())
    training.commands().pause()
    view = until(training, lambda v: v.state == "paused")
    assert view.step >= 1
    assert len(view.losses) == view.step

    later = Training(tmp_path / "runs")  # the server was killed and started again
    assert later.current() == run
    found = later.view()
    assert found is not None
    assert (found.state, found.step, found.losses) == ("paused", view.step, view.losses)
    page: Any = SimpleNamespace(training=later)
    teaching.sample(page, "a zxq cat", 0.5)
    with pytest.raises(ConfigError, match="how many steps"):
        teaching.change_steps(page, None)
    teaching.change_steps(page, 30.0)
    until(later, lambda v: v.steps == 30)
    view = until(later, lambda v: bool(v.previews))
    at = view.step
    ((step, prompt, picture),) = view.previews
    assert (step, prompt, picture.is_file()) == (at, "a zxq cat", True)
    with pytest.raises(LoraError, match="small is being trained"):
        later.start(preset)
    later.commands().unpause()
    until(later, lambda v: v.step > at)

    view = ended(training)
    assert (view.state, view.step, view.error, view.resume) == ("finished", 30, "", "")
    assert view.lora == run / "small.safetensors"
    assert [step for step, _ in view.saved] == sorted({at, 15, 30})
    assert all(read_adapter(file).deltas for _, file in view.saved)
    assert [step for step, _, _ in view.losses] == list(range(1, 31))
    assert ended(later) == view
    with pytest.raises(LoraError, match="No training is running"):
        later.commands()
    log = RunFolder(run, "small").log.read_text()
    assert "Finished" in log
    assert "it/s" not in log  # no progress bar in a file
    assert Training(tmp_path / "runs").view() is None  # nothing runs, and this server has started nothing


def test_asked_to_end_and_resumed(tmp_path: Path, preset: Path, training: Training) -> None:
    run = training.start(preset, ENDLESS)
    until(training, lambda v: v.step >= 2)
    os.kill(pid_of(run), signal.SIGTERM)
    view = ended(training)
    assert view.state == "stopped"
    assert view.resume == f'python launch.py --train --resume "{run}"'
    assert view.lora == run / "checkpoints" / f"small-{view.step:06d}.safetensors"
    shorter = run / "preset.toml"
    shorter.write_text(shorter.read_text().replace("steps = 100000", f"steps = {view.step + 2}"))
    training.resume(run)
    again = training.view()
    assert again is not None
    assert (again.state, again.step, again.losses) == ("starting", view.step, view.losses)
    last = ended(training)
    assert (last.state, last.step) == ("finished", view.step + 2)
    assert [step for step, _, _ in last.losses] == list(range(1, view.step + 3))


def test_steps_drawn_for_another_run_are_not_taken(tmp_path: Path, preset: Path, training: Training) -> None:
    """The page's number is drawn apart from the run's card: a click between the two says the other run's number."""
    run = training.start(preset, ["train.steps=2"])
    ended(training)
    page: Any = SimpleNamespace(training=training, check=SimpleNamespace(stop=lambda: None))
    stale = teaching.of_view(page, 40.0, str(tmp_path / "runs" / "last_week"))
    with pytest.raises(ConfigError, match="all of its 2 steps"):
        teaching.pause_or_go_on(page, stale)
    assert training.current() is None
    teaching.pause_or_go_on(page, teaching.of_view(page, 3.0, str(run)))
    assert ended(training).step == 3


def test_killed(tmp_path: Path, preset: Path, training: Training) -> None:
    """A sentence; and the run, of which nothing was saved, can begin again in the same folder."""
    run = training.start(preset, ENDLESS)
    view = until(training, lambda v: v.step >= 3)
    training.commands().save()  # perhaps done, perhaps not: it must not be done to the next process
    training.commands().pause()
    os.kill(pid_of(run), signal.SIGKILL)
    view = ended(training)
    assert view.state == "failed"
    assert f"was killed (SIGKILL) after step {view.step}." in view.error
    assert "memory" in view.error
    training.resume(run)
    until(training, lambda v: v.state == "running" and v.step >= 1)
    training.commands().stop()
    last = ended(training)
    steps = [step for step, _, _ in last.losses]
    assert steps == list(range(1, last.step + 1))
    assert last.state == "stopped"


def test_a_bad_preset_starts_nothing(tmp_path: Path, preset: Path, training: Training) -> None:
    with pytest.raises(ConfigError, match="Did you mean"):
        training.start(preset, ["train.lerning_rate=1.0"])
    with pytest.raises(ConfigError, match="no preset"):
        training.start("nowhere")
    with pytest.raises(ConfigError, match="no run folder"):
        training.resume(tmp_path / "nowhere")
    assert training.view() is None
    assert training.current() is None
    assert not (tmp_path / "runs").exists()


def test_refused_by_the_trainer_and_started_again(tmp_path: Path, preset: Path, training: Training) -> None:
    (tmp_path / "empty").mkdir()
    run = training.start(preset, [f"data.images={tmp_path / 'empty'}"])
    view = ended(training)
    assert view.state == "failed"
    assert "holds no pictures" in view.error
    assert view.resume == ""
    assert training.start(preset, ["train.steps=1", "train.batch_size=1"]) == run  # never trained in
    begun = training.view()
    assert begun is not None
    assert (begun.state, begun.error) == ("starting", "")  # at once, not when the child gets so far
    assert ended(training).state == "finished"


def test_an_error_nobody_expected_is_quoted_from_the_log(
    tmp_path: Path, preset: Path, training: Training, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "launch.py"
    broken.write_text("print('hello')\nraise RuntimeError('the moon is full')")
    monkeypatch.setattr(app_training, "LAUNCH", broken)
    run = training.start(preset)
    view = ended(training)
    assert view.state == "failed"
    assert "RuntimeError: the moon is full" in view.error
    assert str(run / "log.txt") in view.error
    broken.write_text("import sys\nprint('Another process is training there.')\nsys.exit(3)")
    training.start(preset)
    assert ended(training).error == "Another process is training there."
    broken.write_text("import sys\nsys.exit(130)")  # told twice to go, before it had begun
    training.start(preset)
    view = ended(training)
    assert (view.state, view.error) == ("stopped", "")
    assert "--resume" in view.resume


# --- stories written by hand ----------------------------------------------------------------------------------


class Elsewhere:
    """A run that some other process holds, and its diary."""

    def __init__(self, runs: Path) -> None:
        self.root = runs / "fox"
        self.root.mkdir(parents=True)
        self.lock = RunFolder(self.root, "fox").lock()
        self.say("TakenUp", pid=1)

    def say(self, event: str, **facts: Any) -> None:
        self.write(json.dumps({"event": event, "time": 0, **facts}) + "\n")

    def write(self, text: str) -> None:
        with (self.root / "events.jsonl").open("a", encoding="utf-8") as file:
            file.write(text)

    def steps(self, first: int, last: int, loss: float = 1.0) -> None:
        for step in range(first, last + 1):
            self.say("Step", step=step, steps=9999, loss=loss, learning_rate=0.1, eta_s=5.0)


def seen(training: Training) -> TrainView:
    view = training.view()
    assert view is not None
    return view


def test_a_half_written_line_is_read_when_it_is_whole(tmp_path: Path) -> None:
    run, training = Elsewhere(tmp_path), Training(tmp_path)
    run.say("Started", first_step=1, steps=9999)
    line = json.dumps({"event": "Note", "text": "a cat named Ω"}, ensure_ascii=False)
    run.write(line[:-4])
    assert seen(training).notes == ()
    run.write(line[-4:])
    assert seen(training).notes == ()
    run.write("\n{damaged by a full disk\n")
    run.steps(1, 1)
    assert (seen(training).notes, seen(training).step) == (("a cat named Ω",), 1)


def test_only_what_is_new_is_read(tmp_path: Path) -> None:
    run, training = Elsewhere(tmp_path), Training(tmp_path)
    run.say("Started", first_step=1, steps=9999)
    run.steps(1, 5)
    assert len(seen(training).losses) == 5
    text = (run.root / "events.jsonl").read_text()
    (run.root / "events.jsonl").write_text(text.replace('"loss": 1.0', '"loss": 9.0'))
    run.steps(6, 6)
    assert [raw for _, raw, _ in seen(training).losses] == [1.0] * 6


@pytest.mark.parametrize("count", [0, 1, 999, 1000, 1001, 2500])
def test_at_most_a_thousand_points_from_the_first_step_to_the_last(tmp_path: Path, count: int) -> None:
    run, training = Elsewhere(tmp_path), Training(tmp_path)
    run.steps(1, count)
    steps = [step for step, _, _ in seen(training).losses]
    assert len(steps) == len(set(steps)) <= 1000
    assert len(steps) >= min(count, 500)
    assert steps[:1] + steps[-1:] == ([1, count] if count else [])


def test_smoothing_is_true_to_a_level_from_the_start_and_follows_it(tmp_path: Path) -> None:
    run, training = Elsewhere(tmp_path), Training(tmp_path)
    run.steps(1, 30, loss=2.0)
    assert [smooth for _, _, smooth in seen(training).losses] == pytest.approx([2.0] * 30)
    run.steps(31, 31, loss=0.0)
    assert 1.8 < seen(training).losses[-1][2] < 2.0
    run.steps(32, 200, loss=0.0)
    assert seen(training).losses[-1][2] < 0.01


def test_steps_lost_with_a_killed_process_are_told_once(tmp_path: Path) -> None:
    run, training = Elsewhere(tmp_path), Training(tmp_path)
    run.say("Started", first_step=1, steps=9999)
    run.steps(1, 12)
    run.say("Saved", step=10, path="s", lora="l10")
    run.say("Preview", step=10, paths=["10.png"], prompts=["a"])
    run.say("Preview", step=12, paths=["12.png"], prompts=["a"])
    run.say("TakenUp", pid=2)
    assert seen(training).state == "starting"
    run.say("Started", first_step=11, steps=9999)
    assert (seen(training).state, seen(training).step) == ("running", 10)
    run.steps(11, 12, loss=3.0)
    view = seen(training)
    assert [step for step, _, _ in view.losses] == list(range(1, 13))
    assert view.losses[-1][1] == 3.0
    assert view.previews == ((10, "a", Path("10.png")),)
    assert view.lora == Path("l10")


def test_states_and_endings_of_a_run_found(tmp_path: Path) -> None:
    run, training = Elsewhere(tmp_path), Training(tmp_path)
    run.say("Started", first_step=1, steps=9999)
    run.steps(1, 1)
    run.say("Paused", step=1)
    assert seen(training).state == "paused"
    run.say("Continued", step=1)
    assert seen(training).state == "running"
    run.say("Finished", path="fox.safetensors", seconds=1, layers=1, sha256="")
    view = seen(training)
    assert (view.state, view.lora, view.sheet) == ("finished", Path("fox.safetensors"), None)
    assert training.current() == run.root  # the report is in the making
    run.say("Reported", sheet="sheet.png", figures={"pictures": 4})
    run.lock.release()
    view = seen(training)
    assert (view.state, view.sheet, view.figures) == ("finished", Path("sheet.png"), {"pictures": 4})
    assert training.current() is None


def test_a_found_run_that_dies_in_silence(tmp_path: Path) -> None:
    run, training = Elsewhere(tmp_path), Training(tmp_path)
    run.say("Started", first_step=1, steps=9999)
    run.steps(1, 7)
    run.say("Saved", step=5, path="s", lora="l5")
    assert seen(training).state == "running"
    run.lock.release()
    view = seen(training)
    assert view.state == "failed"
    assert "ended without saying why after step 7" in view.error
    assert "--resume" in view.resume
    assert view == seen(training)


def test_many_threads_may_look_at_once(tmp_path: Path) -> None:
    """Each line is told once, however many look."""
    run, training = Elsewhere(tmp_path), Training(tmp_path)
    run.say("Started", first_step=1, steps=9999)
    failures: list[Exception] = []

    def look() -> None:
        try:
            for _ in range(50):
                training.view()
                training.current()
        except Exception as problem:  # said by the main thread
            failures.append(problem)

    threads = [threading.Thread(target=look) for _ in range(4)]
    for thread in threads:
        thread.start()
    for step in range(1, 201):
        run.steps(step, step)
    for thread in threads:
        thread.join()
    assert not failures
    assert [step for step, _, _ in seen(training).losses] == list(range(1, 201))


def test_it_is_light() -> None:
    code = "import sys, app.training; print(sorted({'torch', 'gradio', 'diffusers', 'numpy'} & set(sys.modules)))"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert result.stdout == "[]\n"
