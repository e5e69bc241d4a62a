"""TOML presets: every shipped one loads and round-trips; every mistake names itself."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lora_core.errors import ConfigError
from trainers import presets
from trainers.config import TrainConfig

LEAST = 'name = "dog"\n[data]\nimages = "photos"\nprompt = "a photo of sks dog"\n'


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def refusal(path: Path | str, *overrides: str) -> str:
    with pytest.raises(ConfigError) as problem:
        presets.load(path, overrides)
    return str(problem.value)


@pytest.mark.parametrize("path", sorted(presets.PRESETS.glob("*.toml")), ids=lambda path: path.stem)
def test_shipped_presets_load_and_round_trip(path: Path, tmp_path: Path) -> None:
    config = presets.load(path)
    assert presets.load(path.stem) == config
    assert presets.load(write(tmp_path, "copy.toml", presets.dump(config))) == config


def test_there_are_presets_and_each_has_a_description() -> None:
    found = presets.list_presets()
    assert {"sd15_subject", "sd15_style", "sdxl_subject", "low_vram"} <= {name for name, _, _ in found}
    assert all(path.is_file() and len(text) > 20 and not text.startswith("#") for _, path, text in found)


def test_low_vram_says_what_each_line_spares_or_costs() -> None:
    text = (presets.PRESETS / "low_vram.toml").read_text(encoding="utf-8")
    lines = [
        line
        for line in text.splitlines()
        if "=" in line and not line.startswith(("#", "extends", "name", "alpha"))
    ]
    assert len(lines) >= 8
    assert [line for line in lines if "spares" not in line and "costs" not in line] == []


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    prompt=st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(str.strip),
    pattern=st.dictionaries(
        st.text(st.characters(exclude_categories=["Cs"])).map(re.escape), st.floats(1e-30, 1e30), max_size=3
    ),
    rate=st.floats(min_value=0, exclude_min=True, allow_infinity=False),
)
def test_whatever_is_dumped_loads_back_equal(
    tmp_path: Path, prompt: str, pattern: dict[str, float], rate: float
) -> None:
    table: dict[str, Any] = {
        "data": {"images": 'a "b\\c', "prompt": prompt},
        "train": {"learning_rate": rate},
    }
    config = TrainConfig(name="x", lora={"alpha_pattern": pattern, "alpha": 3.0}, **table)
    path = tmp_path / "dumped.toml"
    path.write_bytes(presets.dump(config).encode())  # bytes: text mode would translate line ends on Windows
    assert presets.load(path) == config


def test_every_setting_of_the_lora_is_spelled_and_read_back(tmp_path: Path) -> None:
    """One line for each, none left at its default, and --set spells them too."""
    text = """
