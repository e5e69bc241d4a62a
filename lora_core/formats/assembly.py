"""From a file's keys to deltas: what every format does alike once it has said which key is which."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from lora_core import algebra
from lora_core.adapter import Adapter, is_finite
from lora_core.deltas import Delta, factored
from lora_core.deltas.bias import WithBias
from lora_core.deltas.low_rank import LowRank
from lora_core.deltas.magnitude import WithMagnitude
from lora_core.errors import ConfigError, FileRefused, NotFinite
from lora_core.formats import foreign
from lora_core.formats.endings import says_outputs
from lora_core.formats.kinds import kind_of_delta, kind_of_roles
from lora_core.formats.layer import Kind, Layer
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
) -> Reading:
    """Group the file's keys by layer and build a delta of each.

    `spell` says what a key is, None for a key that is no LoRA factor; those are named in `unused`.
    `alpha_of` (path, rank) gives the alpha of a layer that has no alpha tensor: by default the rank.
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
    kinds: dict[str, Kind | None] = {}
    for path, roles in list(layers.items()):
        kind = kind_of_roles(roles)
        if kind is None and "bias" not in roles:
            unused += [
                f"{key} ({role} of a layer that has no LoRA)" for role, key in layers.pop(path).items()
            ]
            continue
        kinds[path] = kind
        own = {"bias"} if kind is None else {*kind.roles.values(), *kind.beside}
        what = "change of its bias alone" if kind is None else kind.name
        for role in [role for role in roles if role not in own]:
            unused.append(f"{roles.pop(role)} (the layer has a {what}, to which that says nothing)")
    tensors = load(header, [key for roles in layers.values() for key in roles.values()])
    name = header.path.name
    deltas = {
        path: _delta(kinds[path], Layer(name, path, roles, _of(roles, tensors), alpha_of))
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


def _delta(kind: Kind | None, layer: Layer) -> Delta:
    change = None if kind is None else kind.read(layer)
    bias = _bias(layer, change)
    if change is not None and "magnitude" in layer.keys:
        change = _with_magnitude(change, layer)
    if bias is None:
        assert change is not None
        return change
    if change is not None and change.shape()[0] not in (-1, bias.numel()):
        raise layer.refused(
            _which_bias(layer),
            f"{bias.numel()} numbers were found where the layer has {change.shape()[0]} outputs",
        )
    try:
        return WithBias(change, bias)
    except ValueError as problem:
        raise layer.refused(_which_bias(layer), problem) from problem


def _bias(layer: Layer, change: Delta | None) -> Tensor | None:
    """Of the layer itself, or of a factor: B (A x) + b, all of it scaled."""
    own = layer.factor("bias") if "bias" in layer.keys else None
    if not isinstance(change, LowRank) or "up_bias" not in layer.keys:
        return own
    if own is not None or "magnitude" in layer.keys:
        other = layer.keys["magnitude" if own is None else "bias"]
        raise layer.refused("up_bias", f"a factor's bias was found beside {other}, where none was expected")
    return change.scale * layer.factor("up_bias").float()


def _which_bias(layer: Layer) -> str:
    return "bias" if "bias" in layer.keys else "up_bias"


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


# ---------------------------------------------------------------- writing


def output_column(magnitude: Tensor, shape: tuple[int, ...]) -> Tensor:
    """-> (out, 1) or (out, 1, 1, 1): the one shape that no reader can take for the other axis. The magnitude's own
    four dimensions stay where a 1x1 convolution's factors are matrices."""
    return magnitude.reshape(-1, *[1] * (max(len(shape), magnitude.dim()) - 1))


class Unwrapped(NamedTuple):
    """A delta without its modifiers, and these: the magnitude along outputs as a column, along inputs as it came."""

    change: Delta | None  # None where the bias is all that changes
    magnitude: Tensor | None
    bias: Tensor | None


def unwrapped(delta: Delta) -> Unwrapped:
    change, bias = (delta.inner, delta.bias) if isinstance(delta, WithBias) else (delta, None)
    if not isinstance(change, WithMagnitude):
        return Unwrapped(change, None, bias)
    magnitude, shape = change.magnitude, change.shape()
    axis = algebra.magnitude_axis(magnitude, torch.Size(shape))
    return Unwrapped(change.inner, output_column(magnitude, shape) if axis == 0 else magnitude, bias)


def low_ranks(adapter: Adapter, spelling: str) -> dict[str, tuple[LowRank, Tensor | None]]:
    """Path -> the low-rank part and the magnitude. ConfigError if a layer is of another kind, which PEFT's and
    diffusers' spellings cannot say: before anything is written."""
    found: dict[str, tuple[LowRank, Tensor | None]] = {}
    for path, delta in adapter.deltas.items():
        change, magnitude, bias = unwrapped(delta)
        if bias is not None:
            raise ConfigError(
                f"{path} has a change of its bias, which the {spelling} spelling has no key for. Write it in the "
                "kohya spelling."
            )
        if not isinstance(change, LowRank):
            kind = kind_of_delta(change)
            raise ConfigError(
                f"{path} is of the kind {type(change).__name__ if kind is None else kind.name}; the {spelling} "
                "spelling can say LoRA and DoRA only. Write it in the kohya spelling, or bake it to a plain "
                "LoRA first."
            )
        found[path] = change, magnitude
    return found


def column_or_refuse(path: str, magnitude: Tensor, spelling: str) -> Tensor:
    """PEFT and diffusers know one magnitude per output, nothing else -> (out,)."""
    if magnitude.shape[0] == 1 and magnitude.numel() != 1:
        raise ConfigError(
            f"{path} is a DoRA that scales input columns; the {spelling} spelling can only say output rows. "
            "Write it in the kohya spelling, or bake it to a plain LoRA first."
        )
    return magnitude.reshape(-1)


def cast(adapter: Adapter, dtype: torch.dtype | None) -> Adapter:
    """Every tensor in `dtype`. Raises NotFinite if a value does not fit."""
    adapter.check_finite()
    if dtype is None:
        return adapter
    if not dtype.is_floating_point:
        raise ConfigError(
            f"dtype = {dtype} cannot hold a LoRA: use torch.float16, torch.bfloat16 or torch.float32."
        )
    smaller = Adapter(
        {path: delta.to(dtype=dtype) for path, delta in adapter.deltas.items()}, adapter.metadata
    )
    for path, delta in smaller.deltas.items():
        for name, tensor in delta.tensors().items():
            if not is_finite(tensor):
                largest = float(adapter.deltas[path].tensors()[name].abs().max())
                raise NotFinite(
                    f"{path} ({name}) reaches {largest:.3g}, more than {str(dtype).removeprefix('torch.')} "
                    f"can hold ({torch.finfo(dtype).max:.3g}). Save it as bfloat16 or float32."
                )
    return Adapter(smaller.deltas, adapter.metadata, adapter.family, adapter.name, adapter.unused)


def alpha_tensor(alpha: float, dtype: torch.dtype) -> Tensor:
    """0-d, in the factors' dtype as kohya has it, unless that would round it."""
    short = torch.tensor(alpha, dtype=torch.float64).to(dtype)
    return short if float(short) == alpha else torch.tensor(alpha, dtype=torch.float64).to(torch.float32)


def ranks_and_alphas(deltas: Mapping[str, Delta]) -> tuple[dict[str, int], dict[str, float]]:
    """Per path, for descriptions of an adapter."""
    inner = {path: unwrapped(delta).change for path, delta in deltas.items()}
    known = {path: found for path, delta in inner.items() if delta and (found := factored(delta))}
    return {p: d.rank for p, d in known.items()}, {p: float(d.alpha) for p, d in known.items()}
