"""Kinds made of factors, as files have them.

lora_down.weight, lora_up.weight, [lora_mid.weight]                 LoRA, LoCon (arXiv 2106.09685)
lora_embedding_A, lora_embedding_B                                  LoRA of an embedding, in PEFT's files only
lora_B.bias                                                         a bias of the second factor, PEFT's as well
hada_w1_a, hada_w1_b, hada_w2_a, hada_w2_b, [hada_t1, hada_t2]      LoHa (2108.06098)
lokr_w1 or lokr_w1_a, lokr_w1_b; lokr_w2 or lokr_w2_a, lokr_w2_b, [lokr_t2]    LoKr (2309.14859)
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from torch import Tensor

from lora_core import algebra
from lora_core.deltas import Delta
from lora_core.deltas.hadamard import Hadamard
from lora_core.deltas.kronecker import Kronecker
from lora_core.deltas.low_rank import LowRank
from lora_core.errors import FileRefused
from lora_core.formats.layer import Layer


class LoRA:
    name = "LoRA"
    delta: type[Delta] = LowRank
    beside = frozenset({"alpha", "magnitude", "bias", "up_bias", "value", "embedding_A", "embedding_B"})
    roles: Mapping[str, str] = {f"lora_{role}.weight": role for role in ("down", "up", "mid")}

    words = ("embedding_A", "embedding_B")  # PEFT's, of an embedding (num, dim): A (r, num), B (dim, r)

    def algo(self, delta: Delta) -> str:
        return "lora"

    def recognises(self, roles: Collection[str]) -> bool:
        return not {"down", "up", *self.words}.isdisjoint(roles)

    def read(self, layer: Layer) -> Delta:
        if not set(self.words).isdisjoint(layer.keys):
            return self._read_words(layer)
        layer.require("down", "up")
        down, up = layer.factor("down"), layer.factor("up")
        if down.dim() == 4 and up.dim() == 2:
            up = up[:, :, None, None]
        if (down.dim(), up.dim()) not in ((2, 2), (4, 4)) or up.shape[2:] not in ((), (1, 1)):
            raise FileRefused(
                f"{layer.file}, {layer.keys['down']}: factors of shape {tuple(down.shape)} and "
                f"{tuple(up.shape)} are no LoRA of a linear layer or a convolution. The file is damaged or of "
                "a kind this version does not know."
            )
        rank = down.shape[0]
        if up.shape[1] != rank:
            raise layer.refused(
                "down",
                f"its rank is {rank}, that of {layer.keys['up']} is {up.shape[1]}; they must agree",
            )
        if "mid" in layer.keys:
            mid = layer.core("mid", rank)
            if down.shape[2:] != (1, 1):
                raise layer.refused(
                    "down",
                    f"a factor of shape {tuple(down.shape)} was found where a core expects (r, in, 1, 1)",
                )
            down, up = algebra.compose_tucker(down, mid), up.float()
        return LowRank(down, up, layer.alpha(rank))

    def _read_words(self, layer: Layer) -> Delta:
        """PEFT's ΔW is s (B A)ᵀ: a row for each word, so its A is `up` and its B `down`, both transposed."""
        layer.require(*self.words)
        a, b = (layer.factor(role) for role in self.words)
        if a.dim() != 2 or b.dim() != 2 or a.shape[0] != b.shape[1]:
            raise layer.refused(
                self.words[0],
                f"factors of shape {tuple(a.shape)} and {tuple(b.shape)} were found where (r, words) and (width, r) "
                "were expected",
            )
        return LowRank(b.T.contiguous(), a.T.contiguous(), layer.alpha(int(a.shape[0])))

    def stored(self, delta: Delta) -> dict[str, Tensor]:
        return {f"lora_{name}.weight": t for name, t in delta.tensors().items() if name != "alpha"}


