"""docs/formats.md tells the truth: its keys are read as it says, and it leaves out no kind, no spelling, no family."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from lora_core.formats.endings import BESIDE, ROLES, role_of
from lora_core.formats.files import SPELLINGS
from lora_core.formats.foreign import BY_WIDTH, OTHERS
from lora_core.formats.names import BEGINNINGS, path_of
from lora_core.formats.peft_kinds import METHODS, OWN_ROLES

PAGE = (Path(__file__).resolve().parents[1] / "docs" / "formats.md").read_text(encoding="utf-8")
KEYS = re.findall(r"^\| .* \| `([^`]+)` \| `([^`]+)` \|$", PAGE, re.MULTILINE)


def section(title: str) -> str:
    return re.split(r"^## ", PAGE.split(f"## {title}\n")[1], flags=re.MULTILINE)[0]


def quoted(text: str) -> set[str]:
    return set(re.findall(r"`([^`]+)`", text))


@pytest.mark.parametrize(("key", "path"), KEYS, ids=[key[:40] for key, _ in KEYS])
def test_a_key_of_the_page_is_read_as_it_says(key: str, path: str) -> None:
    found = role_of(key, ())
    assert found is not None
    assert path_of(found[0]) == path


def test_every_ending_and_no_other_stands_in_the_page() -> None:
    rows = [row for row in section("How a factor is named").splitlines() if row.startswith("| `")]
    assert {ending for row in rows for ending in quoted(row.split("|")[1])} == ROLES.keys() | BESIDE.keys()
    assert {ending for row in rows for ending in quoted(row.split("|")[3])} >= OWN_ROLES.keys()


def test_every_beginning_spelling_and_family_stands_in_the_page() -> None:
    assert len(KEYS) == len(re.findall(r"^\| .+`.*`", section("How a layer is named"), re.MULTILINE)) >= 14
    named = " ".join(quoted(section("How a layer is named")))
    for beginning in (
        "lora_unet",
        "oft_unet",
        "lora_te",
        "lora_te1",
        "lora_te2",
        "clip_l",
        "clip_g",
        "diffusion_model",
    ):
        assert any(beginning in own for own in BEGINNINGS.values())
        assert beginning in named
    refused = section("What is refused by its name")
    families = [
        *(name for _, name in OTHERS),
        *(name for names in BY_WIDTH.values() for name in names.values()),
    ]
    for family in {part for name in families for part in re.split(r", | or ", name)}:
        assert family.removesuffix(".5") in refused, family
    for method in METHODS:
        assert method in refused
    rows = [row for row in section("What is written").splitlines() if row.startswith("| `")]
    assert {row.split("`")[1] for row in rows} == {spelling.name for spelling in SPELLINGS}
