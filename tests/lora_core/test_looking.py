"""A look at a file's header says what reading it would, what its metadata tells, and what is no LoRA is."""

from __future__ import annotations

import hashlib
import json
import os
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lora_core.adapter import Adapter
from lora_core.base_sources import DEMO
from lora_core.deltas.bias import WithBias
from lora_core.deltas.full import Full
from lora_core.deltas.low_rank import LowRank
from lora_core.errors import NotFinite
from lora_core.facts import Facts
from lora_core.formats import read_adapter, write_adapter
from lora_core.formats.said import commonest_tags, facts_said, trigger_words
from lora_core.looking import look
from lora_core.safe_files import save_tensors
from tests.lora_core.adapters_on_disk import PAIR, Q, adapter, saved

SAID = {
    "ss_output_name": "Ink",
    "modelspec.author": "Ann\x1b[2J\u202e",
    "ss_sd_model_name": "/home/ann/models/base v2.safetensors",
    "ss_tag_frequency": json.dumps({"10_rex": {"rex": 12, "dog ": 9}, "1_more": {"dog": 9, "bad": None}}),
    "ss_seed": "None",
    "modelspec.thumbnail": "data:image/jpeg;base64," + "A" * 1000,
}


def mixed() -> Adapter:
    """LoRAs of several ranks and alphas, a DoRA, a whole difference, a bias; unet, both encoders, outside of blocks."""
    low, dora = adapter().deltas, adapter(dora=True).deltas
    first, second, *_ = low
    return Adapter(
        {
            **low,
            first: dora[first],
            second: WithBias(low[second], torch.ones(24)),
            "unet.conv_in": Full(torch.ones(8, 4, 3, 3)),
            "unet.conv_out": WithBias(None, torch.ones(4)),
        },
        embeddings={"<fox>": {"text_encoder": torch.ones(3, 12), "text_encoder_2": torch.ones(3, 10)}},
    )


