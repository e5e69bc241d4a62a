"""What goes wrong in a step costs nothing that was learnt, and a step waits for nothing but the look at the loss."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

from lora_core import algebra, read_adapter
from lora_core.errors import ConfigError, LoraError, NotFinite, Stopped
from lora_core.safe_files import read_header, read_tensors
from tests.trainers.runs import Recorder, base_folder, config, pictures
from trainers import bench, checkpoints, dreambooth, optim
from trainers.batches import Batch, Feeder
from trainers.dreambooth import train
from trainers.events import Note, Step, TrainEvent
from trainers.run_folder import RunFolder


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return base_folder(tmp_path_factory.mktemp("failures") / "base")


def spoil_batch(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """The latents of that batch are NaN."""
    plain, seen = Feeder.next, iter(range(1, 1000))

    def spoilt(self: Feeder, *given: Any) -> list[list[Batch]]:
        ((batch,),) = plain(self, *given)
        return [[dataclasses.replace(batch, z=batch.z * float("nan")) if next(seen) == number else batch]]

    monkeypatch.setattr(Feeder, "next", spoilt)


def state_at(run: Path, step: int) -> dict[str, torch.Tensor]:
    """Weights and moments of a checkpoint."""
    tensors = read_tensors(read_header(checkpoints.state_path(run / "checkpoints", step)))
    return {name: t for name, t in tensors.items() if not name.startswith("rng.")}


@pytest.mark.parametrize("log_every", [1, 4])
def test_no_step_is_taken_on_nan_and_the_run_stops_saved(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch, log_every: int
) -> None:
    """Also where the loss is looked at later: then the good steps in between were taken, and the bad one was not."""
    pictures(tmp_path / "images", 1)
    settings = config(tmp_path, base, train={"steps": 6, "batch_size": 1, "log_every": log_every})
    recorder = Recorder(stop_at=2)
    with pytest.raises(Stopped):  # what the weights and moments are after two good steps
        train(settings, stop=recorder.stop, listeners=[recorder])
    spoil_batch(monkeypatch, 3)
    found = Recorder()
    with pytest.raises(NotFinite) as problem:
        train(settings, listeners=[found])
    said = str(problem.value)
    assert "The loss at step 3 is nan, with 0.png" in said
    assert "No step was taken on it. The latents of 0.png are no numbers" in said
    run = tmp_path / "runs" / "small-2"
    assert str(run) in said
    assert list(found.losses) == [1, 2]
    (at,) = (step for step, _ in checkpoints.saved_steps(run / "checkpoints"))
    assert at == max(3, log_every)
    kept = state_at(run, at)
    assert {float(t) for name, t in kept.items() if name.startswith("step.")} == {at - 1}  # AdamW's own count
    if at == 3:
        good = state_at(tmp_path / "runs" / "small", 2)
        assert kept.keys() == good.keys()
        assert all(torch.equal(kept[name], good[name]) for name in good)
    monkeypatch.undo()
    again = Recorder()
    assert read_adapter(train(settings, resume=run, listeners=[again])).deltas
    assert list(again.losses) == list(range(at + 1, 7))


@pytest.mark.parametrize("save_every", [0, 2])
def test_nan_in_the_optimizer_is_never_saved(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch, save_every: int
) -> None:
    """Its next step ruins the weights: nothing of that is written, and the run goes on from what was saved before."""
    pictures(tmp_path / "images", 2)
    settings = config(tmp_path, base, train={"steps": 6, "batch_size": 1}, save={"every": save_every})
    straight = Recorder()
    train(settings, listeners=[straight])
    made: list[torch.optim.AdamW] = []
    plain = optim.adamw
    monkeypatch.setattr(optim, "adamw", lambda *a, **k: made.append(plain(*a, **k)) or made[0])

    def spoil(event: TrainEvent) -> None:
        if isinstance(event, Step) and event.step == 3:
            next(iter(made[0].state.values()))["exp_avg"].fill_(float("nan"))

    with pytest.raises(NotFinite) as problem:
        train(settings, listeners=[spoil])
    said, run = str(problem.value), tmp_path / "runs" / "small-2"
    assert "holds NaN or Inf (" in said
    assert "was not saved" in said
    assert said.count("step 5") == (0 if save_every else 2)  # the loss there is the first that shows it
    assert checkpoints.last_step(run / "checkpoints") == save_every
    monkeypatch.undo()
    again = Recorder()
    train(settings, resume=run, listeners=[again])
    assert again.losses == {s: loss for s, loss in straight.losses.items() if s > save_every}


def test_a_checkpoint_with_nan_is_passed_over(tmp_path: Path) -> None:
    """One that an earlier version, or a failing disk's friend, has written."""
    header = {"loom.kind": checkpoints.KIND, "loom.state": "{}"}
    for step, value in ((1, 0.0), (2, float("nan"))):
        tensors = {"lora.a": torch.full((2,), value)}
        checkpoints.save_tensors(checkpoints.state_path(tmp_path, step), tensors, header)
    path, problems = checkpoints.newest_whole(tmp_path)
    assert path == checkpoints.state_path(tmp_path, 1)
    assert problems == ["Checkpoint step-000002.safetensors holds NaN or Inf (lora.a) and was passed over."]


# --- memory --------------------------------------------------------------------------------------------------


