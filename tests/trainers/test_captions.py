"""What becomes of a caption each time its picture is shown."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from lora_core.errors import ConfigError
from trainers.captions import draw, possible, sidecars, with_trigger
from trainers.config_data import DataSettings
from trainers.sampler import Draw
from trainers.scan import scan

TAGS = "1girl, red hair, smile, forest, day"


def settings(**changes: Any) -> DataSettings:
    return DataSettings.model_validate(changes)


def drawn(lines: list[str], count: int = 400, **changes: Any) -> Counter[str]:
    given = settings(**changes)
    return Counter(draw(lines, given, random.Random(i)) for i in range(count))


def test_left_alone_a_caption_is_word_for_word_what_was_written() -> None:
    assert drawn(["a  {cat}, with two  spaces {"]) == {"a  {cat}, with two  spaces {": 400}


def test_shuffled_tags_are_all_there_and_the_first_stay() -> None:
    found = drawn([TAGS], shuffle_tags=True, keep_tokens=2)
    assert len(found) == 6
    for text in found:
        tags = text.split(", ")
        assert tags[:2] == ["1girl", "red hair"]
        assert sorted(tags[2:]) == ["day", "forest", "smile"]
    assert min(found.values()) > 40  # 67 expected of each


def test_tags_are_dropped_at_their_rate_and_kept_ones_never() -> None:
    found = drawn([TAGS], 2000, tag_dropout=0.3, keep_tokens=1)
    assert all(text.startswith("1girl") for text in found)
    left = Counter(tag for text, n in found.items() for tag in text.split(", ") for _ in range(n))
    assert all(0.66 < left[tag] / 2000 < 0.74 for tag in ("red hair", "smile", "forest", "day"))
    order = TAGS.split(", ")
    assert all(sorted(text.split(", "), key=order.index) == text.split(", ") for text in found)


def test_the_whole_caption_is_dropped_at_its_rate_with_the_trigger() -> None:
    found = drawn(["a dog"], 2000, caption_dropout=0.1, trigger="zxq")
    assert set(found) == {"", "zxq, a dog"}
    assert 0.08 < found[""] / 2000 < 0.12


def test_the_trigger_comes_first_and_once() -> None:
    assert set(drawn([TAGS], trigger="zxq", shuffle_tags=True, keep_tokens=5)) == {f"zxq, {TAGS}"}
    assert set(drawn(["a photo of zxq dog"], trigger="zxq")) == {"a photo of zxq dog"}
    assert set(drawn([""], trigger="zxq")) == {"zxq"}


@pytest.mark.parametrize(
    ("caption", "shown"),
    [
        ("a sks dog", "a sks dog"),
        ("she asks a dog", "sks, she asks a dog"),  # inside another word it is none
        ("sks, dog", "sks, dog"),
        ("sksdog", "sks, sksdog"),
        ("(sks:1.2) dog", "(sks:1.2) dog"),
    ],
)
def test_the_trigger_is_a_word_of_its_own(caption: str, shown: str) -> None:
    assert with_trigger(caption, "sks") == shown
    assert with_trigger("a <fox> here", "<fox>") == "a <fox> here"
    assert with_trigger("a.b.c", "a+b") == "a+b, a.b.c"


def test_wildcards_are_drawn_evenly_nested_and_empty_ones_too() -> None:
    found = drawn(["a {red|{dark|light} blue|} dog"], 3000)
    assert set(found) == {"a red dog", "a dark blue dog", "a light blue dog", "a dog"}
    assert abs(found["a red dog"] / 3000 - 1 / 3) < 0.04
    assert abs(found["a dark blue dog"] / 3000 - 1 / 6) < 0.03
    assert set(drawn(["a {red|blue} dog"], wildcards=False)) == {"a {red|blue} dog"}


def test_lines_are_variants() -> None:
    assert set(drawn(["one", "two", "three"])) == {"one", "two", "three"}


@pytest.mark.parametrize(
    "changes",
    [{}, {"trigger": "zxq"}, {"caption_dropout": 0.5}, {"caption_dropout": 1.0}, {"wildcards": False}],
)
def test_what_is_possible_is_exactly_what_is_drawn(changes: dict[str, Any]) -> None:
    lines = ["a {red|{dark|light} blue|} dog", "a zxq {cat|cow}"]
    assert set(possible(lines, settings(**changes), 100) or ()) == set(drawn(lines, 2000, **changes))


def test_what_has_no_end_is_said_so_and_found_out_fast() -> None:
    assert possible(["a, b"], settings(shuffle_tags=True), 100) is None
    assert possible(["a, b"], settings(tag_dropout=0.1), 100) is None
    assert possible(["{a|b}" * 8], settings(), 255) is None
    assert len(possible(["{a|b}" * 8], settings(), 256) or ()) == 256
    assert possible(["{a|b}" * 12_000], settings(), 4096) is None
    assert possible(["{a|a}" * 40], settings(), 4096) is None


# --- files -----------------------------------------------------------------------------------------------------


def folder_of(tmp: Path, *names: str, **texts: str) -> Path:
    for name in names:
        Image.new("RGB", (64, 64), "red").save(tmp / name)
    for stem, text in texts.items():
        name, _, end = stem.rpartition("_")
        (tmp / f"{name}.{end}").write_text(text, encoding="utf-8")
    return tmp


def captions_in(folder: Path, **changes: Any) -> dict[str, tuple[str, ...]]:
    dataset = scan(settings(images=folder, **{"prompt": "the prompt", **changes}), 64)
    return {e.path.name: e.lines for e in dataset.instances}


def test_txt_comes_before_caption(tmp_path: Path) -> None:
    folder = folder_of(
        tmp_path, "a.png", "b.png", "c.png", a_txt="of txt", a_caption="no", b_caption="of caption"
    )
    assert captions_in(folder) == {"a.png": ("of txt",), "b.png": ("of caption",), "c.png": ("the prompt",)}
    (report,) = scan(settings(images=folder, prompt="x"), 64).reports
    assert report.captions == {"a.caption": "a.caption was not read: a.txt comes first"}
    assert report.other == []
    assert [p.name for p in sidecars(folder / "a.png")] == ["a.txt", "a.caption"]


def test_two_pictures_of_one_stem_share_a_caption_and_that_is_said(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, "a.png", "a.jpg", a_txt="words")
    assert captions_in(folder) == {"a.jpg": ("words",), "a.png": ("words",)}
    (report,) = scan(settings(images=folder, prompt="x"), 64).reports
    assert "a.txt is the caption of a.jpg and a.png." in str(report)


def test_an_empty_caption_file_means_the_prompt_and_that_is_said(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, "a.png", a_txt=" \n")
    assert captions_in(folder) == {"a.png": ("the prompt",)}
    said = str(scan(settings(images=folder, prompt="x"), 64).reports[0])
    assert "so with the prompt: a.png" in said
    assert "a.txt is empty" in said
    assert captions_in(folder, prompt=None, trigger="zxq") == {"a.png": ("",)}


def test_lines_of_a_file_are_variants_or_the_first_alone(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, "a.png", a_txt="one\n\ntwo\n")
    assert captions_in(folder) == {"a.png": ("one", "two")}
    assert captions_in(folder, caption_lines="first") == {"a.png": ("one",)}
    (example,) = scan(settings(images=folder), 64).instances
    assert {example.words(Draw(0, i, 5)) for i in range(20)} == {"one", "two"}
    assert [example.words(Draw(0, i, 5)) for i in range(20)] == [
        example.words(Draw(9, i, 5)) for i in range(20)
    ]


def test_a_caption_that_is_no_text_is_named_or_refused(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, "a.png", "b.png", b_txt="words")
    (folder / "a.txt").write_bytes("süß".encode("latin-1"))
    assert captions_in(folder)["a.png"] == ("the prompt",)
    with pytest.raises(ConfigError, match=r"(?s)bad_images = .refuse.:.*a.txt is not UTF-8 text"):
        captions_in(folder, bad_images="refuse")
    with pytest.raises(ConfigError, match=r"no caption, .*: a.png.* a.txt is not UTF-8 text"):
        captions_in(folder, prompt=None)
