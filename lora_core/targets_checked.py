"""What only the model can tell about a config: patterns that nothing answers to, ranks larger than a layer."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping, Sequence

from torch import nn

from lora_core.config import LoraConfig, as_tuple, pattern_matches
from lora_core.errors import ConfigError, NothingMatched
from lora_core.targets import Choice, carriers, matches
from lora_core.unet_blocks import known_blocks, named_block
from lora_core.worn import weight_shape

Plan = Mapping[str, Sequence[Choice]]


def check_plan(plan: Plan, configs: Mapping[str, LoraConfig], models: Mapping[str, nn.Module]) -> None:
    """`plan`: component -> what is trained of it. Raises NothingMatched, ConfigError.

    The components of one training often share their patterns: each pattern must be of use in one of them.
    """
    for name, holds in (
        ("rank_pattern", pattern_matches),
        ("alpha_pattern", pattern_matches),
        ("block_ranks", _in_block),
        ("block_alphas", _in_block),
    ):
        _check_used(plan, configs, models, name, holds)
    _check_excluded(configs, models)
    _check_ranks(plan, configs)


def _in_block(key: str, path: str) -> bool:
    return named_block(key).search(path) is not None


def _check_used(
    plan: Plan,
    configs: Mapping[str, LoraConfig],
    models: Mapping[str, nn.Module],
    name: str,
    holds: Callable[[str, str], bool],
) -> None:
    paths = [c.path for choices in plan.values() for c in choices if c.factors]
    used: dict[str, bool] = {}
    for component, choices in plan.items():
        for key, value in getattr(configs[component], name).items():
            # a rank of 0 has done its work where nothing is left
            where = [c.path for c in choices if c.factors] if value else carriers(models[component])
            used[key] = used.get(key, False) or any(holds(key, path) for path in where)
    for key, answered in used.items():
        if not answered:
            blocks = holds is _in_block
            known = known_blocks(paths) if blocks else sorted(_ends(paths))
            close = difflib.get_close_matches(key, known, n=3, cutoff=0.5)
            hint = f" Did you mean {' or '.join(close)}?" if close else ""
            what = "holds" if blocks else "is the end of"
            raise NothingMatched(
                f'{name} "{key}" {what} none of the {len(paths)} layers that get a LoRA: correct it or take it '
                f"out.{hint}"
            )


def _ends(paths: Sequence[str]) -> set[str]:
    return {".".join(p.split(".")[-n:]) for p in paths for n in (1, 2, 3)}


def _check_excluded(configs: Mapping[str, LoraConfig], models: Mapping[str, nn.Module]) -> None:
    used: dict[str, bool] = {}
    for component, model in models.items():
        exclude = configs[component].exclude
        for name in as_tuple(exclude):
            whole = isinstance(exclude, str)
            answers = any(matches(name, path, layer, whole=whole) for path, layer in carriers(model).items())
            used[name] = used.get(name, False) or answers
    for name, answered in used.items():
        if not answered:
            raise NothingMatched(f'exclude "{name}" names no layer of this model: correct it or take it out.')


def _check_ranks(plan: Plan, configs: Mapping[str, LoraConfig]) -> None:
    """A LoKr factor that is too small for its rank is whole instead: any rank goes."""
    large = []
    for component, choices in plan.items():
        config = configs[component]
        for choice in choices:
            if choice.factors and config.kind != "lokr":
                out, inner = weight_shape(choice.layer)
                most, rank = min(out, math.prod(inner)), config.rank_at(choice.path)
                if rank > most:
                    large.append((f"{component}.{choice.path}", choice.path, rank, most))
    if large:
        where, path, rank, most = large[0]
        more = f" (and {len(large) - 1} more layers)" if len(large) > 1 else ""
        patterns = ", ".join(f'"{path}" = {most}' for _, path, _, most in large[:4])
        raise ConfigError(
            f"rank = {rank} is larger than {where} allows{more}: its weight has rank {most} at most. Set rank_pattern "
            f'= {{{patterns}{", ..." if len(large) > 4 else ""}}}, a lower rank, or exclude = ["{path}"].'
        )
