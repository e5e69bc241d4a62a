"""Kinds that are not products of two factors, as files have them.

diff, w_norm                             a whole difference; of a norm's weight (kohya, LyCORIS "full" and "norm")
set_weight                               the weight itself (ComfyUI); PEFT's `weight` of a module that was saved whole
weight, on_input                         (IA)³ (arXiv 2205.05638): (n,), a convolution's (1, n, 1, 1)
a1.weight, a2.weight, b1.weight, b2.weight, [bm.weight]     GLoRA (2306.07967)
oft_blocks, [rescale]                    OFT (2306.07280) of 3 dimensions, BOFT (2311.06243) of 4; alpha is a limit
oft_diag                                 LyCORIS of 2023: the blocks of R themselves
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from lora_core import algebra
from lora_core.deltas import Delta
from lora_core.deltas.absolute import Absolute
from lora_core.deltas.full import Full
from lora_core.deltas.glora import Generalized
from lora_core.deltas.ia3 import Scaling
from lora_core.deltas.oft import Rotation
from lora_core.errors import ConfigError
from lora_core.formats.layer import Layer


class Whole:
    name = "full difference"
    delta: type[Delta] = Full
    roles: Mapping[str, str] = {role: role for role in ("diff", "w_norm")}
    beside = frozenset({"bias"})  # readers ignore an alpha here

    def algo(self, delta: Delta) -> str:
        return "full"

    def recognises(self, roles: Collection[str]) -> bool:
        return not {"diff", "w_norm"}.isdisjoint(roles)

    def read(self, layer: Layer) -> Delta:
        role = "diff" if "diff" in layer.keys else "w_norm"
        if role == "diff" and "w_norm" in layer.keys:
            raise layer.refused(
                role, f"{layer.keys['w_norm']} was found beside it, where one of the two was expected"
            )
        change = layer.factor(role)
        if change.dim() not in ((1,) if role == "w_norm" else (1, 2, 4)) or 0 in change.shape:
            raise layer.refused(
                role,
                f"a difference of shape {tuple(change.shape)} was found where that of a "
                f"{'norm' if role == 'w_norm' else 'linear layer, a convolution, an embedding or a norm'} was expected",
            )
        return Full(change)

    def stored(self, delta: Delta) -> dict[str, Tensor]:
        """What is one number per channel is a norm's, and has a name of its own."""
        change = delta.tensors()["diff"]
        return {"w_norm" if change.dim() == 1 else "diff": change}


class Itself:
    name = "whole weight"
    delta: type[Delta] = Absolute
    roles: Mapping[str, str] = {"set_weight": "value"}
    beside = frozenset({"bias"})

    def algo(self, delta: Delta) -> str:
        return "full"

    def recognises(self, roles: Collection[str]) -> bool:
        return "value" in roles

    def read(self, layer: Layer) -> Delta:
        value = layer.factor("value")
        if value.dim() not in (1, 2, 4) or 0 in value.shape:
            raise layer.refused(
                "value", f"a tensor of shape {tuple(value.shape)} was found where a weight was expected"
            )
        return Absolute(value)

    def stored(self, delta: Delta) -> dict[str, Tensor]:
        tensors = delta.tensors()
        if len(tensors) > 1:
            raise ConfigError(
                "A layer's weight is given whole, with a change on top of it, for which kohya's spelling has no keys. "
                "Combine the LoRA by svd with the layers of the base model first."
            )
        return {"set_weight": tensors["value"]}


class IA3:
    name = "(IA)³"
    delta: type[Delta] = Scaling
    roles: Mapping[str, str] = {"weight": "vector", "on_input": "on_input"}
    beside = frozenset({"bias"})

    def algo(self, delta: Delta) -> str:
        return "ia3"

    def recognises(self, roles: Collection[str]) -> bool:
        return not {"vector", "on_input"}.isdisjoint(roles)

    def read(self, layer: Layer) -> Delta:
        layer.require("vector", "on_input")
        try:
            return Scaling(layer.factor("vector"), layer.flag("on_input"))
        except ValueError as problem:
            raise layer.refused("vector", problem) from problem

    def stored(self, delta: Delta) -> dict[str, Tensor]:
        tensors = delta.tensors()
        return {ending: tensors[role] for ending, role in self.roles.items()}


