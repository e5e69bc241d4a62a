"""The kinds of change a layer can have in a file: how each tells itself by its factors, is read and is stored.

    lora_down.weight, lora_up.weight, [lora_mid.weight]                 LoRA, LoCon (arXiv 2106.09685)
    hada_w1_a, hada_w1_b, hada_w2_a, hada_w2_b, [hada_t1, hada_t2]      LoHa (2108.06098)
    lokr_w1 or lokr_w1_a, lokr_w1_b; lokr_w2 or lokr_w2_a, lokr_w2_b, [lokr_t2]    LoKr (2309.14859)

alpha and a magnitude may stand beside any of them: they are the reader's (assembly) and no kind's.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from lora_core import algebra
from lora_core.deltas import Delta
from lora_core.deltas.hadamard import Hadamard
from lora_core.deltas.kronecker import Kronecker
from lora_core.deltas.low_rank import LowRank
from lora_core.errors import FileRefused
from lora_core.formats.keys import kernel_of

AGAIN = "The file is damaged: download or copy it again."
# Stable Diffusion has no larger kernels, and a core of a thousand squared would unfold to terabytes
_KERNELS = ((1, 1), (3, 3))


@dataclass(frozen=True)
class Layer:
    """One layer of a file: its keys and tensors by role, and the file's name to refuse them by."""

    file: str
    path: str
    keys: Mapping[str, str]
    tensors: Mapping[str, Tensor]
    default_alpha: Callable[[str, int], float]  # (path, rank), for a layer without an alpha of its own

    def factor(self, role: str) -> Tensor:
        """Floating point, or FileRefused. fp8 has next to no arithmetic in torch; all its values are fp16 values."""
        tensor, key = self.tensors[role], self.keys[role]
        if not tensor.is_floating_point():
            raise FileRefused(
                f"{self.file}, {key}: numbers of type {str(tensor.dtype).removeprefix('torch.')} were found "
                "where floating point was expected. Ask for an fp16, bf16 or fp32 version of it."
            )
        return tensor.half() if tensor.dtype.itemsize == 1 else tensor

    def core(self, role: str, rank: int) -> Tensor:
        """A Tucker core, (rank, rank, k, k)."""
        core = self.factor(role)
        if core.dim() != 4 or core.shape[:2] != (rank, rank) or core.shape[2:] not in _KERNELS:
            raise self.refused(
                role,
                f"a core of shape {tuple(core.shape)} was found where ({rank}, {rank}, k, k) was expected",
            )
        return core

    def with_kernel(self, role: str) -> Tensor:
        """LyCORIS' flattened (r, in·k·k) -> (r, in, k, k), for the layers that are convolutions in every model."""
        tensor, k = self.factor(role), kernel_of(self.path)
        if tensor.dim() != 2 or k == 1:
            return tensor
        if tensor.shape[1] % k**2:
            raise self.refused(
                role,
                f"{tensor.shape[1]} columns were found where a multiple of {k**2} was expected, for a {k}x{k} kernel",
            )
        return tensor.reshape(tensor.shape[0], -1, k, k)

    def alpha(self, rank: int) -> float:
        if "alpha" not in self.keys:
            return self.default_alpha(self.path, rank)
        tensor = self.tensors["alpha"]
        if tensor.numel() != 1:
            raise FileRefused(
                f"{self.file}, {self.keys['alpha']}: {tensor.numel()} values were found where alpha is one. "
                "Download it again."
            )
        return float(tensor)

    def refused(self, role: str, problem: object) -> FileRefused:
        return FileRefused(f"{self.file}, {self.keys[role]}: {problem}. {AGAIN}")

    def require(self, *roles: str) -> None:
        """All of them, or FileRefused naming the first that is missing."""
        for role in roles:
            if role not in self.keys:
                there = next(self.keys[r] for r in (*roles, *self.keys) if r in self.keys)
                raise FileRefused(
                    f"{self.file} has {there} without its {role} factor: the file is incomplete. Download or "
                    "copy it again."
                )


class Kind(Protocol):
    name: str
    delta: type[Delta]
    roles: Mapping[str, str]  # what ends a key in kohya's spelling -> role

    def recognises(self, roles: Collection[str]) -> bool:
        """Whether a layer with these roles is of this kind, be it incomplete."""
        ...

    def read(self, layer: Layer) -> Delta:
        """Raises FileRefused for a layer that is incomplete or whose shapes do not go together."""
        ...

    def stored(self, delta: Delta) -> dict[str, Tensor]:
        """The factors by what ends their keys in kohya's spelling, in the shapes other programs read."""
        ...


class LoRA:
    name = "LoRA"
    delta: type[Delta] = LowRank
    roles: Mapping[str, str] = {f"lora_{role}.weight": role for role in ("down", "up", "mid")}

    def recognises(self, roles: Collection[str]) -> bool:
        return not {"down", "up"}.isdisjoint(roles)

    def read(self, layer: Layer) -> Delta:
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

    def stored(self, delta: Delta) -> dict[str, Tensor]:
        return {f"lora_{name}.weight": t for name, t in delta.tensors().items() if name != "alpha"}


class LoHa:
    name = "LoHa"
    delta: type[Delta] = Hadamard
    factors = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
    cores = ("hada_t1", "hada_t2")
    roles: Mapping[str, str] = {role: role for role in (*factors, *cores)}

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
    sides = (("lokr_w1", "lokr_w1_a", "lokr_w1_b"), ("lokr_w2", "lokr_w2_a", "lokr_w2_b"))
    core = "lokr_t2"
    roles: Mapping[str, str] = {role: role for role in (*sides[0], *sides[1], core)}

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


KINDS: tuple[Kind, ...] = (LoRA(), LoHa(), LoKr())


def kind_of_roles(roles: Collection[str]) -> Kind | None:
    return next((kind for kind in KINDS if kind.recognises(roles)), None)


def kind_of_delta(delta: Delta) -> Kind | None:
    """`delta` without its magnitude."""
    return next((kind for kind in KINDS if isinstance(delta, kind.delta)), None)


def _as_stored(name: str, tensor: Tensor) -> Tensor:
    """LyCORIS stores pairs as matrices, whatever their layer is."""
    return tensor.flatten(1) if name in ("w1_b", "w2_b") else tensor


def _rank(b: Tensor) -> int:
    """Of the second factor of a pair; 0 for a single number, which no constructor takes."""
    return int(b.shape[0]) if b.dim() else 0
