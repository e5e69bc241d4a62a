"""What several LoRAs change in a layer together: sum w ΔW, as factors where all have them, else as a matrix; the best
of a lower rank for it, and how far another LoRA is from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from lora_core import algebra
from lora_core.adapter import Adapter
from lora_core.deltas import Delta
from lora_core.deltas.absolute import Absolute
from lora_core.deltas.bias import WithBias
from lora_core.deltas.full import Full
from lora_core.deltas.low_rank import LowRank
from lora_core.errors import ConfigError, WrongFamily
from lora_core.facts import kind_name
from lora_core.families import by
from lora_core.lower_rank import Lost, best_factors, low_rank, rank_of
from lora_core.progress import steps
from lora_core.worn import original_weight, stored, weight_shape

Parts = Sequence[tuple[Delta, float]]  # changes of one layer's weight, with the user's weights
Layers = Mapping[str, nn.Module]


def factors(parts: Parts) -> tuple[Tensor, Tensor] | None:
    """fp32 down (R, in*k*k) and up (out, R) of sum w ΔW; None where one of them has no factors."""
    forms = [(delta.low_rank_form(), w) for delta, w in parts]
    known = [(form, w) for form, w in forms if form is not None]
    if len(known) < len(forms):
        return None
    return torch.cat([algebra.flat(f[0]) for f, _ in known]), torch.cat(
        [w * algebra.flat(f[1]) for f, w in known], 1
    )


def dense(path: str, delta: Delta, layer: nn.Module | None) -> Tensor:
    """ΔW in fp32, flattened to (out, in*k*k). ConfigError where it needs the base and there is no layer, WrongFamily
    for the layer of another model."""
    form = delta.low_rank_form()
    if form is not None:
        return algebra.flat(form[1]) @ algebra.flat(form[0])
    if not delta.needs_original:
        return algebra.flat(delta.delta(torch.zeros(delta.shape())))  # made of its factors alone
    if layer is None:
        raise ConfigError(
            f"{path} is of the kind {kind_name(delta)}, whose change needs the base model's weight. Give the layers of "
            "the model it was trained on."
        )
    out, inner = weight_shape(layer)
    if not delta.fits((out, *inner)):
        raise WrongFamily(
            f"{path} changes a weight of {by(delta.shape())}, and the layer given has {by((out, *inner))}. Give the "
            "layers of the model it was trained on."
        )
    return algebra.flat(delta.delta(original_weight(layer, path).cpu().float()))


def summed(path: str, parts: Parts, layer: nn.Module | None) -> Tensor:
    """sum w ΔW in fp32, (out, in*k*k)."""
    return torch.stack([w * dense(path, delta, layer) for delta, w in parts]).sum(0)


def nearest(
    path: str, parts: Parts, layer: nn.Module | None, *, rank: int | None = None, energy: float | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Flat factors, down (r, n) and up (m, r), nearest to sum w ΔW of that rank, or of the smallest that holds this
    share of its square; and |sum|², |sum - up down|². It is formed only where not all have factors."""
    known = factors(parts)
    if known is None:
        whole = summed(path, parts, layer)
        down, up = best_factors(whole, rank=rank, energy=energy)
        return down, up, whole.square().sum(), (whole - up @ down).square().sum()
    down, up, values = algebra.svd_of_product(*known)
    kept = rank if energy is None else rank_of(values, energy)
    return down[:kept], up[:, :kept], values.square().sum(), values[kept:].square().sum()


def as_low_rank(down: Tensor, up: Tensor, parts: Parts, layer: nn.Module | None = None) -> LowRank:
    """In the shape and dtype of the first layer that tells one, else of the base's; scale 1."""
    told = [delta.shape() for delta, _ in parts if len(delta.shape()) > 1 and -1 not in delta.shape()]
    if not told:  # what tells no shape has asked for the layer before
        assert layer is not None
        out, inner = weight_shape(layer)
        told = [(out, *inner)]
    return low_rank(down, up, told[0], next(iter(parts[0][0].tensors().values())).dtype)


