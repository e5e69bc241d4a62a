"""The library on real files: nothing hidden, nothing lost, nothing taken in that is not what it says."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import stat
import time
import unicodedata
from pathlib import Path

import pytest
import torch

from app import library as library_module
from app.library import Library, LoraFile
from app.safe_names import is_inside, safe_name
from lora_core.errors import FileRefused, LoraError, SaveFailed
from lora_core.formats import write_adapter
from lora_core.plain_text import LONGEST, plain
from lora_core.safe_files import save_tensors
from tests.lora_core.adapters_on_disk import PAIR, Q, adapter


@pytest.fixture
def library(tmp_path: Path) -> Library:
    return Library(tmp_path / "models")


def a_lora(path: Path, seed: float = 1.0, metadata: dict[str, str] | None = None) -> Path:
    """An SD 1.x LoRA of one layer; another `seed` is another LoRA."""
    path.parent.mkdir(parents=True, exist_ok=True)
    k = Q.replace("attn1_to_q", "attn2_to_k")
    tensors = {
        f"{Q}.lora_down.weight": torch.full((4, 320), float(seed)),
        f"{Q}.lora_up.weight": torch.ones(320, 4),
        f"{k}.lora_down.weight": torch.ones(2, 768),
        f"{k}.lora_up.weight": torch.ones(320, 2),
        f"{k}.alpha": torch.tensor(1.0),
    }
    save_tensors(path, tensors, metadata)
    return path


def a_base(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_tensors(path, {"model.diffusion_model.input_blocks.0.0.weight": torch.ones(4, 4, 3, 3)})
    return path


def upload(tmp_path: Path, name: str = "up.safetensors", seed: float = 1.0, **metadata: str) -> Path:
    return a_lora(tmp_path / "uploads" / name, seed, metadata)


def names(library: Library) -> list[str]:
    return [file.name for file in library.loras()]


# ---------------------------------------------------------------- listing


def test_folders_are_made_and_empty_is_empty(library: Library) -> None:
    assert library.loras() == []
    assert library.bases() == [("Demo model (included)", "demo")]
    assert sorted(p.name for p in library.root.iterdir()) == ["Lora", "Stable-diffusion"]


def test_facts_are_those_of_the_header(library: Library) -> None:
    tags = {"10_fox": {"fox": 9, "zxq fox, red": 1, "grass": 20}, "1_more": {"fox": 30}, "bad": 3}
    said = {
        "ss_tag_frequency": json.dumps(tags),
        "ss_sd_model_name": "/home/ann/models/My Base v2.safetensors",
        "ss_base_model_version": "sd_v1",
    }
    path = a_lora(library.lora_folder / "animals" / "fox.safetensors", metadata=said)
    (found,) = library.loras()
    assert found == LoraFile(
        name="animals/fox",
        path=path,
        family="sd1",
        family_title="SD 1.x",
        layers=2,
        ranks=(2, 4),
        size_bytes=path.stat().st_size,
        triggers=("fox", "grass", "zxq fox, red"),
        base_model="My Base v2",
    )
    assert library.find("animals/fox") == found


def test_said_trigger_goes_first_and_text_is_cut_and_cleaned(library: Library) -> None:
    said = {
        "modelspec.trigger_phrase": "zxq, a\x00\n\u202ecat,"
        + ",".join(f"w{i}" for i in range(20))
        + ","
        + "x" * 900,
        "ss_tag_frequency": '{"a": {"never": 1}}',
        "ss_sd_model_name": "<b>\u2066" + "m" * 5000,
    }
    a_lora(library.lora_folder / "x.safetensors", metadata=said)
    (found,) = library.loras()
    assert found.triggers == ("zxq", "a cat", "w0", "w1", "w2", "w3", "w4", "w5")
    assert len(found.base_model) == LONGEST
    assert found.base_model.startswith("<b> mmm")


def test_nothing_is_hidden(library: Library) -> None:
    folder = library.lora_folder
    a_lora(folder / "good.safetensors")
    a_lora(folder / "GOOD.SAFETENSORS", 2)
    (folder / "empty.safetensors").touch()
    (folder / "cut.safetensors").write_bytes((folder / "good.safetensors").read_bytes()[:-9])
    (folder / "page.safetensors").write_text("<!doctype html><title>404</title>")
    (folder / "old.ckpt").write_bytes(pickle.dumps({"x": 1}))
    (folder / "good.pt").write_bytes(b"PK\x03\x04" + bytes(20))
    a_base(folder / "base.safetensors")
    save_tensors(
        folder / "flux.safetensors", {"lora_unet_double_blocks_0_img.lora_down.weight": torch.ones(1, 1)}
    )
    (folder / "note.txt").write_text("mine")
    (folder / ".part.safetensors").touch()
    problems = {file.name: file.problem for file in library.loras()}
    told = {
        "base": "is a base model",
        "cut": "cut short",
        "empty": "empty",
        "flux": "Flux LoRA",
        "good.pt": "zip archive",
        "old.ckpt": "pickle",
        "page": "not a .safetensors file",
    }
    assert set(problems) == {"good", "GOOD", *told}
    for name, words in told.items():
        assert words in problems[name]
        assert library.find(name).layers == 0
    assert problems["good"] == problems["GOOD"] == ""


def test_names_are_unique_even_where_files_agree(library: Library) -> None:
    a_lora(library.lora_folder / "cat.safetensors")
    a_lora(library.lora_folder / "cat.SAFETENSORS", 2)
    write_adapter(adapter(), library.lora_folder / "cat", spelling="peft")
    assert names(library) == ["cat", "cat (2)", "cat (3)"]
    assert library.find("cat (3)").path.is_dir()
    assert library.find("cat").path.name == "cat.SAFETENSORS"


def test_a_peft_folder_is_one_lora(library: Library) -> None:
    write_adapter(adapter(), library.lora_folder / "sub" / "two", spelling="peft")
    (found,) = library.loras()
    assert (found.name, found.family, found.layers) == ("sub/two", "sdxl", len(adapter().deltas))
    assert not found.problem
    shutil.move(library.lora_folder / "sub" / "two" / "unet", library.lora_folder / "alone")
    a_lora(library.lora_folder / "alone" / "other.safetensors")
    assert names(library) == ["alone", "alone/other", "sub/two"]
    (library.lora_folder / "alone" / "adapter_config.json").write_text("{")
    assert "damaged JSON" in library.find("alone").problem


def test_files_are_read_once_and_again_when_they_change(
    library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    real = library_module.look
    monkeypatch.setattr(library_module, "look", lambda p: read.append(p.name) or real(p))
    for i in range(3):
        a_lora(library.lora_folder / f"{i}.safetensors", i)
    (library.lora_folder / "bad.safetensors").write_bytes(b"no")
    assert names(library) == names(library) == ["0", "1", "2", "bad"]
    assert len(read) == 4
    a_lora(library.lora_folder / "1.safetensors", 7, {"modelspec.trigger_phrase": "new"})
    assert library.find("1").triggers == ("new",)
    (library.lora_folder / "0.safetensors").unlink()
    assert names(library) == ["1", "2", "bad"]
    assert read[4:] == ["1.safetensors"]


def test_links_out_of_the_folder_are_shown_and_not_followed(library: Library, tmp_path: Path) -> None:
    folder = library.lora_folder
    a_lora(tmp_path / "secret.safetensors")
    a_lora(tmp_path / "outside" / "x.safetensors")
    a_lora(folder / "real" / "own.safetensors")
    (folder / "out.safetensors").symlink_to(tmp_path / "secret.safetensors")
    (folder / "gone.safetensors").symlink_to(tmp_path / "nothing")
    (folder / "loop.safetensors").symlink_to(folder / "loop.safetensors")
    (folder / "outside").symlink_to(tmp_path / "outside")
    (folder / "circle").symlink_to(folder)
    (folder / "within.safetensors").symlink_to(folder / "real" / "own.safetensors")
    write_adapter(adapter(), folder / "peft", spelling="peft")
    weights = folder / "peft" / "unet" / "adapter_model.safetensors"
    shutil.move(weights, tmp_path / "moved")
    weights.symlink_to(tmp_path / "moved")
    found = {file.name: file for file in library.loras()}
    assert set(found) == {"out", "gone", "loop", "outside", "circle", "within", "real/own", "peft"}
    for name in ("out", "gone", "loop", "outside", "peft"):
        assert "leads out" in found[name].problem
        assert found[name].layers == 0
    assert "link to a folder" in found["circle"].problem
    assert found["within"].problem == found["real/own"].problem == ""


def test_unknown_name_gets_the_nearest(library: Library) -> None:
    a_lora(library.lora_folder / "foxes.safetensors")
    with pytest.raises(LoraError, match='Did you mean "foxes"'):
        library.find("foxs")
    for name in ("", "../foxes", "/etc/passwd", "a\nb" * 500):
        with pytest.raises(LoraError, match="not in the library") as refusal:
            library.find(name)
        assert len(str(refusal.value)) < 400


def test_bases_are_files_and_folders_of_their_own_folder(library: Library, tmp_path: Path) -> None:
    folder = library.base_folder
    a_base(folder / "b.safetensors")
    a_base(folder / "old" / "A.safetensors")
    (folder / "sdxl" / "unet").mkdir(parents=True)
    (folder / "sdxl" / "model_index.json").write_text("{}")
    a_base(folder / "sdxl" / "unet" / "diffusion_pytorch_model.safetensors")
    (folder / "x.ckpt").touch()
    (folder / "out.safetensors").symlink_to(a_base(tmp_path / "out.safetensors"))
    assert library.bases() == [
        ("Demo model (included)", "demo"),
        ("b", str(folder / "b.safetensors")),
        ("old/A", str(folder / "old" / "A.safetensors")),
        ("sdxl", str(folder / "sdxl")),
    ]


def test_a_thousand_files_are_listed_at_once_the_second_time(library: Library) -> None:
    first = a_lora(library.lora_folder / "0.safetensors")
    for i in range(1, 1000):
        shutil.copyfile(first, library.lora_folder / f"{i}.safetensors")
    assert len(library.loras()) == 1000
    began = time.perf_counter()
    assert len(library.loras()) == 1000
    assert time.perf_counter() - began < 2  # 0.1 s on a machine of its own


# ---------------------------------------------------------------- importing


def test_import_moves_the_file_under_its_own_name(library: Library, tmp_path: Path) -> None:
    path = upload(tmp_path)
    path.chmod(0o600)  # as uploads are
    content = path.read_bytes()
    found = library.import_file(path, "Füchse ☃.safetensors")
    assert found == library.find("Füchse ☃")
    assert found.path == library.lora_folder / "Füchse ☃.safetensors"
    assert found.path.read_bytes() == content
    assert stat.S_IMODE(found.path.stat().st_mode) & 0o400
    assert stat.S_IMODE(found.path.stat().st_mode) == stat.S_IMODE(library.lora_folder.stat().st_mode) & 0o666
    assert not path.exists()
    assert os.listdir(library.lora_folder) == ["Füchse ☃.safetensors"]


def test_import_across_file_systems(
    library: Library, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.rename

    def refuses(source: str | Path, target: str | Path) -> None:
        if Path(source).parent != Path(target).parent:
            raise OSError(18, "Invalid cross-device link")
        real(source, target)

    monkeypatch.setattr(os, "rename", refuses)
    path = upload(tmp_path)
    content = path.read_bytes()
    assert library.import_file(path, "cat.safetensors").path.read_bytes() == content
    assert not path.exists()
    assert os.listdir(library.lora_folder) == ["cat.safetensors"]


def test_the_same_lora_is_kept_once_under_any_name(library: Library, tmp_path: Path) -> None:
    there = a_lora(library.lora_folder / "sub" / "mine.safetensors", 1, {"note": "edited"})
    again = upload(tmp_path, seed=1)
    assert library.import_file(again, "other.safetensors").path == there
    assert not again.exists()
    assert names(library) == ["sub/mine"]
    other = upload(tmp_path, seed=2)  # the same size and names, other numbers
    assert library.import_file(other, "mine.safetensors").name == "mine"
    alphas = upload(tmp_path, seed=1, lora_adapter_metadata='{"unet.lora_alpha": 3}')
    assert library.import_file(alphas, "alpha.safetensors").name == "alpha"


def test_another_file_of_the_same_name_is_numbered(library: Library, tmp_path: Path) -> None:
    first = library.import_file(upload(tmp_path, seed=1), "Cat.safetensors")
    before = first.path.read_bytes()
    found = [library.import_file(upload(tmp_path, seed=s), "cat.safetensors").name for s in (2, 3)]
    assert found == ["cat-2", "cat-3"]
    assert first.path.read_bytes() == before
    (library.lora_folder / "dir.safetensors").mkdir()
    assert library.import_file(upload(tmp_path, seed=4), "dir.safetensors").name == "dir-2"


def refused_files(folder: Path) -> dict[str, tuple[Path, str]]:
    """name of the upload -> (file, what the sentence says)"""
    folder.mkdir()
    (folder / "a.safetensors").write_bytes(b"")
    (folder / "b.safetensors").write_bytes(a_lora(folder / "x.safetensors").read_bytes()[:200])
    (folder / "c.safetensors").write_bytes(pickle.dumps(["x" * 20]))
    (folder / "d.ckpt").write_bytes(pickle.dumps(["x" * 20]))
    (folder / "e.safetensors").write_text("<!doctype html>" * 9)
    (folder / "f.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(90))
    a_base(folder / "g.safetensors")
    save_tensors(folder / "h.safetensors", {"transformer.x.lora_A.weight": torch.ones(1, 1)})
    save_tensors(folder / "i.safetensors", {"control_model.x": torch.ones(1, 1)})
    save_tensors(folder / "j.safetensors", {**PAIR, f"{Q}.lora_up.weight": torch.ones(8, 5)})
    save_tensors(folder / "k.safetensors", {"anything": torch.ones(1)})
    save_tensors(folder / "l.txt", PAIR)
    (folder / "m.safetensors").symlink_to(folder / "x.safetensors")
    (folder / "n.safetensors").mkdir()
    said = [
        "empty",
        "cut short",
        "pickle",
        "pickle",
        "not a .safetensors",
        "not a .safetensors",
        "base model",
    ]
    said += [
        "transformer",
        "ControlNet",
        "its rank is 4",
        "no LoRA layer",
        "does not end in",
        "link",
        "folder",
    ]
    files = sorted(p for p in folder.iterdir() if p.stem != "x")
    return {path.name: (path, words) for path, words in zip(files, said, strict=True)}


def test_what_is_no_lora_is_refused_in_one_sentence_and_stays_where_it_is(
    library: Library, tmp_path: Path
) -> None:
    a_lora(library.lora_folder / "mine.safetensors")
    for name, (path, words) in refused_files(tmp_path / "bad").items():
        with pytest.raises(FileRefused) as refusal:
            library.import_file(path, f"../dir/Shown {name}")
        assert words in str(refusal.value), name
        assert f"Shown {name}" in str(refusal.value)
        assert len(str(refusal.value)) < 400
        assert path.exists()
    with pytest.raises(FileRefused, match="cannot be opened"):
        library.import_file(tmp_path / "nothing", "x.safetensors")
    assert os.listdir(library.lora_folder) == ["mine.safetensors"]


def test_a_full_disk_leaves_the_library_as_it_was(
    library: Library, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(source: object, target: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "move", full)
    path = upload(tmp_path)
    with pytest.raises(SaveFailed, match="disk is full"):
        library.import_file(path, "cat.safetensors")
    assert os.listdir(library.lora_folder) == []
    assert path.exists()


# ---------------------------------------------------------------- names

NASTY = {
    "../../etc/passwd": "passwd",
    "..\\..\\windows\\system32": "system32",
    "/absolute/cat": "cat",
    "C:\\cat": "cat",
    "C:cat": "C_cat",
    "\\\\host\\share\\cat": "cat",
    "cat:stream": "cat_stream",
    "CON": "_CON",
    "con.txt": "_con.txt",
    "nul ": "_nul",
    "Aux.": "_Aux",
    "COM1": "_COM1",
    "lpt9.x": "_lpt9.x",
    "COM¹": "_COM¹",
    "CONIN$": "CONIN_",
    "com10": "com10",
    "console": "console",
    "cat.": "cat",
    "cat. . ": "cat",
    "  cat": "cat",
    ".hidden": "hidden",
    "..": "lora",
    "": "lora",
    "///": "lora",
    "???": "lora",
    "a\x00b\nc\x7f": "abc",
    "<img src=x onerror=alert(1)>": "_img src=x onerror=alert(1)_",
    'a"b|c*d?e': "a_b_c_d_e",
    "\u202egnp.cat": "gnp.cat",
    "zero\u200bwidth\ufeff": "zerowidth",
    "\ud800lone": "lone",
    "e\u0301té": "été",
    "-rf": "rf",
    "$(reboot);`id`&&x": "_(reboot)_id_&&x",
    "%2e%2e%2fcat": "_2e_2e_2fcat",
    "猫の絵": "猫の絵",
    "キツネ 🦊✨": "キツネ 🦊✨",
    "👩‍🎨 art": "👩‍🎨 art",
    "❤️ love": "❤️ love",
    "Ünïcödé": "Ünïcödé",
    "x\u00a0y\u3000z": "x y z",
}


@pytest.mark.parametrize("name", NASTY)
def test_nasty_name_becomes_a_safe_one(name: str) -> None:
    safe = safe_name(name)
    assert safe == NASTY[name]
    assert safe_name(safe) in (safe, f"_{safe}")
    assert unicodedata.is_normalized("NFC", safe)


@pytest.mark.parametrize("unit", ["x", "猫", "🦊", "👩‍🎨", "é", "e\u0301", "x.", "\u0301"])
def test_long_names_are_cut_to_what_disks_take(unit: str, library: Library, tmp_path: Path) -> None:
    safe = safe_name(unit * 500)
    assert 0 < len(safe) <= LONGEST
    assert len(f"{safe}-9999.safetensors".encode()) < 255
    assert not safe.endswith((".", " ", "\u200d"))
    found = library.import_file(upload(tmp_path), f"{unit * 500}.safetensors")
    assert found.path.exists()
    assert is_inside(found.path, library.lora_folder)


@pytest.mark.parametrize("name", NASTY)
def test_nasty_name_is_imported_inside_the_folder(name: str, library: Library, tmp_path: Path) -> None:
    found = library.import_file(upload(tmp_path), f"{name}.safetensors")
    assert found.path.parent == library.lora_folder
    assert found.path.is_file()
    assert library.find(found.name) == found


def test_plain_text_is_one_line_without_tricks() -> None:
    assert plain("a\u202e\x1b[31m\n b\u2028c\ud800") == "a [31m b c"
    assert plain("x" * 100) == "x" * 79 + "…"
