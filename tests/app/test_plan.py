"""The Train tab's answers: what follows from what, and what the user has worded himself stays."""

from __future__ import annotations

from pathlib import Path

import pytest

from app.memory import Wanted, read_wanted, write_wanted
from app.plan import Plan
from lora_core.errors import ConfigError
from trainers import presets


def test_a_prompt_follows_its_words_until_somebody_words_it() -> None:
    plan = Plan().changed(token="sks").changed(noun="ox")
    assert plan.prompt == "a sks ox"
    assert plan.changed(noun="otter").prompt == "a sks otter"
    own = plan.changed(prompt="sks ox in a field")
    assert own.changed(noun="cow").prompt == "sks ox in a field"


def test_a_preset_brings_its_numbers_and_a_base_its_preset() -> None:
    plan = Plan(steps=77).changed(preset="low_vram")
    assert (plan.steps, plan.rank, plan.keep_class) == (800, 8, True)
    sdxl = Plan(token="sks", noun="dog", prompt="a sks dog").on_base("/models/big.safetensors", "sdxl")
    assert (sdxl.preset, sdxl.steps, sdxl.prompt) == ("sdxl_subject", 1000, "a photo of sks dog")
    sd15 = sdxl.on_base("/models/small.safetensors", "sd1")
    assert (sd15.preset, sd15.steps) == ("sd15_subject", 800)
    assert sd15.changed(preset="low_vram").on_base("/models/other.safetensors", "sd1").preset == "low_vram"
    chosen = Plan(preset="demo_dora", steps=50)
    assert chosen.on_base("demo", "sd1") == chosen


def test_settings_of_ones_own_are_said_last(tmp_path: Path) -> None:
    lines = "# slower\n\ntrain.steps = 70\n train.gradient_checkpointing = true \ndata.prompt = a fox\n"
    config = Plan(settings=lines).config(tmp_path)
    assert (config.train.steps, config.train.gradient_checkpointing) == (70, True)
    assert config.data.prompt == "a fox"
    with pytest.raises(ConfigError, match=r"Did you mean train\.learning_rate"):
        Plan(settings="train.lerning_rate = 1").config(tmp_path)
    with pytest.raises(ConfigError, match="is no setting"):
        Plan(settings="hello").config(tmp_path)


def test_answers_are_kept_but_not_for_a_preset_that_has_gone(tmp_path: Path) -> None:
    path = tmp_path / "session.json"
    wanted = Wanted(plan=Plan(name="naïve 🦊", settings="train.steps = 7"), predictions={"/x": "epsilon"})
    write_wanted(path, wanted)
    assert read_wanted(path) == wanted
    path.write_text(path.read_text().replace('"preset": "demo"', '"preset": "of_old"'))
    assert read_wanted(path) == Wanted(predictions={"/x": "epsilon"})


def test_what_a_preset_extends(tmp_path: Path) -> None:
    assert presets.ancestors("low_vram") == ["sd15_subject"]
    assert presets.ancestors("demo") == []
    (tmp_path / "a.toml").write_text('extends = "b.toml"')
    (tmp_path / "b.toml").write_text('extends = "low_vram"')
    assert presets.ancestors(tmp_path / "a.toml") == ["b", "low_vram", "sd15_subject"]
    (tmp_path / "b.toml").write_text('extends = "a.toml"')
    assert presets.ancestors(tmp_path / "a.toml") == ["b", "a"]
