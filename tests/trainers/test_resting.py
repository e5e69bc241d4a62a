"""What the steps do without is not in memory, comes back bit for bit, and is missed by nobody."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from lora_core.base_sources import find_source
from lora_core.errors import FileRefused
from trainers import events
from trainers.bench import Bench, prepare
from trainers.config import TrainConfig
from trainers.control import StopRequest
from trainers.dreambooth import train
from trainers.resting import awake, rest
from trainers.run_folder import RunFolder

CPU = torch.device("cpu")


def config(tmp_path: Path, **train_settings: object) -> TrainConfig:
    base = tmp_path / "base"
    if not base.exists():
        shutil.copytree(find_source("demo")[1], base)
    return TrainConfig.model_validate(
        {
            "name": "rested",
            "base": str(base),
            "output": tmp_path / "runs",
            "lora": {"rank": 2, "alpha": 2},
            "data": {"images": find_source("demo")[1].parent / "subjects/fox/train"},
            "train": {"steps": 2, "text_encoder_learning_rate": 0.0, **train_settings},
            "preview": {"every": 1, "prompts": ["a zxq fox"], "steps": 2},
            "report": {"subject_prompts": ["a zxq fox"], "seeds": [0], "steps": 2},
        }
    )


def bench_of(wanted: TrainConfig) -> Bench:
    return prepare(wanted, RunFolder.create(wanted), StopRequest(), lambda event: None)


def resting(bench: Bench) -> set[str]:
    parts = {"vae": bench.live.pipeline.vae, **bench.live.models}
    return {name for name, part in parts.items() if any(p.is_meta for p in part.parameters())}


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, {"vae", "text_encoder"}),
        ({"text_encoder_learning_rate": 1e-4}, {"vae"}),
        ({"cache_latents": False}, {"text_encoder"}),
        ({"cache_text": False}, {"vae"}),
    ],
    ids=["cached", "encoder trained", "latents not kept", "prompts not kept"],
)
def test_only_what_no_step_asks_for_leaves_memory(
    tmp_path: Path, settings: dict[str, object], expected: set[str]
) -> None:
    assert resting(bench_of(config(tmp_path, **settings))) == expected


def test_it_comes_back_bit_for_bit_and_leaves_again(tmp_path: Path) -> None:
    bench = bench_of(config(tmp_path))
    with awake(bench):
        assert not resting(bench)
        report = bench.live.verify_base()
        assert report, str(report)
        vae = bench.live.pipeline.vae
        assert not any(p.requires_grad for p in vae.parameters())
        assert not vae.training
    assert resting(bench) == {"vae", "text_encoder"}


def test_what_a_lora_is_trained_on_waits_in_memory(tmp_path: Path) -> None:
    bench = bench_of(config(tmp_path, text_encoder_learning_rate=1e-4))
    before = {n: p.clone() for n, p in bench.live.models["text_encoder"].named_parameters()}
    rest(bench, "text_encoder")
    assert resting(bench) == {"vae"}
    after = dict(bench.live.models["text_encoder"].named_parameters())
    assert all(torch.equal(before[n], p) for n, p in after.items())


def test_a_base_that_has_changed_costs_the_pictures_and_nothing_else(tmp_path: Path) -> None:
    """Its files are exchanged as soon as the first step is done."""
    wanted, seen = config(tmp_path), list[events.TrainEvent]()

    def exchange(event: events.TrainEvent) -> None:
        seen.append(event)
        if isinstance(event, events.Step) and event.step == 1:
            (tmp_path / "base/vae/diffusion_pytorch_model.safetensors").unlink()

    lora = train(wanted, listeners=[exchange])
    assert lora.is_file()
    said = [e.text for e in seen if isinstance(e, events.Note)]
    assert any("preview of step 1 was not made; the training goes on" in text for text in said), said
    assert any("the LoRA is finished and whole" in text for text in said), said


def test_a_missing_base_is_said_by_its_name(tmp_path: Path) -> None:
    bench = bench_of(config(tmp_path))
    shutil.rmtree(tmp_path / "base/text_encoder")
    with pytest.raises(FileRefused, match=r"model\.safetensors"), awake(bench):
        pass
    assert resting(bench) == {"vae", "text_encoder"}
