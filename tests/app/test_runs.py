"""Every run of a folder in a line: what its events tell, read again only where they grew."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from app.runs import Runs
from app.training import Training
from lora_core.errors import LoraError
from trainers import presets
from trainers.run_folder import RunFolder


def run(runs: Path, name: str, began: int) -> RunFolder:
    folder = RunFolder.create(presets.load("demo", [f"name={name}", f"output={json.dumps(str(runs))}"]))
    os.utime(folder.preset, (began, began))
    return folder


def say(folder: RunFolder, *events: dict[str, Any]) -> None:
    with folder.events.open("a", encoding="utf-8") as file:
        file.write("".join(json.dumps({"time": 0, **event}) + "\n" for event in events))


def step(number: int) -> dict[str, Any]:
    return {"event": "Step", "step": number, "steps": 40, "loss": 1.0, "learning_rate": 1.0, "eta_s": 1.0}


def test_runs_newest_first_each_as_it_ended(tmp_path: Path) -> None:
    runs = Runs(tmp_path)
    assert runs.all() == []
    old, new = run(tmp_path, "old", 1000), run(tmp_path, "new", 2000)
    (tmp_path / "look").mkdir()
    say(old, {"event": "Started", "first_step": 1, "steps": 40}, step(1), step(2))
    say(old, {"event": "Interrupted", "step": 2})
    say(new, {"event": "Started", "first_step": 1, "steps": 40}, step(1))
    old.page.write_text("a report")
    found = [(p.name, p.began, p.state, p.step, p.steps, p.report) for p in runs.all()]
    assert found == [("new", 2000, "broken off", 1, 40, False), ("old", 1000, "stopped", 2, 40, True)]
    before = runs.mark(None)
    assert before == runs.mark(None)
    aside = runs.mark(new.root)
    say(new, step(2), {"event": "Finished", "path": "new.safetensors"})
    assert runs.mark(None) != before
    assert runs.mark(new.root) == aside  # of the one at work, each step is no news
    assert (runs.all()[0].state, runs.all()[0].step) == ("finished", 2)


def test_an_earlier_run_is_shown_and_no_other_folder(tmp_path: Path) -> None:
    training = Training(tmp_path / "runs")
    folder = run(tmp_path / "runs", "fox", 1000)
    say(
        folder,
        {"event": "Started", "first_step": 1, "steps": 40},
        step(1),
        {"event": "Interrupted", "step": 1},
    )
    training.show("fox")
    view = training.view()
    assert view is not None
    assert (view.name, view.state, view.step, view.report) == ("fox", "stopped", 1, None)
    assert "--resume" in view.resume
    for name in ("cat", "..", "../runs/fox", ""):
        with pytest.raises(LoraError, match="There is no run"):
            training.show(name)
    other = run(tmp_path / "runs", "cat", 2000)
    with other.lock(), pytest.raises(LoraError, match="cat is being trained"):
        training.show("fox")
