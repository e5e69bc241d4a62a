"""What a file says about itself: kohya's and modelspec's words, hashes, no private paths, the family."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import safetensors.torch
import torch

from lora_core.adapter import Adapter
from lora_core.deltas.low_rank import LowRank
from lora_core.errors import ConfigError
from lora_core.formats import read_adapter, write_adapter
from lora_core.formats.metadata import kohya_metadata, without_paths
from lora_core.safe_files import read_header
from tests.lora_core.adapters_on_disk import PAIR, QPATH, Q, adapter, saved


def test_metadata_says_what_readers_ask_for(tmp_path: Path) -> None:
    path = write_adapter(
        adapter(), tmp_path / "cat", metadata={"ss_seed": "7", "loom.preset": 'data = "/home/ann/dogs"'}
    )
    said = read_header(path).metadata
    assert said["ss_base_model_version"] == "sdxl_base_v1-0"
    assert said["ss_v2"] == "False"
    assert said["modelspec.architecture"] == "stable-diffusion-xl-v1-base/lora"
    assert (said["modelspec.sai_model_spec"], said["modelspec.resolution"]) == ("1.0.1", "1024x1024")
    assert (said["ss_network_dim"], said["ss_network_alpha"]) == ("Dynamic", "Dynamic")
    assert (said["ss_output_name"], said["ss_seed"], said["loom.preset"]) == ("cat", "7", 'data = "dogs"')
    assert set(json.loads(said["ss_network_args"])) == {"conv_dim", "conv_alpha"}
    again = read_header(write_adapter(read_adapter(path), tmp_path / "again")).metadata
    assert again == said


@pytest.mark.parametrize("size", [4, 200_000])
def test_hashes_are_kohyas(size: int, tmp_path: Path) -> None:
    """By hand: the file with the ss_ entries alone, less its header; and 64 KiB of it from 1 MiB on."""
    ours = Adapter({QPATH: LowRank(torch.randn(2, size), torch.randn(4, 2), 1.0)}, family="sd1")
    path = write_adapter(ours, tmp_path / "x")
    said, tensors = read_header(path).metadata, safetensors.torch.load_file(path)
    assert not any(key.startswith("sshs") for key in kohya_metadata(ours, family="sd1", facts={}))
    plain = safetensors.torch.save(tensors, {k: v for k, v in said.items() if k.startswith("ss_")})
    start = 8 + int.from_bytes(plain[:8], "little")
    assert said["sshs_model_hash"] == hashlib.sha256(plain[start:]).hexdigest()
    assert said["sshs_legacy_hash"] == hashlib.sha256(plain[0x100000:0x110000]).hexdigest()[:8]
    assert (said["sshs_legacy_hash"] == "e3b0c442") is (size == 4)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("/home/ann/my photos/cat", "cat"),
        ("C:\\Users\\Ann B\\cat.safetensors", "cat.safetensors"),
        ("\\\\nas\\share\\cat", "cat"),
        ("~/loras/cat", "cat"),
        ("file:///root/x/cat", "cat"),
        ('{"/srv/train/5_cat": {"n": 5}, "D:\\\\x\\\\dog": 1}', '{"5_cat": {"n": 5}, "dog": 1}'),
        ("out=/mnt/disk/cat seed=3", "out=cat seed=3"),
        ("a cat and/or a dog, 1/2, https://example.org/a/b, 512x512", None),
        ('{"1girl": 3, "w/ hat": 2, "/": 1}', None),
    ],
)
def test_absolute_paths_become_names(value: str, expected: str | None) -> None:
    assert without_paths(value) == (value if expected is None else expected)


def test_metadata_must_be_text() -> None:
    with pytest.raises(ConfigError, match="ss_seed"):
        kohya_metadata(adapter(), family="sdxl", facts={"ss_seed": 7})  # type: ignore[dict-item]


def test_family_comes_from_the_shapes_and_only_then_from_the_claim(tmp_path: Path) -> None:
    claim = {"ss_base_model_version": "sdxl_base_v1-0"}
    assert read_adapter(saved(PAIR, tmp_path, claim)).family == "sdxl"
    width = {
        f"{Q.replace('attn1_to_q', 'attn2_to_k')}.lora_{k}.weight": v
        for k, v in (("down", torch.ones(4, 768)), ("up", torch.ones(8, 4)))
    }
    read = read_adapter(saved({**PAIR, **width}, tmp_path, claim))
    assert read.family == "sd1"
    assert read_header(write_adapter(read, tmp_path / "y")).metadata["ss_base_model_version"] == "sd_v1"
