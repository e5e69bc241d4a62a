"""What LoRA Loom needs of others, and what is installed of it. Told from metadata: no package is imported."""

from __future__ import annotations

import importlib.metadata
import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def requirements() -> dict[str, str]:
    """Package -> ">=1,<2", as they stand in pyproject.toml, or in what is installed where that is not there."""
    try:
        table = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
        lines = table["project"]["dependencies"]
    except (OSError, ValueError, KeyError):
        lines = [line for line in importlib.metadata.requires("lora-loom") or () if ";" not in line]
    split = [re.fullmatch(r"([\w.-]+)\s*(.*)", line.strip()) for line in lines]
    return {found[1]: found[2].replace(" ", "") for found in split if found}


def version(name: str) -> str:
    """Of what is installed; "" where it is not, or not whole."""
    try:
        return str(importlib.metadata.version(name) or "")
    except (importlib.metadata.PackageNotFoundError, OSError, ValueError):
        return ""


def fits(version: str, clauses: str) -> bool:
    """`clauses` of >= and < alone, as ours are."""
    own = numbers_of(version)
    for operator, text in re.findall(r"(>=|<)([\d.]+)", clauses):
        other = numbers_of(text)
        length = max(len(own), len(other))
        a, b = ([*numbers, *[0] * (length - len(numbers))] for numbers in (own, other))
        if (a < b) if operator == ">=" else (a >= b):
            return False
    return True


def numbers_of(version: str) -> list[int]:
    found = re.match(r"\d+(\.\d+)*", version)
    return [int(part) for part in found[0].split(".")] if found else []
