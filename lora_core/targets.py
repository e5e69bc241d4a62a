"""Which layers of a model are trained, and what about each: a change with factors, the whole of it, its bias."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from lora_core.config import LoraConfig, as_tuple
from lora_core.errors import ConfigError, NothingMatched

Layer = nn.Linear | nn.Conv2d | nn.Embedding
WHOLE = (nn.Linear, nn.Conv2d, nn.Embedding, nn.LayerNorm, nn.GroupNorm)  # linear in their weight and bias

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


@dataclass(frozen=True)
class Choice:
    """One module of the base that is trained."""

    path: str
    layer: nn.Module
    whole: bool  # its weight itself, in place of factors
    factors: bool
    bias: bool


def choose(model: nn.Module, config: LoraConfig) -> list[Choice]:
    """-> everything of `model` that `config` trains, in the model's order.

    Raises NothingMatched for a target that names nothing, ConfigError for a module that cannot be trained whole.
    """
    saved = find_saved(model, config)
    targets = dict(find_targets(model, config))
    chosen = []
    elsewhere = saved or config.bias == "all"  # else the targets are all there is to look at
    for path, module in model.named_modules() if elsewhere else targets.items():
        whole, factors = path in saved, path in targets
        has_bias = isinstance(getattr(module, "bias", None), nn.Parameter)
        bias = has_bias and (whole or config.bias == "all" or (config.bias == "lora_only" and factors))
        if bias and not isinstance(module, WHOLE):
            raise ConfigError(
                f'bias = "all" meets {path}, a {type(module).__name__}, whose bias cannot be trained here. Set '
                'bias = "lora_only" or "none".'
            )
        if whole or factors or bias:
            chosen.append(Choice(path, module, whole, factors, bias))
    if config.bias == "lora_only" and not any(c.bias and c.factors for c in chosen):
        raise ConfigError(
            f'bias = "lora_only": none of the {len(targets)} layers that targets = {config.targets!r} names has a '
            'bias. Set bias = "all" or "none".'
        )
    return chosen


def find_targets(model: nn.Module, config: LoraConfig) -> list[tuple[str, Layer]]:
    """-> [(module path, layer)] in the model's order. Every target must match something: see `NothingMatched`.

    Only nn.Linear, ungrouped nn.Conv2d and nn.Embedding can carry a LoRA; a suffix or expression that names another
    kind of module is reported like one that names nothing. What is trained whole is no target beside.
    """
    layers = carriers(model)
    whole = isinstance(config.targets, str)
    chosen: set[str] = set()
    for target in as_tuple(config.targets):
        hits = {path for path, layer in layers.items() if matches(target, path, layer, whole=whole)}
        if not hits:
            raise NothingMatched(_nothing(target, list(layers)))
        chosen |= hits
    if config.layers_to_transform is not None:
        chosen = _of_numbered_layers(chosen, config)
    excluded, whole = as_tuple(config.exclude), isinstance(config.exclude, str)
    saved = find_saved(model, config)
    found = [
        (path, layer)
        for path, layer in layers.items()
        if path in chosen
        and path not in saved
        and config.rank_at(path) > 0
        and not any(matches(e, path, layer, whole=whole) for e in excluded)
    ]
    if not found:
        less = f" minus exclude {config.exclude!r}" if config.exclude else ""
        less += f" minus modules_to_save {config.modules_to_save!r}" if config.modules_to_save else ""
        raise NothingMatched(f"Targets {config.targets!r}{less} leave no layer to train.")
    return found


def find_saved(model: nn.Module, config: LoraConfig) -> dict[str, nn.Module]:
    """-> path -> module, of all that `modules_to_save` trains whole: the modules that own parameters, at or below
    each that it names."""
    if not config.modules_to_save:
        return {}
    modules = dict(model.named_modules())
    saved: dict[str, nn.Module] = {}
    for name in as_tuple(config.modules_to_save):
        roots = [path for path in modules if path == name or path.endswith("." + name)]
        if not roots:
            close = difflib.get_close_matches(name, sorted(_ends(p for p in modules if p)), n=3, cutoff=0.5)
            hint = f" Did you mean {' or '.join(close)}?" if close else ""
            raise NothingMatched(
                f'modules_to_save "{name}" names none of the {len(modules)} modules of this model.{hint}'
            )
        owners = {
            ".".join(filter(None, (root, inside))): module
            for root in roots
            for inside, module in modules[root].named_modules()
            if list(module.parameters(recurse=False))
        }
        for path, module in owners.items():
            if not isinstance(module, WHOLE):
                raise ConfigError(
                    f'modules_to_save "{name}" meets {path}, a {type(module).__name__}. Only '
                    f"{', '.join(kind.__name__ for kind in WHOLE)} can be trained whole: name such modules."
                )
        if not owners:
            raise ConfigError(
                f'modules_to_save "{name}" names a module without a parameter to train: take it out.'
            )
        saved |= owners
    return saved


def carriers(model: nn.Module) -> dict[str, Layer]:
    """Path -> every layer that can carry factors."""
    return {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Embedding)
        or (isinstance(module, nn.Conv2d) and module.groups == 1)
    }


def layer_index(path: str, patterns: tuple[str, ...]) -> int | None:
    """The number that `layers_to_transform` is compared with: PEFT's rule.

    Without patterns the first numbered list below the model's own: `attentions.1` in
    `down_blocks.0.attentions.1.transformer_blocks.0.attn1.to_q`, `layers.3` in `encoder.layers.3.mlp.fc1`.
    """
    for pattern in patterns or (r"(?<=\.)[^.]*",):
        if found := re.search(rf"(?:^|\.)(?:{pattern})\.(\d+)\.", path):
            return int(found[found.re.groups])
    return None


def _of_numbered_layers(chosen: set[str], config: LoraConfig) -> set[str]:
    if isinstance(config.targets, str) and config.targets not in {**GROUPS, **TYPES}:
        raise ConfigError(
            f"layers_to_transform = {config.layers_to_transform!r} does not go with targets = {config.targets!r}, a "
            "regular expression: write the numbers into it, or give targets as a list."
        )
    patterns, named = as_tuple(config.layers_pattern), as_tuple(config.targets)
    kept = {p for p in chosen if p in named or layer_index(p, patterns) in config.layer_indices}
    if not kept:
        present = sorted({i for p in chosen if (i := layer_index(p, patterns)) is not None})
        there = f"are {', '.join(map(str, present))}" if present else "is none"
        where = f" with layers_pattern = {config.layers_pattern!r}" if patterns else ""
        raise NothingMatched(
            f"layers_to_transform = {config.layers_to_transform!r}{where} leaves none of the {len(chosen)} layers that "
            f"targets = {config.targets!r} names. The numbers there {there}."
        )
    return kept


def matches(target: str, path: str, layer: nn.Module, *, whole: bool) -> bool:
    if target in TYPES:
        return isinstance(layer, TYPES[target])
    if target in GROUPS:
        return re.fullmatch(GROUPS[target], path) is not None
    if whole:
        return re.fullmatch(target, path) is not None
    return path == target or path.endswith("." + target)


def _ends(paths: Iterable[str]) -> set[str]:
    return {".".join(path.split(".")[-n:]) for path in paths for n in (1, 2)}


def _nothing(target: str, paths: list[str]) -> str:
    ends = sorted(_ends(paths) | set(GROUPS) | set(TYPES))
    close = difflib.get_close_matches(target, ends, n=3, cutoff=0.5)
    hint = f"Did you mean {' or '.join(close)}?" if close else f"Groups are: {', '.join([*GROUPS, *TYPES])}."
    return (
        f'Target "{target}" names none of the {len(paths)} linear, convolution and embedding layers of this model. '
        f"{hint}"
    )
