"""The class without pictures of it, text encoders that stop learning, and what is measured at fixed noise."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline

from lora_core.errors import ConfigError, Stopped
from lora_core.safe_files import read_header, read_tensors
from tests.trainers.runs import Recorder, base_folder, config, pictures
from trainers import checkpoints, dreambooth, validation
from trainers.batches import Batch
from trainers.bench import Bench
from trainers.dreambooth import train
from trainers.events import Measured
from trainers.predicting import predict, predict_as_base


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return base_folder(tmp_path_factory.mktemp("prior") / "base")


MODEL: dict[str, Any] = {"class_from": "model", "class_prompt": "a cat", "prior_weight": 0.7}


def bare(base: Path) -> Any:
    return StableDiffusionPipeline.from_pretrained(base, safety_checker=None, dtype=torch.float32)


def words(pipe: Any, prompts: list[str]) -> torch.Tensor:
    ids = pipe.tokenizer(
        prompts, padding="max_length", max_length=77, truncation=True, return_tensors="pt"
    ).input_ids
    hidden: torch.Tensor = pipe.text_encoder(ids)[0]
    return hidden


def measured(recorder: Recorder) -> list[Measured]:
    return [event for event in recorder.seen if isinstance(event, Measured)]


# --- the class without pictures ------------------------------------------------------------------------------


@pytest.mark.parametrize("text_rate", [1e-3, 0.0])
def test_the_class_is_taught_by_the_model_with_the_lora_off(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch, text_rate: float
) -> None:
    """Each step's loss, written out: the pictures' own error, and that to what the base says of the class's prompt on
    the same noised latents. The base is asked through a second pipeline that never had a LoRA."""
    pictures(tmp_path / "images", 2)
    settings = config(
        tmp_path,
        base,
        data=MODEL,
        train={"steps": 3, "batch_size": 2, "text_encoder_learning_rate": text_rate},
    )
    pipe, plain, expected = bare(base), dreambooth.batch_loss, list[float]()

    def both(bench: Bench, batch: Batch) -> torch.Tensor:
        assert batch.captions == ["a zxq cat"] * 2 + ["a cat"] * 2
        assert torch.equal(batch.z[:2], batch.z[2:])
        assert torch.equal(batch.eps[:2], batch.eps[2:])
        z_t = bench.schedule.noise(batch.z, batch.eps, batch.t)
        with torch.no_grad():
            says = pipe.unet(z_t[2:], batch.t[2:], words(pipe, ["a cat"] * 2)).sample
            trained = predict(bench, batch, z_t)
            own = (trained[:2] - batch.eps[:2]).square().mean()
            expected.append(float(own + 0.7 * (trained[2:] - says).square().mean()))
        return plain(bench, batch)

    monkeypatch.setattr(dreambooth, "batch_loss", both)
    recorder = Recorder()
    train(settings, listeners=[recorder])
    assert list(recorder.losses.values()) == pytest.approx(expected, rel=1e-5)


def test_the_class_drifts_less_with_it(tmp_path: Path, base: Path) -> None:
    pictures(tmp_path / "images", 2)
    common = {"steps": 12, "batch_size": 1, "learning_rate": 3e-3}
    drift = {}
    for weight in (1e-6, 3.0):
        recorder = Recorder()
        train(
            config(tmp_path, base, data={**MODEL, "prior_weight": weight}, train=common), listeners=[recorder]
        )
        (last,) = measured(recorder)
        assert last.drift_by_prompt.keys() == {"a cat"}
        drift[weight] = last.drift
    assert drift[3.0] < 0.8 * drift[1e-6]


def test_what_does_not_go_together_is_refused(tmp_path: Path, base: Path) -> None:
    for data, said in (
        ({"class_from": "model"}, "goes by data.class_prompt alone"),
        ({**MODEL, "class_count": 3}, "leave data.class_images and data.class_count out"),
    ):
        with pytest.raises(ConfigError, match=re.escape(said)):
            config(tmp_path, base, data=data)


# --- a text encoder that stops -------------------------------------------------------------------------------


@pytest.mark.parametrize(("stop", "last"), [(4.0, 4), (0.5, 5)])
def test_a_text_encoder_stops_and_a_resumed_run_does_as_the_straight_one(
    tmp_path: Path, base: Path, stop: float, last: int
) -> None:
    """With a class taught by the model and an average; stopped before and after the encoder's own stop."""
    pictures(tmp_path / "images", 3)
    settings = config(
        tmp_path,
        base,
        lora={"dropout": 0.1},
        data=MODEL,
        train={"steps": 10, "batch_size": 1, "text_encoder_stop": stop, "ema_decay": 0.9},
        save={"every": 1, "keep": 20},
    )
    straight = Recorder()
    whole = train(settings, listeners=[straight])
    states = [read_tensors(read_header(p)) for _, p in checkpoints.saved_steps(whole.parent / "checkpoints")]
    text, unet = "lora.layers.135.factors.up", "lora.layers.0.factors.up"
    moved = [not torch.equal(a[text], b[text]) for a, b in itertools.pairwise(states)]
    assert moved == [step < last for step in range(1, 10)]
    assert all(not torch.equal(a[unet], b[unet]) for a, b in itertools.pairwise(states))
    for at in (2, 7):
        first, second = Recorder(stop_at=at), Recorder()
        with pytest.raises(Stopped) as said:
            train(settings, stop=first.stop, listeners=[first])
        run = Path(re.search(r'--resume "(.*)"', str(said.value))[1])  # type: ignore[index]
        resumed = train(settings, resume=run, listeners=[second])
        assert {**first.losses, **second.losses} == straight.losses
        a, b = (
            read_tensors(read_header(checkpoints.state_path(f.parent / "checkpoints", 10)))
            for f in (whole, resumed)
        )
        assert a.keys() == b.keys()
        assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_stop_without_effect_is_refused(tmp_path: Path, base: Path) -> None:
    with pytest.raises(ConfigError, match=r"text_encoder_stop = 3\.0 has no effect"):
        config(tmp_path, base, train={"text_encoder_stop": 3.0, "text_encoder_learning_rate": 0.0})
    with pytest.raises(ConfigError, match="neither a step nor a share"):
        config(tmp_path, base, train={"text_encoder_stop": 3.5})