def as_change(path: str, delta: Delta, layer: nn.Module | None) -> Delta:
    """A bias or a norm's weight that is given whole as the change it is beside the base's. Weights of more dimensions
    become changes as they are needed. ConfigError where there is no layer to compare with."""
    change = of_weight(delta)
    norm = change if isinstance(change, Absolute) and len(change.shape()) == 1 else None
    bias = delta if isinstance(delta, WithBias) and delta.of != "change" else None
    if norm is None and bias is None:
        return delta
    if layer is None:
        raise ConfigError(
            f"{path} has a {'weight' if bias is None else 'bias'} that is given whole, whose change only the base "
            "model tells. Give the layers of the model it was trained on."
        )
    if norm is not None:
        change = Full(norm.delta(original_weight(layer, path).cpu().float()))
        delta = with_weight(delta, change)
    if bias is None:
        return delta
    own = stored(layer, path, "bias")
    moved = bias.bias_change(None if own is None else own.detach().cpu())
    if moved is None:
        assert change is not None  # a factor stands beside what it scales
        return change
    return WithBias(change, moved)


def of_weight(delta: Delta | None) -> Delta | None:
    """Without the change of its bias; None where that is all."""
    return delta.inner if isinstance(delta, WithBias) else delta


def with_weight(delta: Delta, change: Delta) -> Delta:
    """`change` in the place of what changes the weight; the change of the bias stays."""
    return replace(delta, inner=change) if isinstance(delta, WithBias) else change


def is_of_norm(delta: Delta) -> bool:
    return isinstance(delta, Full) and len(delta.shape()) == 1


@dataclass(frozen=True)
class Apart:
    """How far a LoRA is from what others do together: `share` = |sum w ΔW - ΔW'| / |sum w ΔW| over all layers, of
    weights and norms; biases do not count. `left_out`: adapter paths that cannot be told without the base."""

    share: float
    left_out: tuple[str, ...] = ()


@torch.no_grad()
def apart(before: Sequence[tuple[Adapter, float]], after: Adapter, layers: Layers | None = None) -> Apart:
    """`layers` is for kinds whose change needs the base, as in `combine`. A layer that one side lacks counts whole."""
    sums, left_out = Lost(), []
    paths = dict.fromkeys(path for adapter, _ in (*before, (after, 1.0)) for path in adapter.deltas)
    for path in steps(paths, "layers measured"):
        given = [(of_weight(adapter.deltas.get(path)), float(w)) for adapter, w in before]
        old = [(delta, w) for delta, w in given if delta is not None]
        new = [(delta, -1.0) for delta in (of_weight(after.deltas.get(path)),) if delta is not None]
        layer = (layers or {}).get(path)
        unchanged = len(old) == len(new) == 1 and old[0][1] == 1 and _same(old[0][0], new[0][0])
        if layer is None and any(delta.needs_original for delta, _ in (*old, *new)):
            # without the base its size is not known, but that nothing changed is
            left_out += [] if unchanged else [path]
            continue
        sums.add(_squared(path, old, layer), 0 if unchanged else _squared(path, [*old, *new], layer))
    return Apart(sums.share, tuple(left_out))


def _squared(path: str, parts: Parts, layer: nn.Module | None) -> float:
    """|sum w ΔW|²."""
    if not parts:
        return 0.0
    known = factors(parts)
    if known is not None:
        return max(float(algebra.gram_inner(*known, *known)), 0.0)
    return float(summed(path, parts, layer).square().sum())


def _same(a: Delta, b: Delta) -> bool:
    one, other = a.tensors(), b.tensors()
    return one.keys() == other.keys() and all(
        torch.equal(t.float().flatten(), other[name].float().flatten()) for name, t in one.items()
    )
