"""Requests are checked at birth; a picture's text gives back what was meant, however the prompt looks."""

from __future__ import annotations

import math
import struct
import time
import zlib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from lora_core.errors import ConfigError, FileRefused, SaveFailed
from lora_core.generation import (
    GeneratedImage,
    GenerationRequest,
    parameters_text,
    parse_parameters,
    read_png_parameters,
    save_png,
)


def text_for(request: GenerationRequest, **given: Any) -> str:
    facts = {"seed": 7, "size": (512, 768), "sampler": "DDIM", "model": "v1-5"} | given
    return parameters_text(request, **facts)


# --- requests ---


@pytest.mark.parametrize(
    ("setting", "phrase"),
    [
        ({"prompt": 3}, "prompt is 3; text was expected"),
        ({"prompt": "\ud800"}, "half a character"),
        ({"negative_prompt": None}, "negative_prompt is None"),
        ({"seed": -2}, "seed = -2 is out of range"),
        ({"seed": 2**63}, "out of range"),
        ({"seed": 1.0}, "seed is 1.0; a whole number"),
        ({"steps": 0}, "steps = 0 is out of range: use 1 to 1000"),
        ({"steps": True}, "steps is True"),
        ({"guidance": math.nan}, "guidance = nan"),
        ({"guidance": -1}, "guidance = -1"),
        ({"guidance": "7"}, "guidance is '7'; a number"),
        ({"width": 500}, "width = 500 must be a multiple of 8: 496 is the nearest"),
        ({"height": 513}, "height = 513 must be a multiple of 8: 512 is the nearest"),
        ({"width": 0}, "width = 0 is out of range"),
        ({"height": 100_000}, "out of range"),
        ({"count": 0}, "count = 0"),
        ({"mixes": []}, "mixes is empty"),
        ({"mixes": {"ink": 1}}, "one dict per picture"),
        ({"mixes": [{"ink": 1}, 0.5]}, "one dict per picture"),
        ({"mixes": [{}, {}], "count": 3}, "count = 3 contradicts 2 mixes"),
    ],
)
def test_bad_requests(setting: dict[str, Any], phrase: str) -> None:
    with pytest.raises(ConfigError) as caught:
        GenerationRequest(**{"prompt": "a cat", **setting})
    assert phrase in str(caught.value)
    assert str(caught.value).endswith(".")


def test_good_requests() -> None:
    plain = GenerationRequest(prompt="")
    assert (plain.seed, plain.steps, plain.guidance, plain.count, plain.width) == (0, 25, 7.5, 1, None)
    for setting in ({"seed": None}, {"seed": -1}, {"width": 8, "height": 8192}, {"guidance": 0}):
        GenerationRequest(prompt="a", **setting)
    mixes = [{"ink": 0.5}, {"ink": {"unet": 1.0}}]
    kept = GenerationRequest(prompt="a", mixes=mixes, count=2)
    mixes[0]["ink"] = 9.0
    assert kept.mixes == ({"ink": 0.5}, {"ink": {"unet": 1.0}})


# --- the text ---


def test_the_text_is_a1111s() -> None:
    request = GenerationRequest(prompt="a cat, snow", negative_prompt="blurry", guidance=7.0, steps=20)
    weights = {"ink": 0.8, "cat": {"unet": 0.5, "text_encoder": 0.0}}
    text = text_for(request, model_hash="6ce0161689", weights=weights, lora_hashes={"ink": "1a2b3c4d5e6f"})
    assert text == (
        "a cat, snow <lora:ink:0.8> <lora:cat:0:0.5>\n"
        "Negative prompt: blurry\n"
        "Steps: 20, Sampler: DDIM, CFG scale: 7, Seed: 7, Size: 512x768, "
        'Model hash: 6ce0161689, Model: v1-5, Lora hashes: "ink: 1a2b3c4d5e6f"'
    )
    assert text_for(GenerationRequest(prompt="x")) == (
        "x\nSteps: 25, Sampler: DDIM, CFG scale: 7.5, Seed: 7, Size: 512x768, Model: v1-5"
    )


