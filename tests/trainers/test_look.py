"""The dataset look shows what a run is fed, no more and no less, and nothing of it can run in a browser."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import shutil
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

import launch
from lora_core import LivePipeline, LoraConfig, attach, detach
from lora_core.errors import ConfigError
from lora_core.trainable.words import learn_words
from tests.trainers.runs import config
from trainers import presets
from trainers.batches import Feeder
from trainers.conditioning import lengths
from trainers.config import TrainConfig
from trainers.dataset import layers, pixels, read
from trainers.look import look
from trainers.picture_checks import BLURRED, alike, perceptual_hash, sharpness
from trainers.scan import scan

EVIL = '<script>alert("x")</script>'
LONG = "a red dog on a striped blue background, " * 12 + "zebra"


def scene(seed: int, size: tuple[int, int] = (96, 96)) -> Image.Image:
    """Smooth shapes with sharp edges, no two seeds alike."""
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 255, (6, 6, 3), np.uint8)).resize(size, Image.Resampling.NEAREST)


def folder(path: Path) -> Path:
    path.mkdir()
    for i in range(4):
        scene(i).save(path / f"{i}.png")
    scene(7, (160, 96)).save(path / "wide.png")
    shutil.copyfile(path / "0.png", path / "twin.png")
    scene(1, (96, 96)).resize((64, 64)).save(path / "nearly.jpg", quality=40)
    scene(8).filter(ImageFilter.GaussianBlur(9)).save(path / "soft.png")
    scene(9, (20, 20)).save(path / "tiny.png")
    (path / "broken.png").write_bytes(b"nonsense")
    (path / "notes.doc").write_text("x")
    (path / "orphan.txt").write_text("alone")
    (path / "0.txt").write_text(f"{EVIL}, a, b, c", encoding="utf-8")
    (path / "1.txt").write_text(LONG, encoding="utf-8")
    return path


def settings(tmp: Path, **data: Any) -> TrainConfig:
    images = tmp / "photos <i>"
    if not images.exists():
        folder(images)
    return config(tmp, "demo", data={"images": images, "shuffle_tags": True, "keep_tokens": 1, **data})


def by_name(facts: dict[str, Any]) -> dict[str, Any]:
    return {p["file"]: p for p in facts["pictures"]}


def test_what_is_shown_is_what_a_run_is_fed(tmp_path: Path) -> None:
    """Crops and prompts against the loader's own, pixel by pixel and word by word."""
    asked = settings(tmp_path, flip=True)
    facts = look(asked, tmp_path / "out")
    dataset = scan(asked.data, 64)
    feeder = Feeder(dataset, None, None, batch_size=2, seed=asked.seed)
    batches = [feeder.draw("instance") for _ in range(8)]
    assert facts["first_batches"] == [
        [{"file": e.path.name, "prompt": text} for e, _, text in rows] for rows in batches
    ]
    shown = by_name(facts)
    for example, view, text in batches[0]:
        assert text in [f["text"] for f in shown[example.path.name]["prompts"]]
        assert tuple(shown[example.path.name]["bucket"]) == view.plan.bucket
    page = (tmp_path / "out" / "small.html").read_text(encoding="utf-8")
    thumbs = [base64.b64decode(uri) for uri in re.findall(r'src="data:image/webp;base64,([^"]+)"', page)]
    assert len(thumbs) == len(dataset.examples) == 9
    for example, thumb in zip(dataset.examples, thumbs, strict=True):
        fed = (pixels(layers(example, read(example))[0], example.views()[0]).permute(1, 2, 0) + 1) * 127.5
        cut = Image.fromarray(fed.round().to(torch.uint8).numpy())
        seen = Image.open(io.BytesIO(thumb))
        assert seen.size == cut.size
        a, b = (np.asarray(image.convert("L"), float) for image in (seen, cut))
        assert (
            np.abs(a - b).mean() < 6
        )  # WebP's loss at these edges; another crop or picture differs by 40 and more
    assert json.loads((tmp_path / "out" / "small.json").read_text(encoding="utf-8")) == json.loads(
        json.dumps(facts)
    )


