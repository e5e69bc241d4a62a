"""What the steps do without is not in memory, comes back bit for bit, and is missed by nobody."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

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


def test_a_device_with_a_number_is_the_one_without(tmp_path: Path) -> None:
    """A card is asked for as "cuda" and answers as "cuda:0": all of the base was put to rest after a picture."""
    bench = bench_of(config(tmp_path, cache_text=False))
    bench.device = torch.device("cpu", 0)
    assert bench.device != bench.live.pipeline.unet.device
    with awake(bench):
        pass
    assert resting(bench) == {"vae"}


def test_what_a_lora_is_trained_on_waits_in_memory(tmp_path: Path) -> None:
    bench = bench_of(config(tmp_path, text_encoder_learning_rate=1e-4))
    before = {n: p.clone() for n, p in bench.live.models["text_encoder"].named_parameters()}
    rest(bench, "text_encoder")
    assert resting(bench) == {"vae"}
    after = dict(bench.live.models["text_encoder"].named_parameters())
    assert all(torch.equal(before[n], p) for n, p in after.items())


def table_of(bench: Bench) -> torch.nn.Embedding:
    table: torch.nn.Embedding = bench.live.models["text_encoder"].get_input_embeddings()
    return table


def test_a_trained_encoder_keeps_the_rows_of_the_runs_words(tmp_path: Path) -> None:
    told = {"unrelated_prompts": ["a banana"], "subject_prompts": [], "seeds": [0]}
    wanted = TrainConfig.model_validate(
        config(tmp_path, text_encoder_learning_rate=1e-4).model_dump() | {"report": told}
    )
    bench = bench_of(wanted)
    assert bench.prompts is not None
    asked = [*bench.prompts, "a banana"]
    ids = bench.words.ids("text_encoder", asked)
    assert table_of(bench).weight.shape[0] == len(ids.unique())
    found = bench.words(asked).hidden
    with awake(bench):
        table = table_of(bench).weight
        assert not table.requires_grad
        assert len(table) == bench.live.models["text_encoder"].config.vocab_size
        assert bench.live.verify_base()
        assert torch.equal(bench.words(asked).hidden, found)
        bench.words(["guitar"])
    assert table_of(bench).weight.shape[0] == len(ids.unique())
    assert torch.equal(bench.words(asked).hidden, found)
    with pytest.raises(IndexError):
        bench.words(["guitar"])  # rather than another word's row


@pytest.mark.parametrize(
    "changed",
    [
        {"train": {"text_encoder_stop": 1}},
        {"data": {"shuffle_tags": True, "tag_dropout": 0.1, "prompt": ", ".join("abcdefghi")}},
        {"lora": {"new_tokens": {"zxq": "fox"}}},
    ],
    ids=["stops", "prompts without end", "new word"],
)
def test_a_table_that_is_asked_for_whole_stays_so(tmp_path: Path, changed: dict[str, Any]) -> None:
    whole = config(tmp_path, text_encoder_learning_rate=1e-4).model_dump()
    if "data" in changed:  # without captions
        (tmp_path / "bare").mkdir()
        for picture in whole["data"]["images"].glob("*.png"):
            shutil.copy(picture, tmp_path / "bare")
        whole["data"]["images"] = tmp_path / "bare"
    bench = bench_of(TrainConfig.model_validate(whole | {t: whole[t] | v for t, v in changed.items()}))
    assert len(table_of(bench).weight) >= bench.live.models["text_encoder"].config.vocab_size


def test_a_table_that_cannot_be_read_again_costs_the_pictures_and_nothing_else(tmp_path: Path) -> None:
    wanted, seen = config(tmp_path, text_encoder_learning_rate=1e-4, steps=3), list[events.TrainEvent]()

    def exchange(event: events.TrainEvent) -> None:
        seen.append(event)
        if isinstance(event, events.Step) and event.step == 1:
            (tmp_path / "base/text_encoder/model.safetensors").unlink()

    assert train(wanted, listeners=[exchange]).is_file()
    assert sum(isinstance(e, events.Step) for e in seen) == 3
    said = [e.text for e in seen if isinstance(e, events.Note)]
    assert any("preview of step 2 was not made; the training goes on" in text for text in said), said


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
