"""What a run was made with: of two runs that differ, the first thing to compare."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

PACKAGES = ("lora-loom", "torch", "diffusers", "transformers", "accelerate", "safetensors", "bitsandbytes")


def versions() -> dict[str, str]:
    """Of Python, the system and the packages that are installed."""
    found = {"python": platform.python_version(), "system": f"{platform.system()} {platform.machine()}"}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
