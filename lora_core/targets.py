"""Which layers of a model get a delta."""

from __future__ import annotations

import difflib
import re

from torch import nn

from lora_core.config import LoraConfig
from lora_core.errors import NothingMatched

Layer = nn.Linear | nn.Conv2d

# The field's names for groups of layers, as the ends of module paths in diffusers' UNets and CLIP text encoders.
GROUPS: dict[str, str] = {
    "attention": r".*(attn\d?|self_attn|attentions\.\d+)\.(to_[qkv]|to_out\.0|[qkv]_proj|out_proj)",
    "feed-forward": r".*(ff\.net\.(0\.proj|2)|mlp\.fc[12])",
    "projection": r".*attentions\.\d+\.proj_(in|out)",
    "conv": r".*(resnets\.\d+\.(conv1|conv2|conv_shortcut)|(down|up)samplers\.0\.conv)",
}
TYPES: dict[str, tuple[type[nn.Module], ...]] = {
    "all-linear": (nn.Linear,),
    "all-linear+conv": (nn.Linear, nn.Conv2d),
}


def find_targets(model: nn.Module, config: LoraConfig) -> list[tuple[str, Layer]]:
    """-> [(module path, layer)] in the model's order. Every target must match something: see `NothingMatched`.

    Only nn.Linear and ungrouped nn.Conv2d can carry a LoRA; a suffix or expression that names another kind
    of module is reported like one that names nothing.
    """
    layers = {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.groups == 1)
    }
    wanted = (config.targets,) if isinstance(config.targets, str) else config.targets
    chosen: set[str] = set()
    for target in wanted:
        hits = {
            p
            for p, layer in layers.items()
            if _matches(target, p, layer, whole=isinstance(config.targets, str))
        }
        if not hits:
            raise NothingMatched(_nothing(target, list(layers)))
        chosen |= hits
    excluded = (config.exclude,) if isinstance(config.exclude, str) else config.exclude
    whole = isinstance(config.exclude, str)
    found = [
        (path, layer)
        for path, layer in layers.items()
        if path in chosen and not any(_matches(e, path, layer, whole=whole) for e in excluded)
    ]
    if not found:
        raise NothingMatched(
            f"Targets {config.targets!r} minus exclude {config.exclude!r} leave no layer to train."
        )
    return found


def _matches(target: str, path: str, layer: nn.Module, *, whole: bool) -> bool:
    if target in TYPES:
        return isinstance(layer, TYPES[target])
    if target in GROUPS:
        return re.fullmatch(GROUPS[target], path) is not None
    if whole:
        return re.fullmatch(target, path) is not None
    return path == target or path.endswith("." + target)


def _nothing(target: str, paths: list[str]) -> str:
    ends = sorted({".".join(p.split(".")[-n:]) for p in paths for n in (1, 2)} | set(GROUPS) | set(TYPES))
    close = difflib.get_close_matches(target, ends, n=3, cutoff=0.5)
    hint = f"Did you mean {' or '.join(close)}?" if close else f"Groups are: {', '.join([*GROUPS, *TYPES])}."
    return f'Target "{target}" names none of the {len(paths)} linear and convolution layers of this model. {hint}'