class LoHa:
    name = "LoHa"
    delta: type[Delta] = Hadamard
    beside = frozenset({"alpha", "magnitude", "bias"})
    factors = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
    cores = ("hada_t1", "hada_t2")
    roles: Mapping[str, str] = {role: role for role in (*factors, *cores)}

    def algo(self, delta: Delta) -> str:
        return "loha"

    def recognises(self, roles: Collection[str]) -> bool:
        return not set(self.factors).isdisjoint(roles)

    def read(self, layer: Layer) -> Delta:
        layer.require(*self.factors)
        has_cores = not set(self.cores).isdisjoint(layer.keys)
        if has_cores:
            layer.require(*self.cores)
        w1_a, w2_a = layer.factor("hada_w1_a"), layer.factor("hada_w2_a")
        t1 = t2 = None
        if has_cores:
            w1_b, w2_b = layer.factor("hada_w1_b"), layer.factor("hada_w2_b")
            t1, t2 = (layer.core(c, _rank(b)) for c, b in zip(self.cores, (w1_b, w2_b), strict=True))
        else:
            w1_b, w2_b = layer.with_kernel("hada_w1_b"), layer.with_kernel("hada_w2_b")
        try:
            return Hadamard(w1_a, w1_b, w2_a, w2_b, layer.alpha(_rank(w1_b)), t1, t2)
        except ValueError as problem:
            raise layer.refused("hada_w1_a", problem) from problem

    def stored(self, delta: Delta) -> dict[str, Tensor]:
        return {f"hada_{name}": _as_stored(name, t) for name, t in delta.tensors().items() if name != "alpha"}


class LoKr:
    name = "LoKr"
    delta: type[Delta] = Kronecker
    beside = frozenset({"alpha", "magnitude", "bias"})
    sides = (("lokr_w1", "lokr_w1_a", "lokr_w1_b"), ("lokr_w2", "lokr_w2_a", "lokr_w2_b"))
    core = "lokr_t2"
    roles: Mapping[str, str] = {role: role for role in (*sides[0], *sides[1], core)}

    def algo(self, delta: Delta) -> str:
        return "lokr"

    def recognises(self, roles: Collection[str]) -> bool:
        return not {role for side in self.sides for role in side}.isdisjoint(roles)

    def read(self, layer: Layer) -> Delta:
        (w1, first), (w2, second) = (self._side(layer, *side) for side in self.sides)
        if self.core in layer.keys:
            if len(w2) == 1:
                raise layer.refused(
                    self.core, f"a core was found beside {layer.keys[second]}, where it belongs to a pair"
                )
            w2 = (w2[0], layer.factor("lokr_w2_b"), layer.core(self.core, _rank(w2[1])))
        split = next((factors for factors in (w1, w2) if len(factors) > 1), None)
        try:
            return Kronecker(w1, w2, layer.alpha(1 if split is None else _rank(split[1])))
        except ValueError as problem:
            raise layer.refused(first, problem) from problem

    def _side(self, layer: Layer, whole: str, a: str, b: str) -> tuple[tuple[Tensor, ...], str]:
        """-> (the factors, a role to name them by)."""
        pair = [role for role in (a, b) if role in layer.keys]
        if whole not in layer.keys:
            if not pair:
                other = next(layer.keys[role] for role in self.roles if role in layer.keys)
                raise FileRefused(
                    f"{layer.file} has {other} without {whole} or {a} and {b}: the file is incomplete. "
                    "Download or copy it again."
                )
            layer.require(a, b)
            tucker = a == "lokr_w2_a" and self.core in layer.keys
            # only the second factor of a convolution carries its kernel
            second = layer.with_kernel(b) if b == "lokr_w2_b" and not tucker else layer.factor(b)
            return (layer.factor(a), second), a
        if pair:
            raise layer.refused(
                whole, f"{layer.keys[pair[0]]} was found beside it, where one of the two was expected"
            )
        return (layer.factor(whole),), whole

    def stored(self, delta: Delta) -> dict[str, Tensor]:
        return {f"lokr_{name}": _as_stored(name, t) for name, t in delta.tensors().items() if name != "alpha"}


def _as_stored(name: str, tensor: Tensor) -> Tensor:
    """LyCORIS stores pairs as matrices, whatever their layer is."""
    return tensor.flatten(1) if name in ("w1_b", "w2_b") else tensor


def _rank(b: Tensor) -> int:
    """Of the second factor of a pair; 0 for a single number, which no constructor takes."""
    return int(b.shape[0]) if b.dim() else 0
