"""`python -m benchmarks [--list] [arguments for each]`: every benchmark but the one of hours, one after the other."""

from __future__ import annotations

import importlib
import sys

BENCHMARKS = {
    "swap": "loading, weighing, fusing and undoing LoRAs, beside diffusers + PEFT",
    "method": "DoRA, combining and attaching, beside PEFT",
    "files": "opening LoRA files and looking at them, beside the safetensors library",
    "train": "steps, memory and losses of a training, beside diffusers + PEFT",
    "likeness": "what trainings teach and what they spoil, beside diffusers + PEFT (hours: by its own name alone)",
}
HOURS = "likeness"


def main(arguments: list[str]) -> int:
    if "--list" in arguments:
        for name, title in BENCHMARKS.items():
            print(f"python -m benchmarks.{name:8} {title}")
        return 0
    for name in [name for name in BENCHMARKS if name != HOURS]:
        # imported one at a time: --list waits for neither torch nor diffusers
        importlib.import_module(f"benchmarks.{name}").main(arguments)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
