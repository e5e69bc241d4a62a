"""Whether a run that is resumed is shown what it was shown before: each picture as it is encoded, and its captions.

An exact resume is that of the same pictures on the same base. A state knows of each picture a digest of what its
latents are kept under (its bytes, its mask, its crop, the VAE) and of its captions, and of the base some numbers out of
every tensor; what differs is named, and so are the settings that do.
"""

from __future__ import annotations

import hashlib
import json
import tomllib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lora_core.errors import ConfigError
from trainers.batches import Feeder
from trainers.dataset import Example, read
from trainers.scan_report import listed

DIGITS = 16  # of each digest; these are no secrets, only unlike
BASE = "the base model"
SAMPLED = 64  # numbers of a tensor: all of an SDXL would take ten seconds at each start


def shown(feeder: Feeder, models: Mapping[str, nn.Module]) -> dict[str, str]:
    """Folder and file name of each picture -> what is shown of it, and its captions; and the base that is shown it."""
    found: dict[str, list[str]] = {BASE: [_sampled(model) for model in models.values()]}
    for example in feeder.dataset.examples:
        name = f"{example.source.folder.name}/{example.path.name}"
        found.setdefault(name, []).append(_digest([_content(feeder, example), *example.lines]))
    return {name: _digest(parts) for name, parts in found.items()}


def compare(before: Mapping[str, str], now: Mapping[str, str]) -> str:
    """What is no longer as it was, in a sentence; empty where all is."""
    if BASE in before and before[BASE] != now[BASE]:
        return "The base model is another than when the run was saved, or in another precision."
    changed = [name for name in before if name in now and before[name] != now[name]]
    gone, added = sorted(before.keys() - now.keys()), sorted(now.keys() - before.keys())
    if len(changed) > 1 and len(changed) == len(before.keys() - {BASE}):
        return (
            "All pictures are shown otherwise than when the run was saved: at another resolution, by another VAE, or "
            "they were all changed."
        )
    parts = [
        f"{what}: {listed(names)}"
        for what, names in (("changed, or its caption was", sorted(changed)), ("gone", gone), ("new", added))
        if names
    ]
    return f"Since the run was saved, of its pictures {'; '.join(parts)}." if parts else ""


def check(before: Mapping[str, str], now: Mapping[str, str], *, refuse: bool) -> str:
    """-> the sentence to say, or empty. Raises ConfigError with it where that is wanted."""
    found = compare(before, now) if before else ""  # a state of an earlier version knows nothing
    if found and refuse:
        raise ConfigError(
            f"{found} It cannot go on exactly. Put everything back as it was, or go on with what is there now: "
            '--set data.changed="say".'
        )
    return found


def settings_changed(before: str, now: str) -> str:
    """Of two presets what differs, in a sentence; empty where nothing does, and for a state that knows no preset."""
    old, new = (dict(_settings(tomllib.loads(text))) for text in (before, now))
    if not old:
        return ""
    parts = [
        f"{name} = {_spelled(new.get(name))}, before {_spelled(old.get(name))}"
        for name in dict.fromkeys([*old, *new])
        if old.get(name) != new.get(name)
    ]
    return f"Other settings than when the run was saved: {'; '.join(parts)}." if parts else ""


def _settings(table: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in table.items():
        numbered = isinstance(value, list) and value and isinstance(value[0], dict)
        inner = dict(enumerate(value)) if numbered else value
        if isinstance(inner, dict):
            yield from _settings({str(k): v for k, v in inner.items()}, f"{above}{key}.")
        else:
            yield f"{above}{key}", value


def _spelled(value: Any) -> str:
    return "left out" if value is None else json.dumps(value, ensure_ascii=False)


def _sampled(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for tensor in model.state_dict().values():
        if isinstance(tensor, Tensor) and tensor.numel():
            flat = tensor.detach().reshape(-1)
            some = flat[:: max(1, len(flat) // SAMPLED)].cpu().contiguous()
            digest.update(f"{some.dtype};".encode() + some.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _content(feeder: Feeder, example: Example) -> str:
    if feeder.cache is not None:
        return _digest([feeder.cache.key(example, view) for view in example.views()])
    data = read(example)
    return hashlib.sha256(data.picture + (data.mask or b"")).hexdigest()


def _digest(parts: list[str]) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:DIGITS]
