"""Several LoRAs into one. MATHS §5; the names are those of PEFT's add_weighted_adapter.

    combine([(ink, 0.8), (cat, 0.5)], method="ties_svd", density=0.5, rank=16)

With t = w · alpha/r, D = alpha/r · B A, per layer, and LoRAs that lack the layer left out:

    cat                A = rows(t A), B = columns(B): exactly the sum, as wide as all together
    linear             A = sum sign(t) sqrt|t| A, B = sum sqrt|t| B: equal ranks; its products mix the LoRAs crosswise,
                       so it is not their sum
    svd                the best of that rank for sum w D
    magnitude_prune    linear, on the largest entries (`density` of them)
    dare_linear        linear, on random entries, divided by `density` (arXiv 2311.03099)
    ties, dare_ties    of what is left after pruning, only the entries whose sign the majority has, as their mean
                       (arXiv 2306.01708)
    ..._svd            the same on the D, then the best of that rank

A norm's weight, which has no rank, is combined entry by entry, and changes of biases are added: w times each. Results
have scale 1. What was lost to a lower rank is said in the metadata (`LOST`), as a share of |ΔW|.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from lora_core import algebra
from lora_core.adapter import Adapter
from lora_core.changes import as_change, as_low_rank, dense, is_of_norm, nearest, of_weight
from lora_core.combination import FROM, Combination, Method, with_svd
from lora_core.deltas import Delta, Factored
from lora_core.deltas.bias import WithBias
from lora_core.deltas.full import Full
from lora_core.deltas.low_rank import LowRank
from lora_core.deltas.magnitude import WithMagnitude
from lora_core.errors import ConfigError, WrongFamily
from lora_core.facts import kind_name
from lora_core.formats.metadata import agreed
from lora_core.lower_rank import LOST, Lost, best_factors, held
from lora_core.progress import steps
from lora_core.replication import read_map, written


@torch.no_grad()
def combine(
    adapters: Sequence[tuple[Adapter, float]],
    method: Method = "cat",
    *,
    density: float | None = None,
    rank: int | None = None,
    clamp: float | None = None,
    majority: Literal["total", "frequency"] = "total",
    signed_election: bool = False,
    layers: Mapping[str, nn.Module] | None = None,
    name: str = "combined",
) -> Adapter:
    """One LoRA out of several (LoRA, weight); see `Combination` for the fields.

    What has no factors (LoKr, DoRA, (IA)³, GLoRA, OFT, a whole difference) goes by an svd method; where ΔW depends on
    the base's weight (all of these but LoKr and the difference) `layers` are needed as well, adapter path -> the layer
    that holds W0. Raises ConfigError for fields and weights that make no sense together and for ranks that
    differ where they must not, WrongFamily for LoRAs of different models.
    """
    how = Combination(
        method=method,
        density=density,
        rank=rank,
        clamp=clamp,
        majority=majority,
        signed_election=signed_election,
    )
    family = _one_family(adapters)
    sums = Lost()
    deltas: dict[str, Delta] = {}
    paths = dict.fromkeys(path for adapter, _ in adapters for path in adapter.deltas)
    for path in steps(paths, "layers"):
        layer = (layers or {}).get(path)
        given = [(adapter.deltas[path], float(w)) for adapter, w in adapters if path in adapter.deltas]
        parts = [(as_change(path, delta, layer), w) for delta, w in given]
        deltas[path] = _combined(path, parts, how, layer, sums)
    facts = agreed([adapter.metadata for adapter, _ in adapters])
    metadata = {**facts, FROM: how.recipe(adapters), **_one_stack(adapters)}
    if how.by_svd:
        metadata[LOST] = f"{sums.share:.6f}"
    return Adapter(deltas, metadata, family, name, embeddings=_words(adapters))


def _one_family(adapters: Sequence[tuple[Adapter, float]]) -> str | None:
    if not adapters:
        raise ConfigError("There is no LoRA to combine. Give at least one, with its weight.")
    for adapter, weight in adapters:
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight):
            raise ConfigError(
                f'The weight of "{adapter.name}" is {weight!r}: a finite number was expected, such as 0.8.'
            )
    families = {adapter.family for adapter, _ in adapters if adapter.family is not None}
    if len(families) > 1:
        raise WrongFamily(
            f"These LoRAs are for different models ({', '.join(sorted(families))}) and cannot become one. Combine "
            "those of one model."
        )
    return next(iter(families), None)


def _combined(
    path: str, parts: Sequence[tuple[Delta, float]], how: Combination, layer: nn.Module | None, sums: Lost
) -> Delta:
    biases = [(delta.bias, w) for delta, w in parts if isinstance(delta, WithBias)]
    inner = [(of_weight(delta), w) for delta, w in parts]
    changes = [(delta, w) for delta, w in inner if delta is not None]
    change: Delta | None = None
    if changes and all(is_of_norm(delta) for delta, _ in changes):
        norms = [delta.tensors()["diff"] for delta, _ in changes]
        change = Full(
            _merged([t.float() for t in norms], torch.tensor([w for _, w in changes]), how).to(norms[0])
        )
    elif changes:
        change = _by_svd(path, changes, how, layer, sums) if how.by_svd else _by_factors(path, changes, how)
    if not biases:
        assert change is not None
        return change
    return WithBias(change, torch.stack([w * b.float() for b, w in biases]).sum(0).to(biases[0][0]))


def _one_stack(adapters: Sequence[tuple[Adapter, float]]) -> dict[str, str]:
    """Of replicated layers: the metadata of all, which must be the same."""
    maps = [read_map(adapter.metadata) for adapter, _ in adapters]
    if any(found != maps[0] for found in maps):
        raise ConfigError(
            "These LoRAs are made for different stacks of replicated layers, whose numbers mean other layers in each. "
            "Combine those of one stack."
        )
    return written(maps[0])


def _words(adapters: Sequence[tuple[Adapter, float]]) -> dict[str, dict[str, Tensor]]:
    """New words have no weight: all of them come along as they are."""
    found: dict[str, dict[str, Tensor]] = {}
    for adapter, _ in adapters:
        for word, rows in adapter.embeddings.items():
            if word in found and not all(torch.equal(found[word][c], rows[c]) for c in rows):
                raise ConfigError(
                    f'"{word}" is a new word of two of these LoRAs, and means something else in each. Combine one of '
                    "them only."
                )
            found[word] = rows
    return found


# --- on the factors ------------------------------------------------------------------------------------------


def _by_factors(path: str, parts: Sequence[tuple[Delta, float]], how: Combination) -> LowRank:
    downs, ups, strengths = [], [], []
    for delta, weight in parts:
        down, up, scale = _factors(path, delta, how.method)
        downs.append(down)
        ups.append(up)
        strengths.append(weight * scale)
    if how.method == "cat":
        down = torch.cat([t * d for t, d in zip(strengths, downs, strict=True)])
        return as_low_rank(down, torch.cat(ups, dim=1), parts)
    ranks = {len(down) for down in downs}
    if len(ranks) > 1:
        raise ConfigError(
            f"{path} has ranks {', '.join(map(str, sorted(ranks)))}, and {how.method} adds the factors themselves, "
            f"which must have one rank. Use {with_svd(how.method)}, or resize the LoRAs first."
        )
    roots = torch.tensor([abs(t) ** 0.5 for t in strengths])
    signs = torch.tensor([-1.0 if t < 0 else 1.0 for t in strengths])
    # the sign on one side only, or two would cancel
    return as_low_rank(_merged(downs, roots * signs, how), _merged(ups, roots, how), parts)


def _factors(path: str, delta: Delta, method: str) -> tuple[Tensor, Tensor, float]:
    """fp32 A (r, in*k*k), B (out, r) and alpha/r; scale 1 for kinds that are no plain LoRA."""
    if isinstance(delta, LowRank):
        return algebra.flat(delta.down), algebra.flat(delta.up), delta.scale
    form = delta.low_rank_form()
    if form is None:
        raise ConfigError(
            f"{path} is of the kind {kind_name(delta)}, which has no factors that {method} could work on. Use an svd "
            f"method{', with the layers of the base model' if delta.needs_original else ''}."
        )
    return algebra.flat(form[0]), algebra.flat(form[1]), 1.0


def _merged(tensors: Sequence[Tensor], weights: Tensor, how: Combination) -> Tensor:
    """(k tensors, k weights) -> one of the same shape, as the method's name without `_svd` says."""
    kind = how.method.removesuffix("_svd")
    prune: Callable[[Tensor, float], Tensor] | None = {
        "ties": by_magnitude,
        "magnitude_prune": by_magnitude,
        "dare_ties": at_random,
        "dare_linear": at_random,
    }.get(kind)
    if prune is not None and how.density is not None and how.density < 1:
        tensors = [prune(tensor, how.density) for tensor in tensors]
    stack = torch.stack(list(tensors))
    weights = weights.reshape(-1, *[1] * (stack.dim() - 1))
    if not kind.endswith("ties"):
        return (stack * weights).sum(0)
    mask = elected(stack * weights.sign() if how.signed_election else stack, how.majority)
    return (stack * weights * mask).sum(0) / mask.sum(0).clamp(min=1)


