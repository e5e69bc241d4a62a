"""A LoRA described by its header alone is the one that is read, less its numbers."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lora_core.deltas.low_rank import LowRank
from lora_core.formats import describe_adapter, read_adapter, write_adapter
from lora_core.safe_files import read_header, save_tensors
from tests.lora_core.adapters_on_disk import PAIR, Q, adapter


@pytest.mark.parametrize("spelling", ["kohya", "diffusers", "peft"])
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_described_is_what_is_read(tmp_path: Path, spelling: str, dora: bool, dtype: torch.dtype) -> None:
    path = write_adapter(adapter(dora, dtype), tmp_path / "x", spelling=spelling)
    read, described = read_adapter(path), describe_adapter(path)
    assert replace(described, deltas={}).__dict__ == replace(read, deltas={}).__dict__
    assert list(described.deltas) == list(read.deltas)
    for layer, delta in read.deltas.items():
        assert described.deltas[layer].shape() == delta.shape()
        assert described.deltas[layer].rank == delta.rank
        assert described.deltas[layer].alpha == delta.alpha
        assert type(described.deltas[layer]) is type(delta)
        assert all(t.is_meta or t.numel() == 1 for t in described.deltas[layer].tensors().values())


def test_described_small_types_and_no_contents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = {
        **{key: tensor.to(torch.float8_e4m3fn) for key, tensor in PAIR.items()},
        f"{Q}.alpha": torch.tensor(2.0),
    }
    save_tensors(tmp_path / "x.safetensors", tensors)
    header = read_header(tmp_path / "x.safetensors")
    # of the data only the alpha is left, which goes first
    os.truncate(tmp_path / "x.safetensors", header.data_start + 4)
    monkeypatch.setattr("lora_core.formats.files.read_header", lambda path: header)
    (described,) = describe_adapter(tmp_path / "x.safetensors").deltas.values()
    assert isinstance(described, LowRank)
    assert (described.rank, described.alpha) == (4, 2.0)
