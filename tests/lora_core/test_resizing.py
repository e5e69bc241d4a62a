"""One LoRA to another rank: how much is kept, and what is said of where it came from."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import launch
from lora_core import Adapter, combine, read_adapter, resize, write_adapter
from lora_core.deltas.low_rank import LowRank
from lora_core.lower_rank import LOST
from lora_core.resizing import FROM, to_plain
from tests.lora_core.adapters_on_disk import adapter
from tests.lora_core.test_combining import ours, peft_model, rank


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_resized_by_rank_and_by_energy(dtype: torch.dtype) -> None:
    model = peft_model()
    wide = combine([(ours(model, "ink"), 1.0), (ours(model, "cat"), 0.05)])
    wide = Adapter({p: d.to(dtype=dtype) for p, d in wide.deltas.items()}, family="sd1")
    same = resize(wide, rank=100)
    small = resize(wide, energy=0.99)
    for path, delta in wide.deltas.items():
        weight = torch.zeros(delta.shape())
        whole = delta.delta(weight)
        assert rank(same, path) == 8
        close = 1e-5 if dtype is torch.float32 else 2e-2
        torch.testing.assert_close(same.deltas[path].delta(weight), whole, atol=close, rtol=close)
        kept = small.deltas[path]
        assert isinstance(kept, LowRank)
        assert kept.down.dtype is dtype
        values = torch.linalg.svdvals(whole.flatten(1).double()).square()
        assert values[: kept.rank].sum() >= 0.99 * values.sum() > values[: kept.rank - 1].sum()
    assert float(small.metadata[LOST]) < 0.1
    assert small.family == "sd1"


def test_a_resized_file_is_called_what_it_is_and_tells_what_it_was(tmp_path: Path) -> None:
    source, out = tmp_path / "ink.safetensors", tmp_path / "small.safetensors"
    said = {
        "ss_output_name": "Ink by Ann",
        "modelspec.title": "Ink!",
        "modelspec.author": "Ann",
        "ss_steps": "9",
    }
    write_adapter(adapter(), source, metadata=said)
    assert launch.main(["--resize", str(source), "--energy", "0.9", "--out", str(out)]) == 0
    found, before = read_adapter(out).metadata, read_adapter(source).metadata
    assert (found["ss_output_name"], found["modelspec.title"]) == ("small", "small")
    assert (found["modelspec.author"], found["ss_steps"]) == ("Ann", "9")
    parent = {"name": "ink", "weight": 1.0, "sshs_model_hash": before["sshs_model_hash"]}
    assert json.loads(found[FROM]) == {"energy": 0.9, "of": [parent]}
    assert found["sshs_model_hash"] != before["sshs_model_hash"]


def test_what_is_made_plain_is_the_same_lora_and_keeps_its_name() -> None:
    said = {"ss_output_name": "Ink by Ann", "modelspec.title": "Ink!"}
    plain = to_plain(Adapter(ours(peft_model(), "ink").deltas, said), rank=2)
    assert {key: plain.metadata[key] for key in said} == said