rank = 3
alpha = 5.0
dropout = 0.05
kind = "lokr"
variant = "dora"
factor = 4
decompose_both = true
init = "random"
rank_stabilized = true
targets = ["to_q"]
text_encoder_targets = ["q_proj"]
exclude = ["attn2.to_q"]
layers_to_transform = [0, 1]
layers_pattern = ["transformer_blocks"]
text_encoder_layers_to_transform = [1]
modules_to_save = ["conv_in"]
text_encoder_modules_to_save = ["final_layer_norm"]
bias = "lora_only"
layer_replication = {"mid_block.attentions.0.transformer_blocks" = [[0, 1], [0, 1]]}
text_encoder_layer_replication = [[0, 2], [1, 2]]
rank_pattern = {"to_q" = 2}
alpha_pattern = {"to_q" = 4.0}
start_from = "it.safetensors"
"""
    config = presets.load(
        write(tmp_path, "all.toml", LEAST + f"[lora]{text}"),
        ["lora.layers_to_transform=[2]", "lora.factor=8"],
    )
    assert config.lora.layers_to_transform == (2,)
    defaults = type(config.lora)()
    new = (
        "kind",
        "factor",
        "decompose_both",
        "layers_to_transform",
        "layers_pattern",
        "modules_to_save",
        "bias",
        "layer_replication",
        "text_encoder_layer_replication",
    )
    assert all(getattr(config.lora, name) != getattr(defaults, name) for name in new)
    assert presets.load(write(tmp_path, "dumped.toml", presets.dump(config))) == config
    unet, words = config.lora.lora_config("unet"), config.lora.lora_config("text_encoder")
    assert (unet.kind, unet.factor, unet.decompose_both, unet.bias) == ("lokr", 8, True, "lora_only")
    assert (unet.layers_to_transform, unet.layers_pattern) == ((2,), ("transformer_blocks",))
    assert (words.layers_to_transform, words.layers_pattern) == ((1,), ())
    assert unet.layer_replication == {"mid_block.attentions.0.transformer_blocks": ((0, 1), (0, 1))}
    assert words.layer_replication == ((0, 2), (1, 2))
    assert (unet.modules_to_save, words.modules_to_save) == (("conv_in",), ("final_layer_norm",))


def test_paths_are_relative_to_the_file_that_names_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, "base/base.toml", LEAST + '[report]\njudge = "views"\nsubject_prompts = ["x"]\n')
    path = write(tmp_path, "mine.toml", 'extends = "base/base.toml"\nbase = "./sd15"\noutput = "out"\n')
    monkeypatch.chdir("/")
    config = presets.load(path, ["data.class_images=cls", "data.class_prompt=a dog"])
    assert config.data.images == tmp_path / "base/photos"
    assert config.report.judge == tmp_path / "base/views"
    assert config.output == tmp_path / "out"
    assert Path(config.base) == tmp_path / "sd15"
    assert config.data.class_images == Path("/cls")  # from the command line: relative to the current folder
    write(tmp_path, "absolute.toml", LEAST.replace('"photos"', '"/photos"'))
    assert presets.load(tmp_path / "absolute.toml").data.images == Path("/photos")


def test_names_of_bases_are_not_taken_for_paths(tmp_path: Path) -> None:
    (tmp_path / "demo").mkdir()
    assert presets.load(write(tmp_path, "a.toml", 'base = "demo"\n' + LEAST)).base == "demo"
    assert presets.load(write(tmp_path, "b.toml", 'base = "owner/model"\n' + LEAST)).base == "owner/model"


def test_extends_merges_tables_and_replaces_lists(tmp_path: Path) -> None:
    write(
        tmp_path,
        "a.toml",
        LEAST + '[train]\nsteps = 9\nbatch_size = 2\n[lora]\ntargets = ["conv", "attention"]\n',
    )
    write(tmp_path, "b.toml", 'extends = "a.toml"\n[train]\nsteps = 7\n[lora]\ntargets = ["conv"]\n')
    config = presets.load(write(tmp_path, "c.toml", 'extends = "b.toml"\nname = "cat"\n'))
    assert (config.name, config.train.steps, config.train.batch_size) == ("cat", 7, 2)
    assert config.lora.targets == ("conv",)


def test_a_shipped_preset_can_be_extended_from_anywhere(tmp_path: Path) -> None:
    config = presets.load(write(tmp_path, "mine.toml", 'extends = "low_vram"\n[data]\nimages = "photos"\n'))
    assert config.data.images == tmp_path / "photos"
    assert config.train.gradient_checkpointing


def test_circles_are_found(tmp_path: Path) -> None:
    write(tmp_path, "a.toml", 'extends = "b.toml"\n' + LEAST)
    write(tmp_path, "b.toml", 'extends = "c.toml"\n')
    write(tmp_path, "c.toml", 'extends = "a.toml"\n')
    assert "a.toml -> b.toml -> c.toml -> a.toml" in refusal(tmp_path / "a.toml")
    write(tmp_path, "self.toml", 'extends = "self.toml"\n')
    assert "self.toml -> self.toml" in refusal(tmp_path / "self.toml")


def test_overrides(tmp_path: Path) -> None:
    path = write(tmp_path, "a.toml", LEAST + "[lora]\nalpha = 8\n")
    config = presets.load(
        path,
        [
            "train.steps=400",
            "train.learning_rate = 2e-5",
            "data.flip=true",
            "data.prompt=a photo of sks cat = 1",
            'lora.targets=["conv"]',
            'lora.rank_pattern."down.*to_q"=4',
            "lora.alpha=",
            'report.subject_prompts=["a", "b"]',
            "name=cat",
        ],
    )
    assert (config.train.steps, config.train.learning_rate, config.data.flip) == (400, 2e-5, True)
    assert config.data.prompt == "a photo of sks cat = 1"
    assert config.lora.targets == ("conv",)
    assert config.lora.rank_pattern == {"down.*to_q": 4}
    assert config.lora.alpha is None
    assert (config.name, config.report.subject_prompts) == ("cat", ("a", "b"))


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("train.steps", "write it as name=value"),
        ("=4", "is no name of a setting"),
        ("a b=4", "is no name of a setting"),
        ("name.x=4", "name is one value, with no settings inside"),
        ("train.step=4", "Did you mean train.steps?"),
        ("trian.steps=4", "There is no setting trian. Did you mean train?"),
        ("train.steps=4 0", 'train.steps = "4 0" must be a whole number'),
        ("train.steps=1\nname='y'", "must be a whole number"),
        ("data.prompt=400", "data.prompt = 400 must be text"),
        ("name=", "name is missing"),
    ],
)
def test_overrides_that_cannot_be(tmp_path: Path, override: str, sentence: str) -> None:
    assert sentence in refusal(write(tmp_path, "a.toml", LEAST), override)


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        (
            LEAST + "[train]\nsteps = = 4\n",
            ["a.toml is not valid TOML", "line 6", "The line reads: steps = = 4"],
        ),
        (LEAST + "[train]\nsteps = 4\nsteps = 5\n", ["a.toml is not valid TOML", "line 7"]),
        (
            LEAST + "[train]\nlerning_rate = 1e-4\n",
            ["a.toml: There is no setting train.lerning_rate. Did you mean train.le"],
        ),
        (LEAST + "[tran]\nsteps = 4\n", ["There is no setting tran. Did you mean train?"]),
        (LEAST + "[train]\nsteps = 2024-01-01\n", ["must be a whole number"]),
        ("extends = 3\n" + LEAST, ["extends must be the name of one preset"]),
        ('extends = "nowhere.toml"\n' + LEAST, ['a.toml extends "nowhere.toml"', "not beside it"]),
        ('data = "x"\nname = "y"', ['data = "x" must be a table.']),
        ("", ["name is missing", "data is missing"]),
    ],
)
def test_bad_presets_say_what_is_wrong(tmp_path: Path, text: str, sentences: list[str]) -> None:
    said = refusal(write(tmp_path, "a.toml", text))
    assert [sentence for sentence in sentences if sentence not in said] == []


def test_bad_files_say_what_is_wrong(tmp_path: Path) -> None:
    assert 'Did you mean "sd15_subject"?' in refusal("sd15_subjct")
    assert "There is no preset" in refusal(tmp_path / "missing.toml")
    assert "There is no preset" in refusal(tmp_path)
    (tmp_path / "latin.toml").write_bytes('name = "é"'.encode("latin-1"))
    assert "latin.toml is not UTF-8 text (byte 8)" in refusal(tmp_path / "latin.toml")
    write(tmp_path, "big.toml", "# " + "x" * 2_000_000)
    assert "larger than 1 MiB" in refusal(tmp_path / "big.toml")


def test_a_byte_order_mark_is_no_obstacle(tmp_path: Path) -> None:
    path = tmp_path / "bom.toml"
    path.write_bytes(b"\xef\xbb\xbf" + LEAST.encode())
    assert presets.load(path).name == "dog"
