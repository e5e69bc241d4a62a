"""What several LoRAs together do to a model, in numbers, without forming ΔW where that can be avoided.

    strength    |sum w ΔW| / |W| per block: how far the weights are moved. Too far, and pictures burn.
    normalised  the mix with every block that is above a limit brought down to it
    overlap     the cosine between two LoRAs: 1 the same change, 0 nothing in common, -1 the opposite

ΔW = B A gives both from r x r products (algebra.gram_inner). What has no factors (DoRA, LoKr) is formed one layer at
a time and dropped again.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from lora_core import algebra, unet_blocks
from lora_core.adapter import COMPONENTS, Adapter
from lora_core.deltas import Delta
from lora_core.errors import ConfigError, WrongFamily
from lora_core.mix import AdapterWeight, Mix
from lora_core.worn import Place, original_weight

# One LoRA as trained moves its layers by 0.3 to 5 % of their norm. Three times the strongest of these is where
# oversaturated, hard-edged pictures begin to be usual; a LoRA alone at weight 1 stays well below it.
LIMIT = 0.15
SLACK = (
    1e-6  # a block brought to the limit is not above it by its rounding, so normalising twice changes nothing
)
NAMED = 4  # blocks that `advice` names


def block_of(path: str) -> str:
    """The block of an adapter path: "down.1", "mid", "up.0"; a text encoder is one block by its own name; the
    UNet's layers outside its blocks go by their first name ("conv_in", "time_embedding")."""
    component, _, inside = path.partition(".")
    if component != "unet":
        return component
    around = unet_blocks.known_blocks([path])  # from the outside in: down, down.1
    return around[-1] if around else inside.split(".", 1)[0]


# --- how far the weights are moved -------------------------------------------------------------------------


@torch.no_grad()
def strength(
    layers: Mapping[str, nn.Module], changes: Mapping[str, Sequence[tuple[float, Delta]]]
) -> dict[str, float]:
    """|sum w ΔW| / |W| per block (Frobenius norms, no unit), over the layers in `changes`: adapter path -> (w, ΔW).

    LoRAs that pull the same way add up in it, and opposite ones cancel. Layers that no LoRA touches do not count,
    or a LoRA of the attention alone would look weak. Biases do not count. Linear in the weights of a
    block. The layers must hold W0: unfuse first.
    """
    moved: dict[str, float] = {}
    whole: dict[str, float] = {}
    for path, weighted in changes.items():
        block, layer = block_of(path), layers[path]
        moved[block] = moved.get(block, 0.0) + _moved_squared(layer, path, weighted)
        whole[block] = whole.get(block, 0.0) + _weight_squared(layer, path)
    in_order = sorted(moved, key=lambda block: (block in COMPONENTS, block))
    return {block: _ratio(moved[block], whole[block]) ** 0.5 for block in in_order}


def _ratio(change: float, base: float) -> float:
    if base == 0:
        return math.inf if change else 0.0  # a layer of zeros is moved infinitely far by anything
    return change / base


def _weight_squared(layer: nn.Module, path: str) -> float:
    weight = original_weight(layer, path)
    norm = torch.linalg.vector_norm(weight.to(Place.of(layer).device), dtype=torch.float32)
    return float(norm) ** 2


def _moved_squared(layer: nn.Module, path: str, weighted: Sequence[tuple[float, Delta]]) -> float:
    """|sum w ΔW|^2 of one layer."""
    device = Place.of(layer).device
    acting = [(w, delta) for w, delta in weighted if w != 0]
    forms = [(w, _factors(delta, device)) for w, delta in acting]
    factors = [(form[0], w * form[1]) for w, form in forms if form is not None]
    if len(factors) == len(acting):
        if not acting:
            return 0.0
        down, up = torch.cat([d for d, _ in factors]), torch.cat([u for _, u in factors], dim=1)
        return max(float(algebra.gram_inner(down, up, down, up)), 0.0)
    w0 = original_weight(layer, path).to(device)
    # the sum first: from the norms alone what cancels could not be seen
    total = torch.zeros(w0.shape, device=device)
    for w, delta in acting:
        total += w * delta.to(device=device).delta(w0)
    return float(torch.linalg.vector_norm(total)) ** 2


def _factors(delta: Delta, device: torch.device) -> tuple[Tensor, Tensor] | None:
    """fp32 down (r, in*k*k), up (out, r); None where there is no such form."""
    form = delta.low_rank_form()
    if form is None:
        return None
    return algebra.flat(form[0].to(device)), algebra.flat(form[1].to(device))


