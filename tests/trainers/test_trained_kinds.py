"""A training of every kind, from the preset's words to the LoRA that is worn: stopped and resumed it is the straight
run bit for bit, and the file on the live pipeline is what the trainable form was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lora_core import LivePipeline, attach, detach, read_adapter
from lora_core.errors import Stopped
from lora_core.safe_files import read_header, read_tensors
from tests.trainers.runs import Recorder, base_folder, config, pictures
from trainers.dreambooth import train

SHORT = {"steps": 3, "batch_size": 1, "learning_rate": 3e-3}
CASES: dict[str, dict[str, dict[str, Any]]] = {
    "loha": {"lora": {"kind": "loha"}},
    "lokr as dora": {"lora": {"kind": "lokr", "factor": 4, "variant": "dora"}},
    "lokr of two pairs": {
        "lora": {"kind": "lokr", "rank": 1, "decompose_both": True, "rank_stabilized": True}
    },
    "lora plus": {"lora": {"dropout": 0.1}, "train": {"lora_plus_ratio": 8.0}},
    "some layers": {
        "lora": {
            "layers_to_transform": [1],
            "layers_pattern": ["down_blocks", "up_blocks"],
            "text_encoder_layers_to_transform": [0],
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
    live.fuse()
    torch.testing.assert_close(answers(live), trained, rtol=1e-4, atol=1e-4)
    live.unload()
    assert torch.equal(answers(live), bare)