def test_reading_what_a1111_wrote() -> None:
    read = parse_parameters(
        "masterpiece, (a cat:1.2) <lora:ink:0.8>, snow,\nsecond line <lora:b_2:1:0.5>\n"
        "Negative prompt: blurry, bad\nhands\n"
        "Steps: 20, Sampler: DPM++ 2M Karras, CFG scale: 7, Seed: 965400086, Size: 512x768, "
        "Model hash: 6ce0161689, "
        'Model: v1-5, Lora hashes: "ink: 1a2b3c4d5e6f, b_2: aabbccddeeff", Version: v1.6.0'
    )
    assert read["prompt"] == "masterpiece, (a cat:1.2), snow,\nsecond line"
    assert read["negative_prompt"] == "blurry, bad\nhands"
    assert read["loras"] == {"ink": 0.8, "b_2": {"text_encoder": 1.0, "unet": 0.5}}
    assert read["lora_hashes"] == {"ink": "1a2b3c4d5e6f", "b_2": "aabbccddeeff"}
    assert (read["fields"]["Sampler"], read["fields"]["Seed"]) == ("DPM++ 2M Karras", "965400086")
    assert (read["fields"]["Size"], read["fields"]["Version"]) == ("512x768", "v1.6.0")


@pytest.mark.parametrize(
    "text", ["", "a cat", "a cat: 3, dog: 4", "x\nNegative prompt: y", 'a: 1, b: 2, c: "']
)
def test_texts_that_are_not_settings(text: str) -> None:
    read = parse_parameters(text)
    assert read["prompt"] == text.partition("\nNegative prompt: ")[0] or read["fields"]
    assert read["negative_prompt"] == text.partition("\nNegative prompt: ")[2]


words = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
tricky = st.sampled_from(
    [
        "a, b: c",
        'say "hi"',
        "Negative prompt: no",
        "\nNegative prompt: x",
        "Steps: 20, Sampler: x, Seed: 4",
        "<lora:x:1>",
        " <lora:x:0.5:0.25>",
        "\\",
        "\n",
        '"',
        "\r\n",
        "\u2028",
        " ",
    ]
)
prompts = st.lists(words | tricky, max_size=5).map("".join)
names = (words | tricky).filter(bool)
numbers = st.floats(-10, 10, allow_subnormal=False) | st.integers(-3, 3).map(float)
mixed = st.fixed_dictionaries(
    {"unet": numbers, "text_encoder": numbers},
    optional={"text_encoder_2": numbers, "blocks": st.dictionaries(words, numbers, max_size=2)},
)


@settings(max_examples=400, deadline=None)
@given(
    prompt=prompts,
    negative=prompts,
    loras=st.dictionaries(names, numbers | mixed, max_size=3),
    hashes=st.dictionaries(names, st.text("0123456789abcdef", min_size=12, max_size=12), max_size=2),
    model=words,
    guidance=st.floats(0, 100),
)
@example(prompt="", negative="", loras={"a": 1.0}, hashes={}, model="", guidance=7.5)
@example(prompt="x <lora:a:1>", negative="", loras={"a": 0.5}, hashes={}, model="m", guidance=7.5)
@example(prompt="x", negative="", loras={"\ud800": 0.5}, hashes={}, model="m", guidance=7.5)
def test_everything_meant_is_read_back(
    prompt: str, negative: str, loras: dict[str, Any], hashes: dict[str, str], model: str, guidance: float
) -> None:
    request = GenerationRequest(prompt=prompt, negative_prompt=negative, guidance=guidance)
    text = text_for(request, weights=loras, lora_hashes=hashes, model=model, model_hash="6ce0161689")
    text.encode("utf-8")
    read = parse_parameters(text)
    assert (read["prompt"], read["negative_prompt"]) == (prompt, negative)
    assert (read["loras"], read["lora_hashes"]) == (loras, hashes)
    fields = read["fields"]
    assert (fields["Model"], fields["Seed"], fields["Size"]) == (model, "7", "512x768")
    assert float(fields["CFG scale"]) == guidance
    assert set(fields) - {"Lora hashes"} == {
        "Steps",
        "Sampler",
        "CFG scale",
        "Seed",
        "Size",
        "Model hash",
        "Model",
    }


def test_ordinary_pictures_need_no_second_spelling() -> None:
    request = GenerationRequest(prompt='a cat: red, (blue:1.2)\n"quoted"', negative_prompt="bad, ugly: yes")
    assert "Exact" not in text_for(request, weights={"ink": 0.8, "b": 1.0}, lora_hashes={"ink": "0" * 12})
    assert "Exact" in text_for(request, weights={"ink": {"unet": 1.0, "blocks": {"down.1": 0.3}}})