@pytest.mark.parametrize("spelling", ["kohya", "diffusers", "peft"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_what_is_seen_is_what_is_read(spelling: str, dtype: torch.dtype, tmp_path: Path) -> None:
    sent = adapter(dora=spelling == "kohya", dtype=dtype)
    path = write_adapter(sent, tmp_path / "x", spelling=spelling, metadata=SAID)
    found = look(path)
    assert (found.problem, found.spelling, found.unused) == ("", spelling, ())
    assert found.facts is not None
    read = Facts.of(read_adapter(path))
    # a file stores alphas as tensors of their own; in memory they are numbers
    assert replace(found.facts, dtypes={}) == replace(read, dtypes={})
    assert next(iter(found.facts.dtypes)) == next(iter(read.dtypes)) == str(dtype).removeprefix("torch.")
    assert found.family == ("sdxl", "layers of a second text encoder")
    assert found.metadata["ss_output_name"] == "Ink"


def test_every_table_of_the_facts(tmp_path: Path) -> None:
    found = look(write_adapter(mixed(), tmp_path / "x", metadata=SAID))
    facts = found.facts
    assert facts is not None
    assert facts.layers == 11
    assert facts.components == {"unet": 9, "text_encoder": 1, "text_encoder_2": 1}
    assert facts.blocks == {
        "unet": 2,
        "unet.down.1": 3,
        "unet.down.2": 1,
        "unet.mid": 1,
        "unet.up.0": 1,
        "unet.up.1": 1,
        "text_encoder": 1,
        "text_encoder_2": 1,
    }
    assert facts.kinds == {"LoRA": 7, "DoRA": 1, "LoRA + bias": 1, "full difference": 1, "bias": 1}
    assert facts.ranks == {2: 3, 3: 3, 4: 3}
    assert facts.alphas == {3.0: 5, 1.5: 4}
    assert facts.words == {"<fox>": 3}
    assert facts.not_finite is None


def test_a_look_for_people_and_for_programs(tmp_path: Path) -> None:
    path = write_adapter(mixed(), tmp_path / "x", metadata={**SAID, "ss_base_model_version": "sd_v1"})
    text, told = str(look(path)), json.loads(json.dumps(look(path).as_json(), allow_nan=False))
    assert "\x1b" not in text
    assert "\u202e" not in text
    assert "/home/ann" not in text
    for line in (
        "SDXL, told by layers of a second text encoder",
        "SD 1.x, by its metadata, which is wrong",
        "LoRA 7, ",
        "<fox> (3 vectors)",
        "dog, rex",
        "base v2.safetensors",
    ):
        assert line in text
    assert (told["family"], told["family_claimed"], told["thumbnail"]) == ("sdxl", "sd1", True)
    assert told["trigger_words"] == ["dog", "rex"]
    assert told["tags"] == {"dog": 18, "rex": 12}
    assert told["said"]["base_model"] == "base v2.safetensors"
    assert "seed" not in told["said"]
    assert "modelspec.thumbnail" not in told["metadata"]
    assert told["hashes"] is told["not_finite"] is None


@pytest.mark.parametrize(
    ("key", "shape", "family"),
    [
        ("model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight", (320, 768), "sd1"),
        (
            "model.diffusion_model.output_blocks.5.1.transformer_blocks.0.attn2.to_k.weight",
            (1280, 1024),
            "sd2",
        ),
        ("model.diffusion_model.middle_block.1.transformer_blocks.9.attn2.to_k.weight", (1280, 2048), "sdxl"),
        ("down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight", (320, 768), "sd1"),
        ("decoder.conv_in.weight", (512, 4), None),
    ],
)
def test_what_is_no_lora_is_named_and_a_base_with_its_family(
    key: str, shape: tuple[int, ...], family: str | None, tmp_path: Path
) -> None:
    found = look(saved({key: torch.zeros(shape)}, tmp_path))
    assert "not a LoRA" in found.problem
    assert found.facts is None
    assert found.family.key == family
    assert found.problem in str(found)
    assert found.as_json()["problem"] == found.problem


def test_a_base_model_in_diffusers_layout_is_named_with_its_family() -> None:
    found = look(DEMO)
    assert "base model in diffusers' layout, not a LoRA" in found.problem
    assert found.family.key == "sd1"
    assert found.facts is None


def test_hashes_are_of_the_bytes_and_non_finite_tensors_are_named(tmp_path: Path) -> None:
    up = f"{Q}.lora_up.weight"
    path = saved({**PAIR, up: torch.full((8, 4), float("nan"))}, tmp_path, {"some": "metadata"})
    found = look(path, hashes=True)
    data = path.read_bytes()
    body = data[8 + int.from_bytes(data[:8], "little") :]
    assert found.hashes == (hashlib.sha256(data).hexdigest(), hashlib.sha256(body).hexdigest())
    assert found.as_json()["hashes"]["autov2"] == hashlib.sha256(data).hexdigest()[:10]
    assert found.as_json()["hashes"]["autov3"] == hashlib.sha256(body).hexdigest()[:12]
    assert found.facts is not None
    assert found.facts.not_finite == (up,)
    assert "must be finite" in found.problem
    with pytest.raises(NotFinite, match=re.escape(found.problem)):
        read_adapter(path)
    save_tensors(
        path, {**PAIR, "hello": torch.tensor(float("inf"))}
    )  # what is not used is named and harms nothing
    found = look(path, hashes=True)
    assert found.facts is not None
    assert (found.problem, found.facts.not_finite, found.unused) == ("", ("hello",), ("hello",))


def test_only_the_header_and_the_alphas_are_read(tmp_path: Path) -> None:
    """However large the file: a hole of 100 GB stands in for it."""
    header = {
        f"{Q}.lora_down.weight": {"dtype": "F32", "shape": [2**12, 2**23], "data_offsets": [4, 4 + 2**37]},
        f"{Q}.lora_up.weight": {
            "dtype": "F32",
            "shape": [8, 2**12],
            "data_offsets": [4 + 2**37, 4 + 2**37 + 2**17],
        },
        f"{Q}.alpha": {"dtype": "F32", "shape": [], "data_offsets": [0, 4]},
    }
    text = json.dumps(header).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + torch.tensor(3.0).numpy().tobytes())
    os.truncate(path, 8 + len(text) + 4 + 2**37 + 2**17)
    found = look(path)
    assert found.facts is not None
    assert (found.facts.ranks, found.facts.alphas) == ({2**12: 1}, {3.0: 1})
    assert found.size_bytes > 2**37


@pytest.mark.parametrize(
    "text",
    [
        "",
        "nonsense",
        "[1]",
        "null",
        "[" * 100_000,
        '{"a": [1]}',
        '{"a": {"b": "c"}}',
        '{"a": {"b": true}}',
        '{"a": {"b": 1e999}}',
        '{"' + "a" * 2**20 + '": {"b": 1}}',
    ],
)
def test_damaged_tags_are_no_triggers(text: str) -> None:
    assert trigger_words({"ss_tag_frequency": text}) == ()
    assert commonest_tags({"ss_tag_frequency": text}) == {}


def test_files_of_one_layout_keep_their_own_facts(tmp_path: Path) -> None:
    """What was made of one file is kept for the next of its layout; all that decides is looked at anew."""
    q = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
    for i, (alpha, claim) in enumerate(
        [(1.0, "sd_v1"), (1.0, "sdxl_base_v1-0"), (2.0, "sd_v1"), (1.0, "sd_v1")] * 2
    ):
        low = LowRank(torch.randn(4, 768), torch.randn(768, 4), alpha)
        said = {"ss_base_model_version": claim, "ss_output_name": f"number {i}"}
        path = write_adapter(Adapter({q: low}), tmp_path / f"{i}", metadata=said)
        found, read = look(path), Facts.of(read_adapter(path))
        assert found.facts is not None
        assert found.facts.alphas == read.alphas == {alpha: 1}
        assert found.family == (read.family, read.told_by)
        assert claim in found.family.by
        assert facts_said(found.metadata)["title"] == f"number {i}"


def test_a_file_beside_or_a_name_that_counts_is_looked_at_anew(tmp_path: Path) -> None:
    folder = write_adapter(adapter(), tmp_path / "x", spelling="peft")
    before = look(folder).facts
    config = folder / "unet" / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "lora_alpha": 77, "alpha_pattern": {}}))
    after = look(folder).facts
    assert before is not None
    assert after is not None
    assert 77.0 in after.alphas
    assert 77.0 not in before.alphas
    for name in ("fox", "cat"):
        save_tensors(tmp_path / f"{name}.safetensors", {"emb_params": torch.ones(2, 768)})
        found = look(tmp_path / f"{name}.safetensors")
        assert found.facts is not None
        assert found.facts.words == {name: 2}
