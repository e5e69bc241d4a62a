"""One layer of a file as its reader sees it, and what a kind of change has to know about it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from lora_core.deltas import Delta
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

    def flag(self, role: str) -> bool:
        """A single number: 0 is no. FileRefused for more than one."""
        tensor = self.tensors[role]
        if tensor.numel() != 1:
            raise self.refused(role, f"{tensor.numel()} values were found where one was expected")
        return bool(tensor)

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


class Readable(Protocol):
    """A kind as some spelling has it."""

    name: str
    roles: Mapping[str, str]  # what ends a key -> role
    beside: frozenset[str]  # roles of endings.BESIDE, and of other spellings alone, that mean something to it

    def recognises(self, roles: Collection[str]) -> bool:
        """Whether a layer with these roles is of this kind, be it incomplete."""
        ...

    def read(self, layer: Layer) -> Delta:
        """Raises FileRefused for a layer that is incomplete or whose shapes do not go together."""
        ...


class Kind(Readable, Protocol):
    """A kind as kohya's spelling has it, which can say all of them: `roles` are its endings."""

    delta: type[Delta]

    def algo(self, delta: Delta) -> str:
        """LyCORIS' word for it, as metadata has it."""
        ...

    def stored(self, delta: Delta) -> dict[str, Tensor]:
        """The factors by what ends their keys in kohya's spelling, in the shapes other programs read. Raises
        ConfigError for what has no key there."""
        ...