class GLoRA:
    name = "GLoRA"
    delta: type[Delta] = Generalized
    factors = ("a1", "a2", "b1", "b2")
    core = "bm"
    roles: Mapping[str, str] = {f"{role}.weight": role for role in (*factors, core)}
    beside = frozenset({"alpha", "bias"})

    def algo(self, delta: Delta) -> str:
        return "glora"

    def recognises(self, roles: Collection[str]) -> bool:
        return not {*self.factors, self.core}.isdisjoint(roles)

    def read(self, layer: Layer) -> Delta:
        layer.require(*self.factors)
        a1, a2, b1, b2 = (layer.factor(role) for role in self.factors)
        if self.core in layer.keys:
            rank = int(b2.shape[0]) if b2.dim() else 0
            core = layer.core(self.core, rank)
            if b2.shape[2:] != (1, 1):
                raise layer.refused(
                    "b2",
                    f"a factor of shape {tuple(b2.shape)} was found where a core expects (r, in, 1, 1)",
                )
            b2 = algebra.compose_tucker(b2, core)
        if _first_glora(a1, a2, b1, b2):
            a1, a2, b1, b2 = a2, a1, b2, b1
        try:
            return Generalized(a1, a2, b1, b2, layer.alpha(int(b2.shape[0]) if b2.dim() else 0))
        except ValueError as problem:
            raise layer.refused("a1", problem) from problem

    def stored(self, delta: Delta) -> dict[str, Tensor]:
        return {f"{name}.weight": t for name, t in delta.tensors().items() if name != "alpha"}


def _first_glora(a1: Tensor, a2: Tensor, b1: Tensor, b2: Tensor) -> bool:
    """Whether factors are named as in the first LyCORIS that had GLoRA: a2 a1 and b2 b1 in place of a1 a2 and b1 b2.
    Where both would fit (layers no wider than the rank) it is the name of today."""
    if {t.dim() for t in (a1, a2, b1, b2)} != {2}:
        return False
    now = b1.shape[1] == b2.shape[0] == a1.shape[1] == a2.shape[0]
    then = b2.shape[1] == b1.shape[0] == a2.shape[1] == a1.shape[0]
    return then and not now


class OFT:
    name = "OFT"
    delta: type[Delta] = Rotation
    roles: Mapping[str, str] = {role: role for role in ("oft_blocks", "oft_diag", "rescale")}
    beside = frozenset({"alpha", "bias"})

    def algo(self, delta: Delta) -> str:
        return "boft" if delta.tensors()["blocks"].dim() == 4 else "diag-oft"

    def recognises(self, roles: Collection[str]) -> bool:
        return not set(self.roles).isdisjoint(roles)

    def read(self, layer: Layer) -> Delta:
        skew = "oft_diag" not in layer.keys
        blocks = "oft_blocks" if skew else "oft_diag"
        layer.require(blocks)
        if not skew and "oft_blocks" in layer.keys:
            raise layer.refused(
                blocks, f"{layer.keys['oft_blocks']} was found beside it, where one of the two was expected"
            )
        # R itself needs no limit, and its alpha means nothing
        limit = layer.alpha(0) if skew and "alpha" in layer.keys else 0.0
        rescale = layer.factor("rescale") if "rescale" in layer.keys else None
        try:
            return Rotation(layer.factor(blocks), limit, rescale, skew)
        except ValueError as problem:
            raise layer.refused(blocks, problem) from problem

    def stored(self, delta: Delta) -> dict[str, Tensor]:
        tensors = delta.tensors()
        if bool(tensors["on_input"]):
            raise ConfigError(
                "A layer's inputs are turned, as PEFT's OFT does it, for which kohya's spelling has no keys: its OFT "
                "turns outputs. Combine the LoRA by svd with the layers of the base model first."
            )
        rescale = {"rescale": tensors["rescale"]} if "rescale" in tensors else {}
        if not bool(tensors["skew"]):
            return {"oft_diag": tensors["blocks"], **rescale}
        return {"oft_blocks": tensors["blocks"], **rescale, "alpha": tensors["limit"].to(torch.float32)}
