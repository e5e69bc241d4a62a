"""Asked to stop at any moment of its life, a run leaves soon, says where it stands, and goes on as if it had not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lora_core.errors import Stopped
from lora_core.pipeline import LivePipeline
from lora_core.safe_files import tensors_sha256
from tests.trainers.runs import Recorder, base_folder, config, events_in, pictures
from trainers.config import TrainConfig
from trainers.control import StopRequest
from trainers.dreambooth import train
from trainers.events import Finished, Note, Preflight, Step, TrainEvent


def settings(tmp: Path) -> TrainConfig:
    if not (tmp / "base").exists():
        base_folder(tmp / "base")
        pictures(tmp / "images", 2)
    return config(
        tmp,
        tmp / "base",
        lora={"dropout": 0.1},
        data={"class_prompt": "a cat", "class_count": 3, "class_images": tmp / "class"},
        train={"steps": 4, "batch_size": 1, "text_encoder_learning_rate": 0.0},
        preview={"every": 3, "prompts": ["a cat"], "steps": 2},
        report={"subject_prompts": ["a cat"], "seeds": [0], "steps": 2},
    )


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tensors_sha256(train(settings(tmp_path_factory.mktemp("straight"))))


def says(text: str) -> Callable[[TrainEvent], bool]:
    return lambda event: isinstance(event, Note) and text in event.text


MOMENTS: dict[str, tuple[Callable[[TrainEvent], bool], int]] = {  # and the step it then stands at
    "class pictures": (says("class pictures of"), 0),
    "caching": (says("pictures used"), 0),
    "encoding": (says("Latents: "), 0),
    "preflight": (lambda event: isinstance(event, Preflight), 0),
    "first step": (lambda event: isinstance(event, Step) and event.step == 1, 1),
    "preview": (lambda event: isinstance(event, Step) and event.step == 3, 3),
    "last step": (lambda event: isinstance(event, Step) and event.step == 4, 4),
    "report": (says("pictures for the report"), 4),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_stopped_at_any_moment(tmp_path: Path, straight: str, moment: str) -> None:
    when, at = MOMENTS[moment]
    stop, recorder, run = StopRequest(), Recorder(), tmp_path / "runs" / "small"

    def ask(event: TrainEvent) -> None:
        if when(event):
            stop.ask()

    with pytest.raises(Stopped):
        train(settings(tmp_path), stop=stop, listeners=[recorder, ask], preflight=True)
    assert max(recorder.losses, default=0) == at
    last = events_in(run)[-1]
    if at == 4:  # what is finished stays so
        assert any(isinstance(event, Finished) for event in recorder.seen)
        assert "The LoRA is finished" in last["text"]
        assert tensors_sha256(run / "small.safetensors") == straight
        return
    assert (last["event"], last["step"], bool(last["path"])) == ("Interrupted", at, at > 0)
    assert tensors_sha256(train(settings(tmp_path), resume=run)) == straight


def test_class_pictures_are_stopped_in_their_midst(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight are made at a time, which may take minutes."""
    stop, plain, asked = StopRequest(), LivePipeline.generate, []

    def watched(
        self: LivePipeline, request: Any, *, on_step: Callable[[int, int], object], **rest: Any
    ) -> Any:
        def one(step: int, steps: int) -> object:
            asked.append(step)
            stop.ask()
            return on_step(step, steps)

        return plain(self, request, on_step=one, **rest)

    monkeypatch.setattr(LivePipeline, "generate", watched)
    with pytest.raises(Stopped):
        train(settings(tmp_path), stop=stop)
    assert asked == [1]
    assert events_in(tmp_path / "runs" / "small")[-1]["event"] == "Interrupted"
