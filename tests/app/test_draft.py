"""The pictures being gathered, and the answers that become a preset."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from app.draft import Draft
from app.memory import Form, Row, Wanted, read_wanted, write_wanted
from app.plan import Plan, slug, subject_prompt
from app.tabs.generate import settings_of
from lora_core.errors import ConfigError
from lora_core.generation import parameters_text
from trainers import presets


@pytest.fixture
def draft(tmp_path: Path) -> Draft:
    return Draft(tmp_path / "datasets")


def picture(folder: Path, name: str, colour: str = "red") -> tuple[Path, str]:
    folder.mkdir(exist_ok=True)
    Image.new("RGB", (32, 24), colour).save(folder / name)
    return folder / name, name


def test_good_pictures_are_kept_and_bad_ones_named(draft: Draft, tmp_path: Path) -> None:
    good = [picture(tmp_path / "up", "b.png"), picture(tmp_path / "up", "a.jpg")]
    (tmp_path / "up" / "broken.png").write_bytes(b"not a picture")
    (tmp_path / "up" / "a.txt").write_text("a zxq dog\n")
    (tmp_path / "up" / "notes.pdf").write_bytes(b"%PDF")
    bad = [(tmp_path / "up" / n, n) for n in ("broken.png", "notes.pdf")]
    problems = draft.add([*good, (tmp_path / "up" / "a.txt", "a.txt"), *bad])
    assert [(e.path.name, e.caption) for e in draft.entries()] == [("a.jpg", "a zxq dog"), ("b.png", "")]
    assert len(problems) == 2
    assert problems[0].startswith("broken.png cannot be used")
    assert problems[1].startswith("notes.pdf is neither a picture")


@pytest.mark.parametrize("name", ["../up.png", "..\\up.png", "/etc/up.png", "C:\\a\\up.png", ".up.png"])
def test_a_name_never_leaves_the_folder(draft: Draft, tmp_path: Path, name: str) -> None:
    path, _ = picture(tmp_path / "up", "x.png")
    assert draft.add([(path, name)]) == []
    assert [e.path for e in draft.entries()] == [draft.folder / "up.png"]


def test_several_lines_of_a_caption_stay_lines(draft: Draft, tmp_path: Path) -> None:
    draft.add([picture(tmp_path / "up", "a.png")])
    draft.caption("a.png", "  one   line \n\n another ")
    assert (draft.folder / "a.txt").read_text() == "one line\nanother\n"
    assert [e.caption for e in draft.entries()] == ["one line\nanother"]


def test_a_run_keeps_the_words_it_began_with(draft: Draft, tmp_path: Path) -> None:
    draft.add([picture(tmp_path / "up", "a.png")])
    draft.caption("a.png", "the first words")
    first = draft.freeze("fox")
    draft.caption("a.png", "other words")
    second = draft.freeze("fox")
    assert (first / "a.txt").read_text() == "the first words\n"
    assert (second / "a.txt").read_text() == "other words\n"
    draft.remove("a.png")
    assert sorted(p.name for p in first.iterdir()) == ["a.png", "a.txt"]
    with pytest.raises(ConfigError, match="no picture to learn from"):
        draft.freeze("fox")


@pytest.mark.parametrize("preset", [name for name, _, _ in presets.list_presets()])
@pytest.mark.parametrize("keep_class", [True, False])
def test_answers_become_a_preset_that_loads(tmp_path: Path, preset: str, keep_class: bool) -> None:
    """Also with everything that a shell or TOML would trip over."""
    words = 'a photo of "sks" \\ dog = [x] 🦊'
    plan = Plan(preset, "My dog!", "dog", words, "demo", 200, 8, keep_class)
    config = presets.load(preset, plan.overrides(tmp_path / "pictures"))
    assert (config.name, config.base, config.train.steps, config.lora.rank) == ("My-dog", "demo", 200, 8)
    assert config.data.prompt == words
    assert config.data.images == tmp_path / "pictures"
    assert config.report.judge is None
    assert config.data.has_class == (keep_class and presets.load(preset, ["data.images=."]).data.has_class)


def test_missing_answers_are_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="There is no word for what it is"):
        Plan("demo", "dog", " ", "a dog", "demo", 10, 4).overrides(tmp_path)
    with pytest.raises(ConfigError, match="leaves nothing for a file name"):
        slug("!!!")
    assert subject_prompt("zxq", "animal", "demo") == "a zxq animal"
    assert subject_prompt("sks", "dog", "sd15.safetensors") == "a photo of sks dog"


def test_what_is_wanted_survives_a_restart_and_a_damaged_file(tmp_path: Path) -> None:
    path = tmp_path / "session.json"
    rows = {"ink": Row("ink", "/x/ink.safetensors", 0.4, 0.1, on=False, triggers=("zxq",))}
    wanted = Wanted("demo", rows, Form(prompt="naïve 🦊", seed=7, sampler="Euler a"))
    write_wanted(path, wanted)
    assert read_wanted(path) == wanted
    path.write_text('{"base": ')
    assert read_wanted(path) == Wanted()
    assert (tmp_path / "session-unreadable.json").exists()


def test_a_pictures_text_fills_the_form() -> None:
    form = Form(prompt="a cat", negative_prompt="blurry", seed=9, steps=12, guidance=6.5, sampler="Euler a")
    text = parameters_text(form.request(), seed=9, size=(64, 96), sampler="Euler a", model="demo")
    assert form.changed(**settings_of(text)) == form.changed(width=64, height=96)
    assert settings_of("just words") == {"prompt": "just words", "negative_prompt": "", "count": 1}
