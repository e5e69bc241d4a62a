"""A file of another trainer -> its settings as names and values, and which trainer's they are.

fox.toml       kohya's --config_file (its sections mean nothing), or its --dataset_config with [[datasets]]
fox.json       what kohya_ss saves with its own names, or either of the above as JSON
fox.sh, .txt   a command line: accelerate launch train_network.py --network_dim 8 ..., with VARIABLES set above it
"""

from __future__ import annotations

import json
import re
import shlex
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_core.errors import ConfigError

MAX_BYTES = 1 << 20
GUI_KEYS = {"LoRA_type", "max_resolution", "LyCORIS_preset", "lr_warmup", "sdxl_no_half_vae"}
DIFFUSERS_KEYS = {"instance_data_dir", "instance_prompt", "with_prior_preservation", "dataset_name"}
LISTS = {"network_args", "optimizer_args", "lr_scheduler_args", "base_weights"}  # one word is a list too
OTHER_MODELS = re.compile(
    r"flux|sd3|stable_cascade|lumina|hunyuan|anima|qwen|sana|hidream|z_image|chroma|wan|controlnet|control_net",
    re.IGNORECASE,
)
_ASSIGNED = re.compile(r"^\s*(?:export\s+|set\s+|\$)?([A-Za-z_]\w*)\s*=\s*(.+?)\s*$")
_VARIABLE = re.compile(r"\$(?:env:)?\{?([A-Za-z_]\w*)\}?")


@dataclass(frozen=True)
class Given:
    """`kind` is "kohya", "kohya_gui" or "diffusers"; `script` the .py of a command line, or empty."""

    file: Path
    kind: str
    script: str
    settings: dict[str, Any]

    @property
    def folder(self) -> Path:
        return self.file.absolute().parent


def read(file: Path) -> Given:
    text = text_of(file)
    if file.suffix.lower() in (".toml", ".json"):
        table = table_of(file, text)
        if "datasets" in table:
            return Given(file, "kohya", "", {"dataset_config": table})
        settings = without_sections(table)
        _refuse_other_models(file, "", settings)
        kind = "kohya_gui" if GUI_KEYS & settings.keys() else _kind("", settings)
        return Given(file, kind, "", settings)
    script, settings = arguments(text)
    if not settings:
        raise ConfigError(
            f"{file.name} holds no arguments such as --network_dim 8. Import kohya's TOML or JSON, or a "
            f"text file with "
            "the command that starts the training."
        )
    _refuse_other_models(file, script, settings)
    return Given(file, _kind(script, settings), script, settings)


def _refuse_other_models(file: Path, script: str, settings: Mapping[str, Any]) -> None:
    said = [script, settings.get("network_module"), settings.get("LoRA_type")]
    said += [
        name for name in ("flux1_checkbox", "sd3_checkbox", "lumina_checkbox") if settings.get(name) is True
    ]
    for word in said:
        if isinstance(word, str) and OTHER_MODELS.search(word):
            raise ConfigError(
                f"{file.name} trains another kind of model ({word}). LoRAs of SD 1.x, 2.x and SDXL are trained here."
            )


def text_of(file: Path) -> str:
    try:
        if file.stat().st_size > MAX_BYTES:
            raise ConfigError(
                f"{file.name} is larger than 1 MiB: no training's settings are. Choose another file."
            )
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as problem:
        raise ConfigError(
            f"{file.name} is not UTF-8 text (byte {problem.start}): save it as UTF-8."
        ) from problem
    except OSError as problem:
        raise ConfigError(f"{file} cannot be read: {problem.strerror}.") from problem


def table_of(file: Path, text: str) -> dict[str, Any]:
    try:
        table = json.loads(text) if file.suffix.lower() == ".json" else tomllib.loads(text)
    except (ValueError, RecursionError) as problem:
        raise ConfigError(f"{file.name} is not valid {file.suffix[1:].upper()}: {problem}.") from problem
    if not isinstance(table, dict):
        raise ConfigError(f"{file.name} is no table of settings but a {type(table).__name__}.")
    return table


def without_sections(table: Mapping[str, Any]) -> dict[str, Any]:
    """kohya's config file: sections are for the eye, and a name counts wherever it stands."""
    flat: dict[str, Any] = {}
    for name, value in table.items():
        flat.update(value if isinstance(value, dict) else {name: value})
    return flat


def arguments(text: str) -> tuple[str, dict[str, Any]]:
    """A command line -> (the script's name, its arguments). Variables that the text sets are filled in."""
    joined = re.sub(r"[\\^`][ \t]*\r?\n", " ", text)  # continued lines of shells, cmd and PowerShell
    variables: dict[str, str] = {}
    words: list[str] = []
    for line in joined.splitlines():
        filled = _VARIABLE.sub(lambda m: variables.get(m[1], m[0]), line)
        if (match := _ASSIGNED.match(filled)) and "--" not in filled:
            variables[match[1]] = match[2].strip("\"'")
        else:
            words += _words(filled)
    script = next((w for w in words if w.endswith(".py")), "")
    start = words.index(script) + 1 if script else 0
    return Path(script.replace("\\", "/")).name, options(words[start:])


def options(words: list[str]) -> dict[str, Any]:
    """["--a=1", "--b", "2", "3", "--c"] -> {"a": "1", "b": ["2", "3"], "c": True}"""
    found: dict[str, Any] = {}
    name = ""
    for word in words:
        if word.startswith("--") and len(word) > 2:
            name, equals, value = word[2:].partition("=")
            name = name.replace("-", "_")
            found[name] = [value] if equals else []
        elif name:
            found[name].append(word)
    return {
        name: values if name in LISTS or len(values) > 1 else values[0] if values else True
        for name, values in found.items()
    }


def _words(line: str) -> list[str]:
    """Backslashes of Windows paths stay: outside of quotes they are only escapes where a shell reads them."""
    windows = re.search(r"(^|[\s=\"'])[A-Za-z]:\\|\.\\", line) is not None
    lexer = shlex.shlex(line, posix=True, punctuation_chars=False)
    lexer.whitespace_split, lexer.commenters = True, "#" if line.lstrip().startswith("#") else ""
    if windows:
        lexer.escape = ""
    try:
        return list(lexer)
    except ValueError as problem:
        raise ConfigError(
            f"A quote is left open in this line: {line.strip()[:200]} ({problem})."
        ) from problem


def _kind(script: str, settings: Mapping[str, Any]) -> str:
    if "train_dreambooth" in script or "train_text_to_image" in script or DIFFUSERS_KEYS & settings.keys():
        return "diffusers"
    return "kohya"
