"""What loading a LoRA tells about it: counted by component and block, nothing silently left out."""

from __future__ import annotations

import copy
import functools
import hashlib
import json
from collections import Counter
from pathlib import Path

import pytest
import torch

from lora_core import Adapter, LivePipeline, coverage_on, write_adapter
from lora_core.adapter import is_finite
from lora_core.errors import LoraError, NotFinite, WrongFamily
from lora_core.facts import Coverage, Facts
from lora_core.formats import describe_adapter, read_adapter
from lora_core.safe_files import read_header, read_tensors, save_tensors
from lora_core.unet_blocks import known_blocks, matches
from tests.lora_core.kinds_by_hand import adapter_of
from tests.lora_core.test_families import low_rank_for
from tests.small_models import FAMILIES, small_pipeline

ABSENT = "unet.up_blocks.7.attentions.0.proj_in"


@functools.cache
def live(family: str) -> LivePipeline:
    return LivePipeline(small_pipeline(family))


def a_file(family: str, path: Path) -> Path:
    """LoRAs on all layers of a small model, one on a layer it has not, and a key that says nothing."""
    made = adapter_of(live(family), "low rank", 3)
    made.deltas[ABSENT] = low_rank_for(torch.empty(8, 8, 1, 1))
    write_adapter(Adapter(made.deltas, family=family), path)
    header = read_header(path)
    save_tensors(path, {**read_tensors(header), "hello": torch.ones(1)}, header.metadata)
    return path


@pytest.mark.parametrize("family", FAMILIES)
def test_a_load_counts_every_layer_in_its_component_and_block(family: str, tmp_path: Path) -> None:
    pipe, path = live(family), a_file(family, tmp_path / "x.safetensors")
    try:
        found = pipe.load(path, name="x")
        deltas = pipe.loaded["x"].deltas
    finally:
        pipe.unload()
    assert (found.matched, found.total) == (len(deltas) - 1, len(deltas))
    assert set(found.unused) == {"hello", ABSENT}
    by_hand = Counter(path.split(".")[0] for path in deltas)
    assert found.by_component == {c: (n - (c == "unet"), n) for c, n in by_hand.items()}
    # every block as weights know it: the same layers
    for block in known_blocks(deltas):
        inside = [p for p in deltas if p.startswith("unet.") and matches(block, p.removeprefix("unet."))]
        own = [v for name, v in found.by_block.items() if f"{name}.".startswith(f"unet.{block}.")]
        assert (sum(m for m, _ in own), sum(n for _, n in own)) == (
            len([p for p in inside if p != ABSENT]),
            len(inside),
        )
    assert found.by_block["unet.up.7"] == (0, 1)
    assert found.by_block["text_encoder"] == found.by_component["text_encoder"]
    assert sum(n for _, n in found.by_block.values()) == found.total
    facts = found.facts
    assert (facts.family, facts.kinds) == (family, {"LoRA": found.total})
    assert facts.told_by
    assert set(facts.ranks) == {2, 3}
    assert facts.dtypes == {"float32": 2 * found.total}
    assert facts.not_finite == ()
    data = path.read_bytes()
    body = data[8 + int.from_bytes(data[:8], "little") :]
    assert found.hashes().autov3 == hashlib.sha256(body).hexdigest()[:12]
    assert json.loads(json.dumps(found.as_json()))["by_block"]["unet.up.7"] == [0, 1]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_file_is_measured_against_a_model_without_either(family: str, tmp_path: Path) -> None:
    """From the header, on modules without weights: what loading says, and nothing changed."""
    pipe, path = live(family), a_file(family, tmp_path / "x.safetensors")
    loaded = pipe.load(path)
    pipe.unload()
    models = {name: copy.deepcopy(model).to("meta") for name, model in pipe.models.items()}
    found = coverage_on(describe_adapter(path), models, pipe.family)
    same = ("matched", "total", "unused", "family", "by_component", "by_block", "words")
    assert {name: getattr(found, name) for name in same} == {name: getattr(loaded, name) for name in same}
    assert found.facts.not_finite is None
    other = live("sdxl" if family != "sdxl" else "sd1")
    with pytest.raises(WrongFamily, match=r"This is an .* LoRA; the model is"):
        coverage_on(describe_adapter(path), other.models, other.family)


def test_a_lora_made_in_memory_has_no_file_to_hash() -> None:
    adapter = adapter_of(live("sd1"), "low rank", 3)
    with pytest.raises(LoraError, match="made in memory"):
        Coverage.of(adapter, ()).hashes()
    assert Coverage.of(adapter, ()).matched == 0


def test_one_bad_value_is_refused_by_its_tensor(tmp_path: Path) -> None:
    adapter = adapter_of(live("sd1"), "low rank", 3)
    path, delta = list(adapter.deltas.items())[5]
    delta.tensors()["up"].view(-1)[3] = float("inf")
    with pytest.raises(NotFinite, match=rf"{path} \(up\) holds 1 values"):
        live("sd1").load(adapter)
    assert not live("sd1").loaded


def test_a_lora_of_every_kind_has_its_kinds_counted() -> None:
    kinds = {"whole": "full difference", "scaling": "(IA)³", "generalized": "GLoRA", "turning": "OFT"}
    for kind, name in kinds.items():
        adapter = adapter_of(live("sd1"), kind, 0, "beside")
        counts = Facts.of(adapter).kinds
        assert sum(counts.values()) == len(adapter.deltas)
        assert {name, f"{name} + bias"} <= set(counts) <= {name, f"{name} + bias", "bias"}


def test_a_word_of_few_bits_with_a_bad_value_is_refused_too(tmp_path: Path) -> None:
    rows = torch.ones(2, 768)
    rows[1, 5] = float("nan")
    save_tensors(tmp_path / "fox.safetensors", {"emb_params": rows.to(torch.float8_e4m3fn)})
    with pytest.raises(NotFinite, match=r"fox \(text_encoder\) holds 1 values"):
        read_adapter(tmp_path / "fox.safetensors")


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e5m2]
)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 3.0])
def test_a_tensor_is_finite_where_each_value_is(value: float, dtype: torch.dtype) -> None:
    for shape in ((), (1,), (7, 5), (100_000,)):
        for at in (0, -1):
            wide = torch.randn(shape)
            wide.view(-1)[at] = value
            assert is_finite(wide.to(dtype)) is bool(torch.isfinite(wide).all()) is (value == 3)
    assert is_finite(torch.full((9,), torch.finfo(dtype).max, dtype=dtype))
    assert is_finite(torch.empty(0, dtype=dtype))
    assert is_finite(torch.arange(3))
