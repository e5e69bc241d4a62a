"""What a file says about itself: kohya's and modelspec's words, hashes, no private paths, the family."""

from __future__ import annotations

import base64
import errno
import hashlib
import io
import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
from PIL import Image

from lora_core.adapter import Adapter
from lora_core.deltas.low_rank import LowRank
from lora_core.errors import ConfigError, SaveFailed
from lora_core.formats import read_adapter, retell, write_adapter
from lora_core.formats.metadata import kohya_metadata, without_paths
from lora_core.safe_files import read_header, save_metadata
from lora_core.thumbnail import data_uri, with_thumbnail
from tests.lora_core.adapters_on_disk import PAIR, QPATH, Q, adapter, assert_same, saved


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
    whole = path.read_bytes()  # modelspec's: of all tensor content, that is, of all behind the header
    assert (
        said["modelspec.hash_sha256"]
        == "0x" + hashlib.sha256(whole[8 + int.from_bytes(whole[:8], "little") :]).hexdigest()
    )


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


# ---------------------------------------------------------------- a picture, and what is said afterwards


@pytest.mark.parametrize(
    ("mode", "size"), [("RGB", (900, 300)), ("RGBA", (40, 60)), ("P", (256, 256)), ("L", (1, 700))]
)
def test_a_thumbnail_is_a_small_jpeg_in_a_data_uri(mode: str, size: tuple[int, int], tmp_path: Path) -> None:
    picture = Image.new(mode, size)
    picture.info["parameters"] = "a secret prompt"
    path = write_adapter(with_thumbnail(adapter(), picture), tmp_path / "x")
    text = read_header(path).metadata["modelspec.thumbnail"]
    kind, _, data = text.partition(",")
    assert kind == "data:image/jpeg;base64"
    shown = Image.open(io.BytesIO(base64.b64decode(data, validate=True)))
    assert (shown.format, shown.mode) == ("JPEG", "RGB")
    assert max(shown.size) == min(256, max(size))
    assert abs(shown.width * size[1] - shown.height * size[0]) <= max(size)
    assert b"secret" not in base64.b64decode(data)
    assert (
        read_adapter(write_adapter(read_adapter(path), tmp_path / "y")).metadata["modelspec.thumbnail"]
        == text
    )


def test_what_is_transparent_is_white() -> None:
    data = data_uri(Image.new("RGBA", (8, 8), (255, 0, 0, 0))).partition(",")[2]
    assert Image.open(io.BytesIO(base64.b64decode(data))).getpixel((4, 4)) == (255, 255, 255)


@pytest.mark.parametrize("spelling", ["kohya", "diffusers", "peft"])
def test_a_file_is_told_anew_and_its_tensors_stay(spelling: str, tmp_path: Path) -> None:
    path = write_adapter(
        adapter(), tmp_path / "x", spelling=spelling, metadata={"ss_seed": "7", "note": "old"}
    )
    before = [read_header(file) for file in files_of(path)]
    bodies = [
        file.read_bytes()[header.data_start :] for file, header in zip(files_of(path), before, strict=True)
    ]
    retell(path, {"modelspec.author": "Ann", "note": None, "place": "/home/ann/x", "long": "é" * 5000})
    for file, header, body in zip(files_of(path), before, bodies, strict=True):
        after = read_header(file)
        assert after.tensors == header.tensors
        assert file.read_bytes()[after.data_start :] == body
        assert after.data_start % 8 == 0
        told = {"modelspec.author": "Ann", "place": "x", "long": "é" * 5000}
        assert after.metadata == {k: v for k, v in header.metadata.items() if k != "note"} | told
    assert_same(adapter(), read_adapter(path))


def test_foreign_files_keep_the_order_of_their_tensors(tmp_path: Path) -> None:
    """Another order would be another hash."""
    listing = {"b": (0, 4), "a": (4, 8)}
    text = json.dumps(
        {n: {"dtype": "F32", "shape": [1], "data_offsets": list(at)} for n, at in listing.items()}
    )
    text += " " * (-len(text) % 8)
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text.encode() + bytes(range(8)))
    save_metadata(path, {"x": "y"})
    assert path.read_bytes().endswith(bytes(range(8)))
    assert {n: (t.start, t.end) for n, t in read_header(path).tensors.items()} == listing
    assert read_header(path).metadata == {"x": "y"}


@pytest.mark.parametrize("key", ["sshs_model_hash", "modelspec.hash_sha256", "lora_adapter_metadata"])
def test_what_the_tensors_say_is_not_told_anew(key: str, tmp_path: Path) -> None:
    path = write_adapter(adapter(), tmp_path / "x")
    before = path.read_bytes()
    for wrong in ({key: "0"}, {key: None}, {"ss_seed": 7}):
        with pytest.raises(ConfigError):
            retell(path, wrong)  # type: ignore[arg-type]
    assert path.read_bytes() == before


@pytest.mark.parametrize("fault", ["full", "short"])
def test_what_cannot_be_written_loses_nothing(
    fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At both sites: a new file over an old one, and an old file told anew. The disk is full, or writes half."""
    path = write_adapter(adapter(), tmp_path / "x")
    before = path.read_bytes()

    def wrong(self: Path, data: bytes) -> int:
        if fault == "full":
            raise OSError(errno.ENOSPC, "No space left on device")
        with self.open("wb") as file:
            return file.write(data[: len(data) // 2])

    def too_late(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_bytes", wrong)
        with pytest.raises(SaveFailed, match="the disk is full" if fault == "full" else "cut short"):
            write_adapter(adapter(dora=True), path)
    with monkeypatch.context() as patched:
        if fault == "full":
            patched.setattr("lora_core.safe_writes.os.fsync", too_late)
        else:
            patched.setattr(
                "lora_core.safe_files.read_bytes", lambda file, at, count, path: b"0" * (count // 2)
            )
        with pytest.raises(SaveFailed):
            retell(path, {"x": "y"})
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def files_of(path: Path) -> list[Path]:
    return [path] if path.is_file() else sorted(path.rglob("*.safetensors"))
