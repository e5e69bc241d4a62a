"""`launch.py --doctor` in real processes: as things are, and with packages that are missing, broken, or deadly."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from app.doctor import Finding, homely, told, usable

ROOT = Path(__file__).resolve().parents[2]
SECRET = "http://ann:secret@proxy.example:3128"


def child(
    *words: object, cwd: Path, python: tuple[str, ...] = (), **environment: str
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *python, str(ROOT / "launch.py"), *map(str, words)]
    everything = {**os.environ, **environment}
    return subprocess.run(
        command, cwd=cwd, env=everything, capture_output=True, text=True, timeout=500, check=False
    )


def findings(done: subprocess.CompletedProcess[str]) -> dict[str, dict[str, Any]]:
    said = json.loads(done.stdout)
    assert done.stderr == ""
    assert said["usable"] is (done.returncode == 0)
    assert done.returncode == (1 if any(f["state"] == "problem" for f in said["findings"]) else 0)
    return {found["name"]: found for found in said["findings"]}


def package(folder: Path, name: str, text: str) -> str:
    (folder / name).mkdir(parents=True)
    (folder / name / "__init__.py").write_text(text)
    return str(folder)


def test_this_machine_is_fit_and_its_home_is_not_told(tmp_path: Path) -> None:
    home = tmp_path / "ann"
    home.mkdir()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = child("--doctor", "--json", "--port", port, cwd=home, HOME=str(home), HTTPS_PROXY=SECRET)
    found = findings(done)
    assert done.returncode == 0
    for name in ("torch", "diffusers", "gradio", "pillow"):
        assert (found[name]["state"], found[name]["said"]) == ("ok", version(name))
    assert "bf16" in found["device"]["said"]
    assert found["included model"]["said"] == "whole (SD 1.x)"
    assert found["runs"]["said"].startswith("~/runs (will be made), ")
    assert (found["port"]["state"], str(port) in found["port"]["said"]) == ("warning", True)
    assert "HTTPS_PROXY" in found["network"]["said"]
    assert "secret" not in done.stdout
    assert str(home) not in done.stdout
    assert list(home.rglob("*")) == []  # nothing was made


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("raise OSError('libcudart.so.13: no such file')", "OSError: libcudart.so.13: no such file"),
        ("import os; os._exit(86)", "the process ended with it (exit code 86)"),
        ("raise SystemExit", "SystemExit"),
    ],
)
def test_a_broken_torch_is_named_with_its_reason_and_the_remedy(text: str, says: str, tmp_path: Path) -> None:
    broken = package(tmp_path / "broken", "torch", text)
    found = findings(child("--doctor", "--json", cwd=tmp_path, PYTHONPATH=broken))
    assert found["torch"]["state"] == "problem"
    assert says in found["torch"]["said"]
    assert 'pip install --force-reinstall "torch>=' in found["torch"]["remedy"]
    assert found["devices"]["said"].startswith("not tried")
    assert found["included model"]["said"].startswith("not tried")
    assert found["outputs"]["state"] == "ok"  # what does not need it is told all the same


def test_without_any_package_it_says_what_to_install_and_so_does_every_command(tmp_path: Path) -> None:
    (tmp_path / "models").write_text("a file")
    bare = ("-S",)  # no site-packages
    done = child("--doctor", "--json", cwd=tmp_path, python=bare)
    found = findings(done)
    for name in ("torch", "psutil", "gradio"):
        assert found[name]["said"].startswith("is not installed; >=")
        assert f'pip install "{name}>=' in found[name]["remedy"]
    assert (found["Lora"]["state"], "it is a file" in found["Lora"]["said"]) == ("problem", True)
    assert found["port"]["state"] == "warning"
    done = child("--list-presets", cwd=tmp_path, python=bare)
    assert (done.returncode, "Traceback" in done.stderr) == (1, False)
    assert "--doctor` tells what is missing" in done.stderr


def test_in_words_with_what_to_do_below() -> None:
    found = [Finding("torch", "ok", "2.13"), Finding("port", "warning", "is taken", "Choose another.")]
    assert told(found) == [
        "ok       torch  2.13",
        "warning  port   is taken",
        "                -> Choose another.",
        "",
        "LoRA Loom can be used: 1 warning.",
    ]
    found.append(Finding("runs", "problem", "cannot be written to"))
    assert told(found)[-1] == "LoRA Loom cannot be used as it is: 1 problem, 1 warning."
    assert (usable(found), usable(found[:2])) == (False, True)


def test_the_home_folder_is_a_tilde_and_only_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "ann"))
    (tmp_path / "ann").mkdir()
    assert homely(f"no {tmp_path}/ann/runs, no '{tmp_path}/ann'") == "no ~/runs, no '~'"
    assert homely(f"{tmp_path}/anna/runs") == f"{tmp_path}/anna/runs"