def short_of_memory(monkeypatch: pytest.MonkeyPatch, fits: Callable[[bench.Bench, Batch], bool]) -> None:
    plain = dreambooth.batch_loss

    def limited(at: bench.Bench, batch: Batch) -> torch.Tensor:
        loss = plain(at, batch)
        if not fits(at, batch):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return loss

    monkeypatch.setattr(dreambooth, "batch_loss", limited)


def test_what_does_not_fit_is_done_in_pieces_and_is_the_same_step(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two batches a step of three pictures of each kind: six at once, then three, then two."""
    pictures(tmp_path / "images", 4)
    pictures(tmp_path / "class", 3, seed=1)
    settings = config(
        tmp_path,
        base,
        data={"class_images": tmp_path / "class", "class_prompt": "a cat", "prior_weight": 0.7},
        train={"steps": 3, "batch_size": 3, "gradient_accumulation": 2, "learning_rate": 1e-5},
    )
    whole = Recorder()
    train(settings, listeners=[whole])
    short_of_memory(monkeypatch, lambda _, batch: len(batch) <= 2)
    pieces = Recorder()
    train(settings, listeners=[pieces])
    assert list(pieces.losses.values()) == pytest.approx(list(whole.losses.values()), rel=1e-5)
    notes = [e.text for e in pieces.seen if isinstance(e, Note) and "out of memory" in e.text]
    assert [note.split(": ")[1].split(" pictures")[0] for note in notes] == ["3 of the 6", "2 of the 6"]


def test_then_activations_are_computed_twice_and_then_the_run_ends(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pictures(tmp_path / "images", 1)
    settings = config(tmp_path, base, train={"steps": 2, "batch_size": 1})
    whole = Recorder()
    train(settings, listeners=[whole])
    with monkeypatch.context() as patch:
        short_of_memory(patch, lambda at, _: at.checkpointed)
        recorder = Recorder()
        train(settings, listeners=[recorder])
    assert list(recorder.losses.values()) == pytest.approx(list(whole.losses.values()), rel=1e-5)
    assert [e for e in recorder.seen if isinstance(e, Note) and "gradient_checkpointing is on" in e.text]
    short_of_memory(monkeypatch, lambda *_: False)
    with pytest.raises(LoraError, match=r"out of memory.*train\.batch_size = 1.*lower data\.resolution"):
        train(settings)


def test_other_errors_of_the_device_are_not_taken_for_a_lack_of_memory(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pictures(tmp_path / "images", 1)

    def broken(*_: object) -> torch.Tensor:
        raise RuntimeError("CUDA error: device-side assert triggered")

    monkeypatch.setattr(dreambooth, "batch_loss", broken)
    with pytest.raises(RuntimeError, match="device-side assert"):
        train(config(tmp_path, base, train={"steps": 1, "batch_size": 1}))


# --- waiting -------------------------------------------------------------------------------------------------

LOOKS = {
    "item",
    "tolist",
    "numpy",
    "cpu",
    "__bool__",
    "__float__",
    "__int__",
    "__index__",
    "nonzero",
    "equal",
}


class Looks(TorchFunctionMode):
    """Counts what makes the host wait for a device, while `watching`."""

    def __init__(self) -> None:
        super().__init__()
        self.watching, self.seen = False, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.watching and getattr(func, "__name__", "") in LOOKS:
            self.seen += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("log_every", "expected"), [(1, {1}), (4, {0, 1})])
def test_a_step_waits_for_nothing_but_the_look_at_the_loss(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch, log_every: int, expected: set[int]
) -> None:
    """From the batch, which is made on the CPU, to the next one. With accumulation, dropout and min-SNR."""
    pictures(tmp_path / "images", 2)
    plain, looks, by_step = Feeder.next, Looks(), []

    def counted(self: Feeder, *given: Any) -> list[list[Batch]]:
        by_step.append(looks.seen)
        looks.watching, looks.seen = False, 0
        batches = plain(self, *given)
        looks.watching = True
        return batches

    monkeypatch.setattr(Feeder, "next", counted)
    settings = config(
        tmp_path,
        base,
        lora={"dropout": 0.1},
        train={
            "steps": 9,
            "batch_size": 1,
            "gradient_accumulation": 2,
            "log_every": log_every,
            "loss_weighting": "min_snr",
        },
    )
    recorder = Recorder()
    with looks:
        train(settings, listeners=[recorder])
    between = by_step[1:9]  # the ninth is followed by saving
    assert set(between) == expected
    assert between.count(1) == 8 // log_every
    assert list(recorder.losses) == list(range(1, 10))


def test_a_doras_norms_wait_for_nothing_on_a_gpu() -> None:
    weight, down, up = torch.randn(12, 10), torch.randn(2, 10), torch.randn(12, 2)
    with Looks() as looks:
        looks.watching = True
        algebra._with_nearest_dense(
            torch.rand(3, 12), torch.ones(3, 12), lambda layer, rows: weight[rows].square().sum(1)
        )
        assert looks.seen == 0
        algebra.row_norms(weight, down, up, scale=1.0)  # on a CPU, where it is free
        assert looks.seen == 1


def test_weights_alone_are_no_run_to_resume(tmp_path: Path, base: Path) -> None:
    pictures(tmp_path / "images", 1)
    settings = config(tmp_path, base, train={"steps": 1, "batch_size": 1})
    lora = train(settings)
    with pytest.raises(ConfigError, match=r"from weights alone.*lora\.start_from="):
        RunFolder.reopen(lora)
    with pytest.raises(ConfigError, match=r"from weights alone.*lora\.start_from="):
        train(settings, resume=lora)
