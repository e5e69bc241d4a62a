"""The command that says what lies in files."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lora_core.duplicates import duplicates
from lora_core.errors import FileRefused, LoraError
from lora_core.formats.files import headers_of
from lora_core.looking import Look, look
from lora_core.progress import steps

MODELS = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")  # pickles are refused, by name


@dataclass(frozen=True, kw_only=True)
class Inspect:
    """`hash`: read the files whole too, for their hashes and for NaN and Inf. `json`: one array, an object for each
    file: what `Look.as_json` has, and "duplicates", the other files that are the same LoRA."""

    files: tuple[Path, ...]
    json: bool = False
    hash: bool = False

    def run(self) -> Iterator[str]:
        """Raises LoraError at the end, with a sentence for each file that is neither a LoRA one could use nor a base
        model."""
        paths = list(dict.fromkeys(path for named in self.files for path in _walked(named)))
        if not paths:
            raise LoraError(
                f"No model lies in {', '.join(map(str, self.files))}. Choose another folder, or a file."
            )
        looks = [look(path, hashes=self.hash) for path in steps(paths, "files")]
        same = duplicates(looks)
        yield from _as_json(looks, same) if self.json else _as_text(looks, same)
        problems = [
            f"{found.path}: {found.problem}" for found in looks if found.problem and not found.is_base
        ]
        if problems:
            raise LoraError(
                "\n".join([f"{len(problems)} of {len(looks)} files cannot be used as a LoRA:", *problems])
            )


def _walked(path: Path) -> Iterator[Path]:
    """The file itself, or what lies below a folder; a folder that is a LoRA, or a base model of many parts, is one."""
    if not path.is_dir():
        yield path
        return
    if (path / "model_index.json").is_file() or _is_lora(path):
        yield path
        return
    try:
        within = sorted(path.iterdir())
    except OSError as problem:
        raise LoraError(
            f"{path} cannot be looked into: {problem.strerror}. Choose another folder."
        ) from problem
    for inside in within:
        hidden = inside.name.startswith(".") or (inside.is_dir() and inside.is_symlink())
        if not hidden and (inside.is_dir() or inside.suffix.lower() in MODELS):
            yield from _walked(inside)


def _is_lora(folder: Path) -> bool:
    try:
        return bool(headers_of(folder))
    except FileRefused:
        return False


def _as_json(looks: list[Look], same: list[tuple[Look, ...]]) -> Iterator[str]:
    others = {found.path: [str(o.path) for o in group if o is not found] for group in same for found in group}
    rows = [found.as_json() | {"duplicates": others.get(found.path, [])} for found in looks]
    yield json.dumps(rows, indent=2)  # in ASCII: any pipe can take it


def _as_text(looks: list[Look], same: list[tuple[Look, ...]]) -> Iterator[str]:
    for found in looks:
        yield f"{found}\n"
    for group in same:
        yield f"the same LoRA {len(group)} times: {', '.join(str(found.path) for found in group)}"
