"""<lora:...> in a prompt: taken out without a trace, and weighed as A1111 weighs it."""

from __future__ import annotations

import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_core.errors import ConfigError
from lora_core.parameters import parse_parameters
from lora_core.prompt_tags import split_tags


def both(unet: float, text_encoder: float) -> dict[str, float]:
    return {"unet": unet, "text_encoder": text_encoder}


words = st.lists(
    st.sampled_from(["cat", "snow", "(red:1.2)", "<3", "a < b", "lora:", "日本"]), min_size=1, max_size=4
)


@given(words.map(", ".join))
def test_a_prompt_without_tags_comes_back(prompt: str) -> None:
    assert split_tags(prompt) == (prompt, {})


@given(words, st.lists(st.sampled_from("pqrst"), unique=True, min_size=1), st.data())
def test_tags_leave_no_trace(items: list[str], names: list[str], data: st.DataObject) -> None:
    """As items of their own, or behind a word: the prompt is what it was before they were written in."""
    spread = list(items)
    for name in names:
        place = data.draw(st.integers(0, len(spread)))
        if place and data.draw(st.booleans()):
            spread[place - 1] += f"{data.draw(st.sampled_from([' ', '   ']))}<lora:{name}:0.5>"
        else:
            spread.insert(place, f"<lora:{name}:0.5>")
    assert split_tags(", ".join(spread)) == (", ".join(items), dict.fromkeys(names, 0.5))


@given(st.sampled_from(["a cat", ""]), st.floats(-4, 4), st.floats(-4, 4))
def test_all_spellings_of_two_weights_agree(prompt: str, text: float, unet: float) -> None:
    arguments = [
        f"{text}:{unet}",
        f"te={text}:unet={unet}",
        f"UNET={unet}:Te={text}",
        f" {text} : unet = {unet} ",
    ]
    found = [split_tags(f"{prompt}<lora:x:{spelled}>") for spelled in arguments]
    assert found == [(prompt, {"x": unet if unet == text else both(unet, text)})] * len(arguments)


@pytest.mark.parametrize(
    ("tag", "weight"),
    [
        ("<lora:x>", 1.0),
        ("<lora:x:0.8>", 0.8),
        ("<lora:x:-.5>", -0.5),
        ("<lora:x:1e-3>", 0.001),
        ("<lora:x:0.3:0.7>", both(0.7, 0.3)),
        ("<lora:x:0.7:0.7>", 0.7),
        ("<lora:x:unet=0.7>", both(0.7, 1.0)),
        ("<lora:x:te=0.5>", 0.5),  # A1111: the UNet has what the text encoders have, unless it is said
        ("<lora:x:0.8:te=0.5>", 0.5),
        ("<lora:x:0.8:unet=0.5>", both(0.5, 0.8)),
        ("<lora:x:unet=0.5:0.8>", both(0.5, 0.8)),
        ("<lora:x:0.1:0.2:te=0.3>", both(0.2, 0.3)),
        ("<LoRA:x:1>", 1.0),
        ("<lyco:x:0.4>", 0.4),
    ],
)
def test_weights_are_a1111s(tag: str, weight: Any) -> None:
    assert split_tags(f"a cat {tag}") == ("a cat", {"x": weight})


@pytest.mark.parametrize(
    ("prompt", "plain"),
    [
        ("a cat <lora:x:1>, snow", "a cat, snow"),
        ("a cat, <lora:x:1>, snow", "a cat, snow"),
        ("a cat,<lora:x:1>", "a cat"),
        ("<lora:x:1>, a cat", "a cat"),
        ("a <lora:x:1> <lora:y:1> cat", "a cat"),
        ("a <lora:x:1><lora:y:1>cat", "a cat"),
        ("(a cat <lora:x:1>)", "(a cat)"),
        ("(<lora:x:1> a cat)", "(a cat)"),
        ("a cat <lora:x:1>\nsnow", "a cat\nsnow"),
        ("a cat,\n<lora:x:1>, snow", "a cat,\nsnow"),
        ("a  cat <lora:x:1> ", "a  cat"),  # what the user wrote elsewhere is the user's
        ("a cat<lora:x:1>", "a cat"),
        ("sun<lora:x:1>flower", "sunflower"),
        ("a cat <lora:x:1>flower", "a cat flower"),
        ("<lora:x:1>", ""),
    ],
)
def test_what_stays_is_tidy(prompt: str, plain: str) -> None:
    assert split_tags(prompt)[0] == plain