def test_what_is_odd_is_said(tmp_path: Path) -> None:
    facts = look(settings(tmp_path), tmp_path / "out")
    where = "photos <i>/"
    assert facts["duplicates"] == [[f"{where}0.png", f"{where}twin.png"]]
    assert facts["near_duplicates"] == [[f"{where}1.png", f"{where}nearly.jpg"]]
    shown = by_name(facts)
    assert {name for name, p in shown.items() if p["odd"]} == {"soft.png", "tiny.png"}
    assert shown["soft.png"]["odd"] == ["blurred"]
    assert shown["tiny.png"]["odd"][0] == "too small: enlarged 3.2 times"
    (of_folder,) = facts["folders"]
    assert of_folder["unused"].pop("broken.png").startswith("it is damaged")
    assert of_folder["unused"] == {
        "notes.doc": "not a picture that is read",
        "orphan.txt": "a caption without a picture",
    }
    assert {tuple(b["bucket"]): (b["pictures"], b["turns"]) for b in facts["buckets"]} == {
        (64, 64): (8, 8),
        (80, 48): (1, 1),
    }
    assert "80 x 48 has one picture: its batches hold nothing else." in facts["warnings"]


def test_what_is_not_read_of_a_prompt_is_marked(tmp_path: Path) -> None:
    facts = look(settings(tmp_path, shuffle_tags=False), tmp_path / "out")
    (prompt,) = by_name(facts)["1.png"]["prompts"]
    assert prompt["text"] == LONG
    assert prompt["tokens"] > 77
    assert LONG.endswith(prompt["unread"])
    page = (tmp_path / "out" / "small.html").read_text(encoding="utf-8")
    assert f'{LONG.removesuffix(prompt["unread"])}<span class="unread">{prompt["unread"]}</span>' in page
    (said,) = [line for line in facts["warnings"] if "tokens" in line]
    assert said.startswith(
        f"1.png has prompts of up to {prompt['tokens']} tokens; not read is “{prompt['unread'][:40]}"
    )
    (short,) = by_name(facts)["2.png"]["prompts"]
    assert (short["text"], short["unread"]) == ("a zxq cat", "")


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def test_the_page_is_one_file_in_which_nothing_runs_and_nothing_is_fetched(tmp_path: Path) -> None:
    look(settings(tmp_path), tmp_path / "out")
    text = (tmp_path / "out" / "small.html").read_text(encoding="utf-8")
    assert "&lt;script&gt;" in text
    parser = Tags()
    parser.feed(text)
    tags = {tag for tag, _ in parser.found}
    assert not tags & {"script", "link", "iframe", "object", "form", "a", "i"}
    for tag, attributes in parser.found:
        assert not [name for name in attributes if name.startswith("on")]
        if "src" in attributes:
            assert tag == "img"
            assert (attributes["src"] or "").startswith("data:image/webp;base64,")
    assert "http" not in text.replace("http-equiv", "")
    assert "default-src 'none'" in text


def test_masks_and_classes_to_come(tmp_path: Path) -> None:
    asked = settings(tmp_path, masked_loss=True, class_prompt="a <cat>", class_count=5)
    Image.new("L", (96, 96), 255).save(tmp_path / "photos <i>" / "2.mask.png")
    facts = look(asked, tmp_path / "out")
    assert by_name(facts)["2.png"]["mask"] == "2.mask.png"
    assert by_name(facts)["3.png"]["mask"] is None
    assert facts["notes"] == ["5 pictures of “a <cat>” will be made by the base model."]