# --- what is measured ----------------------------------------------------------------------------------------


def test_validation_changes_nothing_and_is_the_same_each_time(tmp_path: Path, base: Path) -> None:
    """At a rate that moves nothing two measurements are equal to the bit, and the training is that without them."""
    pictures(tmp_path / "images", 3)
    pictures(tmp_path / "held", 2, caption="a zxq cat", seed=9)
    common: dict[str, Any] = {
        "lora": {"dropout": 0.1},
        "train": {"steps": 4, "batch_size": 1, "learning_rate": 1e-12},
        "report": {
            "unrelated_prompts": ["a dog"],
            "subject_prompts": ["a zxq cat"],
            "seeds": [0],
            "steps": 1,
        },
    }
    plain, watched = Recorder(), Recorder()
    train(config(tmp_path, base, **{**common, "report": {}}), listeners=[plain])
    held = {"images": tmp_path / "held", "every": 2}
    file = train(config(tmp_path, base, **common, validation=held), listeners=[watched])
    assert watched.losses == plain.losses
    found = measured(watched)
    assert [m.step for m in found] == [2, 4]
    assert found[0].validation == pytest.approx(found[1].validation, rel=1e-6)
    assert len(found[0].validation_by_timestep) == 5
    assert found[0].drift_by_prompt.keys() == {"a dog"}
    assert found[1].drift < 1e-6
    figures = json.loads((file.parent / "report.json").read_text())
    assert figures["validation_loss"] == pytest.approx(found[1].validation, rel=1e-4)
    assert "drift_unet" in figures
    assert "validation loss" in str(found[0])


def test_a_share_is_held_back_and_never_trained_on(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pictures(tmp_path / "images", 5)
    settings = config(
        tmp_path, base, train={"steps": 6, "batch_size": 1}, validation={"share": 0.4}, data={"flip": True}
    )
    seen: set[str] = set()
    held: set[str] = set()
    plain = dreambooth.batch_loss

    def watched(bench: Bench, batch: Batch) -> torch.Tensor:
        seen.update(batch.names)
        held.update(example.path.name for example in bench.held_out)
        return plain(bench, batch)

    monkeypatch.setattr(dreambooth, "batch_loss", watched)
    recorder = Recorder()
    file = train(settings, listeners=[recorder])
    assert len(held) == 2
    assert not seen & held
    assert len(seen) == 3
    assert json.loads((file.parent / "report.json").read_text()).keys() == {"validation_loss"}
    (tmp_path / "images" / "1.png").rename(tmp_path / "1.png")
    for name in ("2.png", "3.png", "4.png"):
        (tmp_path / "images" / name).unlink()
    with pytest.raises(ConfigError, match="leaves none to learn from"):
        train(settings)


def test_drift_is_the_distance_to_the_base(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside a pipeline of diffusers that never had a LoRA; its text encoder is not the trained one either."""
    pictures(tmp_path / "images", 1)
    recorder, apart, plain, pipe = Recorder(), list[float](), validation.moved, bare(base)

    @torch.no_grad()
    def beside(bench: Bench, batch: Batch) -> float:
        z_t = validation.noised(bench, batch)
        says = pipe.unet(z_t, batch.t, words(pipe, batch.captions)).sample
        assert torch.allclose(predict_as_base(bench, batch, z_t), says, atol=1e-5)
        apart.append(float((predict(bench, batch, z_t) - says).abs().mean()))
        return plain(bench, batch)

    monkeypatch.setattr(validation, "moved", beside)
    settings = config(tmp_path, base, data=MODEL, train={"steps": 2, "batch_size": 1, "learning_rate": 1e-2})
    train(settings, listeners=[recorder])
    (found,) = measured(recorder)
    assert [found.drift] == pytest.approx(apart, rel=1e-4)
    assert apart[0] > 1e-4
