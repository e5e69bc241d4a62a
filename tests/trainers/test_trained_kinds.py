"""A training of every kind, from the preset's words to the LoRA that is worn: stopped and resumed it is the straight
run bit for bit, and the file on the live pipeline is what the trainable form was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lora_core import LivePipeline, attach, detach, read_adapter
from lora_core.errors import ConfigError, LoraError, Stopped
from lora_core.safe_files import read_header, read_tensors
from tests.trainers.runs import Recorder, base_folder, config, pictures
from trainers.dreambooth import train

SHORT = {"steps": 3, "batch_size": 1, "learning_rate": 3e-3}
CASES: dict[str, dict[str, dict[str, Any]]] = {
    "loha in some layers": {
        "lora": {
            "kind": "loha",
            "layers_to_transform": [1],
            "layers_pattern": ["down_blocks", "up_blocks"],
            "text_encoder_layers_to_transform": [0],
        }
    },
    "lokr as dora": {"lora": {"kind": "lokr", "factor": 4, "variant": "dora"}},
    "lora plus, and embeddings": {
        "lora": {"dropout": 0.1, "text_encoder_targets": ["v_proj", "token_embedding", "position_embedding"]},
        "train": {"lora_plus_ratio": 8.0},
    },
    "dora with biases, and an embedding": {
        "lora": {
            "bias": "lora_only",
            "variant": "dora",
            "text_encoder_targets": ["v_proj", "token_embedding"],
        }
    },
    "replicated layers": {
        "lora": {
            "layer_replication": {"mid_block.attentions.0.transformer_blocks": [[0, 1], [0, 1]]},
            "text_encoder_layer_replication": [[0, 2], [1, 2]],
        }
    },
    "whole modules and every bias": {
        "lora": {
            "bias": "all",
            "modules_to_save": [
                "conv_in",
                "conv_norm_out",
                "mid_block.attentions.0.transformer_blocks.0.norm1",
            ],
            "text_encoder_modules_to_save": ["token_embedding", "final_layer_norm"],
        }
    },
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return base_folder(tmp_path_factory.mktemp("models") / "base")


@torch.no_grad()
def answers(live: LivePipeline) -> torch.Tensor:
    """Of the text encoder and the UNet together."""
    g = torch.Generator().manual_seed(4)
    ids = torch.randint(0, 70, (1, 77), generator=g)
    words = live.models["text_encoder"](ids)[0]
    latents = torch.randn(1, 4, 8, 8, generator=g)
    unet: Any = live.models["unet"]
    found: torch.Tensor = unet(latents, 300, encoder_hidden_states=words).sample
    return found


@pytest.mark.parametrize("case", CASES)
def test_trained_resumed_saved_read_and_worn(tmp_path: Path, base: Path, case: str) -> None:
    tables = CASES[case]
    pictures(tmp_path / "images", 2)
    few = {"targets": ["attn2.to_v", "attn1.to_out.0"], "text_encoder_targets": ["v_proj"]}
    lora = {"rank": 2, "alpha": 3.0, **few, **tables["lora"]}
    settings = config(tmp_path, base, lora=lora, train={**SHORT, **tables.get("train", {})})
    straight = Recorder()
    whole = train(settings, listeners=[straight])
    first = Recorder(stop_at=1)
    with pytest.raises(Stopped):
        train(settings, stop=first.stop, listeners=[first])
    second = Recorder()
    torch.manual_seed(999)
    resumed = train(settings, resume=tmp_path / "runs" / "small-2", listeners=[second])
    assert {**first.losses, **second.losses} == straight.losses
    a, b = read_tensors(read_header(whole)), read_tensors(read_header(resumed))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[k], b[k]) for k in a)

    adapter = read_adapter(whole)
    assert not adapter.unused
    live = LivePipeline.open(str(base))
    bare = answers(live)
    settings_of = {c: settings.lora.lora_config(c) for c in ("unet", "text_encoder")}
    form = attach({c: live.models[c] for c in settings_of}, settings_of, start=adapter)
    form.eval()
    trained = answers(live)
    detach(form)
    assert torch.equal(answers(live), bare)
    coverage = live.load(whole, name="it")
    assert coverage.matched == coverage.total == len(form.paths)
    worn = answers(live)
    torch.testing.assert_close(worn, trained, rtol=1e-4, atol=1e-4)
    assert (worn - bare).abs().max() > 1e-3
    if settings.lora.layer_replication:  # one weight in several places cannot be all of them
        with pytest.raises(LoraError, match="replicated layers"):
            live.fuse()
    else:
        live.fuse()
    torch.testing.assert_close(answers(live), trained, rtol=1e-4, atol=1e-4)
    live.unload()
    assert torch.equal(answers(live), bare)


def test_a_spelling_without_words_for_a_layer_is_refused_before_the_first_step(
    tmp_path: Path, base: Path
) -> None:
    pictures(tmp_path / "images", 1)
    recorder = Recorder()
    settings = config(
        tmp_path,
        base,
        lora={"text_encoder_targets": ["token_embedding"]},
        save={"spelling": "diffusers"},
    )
    with pytest.raises(ConfigError, match="is an embedding"):
        train(settings, listeners=[recorder])
    assert not recorder.losses


@pytest.mark.parametrize("ratio", [1.0, 8.0])
def test_the_ratio_is_that_of_the_first_step(tmp_path: Path, base: Path, ratio: float) -> None:
    """Adam's first step is the learning rate itself, and B begins at zero: the file shows how fast it learns."""
    pictures(tmp_path / "images", 1)
    rates = {"steps": 1, "batch_size": 1, "learning_rate": 2e-3, "text_encoder_learning_rate": 1e-3}
    few = {"targets": ["attn2.to_v"], "text_encoder_targets": ["v_proj"]}
    adapter = read_adapter(train(config(tmp_path, base, lora=few, train={**rates, "lora_plus_ratio": ratio})))
    for path, delta in adapter.deltas.items():
        rate = 2e-3 if path.startswith("unet") else 1e-3
        largest = float(delta.tensors()["up"].abs().max())
        assert largest == pytest.approx(rate * ratio, rel=1e-2)
