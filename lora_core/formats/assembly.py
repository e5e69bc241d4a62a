"""From a file's keys to deltas: what every format does alike once it has said which key is which."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from lora_core import algebra
from lora_core.adapter import Adapter
from lora_core.deltas import Delta
from lora_core.deltas.absolute import Absolute
from lora_core.deltas.bias import WithBias
from lora_core.deltas.low_rank import LowRank
from lora_core.deltas.magnitude import WithMagnitude
from lora_core.errors import FileRefused
from lora_core.formats import foreign
from lora_core.formats.endings import says_outputs
from lora_core.formats.kinds import KINDS, kind_of_roles
from lora_core.formats.layer import Layer, Readable
from lora_core.formats.writing import output_column
from lora_core.safe_files import Header, read_tensors
from lora_core.safe_header import DTYPES, TensorInfo


class Part(NamedTuple):
    """What one key of a file is: a factor of the layer at `path` (an adapter path)."""

    path: str
    role: str  # a role of one of kinds.KINDS, or one of what may stand beside it (endings)


@dataclass(frozen=True)
class Reading:
    """What a format made of a file."""

    deltas: dict[str, Delta]
    unused: tuple[str, ...]


BIASES = frozenset({"bias", "bias_value"})  # the change of a layer's bias, and the bias itself
NUMBERS = (".alpha", ".on_input")  # what ends the key of a single number that says what a layer is
# Where the contents of a file's tensors come from: `read_tensors`, or `outlines` where only shapes matter.
Load = Callable[[Header, Iterable[str]], dict[str, Tensor]]


class Format(Protocol):
    """One way in which an Adapter can be spelled in a file, to be read."""

    name: str

    def recognises(self, header: Header) -> bool:
        """Whether the keys look like this spelling. Looks at names only."""
        ...

    def read(self, header: Header, load: Load = read_tensors) -> Reading:
        """Raises FileRefused for a file that is this spelling and damaged."""
        ...


class Spelling(Protocol):
    """One way to write an Adapter."""

    name: str

    def write(self, adapter: Adapter, path: Path, metadata: dict[str, str]) -> Path:
        """Write `adapter` in the dtype it has -> the file or folder. Raises SaveFailed, ConfigError."""
        ...


def assemble(
    header: Header,
    spell: Callable[[str], Part | None],
    *,
    load: Load = read_tensors,
    alpha_of: Callable[[str, int], float] = lambda path, rank: float(rank),
    kinds: Sequence[Readable] = KINDS,
) -> Reading:
    """Group the file's keys by layer and build a delta of each.

    `spell` says what a key is, None for a key that is no LoRA factor; those are named in `unused`.
    `alpha_of` (path, rank) gives the alpha of a layer that has no alpha tensor: by default the rank. `kinds`: as this
    spelling has them.
    """
    layers: dict[str, dict[str, str]] = {}
    unused: list[str] = []
    for key in header.tensors:
        part = spell(key)
        if part is None:
            unused.append(foreign.describe(key, header.tensors))
        elif part.role in layers.setdefault(part.path, {}):
            unused.append(f"{key} (the same layer a second time)")
        else:
            layers[part.path][part.role] = key
    found: dict[str, Readable | None] = {}
    for path, roles in list(layers.items()):
        kind = kind_of_roles(roles, kinds)
        if kind is None and BIASES.isdisjoint(roles):
            unused += [
                f"{key} ({role} of a layer that has no LoRA)" for role, key in layers.pop(path).items()
            ]
            continue
        found[path] = kind
        own = BIASES if kind is None else {*kind.roles.values(), *kind.beside}
        if "bias" in own:
            own = own | BIASES
        what = "change of its bias alone" if kind is None else kind.name
        for role in [role for role in roles if role not in own]:
            unused.append(f"{roles.pop(role)} (the layer has a {what}, to which that says nothing)")
    tensors = load(header, [key for roles in layers.values() for key in roles.values()])
    name = header.path.name
    deltas = {
        path: _delta(found[path], Layer(name, path, roles, _of(roles, tensors), alpha_of))
        for path, roles in layers.items()
    }
    return Reading(deltas, tuple(unused))


def _of(roles: Mapping[str, str], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {role: tensors[key] for role, key in roles.items()}


def outlines(header: Header, names: Iterable[str]) -> dict[str, Tensor]:
    """Tensors that have a shape and a dtype and cost nothing: what the header alone says of them.

    A file is then checked by the very code that reads it. Single numbers are read: an alpha is what people look for,
    and which side an (IA)³ scales decides what it fits."""
    infos = {name: header.tensors[name] for name in names}
    empty = {name: _outline(info.dtype, info.shape) for name, info in infos.items()}
    return empty | read_tensors(header, [name for name, info in infos.items() if is_number(name, info)])


def is_number(name: str, info: TensorInfo) -> bool:
    """Whether the tensor is a setting of its layer, whose value counts where all others' shapes do."""
    return name.endswith(NUMBERS) and math.prod(info.shape) == 1


@lru_cache(maxsize=1024)  # a model has a dozen shapes, and a tensor without contents can stand for several
def _outline(dtype: str, shape: tuple[int, ...]) -> Tensor:
    return torch.empty(shape, dtype=DTYPES[dtype], device="meta")


def _delta(kind: Readable | None, layer: Layer) -> Delta:
    change = None if kind is None else kind.read(layer)
    bias = _bias(layer, change)
    if change is not None and "magnitude" in layer.keys:
        change = _with_magnitude(change, layer)
    if "value" in layer.keys and not isinstance(change, Absolute):
        change = Absolute(layer.factor("value"), change)
    if bias is None:
        assert change is not None
        return change
    if change is not None and change.shape()[0] not in (-1, bias.numel()):
        raise layer.refused(
            _which_bias(layer),
            f"{bias.numel()} numbers were found where the layer has {change.shape()[0]} outputs",
        )
    try:
        return WithBias(change, bias, "value" if "bias_value" in layer.keys else "change")
    except ValueError as problem:
        raise layer.refused(_which_bias(layer), problem) from problem


def _bias(layer: Layer, change: Delta | None) -> Tensor | None:
    """Of the layer itself, or of a factor: B (A x) + b, all of it scaled."""
    own = next((role for role in ("bias", "bias_value") if role in layer.keys), None)
    if layer.keys.keys() >= BIASES:
        raise layer.refused("bias_value", f"{layer.keys['bias']} was found beside it, where one was expected")
    if not isinstance(change, LowRank) or "up_bias" not in layer.keys:
        return None if own is None else layer.factor(own)
    if own is not None or "magnitude" in layer.keys:
        other = layer.keys[own or "magnitude"]
        raise layer.refused("up_bias", f"a factor's bias was found beside {other}, where none was expected")
    return change.scale * layer.factor("up_bias").float()


def _which_bias(layer: Layer) -> str:
    return next(role for role in ("bias", "bias_value", "up_bias") if role in layer.keys)


def _with_magnitude(inner: Delta, layer: Layer) -> WithMagnitude:
    magnitude, shape = layer.factor("magnitude"), inner.shape()
    if says_outputs(layer.keys["magnitude"]) and magnitude.numel() == shape[0]:
        magnitude = output_column(magnitude, shape)
    try:
        algebra.magnitude_axis(magnitude, torch.Size(shape))
    except ValueError as problem:
        raise FileRefused(
            f"{layer.file}, {layer.keys['magnitude']}: a magnitude of shape {tuple(magnitude.shape)} fits "
            f"neither the {shape[0]} outputs nor the {shape[1]} inputs of its layer. Download or copy the "
            "file again."
        ) from problem
    return WithMagnitude(inner, magnitude)
