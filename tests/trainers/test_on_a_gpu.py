"""What only a card can show: `pytest -m gpu`. An fp32 base is not here where bits are compared: some kernels of a card
add up in no fixed order there, and two runs of one seed differ; in half precision none of those met here does."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lora_core.errors import Stopped
from tests.trainers.runs import Recorder, base_folder, config, pictures
from tests.trainers.test_no_waiting import RUNS, run_of
from trainers import dreambooth
from trainers.config import TrainConfig
from trainers.dreambooth import train
from trainers.events import Note, Preflight, TrainEvent
from trainers.sending import fetched, sent
from trainers.watch import Watch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
GPU = torch.device("cuda")


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    tmp = tmp_path_factory.mktemp("bases")
    return {family: base_folder(tmp / family, family) for family in ("sd1", "sdxl")}


def test_what_is_sent_arrives_however_it_lies() -> None:
    for there in (torch.randn(3, 4), torch.randn(1, 4).expand(3, 4), torch.randn(4, 3).T, torch.tensor(3)):
        arrived = sent(there, GPU)
        torch.cuda.synchronize()
        assert torch.equal(arrived.cpu(), there)
        back = fetched(arrived)
        torch.cuda.synchronize()
        assert torch.equal(back, there)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize(("family", "encoder"), [("sd1", 1e-4), ("sd1", 0.0), ("sdxl", 1e-4)], ids=str)
def test_begun_tried_out_stopped_and_gone_on_with(
    tmp_path: Path, bases: dict[str, Path], dtype: str, family: str, encoder: float
) -> None:
    """With previews, which call back what rests, and a dry run before: the same file, bit for bit."""
    pictures(tmp_path / "images", 3)

    def settings(name: str) -> TrainConfig:
        rates = {"text_encoder_learning_rate": encoder} | (
            {"text_encoder_2_learning_rate": 0.0} if family == "sdxl" else {}
        )
        return config(
            tmp_path,
            bases[family],
            train={"base_dtype": dtype, **rates},
            preview={"every": 2, "prompts": ["a zxq cat"], "steps": 2},
        ).model_copy(update={"name": name})

    straight, tried = train(settings("straight")), train(settings("tried"), preflight=True)
    stopping = settings("stopped")
    recorder = Recorder(stop_at=3)
    with pytest.raises(Stopped):
        train(stopping, stop=recorder.stop, listeners=[recorder])
    resumed = train(stopping, resume=stopping.output / "stopped")
    wanted = load_file(straight)
    assert all(torch.isfinite(t.float()).all() for t in wanted.values())
    assert any(t.abs().max() > 0 for key, t in wanted.items() if "up" in key or "lora_B" in key)
    for other in (tried, resumed):
        found = load_file(other)
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[key], wanted[key]) for key in wanted)


@pytest.fixture
def _waits_are_errors(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """From the second step on, until the losses are read."""

    class Listening(Watch):
        def keep(self, *given: Any) -> torch.Tensor:
            bad = super().keep(*given)
            torch.cuda.set_sync_debug_mode("error")
            return bad

        def read(self, *, scaled: bool) -> Any:
            torch.cuda.set_sync_debug_mode("default")
            return super().read(scaled=scaled)

    monkeypatch.setattr(dreambooth, "Watch", Listening)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Synchronization debug mode")
        yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.usefixtures("_waits_are_errors")
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("name", RUNS)
def test_no_step_waits_for_the_card(tmp_path: Path, bases: dict[str, Path], name: str, dtype: str) -> None:
    """A wait is an error here: RuntimeError, from where it is made."""
    train(run_of(tmp_path, bases, name, base_dtype=dtype))


def test_too_large_a_batch_comes_to_the_same_in_pieces(tmp_path: Path, bases: dict[str, Path]) -> None:
    """The allocator is given a real limit."""
    pictures(tmp_path / "images", 4, side=256)

    def run(name: str, *, preflight: bool) -> tuple[list[float], list[TrainEvent]]:
        recorder = Recorder()
        settings = config(
            tmp_path,
            bases["sd1"],
            data={"resolution": 256},
            train={"batch_size": 32, "steps": 3, "text_encoder_learning_rate": 0.0},
        )
        train(settings.model_copy(update={"name": name}), listeners=[recorder], preflight=preflight)
        return [recorder.losses[step] for step in sorted(recorder.losses)], recorder.seen

    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    whole, seen = run("whole", preflight=False)
    assert not any("out of memory" in str(event) for event in seen if isinstance(event, Note))
    taken = torch.cuda.max_memory_allocated() - before
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(GPU).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 0.6 * taken) / total)
    try:
        pieces, seen = run("pieces", preflight=True)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert any("of the 32 pictures of a batch at a time" in str(event) for event in seen)
    assert next(event for event in seen if isinstance(event, Preflight)).pieces > 1
    assert pieces == pytest.approx(whole, rel=1e-4)


def test_what_rests_is_given_back_to_the_card(tmp_path: Path, bases: dict[str, Path]) -> None:
    """Not to torch alone, which would keep it from every other program."""
    pictures(tmp_path / "images", 2)
    held: list[tuple[int, int]] = []

    def look(event: TrainEvent) -> None:
        if type(event).__name__ == "Started":
            held.append((torch.cuda.memory_allocated(), torch.cuda.memory_reserved()))

    train(config(tmp_path, bases["sd1"], train={"text_encoder_learning_rate": 0.0}), listeners=[look])
    ((allocated, reserved),) = held
    assert reserved - allocated < 64 * 2**20
