"""Stderr of a process of its own, as a user's: the libraries' usual complaints are not there, a real one is."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LONG = """
from lora_core import GenerationRequest, LivePipeline
live = LivePipeline.open("demo", device="cpu")
live.generate(GenerationRequest(prompt="cat " * 60 + "dog", steps=1))
"""


def stderr_of(*words: str) -> str:
    plain = {k: v for k, v in os.environ.items() if k != "TRANSFORMERS_VERBOSITY"}
    done = subprocess.run(
        [sys.executable, *words], cwd=ROOT, env=plain, capture_output=True, text=True, check=True
    )
    return done.stderr


def test_a_command_that_went_well_says_nothing_on_stderr(tmp_path: Path) -> None:
    assert stderr_of("launch.py", "--look", "presets/demo.toml", "--set", f"output={tmp_path}") == ""


def test_a_prompt_that_is_cut_is_still_said() -> None:
    said = stderr_of("-c", LONG)
    assert "truncated because CLIP" in said
    assert "dog" in said
    assert "indexing errors" not in said
