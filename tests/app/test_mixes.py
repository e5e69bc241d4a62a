"""Mixes kept by name: files that nobody else's files are mistaken for, and nothing lost by a slip."""

from __future__ import annotations

from pathlib import Path

import pytest

from app.mixes import Mixes
from lora_core.errors import ConfigError, LoraError
from lora_core.mix import AdapterWeight
from lora_core.named_mixes import read_mix

SOFT = {
    "ink": AdapterWeight.parse("ink", {"unet": 0.3, "blocks": {"down.1": 0.1}, "curve": [[0, 1], [1, 0]]})
}
LOUD = {"ink": AdapterWeight(2.0, 2.0, 2.0), "glow": AdapterWeight()}


@pytest.fixture
def mixes(tmp_path: Path) -> Mixes:
    return Mixes(tmp_path / "Mixes")


def test_what_is_saved_is_found_again(mixes: Mixes) -> None:
    assert mixes.save("soft ink", SOFT, {"ink": "sub/ink.safetensors"}) == "soft ink"
    assert read_mix(mixes.folder / "soft ink.toml") == (SOFT, {"ink": "sub/ink.safetensors"})
    found = Mixes(mixes.folder).find("soft ink")
    assert (found.mix, found.files, found.problem) == (SOFT, {"ink": "sub/ink.safetensors"}, "")
    mixes.save("Soft Ink", LOUD, {})  # one name on every disk, and the newer mix counts
    assert [(saved.name, saved.mix) for saved in mixes.all()] == [("soft ink", LOUD)]


def test_names_from_outside_stay_inside(mixes: Mixes, tmp_path: Path) -> None:
    assert mixes.save("../../over there?", SOFT, {}) == "over there_"
    with pytest.raises(ConfigError, match="no name"):
        mixes.save("  ", SOFT, {})
    mixes.delete("../session")
    (tmp_path / "secret.toml").write_text("[weights]\n")
    (mixes.folder / "link.toml").symlink_to(tmp_path / "secret.toml")
    mixes.delete("link")
    assert [saved.name for saved in mixes.all()] == ["over there_"]
    assert sorted(path.name for path in tmp_path.rglob("*.toml")) == [
        "link.toml",
        "over there_.toml",
        "secret.toml",
    ]


def test_a_file_that_is_no_mix_is_listed_with_the_reason(mixes: Mixes) -> None:
    mixes.save("good", SOFT, {})
    (mixes.folder / "torn.toml").write_text('[weights]\n"ink" = {"unet" = "much"}\n')
    (mixes.folder / ".hidden.toml").write_text("")
    good, torn = mixes.all()
    assert (good.name, good.problem, torn.name) == ("good", "", "torn")
    assert "'much' is not a finite number" in torn.problem
    with pytest.raises(LoraError, match="finite"):
        mixes.find("torn")
    (mixes.folder / "torn.toml").write_text(
        '[weights]\n"ink" = 0.5\n'
    )  # put right by hand: found at the next look
    assert mixes.find("torn").mix == {"ink": AdapterWeight.parse("ink", 0.5)}
    with pytest.raises(LoraError, match='Did you mean "good"'):
        mixes.find("goood")


def test_a_deleted_mix_comes_back_whole(mixes: Mixes) -> None:
    mixes.save("soft", SOFT, {})
    content = (mixes.folder / "soft.toml").read_bytes()
    assert mixes.deleted == ""
    mixes.delete("soft")
    assert (mixes.all(), mixes.deleted) == ([], "soft")
    mixes.restore()
    assert (mixes.folder / "soft.toml").read_bytes() == content
    mixes.restore()  # there is nothing to bring back any longer
    mixes.delete("soft")
    mixes.save("soft", LOUD, {})
    with pytest.raises(LoraError, match="again"):
        mixes.restore()
    assert mixes.find("soft").mix == LOUD