def advice(strengths: Mapping[str, float], limit: float = LIMIT) -> str:
    """A sentence that names the blocks above `limit`, the strongest first, and what to do; "" where none is.

    A rule of thumb: what a picture bears depends on the LoRA, the base and the sampler. The default is three times
    what a strong LoRA alone does at weight 1.
    """
    above = sorted(_above(strengths, limit), key=lambda block: -strengths[block])
    if not above:
        return ""
    listed = [f"{block} ({strengths[block]:.0%})" for block in above[:NAMED]]
    if len(above) > NAMED:
        listed.append(f"{len(above) - NAMED} more")
    many, them = len(above) > 1, "these blocks" if len(above) > 1 else above[0]
    return (
        f"{_joined(listed)} {'are' if many else 'is'} changed by more than {limit:.3g} times "
        f"{'their' if many else 'its'} own size: pictures may burn. Lower the LoRAs' weights in {them}, or normalise."
    )


def _joined(words: list[str]) -> str:
    return " and ".join(filter(None, (", ".join(words[:-1]), words[-1])))


def _above(strengths: Mapping[str, float], limit: float) -> list[str]:
    if not (math.isfinite(limit) and limit > 0):
        raise ConfigError(f"The limit is {limit!r}, and must be above 0. Usual is {LIMIT}.")
    return [block for block, figure in strengths.items() if figure > limit * (1 + SLACK)]


# --- bringing it down --------------------------------------------------------------------------------------


def normalised(
    mix: Mix, strengths: Mapping[str, float], limit: float = LIMIT, *, paths: Iterable[str] | None = None
) -> Mix:
    """A new Mix in which all LoRAs' weights in a block above `limit` are times limit/figure, and the rest is as it
    was. One factor for all: what the LoRAs together change keeps its direction and only gets smaller.

    `strengths` are those of `mix` itself. Text encoders are scaled by their component weight, the UNet by block keys
    in `blocks`. Keys the user has set go on winning where they won before: inside a scaled block each gets a
    stronger key of its own, a block name where there is one, else his regular expression tied to the block.
    `paths` are the adapter paths of the model: with them no key is made that names no layer, which a LivePipeline
    would refuse. Raises ConfigError for a limit that is not above 0.
    """
    factors = {block: limit / strengths[block] for block in _above(strengths, limit)}
    inside = None if paths is None else unet_blocks.inside_unet(paths)
    result: Mix = {}
    for name, weight in mix.items():
        blocks, parts = dict(weight.blocks), {}
        for block, factor in factors.items():
            if block in COMPONENTS:
                parts[block] = getattr(weight, block) * factor
            else:
                blocks |= _scaled_keys(weight, block, factor, inside)
        changed = bool(parts) or blocks != dict(weight.blocks)
        result[name] = replace(weight, **parts, blocks=tuple(blocks.items())) if changed else weight
    return result


def _scaled_keys(
    weight: AdapterWeight, block: str, factor: float, inside: Sequence[str] | None
) -> dict[str, float]:
    """Keys whose effect is `factor` times what `weight` has in this UNet block, and nothing elsewhere."""
    anchor = _anchor(block)
    layers = None if inside is None else [path for path in inside if unet_blocks.matches(anchor, path)]
    own = dict(weight.blocks)
    # weakest first; of two equally long keys `AdapterWeight.at` takes the first
    ranked = list(reversed(own))
    ranked.sort(key=len)
    covering = [i for i, key in enumerate(ranked) if unet_blocks.overlap(key, block) == block]
    base = own[ranked[covering[-1]]] if covering else weight.unet
    stronger = ranked[covering[-1] + 1 :] if covering else ranked  # what is weaker never shows in this block
    stronger = [key for key in stronger if _meets(key, block, layers)]
    if base == 0 and not any(own[key] for key in stronger):
        return {}
    regular = any(_is_regular(key) for key in stronger)
    first = block if unet_blocks.overlap(block, block) else anchor
    scaled, length = {first: base * factor}, len(first)
    for key in stronger:
        tied = unet_blocks.overlap(key, block)
        if regular:  # the longest key wins: each is made longer than the one before it
            tied = _longer(_tied(key, anchor) if tied is None else _anchor(tied), length)
            length = len(tied)
        assert tied is not None
        scaled[tied] = own[key] * factor
    return scaled


def _is_regular(key: str) -> bool:
    """Whether a key is no block's name."""
    return unet_blocks.overlap(key, key) is None


