"""The door: instant help, a first page, and pictures with and without a LoRA."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import launch
from lora_core import LivePipeline, LoraConfig, attach, collect, detach, write_adapter
from lora_core.generation import read_png_parameters
from lora_core.mix import split_weight
from lora_core.parameters import parse_parameters
from lora_core.recipe import Recipe

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("words", [["--help"], ["--list-presets"], ["--resize", "--help"]])
def test_light_commands_import_no_torch_and_no_gradio(words: list[str]) -> None:
    code = (
        "import sys, launch\n"
        "try: code = launch.main(sys.argv[1:])\n"
        "except SystemExit as e: code = e.code\n"
        "heavy = {'torch', 'gradio', 'diffusers', 'transformers'} & set(sys.modules)\n"
        "print('heavy', sorted(heavy)); sys.exit(code)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, *words], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert result.stdout.endswith("heavy []\n")
    assert any(word in result.stdout for word in ("--train", "demo.toml", "--rank"))


def test_without_a_command_the_app_answers_and_a_signal_ends_it(tmp_path: Path) -> None:
    command = [
        sys.executable,
        ROOT / "launch.py",
        "--no-browser",
        "--port",
        "0",
        "--models",
        tmp_path / "models",
    ]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as child:
        try:
            assert child.stdout is not None
            said = child.stdout.readline()
            assert said.startswith("LoRA Loom is at http://127.0.0.1:"), said
            with urllib.request.urlopen(said.split()[4], timeout=30) as answer:
                assert b"LoRA Loom" in answer.read()
        finally:
            child.send_signal(signal.SIGTERM)
            assert child.wait(60) == 0
    assert (tmp_path / "models" / "session.json").exists()


def test_the_network_is_let_in_with_a_token_alone(capsys: pytest.CaptureFixture[str]) -> None:
    assert launch.main(["--host", "0.0.0.0"]) == 2
    assert "Add --token" in capsys.readouterr().err


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    live = LivePipeline.open("demo", device="cpu")
    form = attach(live.models, LoraConfig(rank=4, alpha=6, init="random"))
    adapter = collect(form)
    detach(form)
    return write_adapter(adapter, tmp_path_factory.mktemp("lora") / "fox.safetensors")


def test_one_picture_per_weight_and_the_way_back(
    tmp_path: Path, lora: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        "--generate",
        "--prompt",
        "a dog on a blue background",
        "--steps",
        "3",
        "--out",
        str(tmp_path),
        "--seed",
        "4",
    ]
    assert launch.main([*words, "--lora", f"{lora}:0.5", "--weights", "0", "1", "2"]) == 0
    said = capsys.readouterr().out
    assert "64 of 64 layers" in said
    assert "base verified" in said
    files = sorted(tmp_path.glob("*-4.png"))
    weights = [parse_parameters(read_png_parameters(f))["loras"]["fox"] for f in files]
    assert weights == [0, 0.5, 1]
    assert len({Image.open(f).tobytes() for f in files}) == 3
    assert len(list(tmp_path.glob("*-strip.png"))) == 1
    assert launch.main(words) == 0  # the base alone: the picture at weight 0, into a new file
    bare = (set(tmp_path.glob("*-4.png")) - set(files)).pop()
    a, b = (np.asarray(Image.open(f)).astype(int) for f in (bare, files[0]))
    assert np.abs(a - b).max() <= 1  # sums of another batch size, rounded to bytes


def test_a_contact_sheet_and_its_cells(
    tmp_path: Path, lora: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        "--generate",
        "--prompt",
        "a dog",
        "--steps",
        "2",
        "--lora",
        f"{lora}:0.8",
        "--out",
        str(tmp_path),
    ]
    assert (
        launch.main([*words, "--sheet", "seeds", "--sheet-seeds", "5", "6", "--sheet-weights", "0", "1"]) == 0
    )
    (page,) = tmp_path.glob("*-sheet.png")
    assert page.name in capsys.readouterr().out
    cells = sorted(set(tmp_path.glob("*.png")) - {page})
    read = [parse_parameters(read_png_parameters(f)) for f in cells]
    found = sorted((int(r["fields"]["Seed"]), r["loras"]["fox"]) for r in read)
    assert found == [(5, 0), (5, 0.8), (6, 0), (6, 0.8)]
    assert launch.main([*words, "--sheet", "rows"]) == 2
    assert "seeds" in capsys.readouterr().err


def test_recipe_and_flags(tmp_path: Path, lora: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        f'prompt = "a cat"\nsteps = 2\nseed = 1\nout = "{tmp_path}/out"\n[loras]\n"{lora}" = 0.7\n'
    )
    assert launch.main(["--generate", str(recipe), "--seed", "9", "--fuse"]) == 0
    (file,) = (tmp_path / "out").iterdir()
    read = parse_parameters(read_png_parameters(file))
    assert (read["fields"]["Seed"], read["loras"]) == ("9", {"fox": 0.7})
    assert "fused" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--generate"], "no prompt"),
        (["--generate", "--prompt", "a cat <lora:ink:1>"], "--lora ink.safetensors"),
        (["--generate", "--prompt", "x", "--steps", "0"], "steps"),
        (["--generate", "missing.toml"], "cannot be read"),
        (["--train"], "Name a preset"),
        (["--train", "nowhere.toml"], "nowhere"),
        (["--train", "x", "--generate"], "Choose one"),
        (["--train", "--resume", "nowhere"], "no run folder"),
    ],
)
def test_wrong_usage_is_a_sentence_and_code_2(
    words: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert launch.main(words) == 2
    assert says in capsys.readouterr().err


def test_misspelt_recipe_key(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "r.toml").write_text('promt = "a cat"\n')
    assert launch.main(["--generate", str(tmp_path / "r.toml")]) == 2
    assert 'Did you mean "prompt"' in capsys.readouterr().err


def test_missing_lora_is_a_sentence_and_code_1(capsys: pytest.CaptureFixture[str]) -> None:
    assert launch.main(["--generate", "--prompt", "x", "--lora", "nowhere.safetensors"]) == 1
    assert "nowhere.safetensors" in capsys.readouterr().err


def test_weights_and_windows_paths() -> None:
    assert split_weight("a.safetensors:0.8") == ("a.safetensors", 0.8)
    assert split_weight("a.safetensors:-1") == ("a.safetensors", -1.0)
    assert split_weight(r"C:\loras\a.safetensors") == (r"C:\loras\a.safetensors", 1.0)
    assert split_weight(r"C:\loras\a.safetensors:.5") == (r"C:\loras\a.safetensors", 0.5)
    assert Recipe().with_flags({"lora": ["x:2"]}).loras == {"x": 2.0}
