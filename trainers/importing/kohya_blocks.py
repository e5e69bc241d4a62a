"""kohya's ranks, alphas and rates by block, as networks/lora.py counts them: 25 places of an SD 1 or 2, 23 of an SDXL.

            SD 1 and 2                                            SDXL
place 0     nothing that carries a LoRA                           nothing that carries a LoRA
then        1 + 3b + j: attention and resnet j of down.b,         2 + 3b + j
            and j = 2 its downsampler
middle      12                                                    10, 11, 12: resnet 0, the attention, resnet 1
then        13 + 3b + j: attention and resnet j of up.b, and with j = 2 its upsampler
last        (24 belongs to up.3)                                  22: nothing that carries a LoRA

block_dims, block_alphas            of linear layers and 1x1 convolutions; a rank of 0 leaves the place out
conv_block_dims, conv_block_alphas  of the other convolutions
down_lr_weight, mid_..., up_...     factors on the UNet's rate, outside to inside and back; 0 leaves the place out
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from trainers.importing.carrying import Carrying, finite

COUNTS = {25: False, 23: True}  # numbers in a list -> whether it is an SDXL
DIMS = ("block_dims", "block_alphas", "conv_block_dims", "conv_block_alphas")
WEIGHTS = ("down_lr_weight", "mid_lr_weight", "up_lr_weight")
CURVES: dict[str, Callable[[float], float]] = {  # of x from 0 to 1
    "cosine": lambda x: math.sin(math.pi * (1 - x) / 2),
    "sine": lambda x: math.sin(math.pi * x / 2),
    "linear": lambda x: x,
    "reverse_linear": lambda x: 1 - x,
    "zeros": lambda x: 0.0,
}


class Shape(NamedTuple):
    """`rank` and `alpha` of linear layers, of other convolutions; a `conv_rank` of 0: these are not trained."""

    rank: int
    alpha: float
    conv_rank: int
    conv_alpha: float


class Layers(NamedTuple):
    """Layers with one place: their block, their own name in it (the block's for a sampler), its convolutions' paths."""

    block: str
    name: str
    place: int
    convolutions: tuple[str, ...]


@dataclass(frozen=True)
class Blocks:
    """What differs from place to place. `factors`: place -> on the rate."""

    layers: tuple[Layers, ...]
    factors: Mapping[int, float]

    def carry_rates(self, c: Carrying) -> None:
        """The UNet's rate is known by now."""
        rate = c.preset["train"]["learning_rate"]
        own = by_name(self.layers, {place: rate * factor for place, factor in self.factors.items()}, rate)
        if own:
            c.set("train.rates", {f"unet.{name}": value for name, value in own.items()})


def carry(c: Carrying, given: dict[str, str], shape: Shape, *, sdxl: bool) -> Blocks | None:
    """Takes the arguments of blocks out of `given` and sets the ranks and alphas; the rates come later."""
    lists = {name: _numbers(c, name, given.pop(name)) for name in DIMS if given.get(name)}
    weights = {name: text for name in WEIGHTS if (text := given.pop(name, ""))}
    threshold = _threshold(given.pop("block_lr_zero_threshold", ""))
    if not weights and "block_dims" not in lists:
        for name, values in lists.items():
            if values:
                c.leave(
                    f"network_args {name}", values, "sd-scripts reads it only with block_dims or a lr_weight"
                )
        return None
    found = {name: values for name, values in lists.items() if values}
    if len({len(values) for values in found.values()}) > 1:
        c.leave("network_args", found, "they count the blocks of different models")
        return None
    for values in found.values():
        sdxl = COUNTS[len(values)]
    factors = _factors(c, weights, threshold, sdxl=sdxl)
    count = 23 if sdxl else 25
    ranks = {i: int(rank) for i, rank in enumerate(found.get("block_dims", [shape.rank] * count))}
    alphas = dict(enumerate(found.get("block_alphas", [shape.alpha] * count)))
    conv_ranks = {i: int(r) for i, r in enumerate(found.get("conv_block_dims", [shape.conv_rank] * count))}
    conv_alphas = dict(enumerate(found.get("conv_block_alphas", [shape.conv_alpha] * count)))
    for place, factor in factors.items():
        if factor == 0:
            ranks[place] = conv_ranks[place] = 0
    layers = tuple(_layers(sdxl=sdxl, convolutions=any(conv_ranks.values())))
    _set_linear(c, layers, shape, ranks, alphas)
    if any(conv_ranks.values()):
        _set_convolutions(c, layers, conv_ranks, conv_alphas)
    trained = tuple(one for one in layers if ranks[one.place] or (one.convolutions and conv_ranks[one.place]))
    return Blocks(trained, {place: factor for place, factor in factors.items() if factor})


def has_convolutions(given: Mapping[str, str]) -> bool:
    """Whether conv_block_dims brings them in, where conv_dim does not."""
    return bool(given.get("conv_block_dims")) and any(given.get(name) for name in ("block_dims", *WEIGHTS))


def by_name(layers: tuple[Layers, ...], values: Mapping[int, float], usual: float) -> dict[str, float]:
    """What is not as usual, by block where a whole block has it and else by the attention and resnet."""
    own: dict[str, float] = {}
    for block in dict.fromkeys(one.block for one in layers):
        inside = [one for one in layers if one.block == block]
        found = {one.name: values.get(one.place, usual) for one in inside}
        rest = next(iter(found.values())) if len(set(found.values())) == 1 else found.get(block, usual)
        if rest != usual:
            own[block] = rest
        own |= {name: value for name, value in found.items() if value != rest}
    return own


def _set_linear(
    c: Carrying,
    layers: tuple[Layers, ...],
    shape: Shape,
    ranks: Mapping[int, int],
    alphas: Mapping[int, float],
) -> None:
    linear = tuple(one for one in layers if one.name != one.block)
    if own := by_name(linear, ranks, shape.rank):
        c.set("lora.ranks", {f"unet.{name}": int(rank) for name, rank in own.items()})
    trained = tuple(one for one in linear if ranks[one.place])
    if own := by_name(trained, alphas, shape.alpha):
        c.set("lora.alphas", {f"unet.{name}": alpha for name, alpha in own.items()})


def _set_convolutions(
    c: Carrying, layers: tuple[Layers, ...], ranks: Mapping[int, int], alphas: Mapping[int, float]
) -> None:
    """By path: a block's rank is for all of its layers."""
    rank_pattern: dict[str, int] = {}
    alpha_pattern: dict[str, float] = {}
    exclude: list[str] = []
    shapes = dict.fromkeys((ranks[one.place], alphas[one.place]) for one in layers if one.convolutions)
    for rank, alpha in shapes:
        paths = [
            path
            for one in layers
            if (ranks[one.place], alphas[one.place]) == (rank, alpha)
            for path in one.convolutions
        ]
        if rank == 0:
            exclude += paths
        else:
            pattern = "|".join(path.replace(".", r"\.") for path in paths)
            rank_pattern[pattern] = rank
            alpha_pattern[pattern] = alpha
    c.set("lora.rank_pattern", rank_pattern)
    c.set("lora.alpha_pattern", alpha_pattern)
    if exclude:
        c.set("lora.exclude", exclude)


def _layers(*, sdxl: bool, convolutions: bool) -> list[Layers]:
    attentions = {"down": (1, 2), "up": (0, 1)} if sdxl else {"down": (0, 1, 2), "up": (1, 2, 3)}
    count = 3 if sdxl else 4
    found = []
    for side, first, each in (("down", 2 if sdxl else 1, 2), ("up", 13, 3)):
        for b in range(count):
            block = f"{side}.{b}"
            for j in range(each):
                place = first + 3 * b + j
                if b in attentions[side]:
                    found.append(Layers(block, f"{block}.attn.{j}", place, ()))
                if convolutions:
                    found.append(_resnet(f"{side}_blocks.{b}", block, j, place))
            if convolutions and b < count - 1:
                path = f"{side}_blocks.{b}.{side}samplers.0.conv"
                found.append(Layers(block, block, first + 3 * b + 2, (path,)))
    found.append(Layers("mid", "mid.attn.0", 11 if sdxl else 12, ()))
    if convolutions:
        found += [_resnet("mid_block", "mid", j, (10 + 2 * j) if sdxl else 12) for j in (0, 1)]
    return found


def _resnet(path: str, block: str, j: int, place: int) -> Layers:
    convolutions = (f"{path}.resnets.{j}.conv1", f"{path}.resnets.{j}.conv2")
    return Layers(block, f"{block}.res.{j}", place, convolutions)


def _numbers(c: Carrying, name: str, text: str) -> list[float]:
    """Of a list for all places; what is none is left, and nothing."""
    try:
        values = [finite(part) for part in text.split(",")]
    except ValueError:
        values = []
    if len(values) in COUNTS and min(values) >= 0:
        return values
    c.leave(f"network_args {name}", text, "it is not 25 numbers (SD 1 and 2) or 23 (SDXL)")
    return []


def _factors(c: Carrying, weights: Mapping[str, str], threshold: float, *, sdxl: bool) -> dict[int, float]:
    """Place -> factor on the rate; places that nothing is said of are not there."""
    starts = (1, 10, 13) if sdxl else (0, 12, 13)
    lengths = (9, 3, 9) if sdxl else (12, 1, 12)
    found: dict[int, float] = {}
    for name, start, length in zip(WEIGHTS, starts, lengths, strict=True):
        if name not in weights:
            continue
        values = _weights(weights[name], length, curves=name != "mid_lr_weight")
        if values is None:
            c.leave(
                f"network_args {name}",
                weights[name],
                f"it is no list of {length} numbers and no curve's name",
            )
            continue
        values = [*values, *[1.0] * length][:length]
        found |= {start + i: value if value > threshold else 0.0 for i, value in enumerate(values)}
    return found


def _weights(text: str, length: int, *, curves: bool) -> list[float] | None:
    if "," in text or not curves:
        try:
            values = [finite(part) if part.strip() else 0.0 for part in text.split(",")]
        except ValueError:
            return None
        return values if min(values) >= 0 else None
    name, _, base = text.partition("+")
    try:
        shift = finite(base or 0)
    except ValueError:
        return None
    curve = CURVES.get(name)
    return None if curve is None else [curve(i / (length - 1)) + shift for i in range(length)]


def _threshold(text: str) -> float:
    try:
        return finite(text or 0)
    except ValueError:
        return 0.0
