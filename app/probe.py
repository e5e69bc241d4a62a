"""What only the heavy packages can tell, in a process of its own: one of them may be broken and take the process along.

    python -m app.probe torch diffusers ...     imports each, tries the devices and the included model

Every fact is a line of JSON on stdout behind `MARK`; what a package prints is none. Before something is tried it is
said, so that whoever reads (`Facts`) knows where it ended.
"""

from __future__ import annotations

import functools
import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
MARK = "fact: "
PATIENCE_S = 600  # the first import after an installation compiles everything
DEVICES, DEMO = "the devices", "the included model"
_DTYPES = {"fp16": "float16", "bf16": "bfloat16", "fp8": "float8_e4m3fn"}


@dataclass(frozen=True)
class Facts:
    """What such a process has found, by name: what came of each trial, or why nothing did."""

    done: dict[str, Any]
    failed: dict[str, str]

    @classmethod
    def gathered(cls, modules: Sequence[str]) -> Facts:
        """From a process that may die or hang of it."""
        paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        command = [sys.executable, "-m", "app.probe", *modules]
        calm = {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_OFFLINE": "1"}
        environment = {**os.environ, **calm, "PYTHONPATH": paths, "PYTHONIOENCODING": "utf-8"}
        try:
            process = subprocess.run(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                timeout=PATIENCE_S,
                check=False,
            )
        except subprocess.TimeoutExpired as late:
            said, ended = late.stdout or b"", f"there was no answer within {PATIENCE_S // 60} minutes"
        else:
            said, ended = process.stdout, f"the process ended with it (exit code {process.returncode})"
        lines = [line for line in said.decode("utf-8", "replace").splitlines() if line.startswith(MARK)]
        return cls.of([json.loads(line.removeprefix(MARK)) for line in lines], ended)

    @classmethod
    def of(cls, facts: Sequence[dict[str, Any]], ended: str) -> Facts:
        done = {fact["done"]: fact["found"] for fact in facts if "done" in fact}
        failed = {fact["failed"]: str(fact["why"]) for fact in facts if "failed" in fact}
        for fact in facts:
            if (what := fact.get("trying")) is not None and what not in (*done, *failed):
                failed[what] = ended
        return cls(done, failed)


def main(names: list[str]) -> None:
    good = {name for name in names if _try(name, functools.partial(_imported, name))}
    if "torch" in good:
        _try(DEVICES, _devices)
    if good >= {"torch", "diffusers", "transformers", "safetensors"}:
        _try(DEMO, _demo)


def _imported(name: str) -> None:
    importlib.import_module(name)


def _try(what: str, act: Callable[[], object]) -> bool:
    """Whether it went well. Nothing that a broken package raises gets past this."""
    _say(trying=what)
    try:
        found = act()
    except BaseException as problem:
        first = next(iter(str(problem).strip().splitlines()), "")
        _say(failed=what, why=f"{type(problem).__name__}: {first}"[:400])
        return False
    _say(done=what, found=found)
    return True


def _say(**fact: Any) -> None:
    print(f"{MARK}{json.dumps(fact)}", flush=True)


def _devices() -> dict[str, Any]:
    """Of every device its name, the bytes of its own memory, and the dtypes that a product was made in."""
    torch = importlib.import_module("torch")
    found = [{"name": f"CPU, {torch.get_num_threads()} threads", "dtypes": _works(torch, "cpu")}]
    if torch.backends.mps.is_available():
        found.append({"name": "Apple GPU (mps)", "dtypes": _works(torch, "mps")})
    for number in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        free, total = torch.cuda.mem_get_info(number)
        found.append(
            {
                "name": torch.cuda.get_device_name(number),
                "total": total,
                "free": free,
                "dtypes": _works(torch, f"cuda:{number}"),
            }
        )
    return {"built_for": torch.version.cuda or torch.version.hip or "", "devices": found}


def _works(torch: Any, device: str) -> list[str]:
    """fp8 is a way to keep weights, which are multiplied in another dtype."""
    found = []
    for name, attribute in _DTYPES.items():
        try:
            kept = torch.ones(16, 16, device=device).to(getattr(torch, attribute))
            used = kept.float() if name == "fp8" else kept
            if float((used @ used).float().sum()) == 16.0**3:
                found.append(name)
        except (RuntimeError, TypeError, AttributeError):
            continue
    return found


def _demo() -> str:
    models = importlib.import_module("lora_core.models")
    return str(models.find_base("demo").family.title)


if __name__ == "__main__":
    main(sys.argv[1:])
