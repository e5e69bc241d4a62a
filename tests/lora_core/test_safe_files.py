"""Files: a hostile one gets nothing, a crash loses nothing. Oracle: the safetensors library."""

from __future__ import annotations

import contextlib
import hashlib
import json
import multiprocessing
import os
import pickle
import random
import resource
import signal
import stat
import subprocess
import time
import tracemalloc
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lora_core.errors import FileRefused, LoraError, SaveFailed
from lora_core.safe_files import (
    read_header,
    read_tensors,
    save_tensors,
    sweep_partials,
    tensors_sha256,
    write_atomic,
)

PROCESSES = multiprocessing.get_context("forkserver")  # one import of torch for all the children


@pytest.fixture(autouse=True, scope="module")
def _preload() -> None:
    PROCESSES.set_forkserver_preload(["lora_core.safe_files", __name__])


def tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    half = torch.randn(5, 3, generator=g).half()
    return {
        "b.weight": torch.randn(4, 6, generator=g),
        "a.alpha": torch.tensor(0.5),
        "half": half,
        "shared": half[1:3],
        "strided": torch.randn(3, 4, generator=g).T,
        "brain": torch.randn(7, generator=g).bfloat16(),
        "fp8": torch.randn(4, generator=g).to(torch.float8_e4m3fn),
        "flags": torch.tensor([True, False, True]),
        "nan": torch.tensor([float("nan"), float("inf"), -0.0]),
        "ids": torch.arange(3),
    }


def raw(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    a, b = (t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b))
    return torch.equal(a, b)


# ---------------------------------------------------------------- reading and writing agree with the library


def test_what_is_saved_is_read_by_us_and_by_the_library(tmp_path: Path) -> None:
    path, sent = tmp_path / "x.safetensors", tensors()
    save_tensors(path, sent, {"a": "ü", "b": '"\\'})
    theirs, ours = safetensors.torch.load_file(path), read_tensors(path)
    assert set(ours) == set(theirs) == set(sent)
    for name in sent:
        assert ours[name].dtype == theirs[name].dtype == sent[name].dtype
        assert ours[name].shape == sent[name].shape
        assert same_bits(ours[name], sent[name])
        assert same_bits(theirs[name], sent[name])
    with safetensors.safe_open(path, "pt") as file:
        assert file.metadata() == {"a": "ü", "b": '"\\'} == read_header(path).metadata
    assert list(read_tensors(path, ["half", "ids"])) == ["half", "ids"]
    assert os.listdir(tmp_path) == ["x.safetensors"]