@pytest.mark.parametrize("name", ["a b", "a.b", "a=b", "日本 🐱", "v1-5_(x)", 'say "hi"', "a, b"])
def test_names(name: str) -> None:
    assert split_tags(f"x <lora:{name}:0.5>") == ("x", {name: 0.5})


@pytest.mark.parametrize(
    "text",
    ["<3", "a <b> c", "<lora>", "<lora x:1>", "<lora:x:1", "lora:x:1>", "<lora:a\nb:1>", "<embedding:x:1>"],
)
def test_what_only_looks_like_a_tag_stays(text: str) -> None:
    assert split_tags(f"a {text}  b") == (f"a {text}  b", {})


@pytest.mark.parametrize(
    ("tag", "phrase"),
    [
        ("<lora:>", "names no LoRA"),
        ("<lora::0.8>", "names no LoRA"),
        ("<lora:x:>", '"" is not a finite number'),
        ("<lora:x:0,8>", '"0,8" is not a finite number'),
        ("<lora:x:nan>", '"nan" is not a finite number'),
        ("<lora:x:1e999>", '"1e999" is not a finite number'),
        ("<lora:x:1_0>", "not a finite number"),
        ("<lora:x:te=much>", '"much" is not a finite number'),
        ("<lora:x:1:unte=1>", 'Did you mean "unet"'),
        ("<lora:x:lbw=XYZ>", "Known: te, unet"),
        ("<lora:x:=1>", '"" is unknown'),
        ("<lora:x:te=1:TE=1>", "says te twice"),
        ("<lora:x:dyn=8>", "rank (dyn)"),
        ("<lora:x:1:1:8>", "rank (dyn)"),
        ("<hypernet:x:1>", "is a hypernetwork"),
        ("<lora:x:1> <lyco:x:0.5>", 'the LoRA "x" twice, last in <lyco:x:0.5>'),
    ],
)
def test_refusals(tag: str, phrase: str) -> None:
    with pytest.raises(ConfigError) as caught:
        split_tags(f"a cat {tag}")
    assert phrase in str(caught.value)
    assert tag.split()[-1] in str(caught.value)
    assert str(caught.value).endswith((".", "?"))


@pytest.mark.parametrize("tag", ["<lora:x:0,8>", "<hypernet:x:1>", "<lora:>", "<lora:x:dyn=8>"])
def test_a_picture_keeps_in_its_prompt_what_is_refused_here(tag: str) -> None:
    read = parse_parameters(f"a cat {tag}")
    assert (read["prompt"], read["loras"]) == (f"a cat {tag}", {})


def test_a_picture_speaks_the_same_language() -> None:
    read = parse_parameters("a cat <lora:x> <lyco:y:0.4> <lora:z:0.8:unet=0.5> <lora:x:2>")
    assert read["loras"] == {"x": 1.0, "y": 0.4, "z": both(0.5, 0.8)}
    assert read["prompt"] == "a cat <lora:x:2>"  # said twice: the second stays for the user to see


@pytest.mark.parametrize("unit", ["<lora:", "<lora:a:", "<", "<lora:a ", " <3 ", "a, "])
def test_long_prompts_take_no_time(unit: str) -> None:
    began = time.perf_counter()
    split_tags(unit * (200_000 // len(unit)))
    assert time.perf_counter() - began < 5
