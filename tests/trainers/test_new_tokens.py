"""A run that learns a word with its LoRA: its row alone has moved, and resuming is the straight run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lora_core import LivePipeline, read_adapter
from lora_core.adapter import weight_of
from lora_core.errors import ConfigError, Stopped
from tests.trainers.runs import Recorder, base_folder, config, pictures, refusal
from trainers import presets
from trainers.config import TrainConfig
from trainers.dreambooth import train


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return base_folder(tmp_path_factory.mktemp("base") / "m")


def settings(tmp: Path, base: Path, **train_table: object) -> TrainConfig:
    pictures(tmp / "images", 3)
    return config(
        tmp,
        base,
        lora={"new_tokens": {"<fox>": "cat", "<look>": 2}},
        data={"prompt": "a <fox> cat in <look>"},
        train={"steps": 4, **train_table},
    )


@pytest.mark.parametrize("encoder_rate", [None, 0])
def test_a_run_learns_words_with_the_lora(encoder_rate: float | None, base: Path, tmp_path: Path) -> None:
    """With the text encoder's own LoRA and without: either way the words are not taken from a cache."""
    run = settings(tmp_path, base, text_encoder_learning_rate=encoder_rate, weight_decay=0.5)
    lora = train(run)
    live = LivePipeline.open(base, device="cpu", dtype=torch.float32)
    covered = live.load(lora, "fox")
    assert set(covered.words) == {"<fox>", "<look>"}
    assert (covered.matched, covered.unused) == (covered.total, ())
    assert ("text_encoder" in covered.by_component) is (encoder_rate is None)
    (number,) = live.pipeline.tokenizer("cat", add_special_tokens=False).input_ids
    table = weight_of(live.pipeline.text_encoder.get_input_embeddings())
    row = read_adapter(lora).embeddings["<fox>"]["text_encoder"][0]
    moved = (row - table[number]).abs()
    # AdamW's steps are of the rate's size, and no decay has shrunk the row
    assert 1e-3 < float(moved.max()) < 4.5e-3
    live.unload()
    assert live.verify_base()


def test_a_stopped_run_goes_on_exactly(base: Path, tmp_path: Path) -> None:
    straight = read_adapter(train(settings(tmp_path / "a", base)))
    run, recorder = settings(tmp_path / "b", base), Recorder(stop_at=2)
    with pytest.raises(Stopped):
        train(run, stop=recorder.stop, listeners=[recorder])
    (folder,) = (tmp_path / "b" / "runs").iterdir()
    resumed = read_adapter(train(run, resume=folder))
    for word, rows in straight.embeddings.items():
        assert torch.equal(resumed.embeddings[word]["text_encoder"], rows["text_encoder"])
    for path, delta in straight.deltas.items():
        assert torch.equal(resumed.deltas[path].tensors()["up"], delta.tensors()["up"])


def test_a_second_run_goes_on_from_the_words_of_the_first(base: Path, tmp_path: Path) -> None:
    first = train(settings(tmp_path / "a", base))
    again = settings(tmp_path / "b", base, new_token_learning_rate=1e-9)
    table = again.lora.model_copy(update={"start_from": first})
    second = train(again.model_copy(update={"lora": table}))
    old, new = (read_adapter(path).embeddings["<look>"]["text_encoder"] for path in (first, second))
    assert torch.allclose(old, new, atol=1e-7)
    without = again.model_copy(update={"lora": table.model_copy(update={"new_tokens": {}})})
    assert "The file to start from has the new words <fox>, <look>, this training none" in refusal(without)


def test_what_is_said_of_words_that_cannot_be_learnt(base: Path, tmp_path: Path) -> None:
    run = settings(tmp_path, base)
    assert presets.dump(run).count("new_tokens") == 1
    unread = run.model_copy(update={"data": run.data.model_copy(update={"prompt": "a <fox> cat"})})
    assert '"<look>" is in no caption of images' in refusal(unread)
    known = run.lora.model_copy(update={"new_tokens": {"cat": 1}})
    assert "is a word of the model already" in refusal(run.model_copy(update={"lora": known}))
    with pytest.raises(ConfigError, match="new_tokens"):
        config(tmp_path, base, lora={"new_tokens": {"<fox>": []}})