def _anchor(block: str) -> str:
    """A regular expression for the paths of a block."""
    return rf"^{re.escape(block)}\b" if _is_regular(block) else unet_blocks.block_pattern(block).pattern


def _meets(key: str, block: str, layers: Sequence[str] | None) -> bool:
    """Whether a key may hold for a layer of the block; without `layers` any regular expression may."""
    shared = unet_blocks.overlap(key, block)
    if shared is None and not _is_regular(key):
        return False
    return layers is None or any(unet_blocks.matches(shared or key, path) for path in layers)


def _tied(key: str, anchor: str) -> str:
    """A regular expression that is found where `key` is, in the paths of one block only."""
    flags, rest = re.fullmatch(r"((?:\(\?[aimsux]+\))*)(.*)", key, re.DOTALL).groups()  # type: ignore[union-attr]
    # flags for the whole, (?i), may stand at the beginning only: here they become a group's own. A comment of a
    # verbose expression ends with its line.
    letters = "".join(sorted(set(flags) - set("(?)")))
    group = f"(?{letters}:{rest}" + ("\n)" if "x" in letters else ")")
    return f"^(?=.*?{group}){anchor.removeprefix('^')}"


def _longer(pattern: str, length: int) -> str:
    """The pattern, filled up with a comment until it is longer than that."""
    missing = length + 1 - len(pattern)
    return pattern if missing <= 0 else f"{pattern}(?#{'.' * (missing - 4)})"


# --- two LoRAs ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Overlap:
    """Cosines between two LoRAs, -1 to 1, over the layers both have; 0 where one of them changes nothing."""

    cosine: float
    blocks: dict[str, float] = field(default_factory=dict)
    compared: int = 0  # layers
    left_out: tuple[str, ...] = ()  # adapter paths that both have, and that need the base


@torch.no_grad()
def overlap(a: Adapter, b: Adapter, layers: Mapping[str, nn.Module] | None = None) -> Overlap:
    """The cosine between what two LoRAs do at weight 1: <ΔWa, ΔWb> / (|ΔWa| |ΔWb|), over all and per block.

    `layers`, adapter path -> a layer that holds W0, is for kinds without factors (DoRA, LoKr). Layers of these that
    are not in it are left out and named in the result. Raises WrongFamily for LoRAs that are not for the same model.
    """
    sums: dict[str, list[float]] = {}  # <a, b>, <a, a>, <b, b>
    left_out = []
    compared = 0
    for path in (p for p in a.deltas if p in b.deltas):
        products = _products(path, a.deltas[path], b.deltas[path], (layers or {}).get(path))
        if products is None:
            left_out.append(path)
            continue
        before = sums.get(block_of(path), [0.0, 0.0, 0.0])
        sums[block_of(path)] = [x + y for x, y in zip(before, products, strict=True)]
        compared += 1
    total = [sum(column) for column in zip(*sums.values(), strict=True)] or [0.0, 0.0, 0.0]
    blocks = {block: _cosine(*sums[block]) for block in sorted(sums, key=lambda n: (n in COMPONENTS, n))}
    return Overlap(_cosine(*total), blocks, compared, tuple(left_out))


def _products(path: str, a: Delta, b: Delta, layer: nn.Module | None) -> tuple[float, float, float] | None:
    """<ΔWa, ΔWb>, |ΔWa|^2, |ΔWb|^2 of one layer; None where they cannot be had without it."""
    device = torch.device("cpu") if layer is None else Place.of(layer).device
    one, other = _factors(a, device), _factors(b, device)
    if one is not None and other is not None:
        if (one[0].shape[1], one[1].shape[0]) != (other[0].shape[1], other[1].shape[0]):
            raise WrongFamily(
                f"{path} is {one[1].shape[0]} x {one[0].shape[1]} in one LoRA and {other[1].shape[0]} x "
                f"{other[0].shape[1]} in the other: they are for different models and cannot be compared."
            )
        ab, aa, bb = (algebra.gram_inner(*x, *y) for x, y in ((one, other), (one, one), (other, other)))
    elif layer is None:
        return None
    else:
        w0 = original_weight(layer, path).to(device)
        x, y = (delta.to(device=device).delta(w0) for delta in (a, b))
        # sums in pairs: a dot product of millions of fp32 numbers loses digits
        ab, aa, bb = (x * y).sum(), (x * x).sum(), (y * y).sum()
    return float(ab), float(aa), float(bb)


def _cosine(ab: float, aa: float, bb: float) -> float:
    return max(-1.0, min(1.0, ab / (aa * bb) ** 0.5)) if aa > 0 and bb > 0 else 0.0