@settings(max_examples=200, deadline=None)
@given(
    st.lists(words | tricky | st.sampled_from(["Exact: ", '"{}"', '"[1]"', ", ", "a: b, "]), max_size=8).map(
        "".join
    )
)
@example('a: 1, b: 2, Exact: "[[1]]"')
@example('a: 1, b: 2, Exact: "{\\"prompt\\": 3}"')
@example('a: 1, b: 2, Exact: "' + "[" * 5000 + '"')
def test_no_text_breaks_the_reader(text: str) -> None:
    read = parse_parameters(text)
    assert isinstance(read["prompt"], str)


@pytest.mark.parametrize(
    "unit",
    ["<lora:a:1>", "<lora:", "a:", "a: ", 'a: "', 'a: "\\', "a: b, ", " ", "a", "\nNegative prompt:", '\\"'],
)
def test_reading_takes_time_in_proportion(unit: str) -> None:
    began = time.perf_counter()
    parse_parameters(unit * (500_000 // len(unit)))
    assert time.perf_counter() - began < 5


# --- the file ---


def image_with(text: str) -> GeneratedImage:
    return GeneratedImage(Image.new("RGB", (16, 8), (200, 100, 50)), 7, text)


@pytest.mark.parametrize("prompt", ["a cat", "naïve café", "日本 🐱", 'two\nlines, "q"', "", "nul \0 byte"])
def test_a_png_remembers(prompt: str, tmp_path: Path) -> None:
    text = text_for(GenerationRequest(prompt=prompt))
    save_png(image_with(text), tmp_path / "x.png")
    assert read_png_parameters(tmp_path / "x.png") == text
    with Image.open(tmp_path / "x.png") as image:
        assert (image.format, image.size, image.getpixel((0, 0))) == ("PNG", (16, 8), (200, 100, 50))
    assert list(tmp_path.iterdir()) == [tmp_path / "x.png"]


def test_a_failed_save_leaves_the_old_file(tmp_path: Path) -> None:
    save_png(image_with("first"), tmp_path / "x.png")
    broken = GeneratedImage(Image.new("CMYK", (4, 4)), 7, "second")  # PNG has no CMYK
    with pytest.raises((SaveFailed, OSError)):
        save_png(broken, tmp_path / "x.png")
    assert read_png_parameters(tmp_path / "x.png") == "first"
    with pytest.raises(SaveFailed):
        save_png(image_with("x"), tmp_path / "no folder" / "x.png")
    assert list(tmp_path.iterdir()) == [tmp_path / "x.png"]


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def test_text_behind_the_pixels_is_found(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "x.png")
    whole = (tmp_path / "x.png").read_bytes()
    end = whole.index(b"IEND") - 4
    (tmp_path / "x.png").write_bytes(whole[:end] + chunk(b"tEXt", b"parameters\0late") + whole[end:])
    assert read_png_parameters(tmp_path / "x.png") == "late"


def test_files_without_settings_are_refused(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "plain.png")
    Image.new("RGB", (4, 4)).save(tmp_path / "photo.jpg")
    (tmp_path / "text.png").write_text("not a picture")
    bomb = chunk(b"IHDR", struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0))
    (tmp_path / "bomb.png").write_bytes(
        b"\x89PNG\r\n\x1a\n" + bomb + chunk(b"IDAT", b"x") + chunk(b"IEND", b"")
    )
    info = PngImagePlugin.PngInfo()
    info.add_text("parameters", "x" * 50_000_000, zip=True)
    Image.new("RGB", (4, 4)).save(tmp_path / "long.png", pnginfo=info)
    for name in ("plain.png", "photo.jpg", "text.png", "bomb.png", "long.png", "nothing.png"):
        with pytest.raises(FileRefused, match=name):
            read_png_parameters(tmp_path / name)


def test_a_png_cut_anywhere_is_read_or_refused(tmp_path: Path) -> None:
    save_png(image_with("a cat"), tmp_path / "x.png")
    whole, path = (tmp_path / "x.png").read_bytes(), tmp_path / "cut.png"
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        try:
            found = read_png_parameters(path)
        except FileRefused:
            continue
        assert found == "a cat"