def by_magnitude(tensor: Tensor, density: float) -> Tensor:
    """The int(density · n) entries of largest absolute value; the others become 0."""
    kept = tensor.abs().flatten().topk(int(density * tensor.numel())).indices
    mask = torch.zeros(tensor.numel(), dtype=tensor.dtype)
    mask[kept] = 1
    return tensor * mask.reshape(tensor.shape)


def at_random(tensor: Tensor, density: float) -> Tensor:
    """Each entry with the chance `density`, divided by it: the same in expectation (DARE)."""
    return tensor * torch.bernoulli(torch.full_like(tensor, density)) / density


def elected(stack: Tensor, majority: str) -> Tensor:
    """(k, ...) -> which entries have the sign that wins among the k; a tie is won by +, and 0 never has it."""
    votes = stack.sum(0) if majority == "total" else stack.sign().sum(0)
    return stack.sign() == torch.where(votes >= 0, 1, -1)


# --- on the products -----------------------------------------------------------------------------------------


def _by_svd(
    path: str, parts: Sequence[tuple[Delta, float]], how: Combination, layer: nn.Module | None, sums: Lost
) -> LowRank:
    rank = how.rank or max(_rank(path, delta) for delta, _ in parts)
    if how.method == "svd" and how.clamp is None:
        down, up, whole, gone = nearest(path, parts, layer, rank=rank)
    else:
        weights = torch.tensor([weight for _, weight in parts])
        merged = _merged([dense(path, delta, layer) for delta, _ in parts], weights, how)
        down, up = best_factors(merged, rank=rank)
        whole, gone = merged.square().sum(), (merged - up @ down).square().sum()
    sums.add(whole, gone)
    return as_low_rank(*held(down, up, how.clamp, sums), parts, layer)


def _rank(path: str, delta: Delta) -> int:
    inner = delta.inner if isinstance(delta, WithMagnitude) else delta
    if not isinstance(inner, Factored):
        raise ConfigError(
            f"{path} is of the kind {kind_name(inner)}, which has no rank of its own: give the result's rank."
        )
    return inner.rank