def test_the_same_tensors_are_the_same_file_in_every_process(tmp_path: Path) -> None:
    facts = {f"key {i}": "value" for i in range(20)}
    save_tensors(tmp_path / "a.safetensors", tensors(), facts)
    child = PROCESSES.Process(target=save_tensors, args=(tmp_path / "b.safetensors", tensors(), facts))
    child.start()
    child.join()
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_hash_is_that_of_the_bytes_behind_the_header(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_tensors(path, tensors(), {"some": "metadata"})
    data = path.read_bytes()
    by_hand = hashlib.sha256(data[8 + int.from_bytes(data[:8], "little") :]).hexdigest()
    assert tensors_sha256(path) == by_hand
    save_tensors(path, tensors(), {"other": "metadata, longer"})
    assert tensors_sha256(path) == by_hand


@pytest.mark.parametrize(
    "text", ['{"__metadata__":M,"a":T}', '{"a":T,"__metadata__":M}', '{\n"__metadata__" : M ,\t"a": T } ']
)
def test_metadata_is_read_wherever_it_stands(text: str, tmp_path: Path) -> None:
    said = {"k": '},"b":{', "__metadata__": "\\"}
    text = text.replace("M", json.dumps(said)).replace("T", json.dumps(T))
    (tmp_path / "x.safetensors").write_bytes(raw(text.encode(), b"12345678"))
    header = read_header(tmp_path / "x.safetensors")
    assert header.metadata == said
    assert header.tensors == {"a": ("F32", (2,), 0, 8)}


def test_files_that_list_the_same_share_it_and_nothing_else(tmp_path: Path) -> None:
    paths = [tmp_path / f"{i}.safetensors" for i in range(3)]
    for i, path in enumerate(paths):
        save_tensors(path, {"a": torch.full((2 + i // 2,), float(i))}, {"number": str(i)})
    headers = [read_header(path) for path in paths]
    assert headers[0].tensors is headers[1].tensors
    assert [header.metadata["number"] for header in headers] == ["0", "1", "2"]
    assert [float(read_tensors(header)["a"][0]) for header in headers] == [0, 1, 2]
    os.truncate(paths[1], paths[1].stat().st_size - 1)
    with pytest.raises(FileRefused, match="cut short"):
        read_header(paths[1])


# ---------------------------------------------------------------- hostile files


T = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
BAD: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "empty"),
    "short": (b"123", "too few"),
    "pickle": (pickle.dumps({"a": 1}), "pickle"),
    "html": (b"<!DOCTYPE html><html></html>", "not a .safetensors"),
    "header too long": ((2**40).to_bytes(8, "little") + b'{"a"', "hostile"),
    "header cut": (raw(b'{"a": 1}')[:-2], "cut short"),
    "data cut": (raw({"a": T}, b"1234567"), "cut short"),
    "data left": (raw({"a": T}, b"123456789"), "behind its last"),
    "twice": (raw(b'{"a":%b,"a":%b}' % ((json.dumps(T).encode(),) * 2), b"12345678"), "twice"),
    "metadata twice": (raw(b'{"__metadata__":{},"__metadata__":{}}'), "twice"),
    "metadata twice, apart": (
        raw(
            b'{ "__metadata__" : {"a":""} , "a":%b, "__metadata__":{}}' % json.dumps(T).encode(), b"12345678"
        ),
        "twice",
    ),
    "metadata of nothing": (raw(b'{"__metadata__":null}'), "text to text"),
    "comma behind metadata": (raw(b'{"__metadata__":{},}'), "damaged header"),
    "key of metadata twice": (raw(b'{"__metadata__":{"a":"","a":""}}'), "twice"),
    "no object": (raw(b'{"a":[}'), "damaged header"),
    "no json": (raw(b"{nonsense}"), "damaged header"),
    "nan": (raw(b'{"a": NaN}'), "damaged header"),
    "not utf-8": (raw(b'{"\xff": 1}'), "damaged header"),
    "surrogate": (
        raw(b'{"\\ud800": {"dtype":"F32","shape":[2],"data_offsets":[0,8]}}', b"12345678"),
        "damaged",
    ),
    "deep": (raw(b'{"a":' + b"[" * 30_000), "damaged header"),
    "zero elements": (raw({"a": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}), "not between 1"),
    "huge side": (raw({"a": {"dtype": "U8", "shape": [2**25], "data_offsets": [0, 2**25]}}), "not between 1"),
    "overflow": (raw({"a": {"dtype": "U8", "shape": [2**24] * 8, "data_offsets": [0, 0]}}), "its place"),
    "negative": (raw({"a": {"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]}}), "its place"),
    "true": (
        raw({"a": {"dtype": "F32", "shape": [True, 2], "data_offsets": [0, 8]}}, b"8" * 8),
        "whole numbers",
    ),
    "float": (
        raw({"a": {"dtype": "F32", "shape": [2.0], "data_offsets": [0, 8]}}, b"8" * 8),
        "whole numbers",
    ),
    "dtype": (raw({"a": {**T, "dtype": "F31"}}, b"8" * 8), "unknown"),
    "more": (raw({"a": {**T, "code": "x"}}, b"8" * 8), "nothing else"),
    "long name": (raw({"a" * 1001: T}, b"8" * 8), "1,001 characters"),
    "overlap": (raw({"a": T, "b": {**T, "data_offsets": [4, 12]}}, b"8" * 12), "overlap"),
    "gap": (raw({"a": T, "b": {**T, "data_offsets": [9, 17]}}, b"8" * 17), "overlap"),
    "metadata": (raw({"__metadata__": {"a": 1}, "a": T}, b"8" * 8), "text to text"),
    "many": (raw({f"{i}": T for i in range(20_001)}), "20,000"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_file_is_refused_in_one_sentence(what: str, tmp_path: Path) -> None:
    path = tmp_path / "lora.safetensors"
    path.write_bytes(BAD[what][0])
    with pytest.raises(FileRefused, match=BAD[what][1]) as refusal:
        read_header(path)
    assert "lora.safetensors" in str(refusal.value)
    assert len(str(refusal.value)) < 400


def test_zip_names_of_checkpoints_folders_pipes_and_nothing(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "z.safetensors", "w") as file:
        file.writestr("archive/data.pkl", b"")
    save_tensors(tmp_path / "ok.safetensors", tensors())
    (tmp_path / "ok.ckpt").write_bytes((tmp_path / "ok.safetensors").read_bytes())
    os.mkfifo(tmp_path / "pipe.safetensors")
    for name, why in {
        "z.safetensors": "zip",
        "ok.ckpt": "ckpt",
        "pipe.safetensors": "pipe",
        "": "folder",
        "no.safetensors": "cannot be opened",
    }.items():
        with pytest.raises(FileRefused, match=why):
            read_header(tmp_path / name)


def test_file_that_shrinks_after_its_header_was_read_is_refused(tmp_path: Path) -> None:
    save_tensors(tmp_path / "x.safetensors", tensors())
    header = read_header(tmp_path / "x.safetensors")
    os.truncate(tmp_path / "x.safetensors", header.data_start + 10)
    for read in (read_tensors, tensors_sha256):
        with pytest.raises(FileRefused, match="shorter"):
            read(header)


ENTRIES = b",".join(b'"%x":""' % i for i in range(1_400_000))


@pytest.mark.parametrize(
    "body",
    [
        *(b'{"a":[' + unit * (2**24 // len(unit)) for unit in (b"[", b"[],", b'"",', b"{", b"0,", b"9")),
        *(b'{"a":"' + unit * 2**23 for unit in (b"\\\\", b'\\"')),
        b'{"__metadata__":{' + ENTRIES + b"}}",
    ],
    ids=lambda body: body[:24].decode(),
)
def test_sixteen_megabytes_of_hostile_header_cost_little(body: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(raw(body[: 2**24 - 16]))
    tracemalloc.start()
    began = time.perf_counter()
    with pytest.raises(FileRefused):
        read_header(path)
    seconds, peak = time.perf_counter() - began, tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < path.stat().st_size + 100 * 2**20
    assert seconds < 5  # two for a machine that is not traced and not shared


VALID = safetensors.torch.save({"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(3).half()}, {"k": "v"})


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    data = bytearray(VALID)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(data) - 1))
        match draw(st.sampled_from(("set", "cut", "insert", "digit", "digit", "repeat"))):
            case "set":
                data[at] = draw(st.integers(0, 255))
            case "cut":
                del data[at : at + draw(st.integers(1, 8))]
            case "insert":
                data[at:at] = draw(st.binary(min_size=1, max_size=4))
            case "digit":
                digits = [i for i, c in enumerate(data) if chr(c).isdigit()]
                data[draw(st.sampled_from(digits))] = ord(draw(st.sampled_from("0123456789-")))
            case "repeat":
                data[at:at] = data[at : at + 20]
        if len(data) < 2:
            break
    if draw(st.booleans()):  # every other file keeps a header length that fits: deeper checks are reached
        length = int.from_bytes(VALID[:8], "little") + len(data) - len(VALID)
        data[:8] = max(length, 0).to_bytes(8, "little")
    return bytes(data)


@settings(max_examples=1000, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=mutated())
def test_mutated_file_is_refused_cleanly_or_read_as_the_library_reads_it(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(data)
    try:
        ours = read_tensors(path)
    except FileRefused:
        return
    theirs = safetensors.torch.load(data)  # raises if we were more generous than the library
    assert set(ours) == set(theirs)
    assert all(same_bits(ours[name], theirs[name]) for name in ours)


# ---------------------------------------------------------------- writing


def write_forever(path: Path) -> None:
    for seed in range(1_000_000):
        save_tensors(path, {"x": torch.full((50_000,), float(seed))}, {"seed": str(seed)})


def test_killed_while_saving_the_file_is_whole(tmp_path: Path) -> None:
    path, chance = tmp_path / "x.safetensors", random.Random(0)
    save_tensors(path, {"x": torch.full((50_000,), -1.0)}, {"seed": "-1"})
    seen, orphans = set(), 0
    for _ in range(20):
        child = PROCESSES.Process(target=write_forever, args=(path,))
        child.start()
        before = path.stat().st_mtime_ns
        while path.stat().st_mtime_ns == before and child.is_alive():
            time.sleep(0.001)  # it is at work
        time.sleep(chance.random() * 0.03)
        os.kill(child.pid or 0, signal.SIGKILL)
        child.join()
        header = read_header(path)
        assert bool((read_tensors(header)["x"] == float(header.metadata["seed"])).all())
        seen.add(header.metadata["seed"])
        orphans += len(sweep_partials(tmp_path))
        assert os.listdir(tmp_path) == ["x.safetensors"]
    assert len(seen) > 1
    assert orphans > 0  # some kills did hit the middle of a write


def test_sweep_leaves_a_living_writers_file(tmp_path: Path) -> None:
    (tmp_path / f".x.safetensors.{os.getpid()}-0123abcd.partial").touch()
    (tmp_path / "mine.partial").touch()
    assert sweep_partials(tmp_path) == []
    # the same process id, but of a process that is younger than the file
    old = tmp_path / f".y.safetensors.{os.getpid()}-0123abcd.partial"
    old.touch()
    os.utime(old, (1_000_000_000, 1_000_000_000))
    assert sweep_partials(tmp_path) == [old]


def test_mode_is_kept_and_a_failing_write_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "x.txt"
    path.write_text("old")
    path.chmod(0o640)
    write_atomic(path, lambda partial: bool(partial.write_text("new")) and None)
    assert (path.read_text(), stat.S_IMODE(path.stat().st_mode)) == ("new", 0o640)

    def fails(partial: Path) -> None:
        partial.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomic(path, fails)
    with pytest.raises(SaveFailed, match="No such file"):
        write_atomic(tmp_path / "nowhere" / "x", fails)
    assert path.read_text() == "new"
    assert os.listdir(tmp_path) == ["x.txt"]


def save_under_a_limit(path: Path, answer: object) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    try:
        save_tensors(path, {"x": torch.ones(100_000)})
    except LoraError as problem:
        answer.send((type(problem).__name__, str(problem)))  # type: ignore[attr-defined]


def test_a_file_too_large_for_the_limit_is_a_sentence_and_the_old_one_stays(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_tensors(path, {"x": torch.zeros(3)})
    before = path.read_bytes()
    ours, theirs = PROCESSES.Pipe()
    child = PROCESSES.Process(target=save_under_a_limit, args=(path, theirs))
    child.start()
    assert ours.poll(30)
    kind, message = ours.recv()
    child.join()
    assert kind == "SaveFailed"
    assert "x.safetensors could not be saved" in message
    assert "0.4 MB are needed" in message
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["x.safetensors"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("mounting a small disk is not allowed here")
    yield disk
    with contextlib.suppress(OSError):
        subprocess.run(["umount", str(disk)], check=True)


def test_full_disk_is_a_sentence_and_the_old_file_stays(small_disk: Path) -> None:
    path = small_disk / "x.safetensors"
    save_tensors(path, {"x": torch.zeros(100_000)})
    before = path.read_bytes()
    with pytest.raises(SaveFailed, match=r"disk is full \(1\.1 MB are needed; free: 0\.\d MB\)"):
        save_tensors(path, {"x": torch.ones(300_000)})
    assert path.read_bytes() == before
    assert os.listdir(small_disk) == ["x.safetensors"]
    save_tensors(path, {"x": torch.ones(1000)})  # it goes on when there is space