def test_a_base_that_is_not_here_is_not_fetched(tmp_path: Path) -> None:
    asked = settings(tmp_path).model_copy(update={"base": "somebody/some-model"})
    facts = look(asked, tmp_path / "out")
    assert facts["base"] == "somebody/some-model (not on this machine)"
    assert by_name(facts)["1.png"]["prompts"][0]["tokens"] > 77


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    preset = tmp_path / "preset.toml"
    preset.write_text(presets.dump(settings(tmp_path)), encoding="utf-8")
    assert launch.main(["--look", str(preset), "--set", "data.flip=true"]) == 0
    said = capsys.readouterr().out
    assert "9 pictures. Buckets: 64 x 64: 8, 80 x 48: 1." in said
    assert "The same file twice" in said
    assert Path(said.splitlines()[-1]) == tmp_path / "runs" / "look" / "small.html"
    assert launch.main(["--look", str(preset), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert len(facts["pictures"]) == 9
    assert launch.main(["--look", str(preset), "--set", f"data.images={tmp_path / 'nowhere'}"]) == 2
    assert "does not exist" in capsys.readouterr().err
    with pytest.raises(ConfigError):
        look(settings(tmp_path, images=tmp_path / "nowhere"), tmp_path / "out")


# --- the figures -----------------------------------------------------------------------------------------------


def test_hashes_stay_and_tell_apart() -> None:
    scenes = [scene(i, (200, 200)) for i in range(12)]
    hashes = [perceptual_hash(image) for image in scenes]
    assert alike(hashes) == []
    for image, code in zip(scenes, hashes, strict=True):
        buffer = io.BytesIO()
        lighter = image.resize((90, 90)).point(lambda v: min(255, v + 12))
        lighter.save(buffer, "JPEG", quality=50)
        assert alike([code, perceptual_hash(Image.open(buffer))]) == [[0, 1]]
    assert alike([0, 0b111, 0b111111, 2**40 - 1]) == [[0, 1, 2]]  # a chain


def test_sharpness_is_the_variance_of_the_laplacian() -> None:
    values = np.random.default_rng(0).integers(0, 255, (40, 50), np.uint8)
    grey = values.astype(int)
    found = [
        grey[r - 1, c] + grey[r + 1, c] + grey[r, c - 1] + grey[r, c + 1] - 4 * grey[r, c]
        for r in range(1, 39)
        for c in range(1, 49)
    ]
    assert sharpness(Image.fromarray(values)) == pytest.approx(np.var(found))
    picture = scene(3, (512, 512))
    assert sharpness(picture.filter(ImageFilter.GaussianBlur(3))) < BLURRED < sharpness(picture)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names")
def test_a_name_that_is_no_text_is_shown_all_the_same(tmp_path: Path) -> None:
    images = tmp_path / "p"
    images.mkdir()
    scene(1).save(images / "a.png")
    (images / "a.png").rename(images / os.fsdecode(b"odd\xff.png"))
    facts = look(config(tmp_path, "demo", data={"images": images, "prompt": "x"}), tmp_path / "out")
    assert [p["file"] for p in facts["pictures"]] == ["odd\udcff.png"]
    assert "odd\\udcff.png" in Path(facts["page"]).read_text(encoding="utf-8")


@pytest.mark.parametrize("base", ["demo", "somewhere/else"])
def test_new_words_are_counted_as_the_training_counts_them(tmp_path: Path, base: str) -> None:
    """Against the tokenizer that stands in the pipeline while they are learned."""
    words = {"<fox>": "animal", "<look>": 3, "zxqwv": "a red dog"}
    text = "a photo of <fox>, zxqwv and so on in the style of <look>"
    asked = config(
        tmp_path, base, data={"images": folder(tmp_path / "p"), "prompt": text}, lora={"new_tokens": words}
    )
    facts = look(asked, tmp_path / "out")
    shown = {prompt["text"]: prompt["tokens"] for p in facts["pictures"] for prompt in p["prompts"]}
    if base != "demo":  # CLIP's own words: two marks, ten words, a comma, and 1 + 3 + 3 vectors
        assert shown[text] == 2 + 10 + 1 + 7
        return
    pipe = LivePipeline.open("demo", device="cpu")
    form = attach(pipe.models, LoraConfig(rank=1))
    learn_words(form, pipe.pipeline, words)
    assert shown[text] == lengths(pipe.pipeline, [text])[0]
    detach(form)
    assert shown[text] < lengths(pipe.pipeline, [text])[0]
