"""The same LoRA under several names, and LoRAs that only look the same."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from lora_core import Adapter, write_adapter
from lora_core.deltas.low_rank import LowRank
from lora_core.duplicates import duplicates
from lora_core.looking import look
from tests.lora_core.adapters_on_disk import PAIR, adapter, saved


def test_duplicates_are_found_whatever_their_names_and_metadata(tmp_path: Path) -> None:
    one, other = adapter(), adapter()
    first = next(iter(other.deltas))
    other.deltas[first] = replace(other.deltas[first], alpha=9.0)  # type: ignore[type-var]
    paths = [
        write_adapter(one, tmp_path / "a"),
        write_adapter(one, tmp_path / "b", metadata={"ss_output_name": "quite another"}),
        write_adapter(other, tmp_path / "c"),
        write_adapter(one, tmp_path / "d", spelling="diffusers"),
        write_adapter(
            other, tmp_path / "e", spelling="diffusers"
        ),  # the same bytes, its alpha in the metadata
        saved(PAIR, tmp_path),
    ]
    assert [[found.path for found in group] for group in duplicates(map(look, paths))] == [paths[:2]]


def test_the_same_alphas_on_other_layers_are_another_lora(tmp_path: Path) -> None:
    """In diffusers' spelling they stand in the metadata alone: the tensors are equal, and so is how often each alpha
    occurs."""
    q, k = (f"unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_{part}" for part in "qk")
    down, up = torch.randn(2, 8), torch.randn(8, 2)

    def file(name: str, of_q: float, of_k: float) -> Path:
        deltas = {q: LowRank(down, up, of_q), k: LowRank(down, up, of_k)}
        return write_adapter(Adapter(deltas), tmp_path / name, spelling="diffusers")

    one, other, again = file("one", 1.0, 3.0), file("other", 3.0, 1.0), file("again", 1.0, 3.0)
    assert [[found.path for found in g] for g in duplicates(map(look, (one, other, again)))] == [[one, again]]
