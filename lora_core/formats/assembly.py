"""From a file's keys to deltas: what every format does alike once it has said which key is which."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from lora_core import algebra
from lora_core.adapter import Adapter
from lora_core.deltas import Delta
from lora_core.deltas.low_rank import LowRank
from lora_core.deltas.magnitude import WithMagnitude
from lora_core.errors import ConfigError, FileRefused, NotFinite
from lora_core.formats import foreign
from lora_core.safe_files import Header, read_tensors
from lora_core.safe_header import DTYPES


class Part(NamedTuple):
    """What one key of a file is: a factor of the layer at `path` (an adapter path)."""

    path: str
    role: str  # "down", "up", "mid", "alpha" or "magnitude"


@dataclass(frozen=True)
class Reading:
    """What a format made of a file."""

    deltas: dict[str, Delta]
    unused: tuple[str, ...]


# Where the contents of a file's tensors come from: `read_tensors`, or `outlines` where only shapes matter.
Load = Callable[[Header, Iterable[str]], dict[str, Tensor]]


class Format(Protocol):
    """One way of spelling an Adapter in a file."""

    name: str

    def recognises(self, header: Header) -> bool:
        """Whether the keys look like this spelling. Looks at names only."""
        ...

    def read(self, header: Header, load: Load = read_tensors) -> Reading:
        """Raises FileRefused for a file that is this spelling and damaged."""
        ...

    def write(self, adapter: Adapter, path: Path, metadata: dict[str, str]) -> Path:
        """Write `adapter` in the dtype it has -> the file or folder. Raises SaveFailed, ConfigError."""
        ...


def assemble(
    header: Header,
    spell: Callable[[str], Part | None],
    *,
    load: Load = read_tensors,
    alpha_of: Callable[[str, int], float] = lambda path, rank: float(rank),
    magnitude_is_output: bool = False,
) -> Reading:
    """Group the file's keys by layer and build a delta of each.

    `spell` says what a key is, None for a key that is no LoRA factor; those are named in `unused`.
    `alpha_of` (path, rank) gives the alpha of a layer that has no alpha tensor: by default the rank.
    `magnitude_is_output`: the format knows no other axis, so (1, n, 1, 1) is no riddle.
    """
    layers: dict[str, dict[str, str]] = {}
    unused: list[str] = []
    for key in header.tensors:
        part = spell(key)
        if part is None:
            unused.append(foreign.describe(key))
        elif part.role in layers.setdefault(part.path, {}):
            unused.append(f"{key} (the same layer a second time)")
        else:
            layers[part.path][part.role] = key
    for path, roles in list(layers.items()):
        if not {"down", "up"} & set(roles):
            unused += [
                f"{key} ({role} of a layer that has no LoRA)" for role, key in layers.pop(path).items()
            ]
    tensors = load(header, [key for roles in layers.values() for key in roles.values()])
    deltas = {
        path: _delta(header, path, roles, tensors, alpha_of, magnitude_is_output)
        for path, roles in layers.items()
    }
    return Reading(deltas, tuple(unused))


def outlines(header: Header, names: Iterable[str]) -> dict[str, Tensor]:
    """Tensors that have a shape and a dtype and cost nothing: what the header alone says of them.

    A file is then checked by the very code that reads it. Single numbers are ones, for alpha is asked for."""
    return {
        name: torch.ones(info.shape, dtype=DTYPES[info.dtype])
        if math.prod(info.shape) == 1
        else torch.empty(info.shape, dtype=DTYPES[info.dtype], device="meta")
        for name in names
        for info in (header.tensors[name],)
    }


def _delta(
    header: Header,
    path: str,
    keys: Mapping[str, str],
    tensors: dict[str, Tensor],
    alpha_of: Callable[[str, int], float],
    magnitude_is_output: bool,
) -> Delta:
    name = header.path.name
    for role, other in (("down", "up"), ("up", "down")):
        if role not in keys:
            raise FileRefused(
                f"{name} has {keys[other]} without its {role} factor: the file is incomplete. Download or "
                "copy it again."
            )
    down, up = (_factor(tensors[keys[role]], keys[role], name) for role in ("down", "up"))
    if down.dim() == 4 and up.dim() == 2:
        up = up[:, :, None, None]
    rank, expected = down.shape[0], (2, 2) if down.dim() == 2 else (4, 4)
    if (down.dim(), up.dim()) != expected or up.shape[2:] not in ((), (1, 1)):
        raise FileRefused(
            f"{name}, {keys['down']}: factors of shape {tuple(down.shape)} and {tuple(up.shape)} are no "
            "LoRA of a linear layer or a convolution. The file is damaged or of a kind this version does "
            "not know."
        )
    if up.shape[1] != rank:
        raise FileRefused(
            f"{name}, {keys['down']}: its rank is {rank}, that of {keys['up']} is {up.shape[1]}; they must "
            "agree. The file is damaged: download or copy it again."
        )
    if "mid" in keys:
        mid = _factor(tensors[keys["mid"]], keys["mid"], name)
        # Stable Diffusion has no larger kernels, and a core of a thousand squared would unfold to terabytes
        sides = ((1, 1), (3, 3))
        if (
            mid.dim() != 4
            or mid.shape[:2] != (rank, rank)
            or mid.shape[2:] not in sides
            or down.shape[2:] != (1, 1)
        ):
            raise FileRefused(
                f"{name}, {keys['mid']}: a core of shape {tuple(mid.shape)} was found where ({rank}, "
                f"{rank}, k, k) was expected. The file is damaged: download or copy it again."
            )
        down, up = algebra.compose_tucker(down, mid), up.float()
    low = LowRank(
        down,
        up,
        _alpha(tensors[keys["alpha"]], keys["alpha"], name) if "alpha" in keys else alpha_of(path, rank),
    )
    if "magnitude" not in keys:
        return low
    magnitude = _factor(tensors[keys["magnitude"]], keys["magnitude"], name)
    if magnitude_is_output and magnitude.numel() == up.shape[0]:
        magnitude = output_column(magnitude, low)
    elif not _fits(magnitude, low):
        raise FileRefused(
            f"{name}, {keys['magnitude']}: a magnitude of shape {tuple(magnitude.shape)} fits neither the "
            f"{low.shape()[0]} outputs nor the {low.shape()[1]} inputs of its layer. Download or copy the "
            "file again."
        )
    return WithMagnitude(low, magnitude)


def _factor(tensor: Tensor, key: str, name: str) -> Tensor:
    if not tensor.is_floating_point():
        raise FileRefused(
            f"{name}, {key}: numbers of type {str(tensor.dtype).removeprefix('torch.')} were found where "
            "floating point was expected. Ask for an fp16, bf16 or fp32 version of it."
        )
    # fp8 has next to no arithmetic in torch; every fp8 value is an fp16 value
    return tensor.half() if tensor.dtype.itemsize == 1 else tensor


def _alpha(tensor: Tensor, key: str, name: str) -> float:
    if tensor.numel() != 1:
        raise FileRefused(
            f"{name}, {key}: {tensor.numel()} values were found where alpha is one. Download it again."
        )
    return float(tensor)


def _fits(magnitude: Tensor, low: LowRank) -> bool:
    """A 1x1 convolution's factors may be stored as matrices, its magnitude with four dimensions."""
    shape = low.shape()
    for dims in (2, 4):
        try:
            algebra.magnitude_axis(magnitude, torch.Size((*shape[:2], *[1] * (dims - 2))))
        except ValueError:
            continue
        return True
    return False


# ---------------------------------------------------------------- writing


def output_column(magnitude: Tensor, low: LowRank) -> Tensor:
    """-> (out, 1) or (out, 1, 1, 1): the one shape that no reader can take for the other axis."""
    return magnitude.reshape(-1, *[1] * (low.down.dim() - 1))


def factors(path: str, delta: Delta) -> tuple[LowRank, Tensor | None]:
    """-> the low-rank part and the magnitude (along outputs: as a column). ConfigError for other kinds."""
    if isinstance(delta, LowRank):
        return delta, None
    if isinstance(delta, WithMagnitude):
        low, magnitude = delta.inner, delta.magnitude
        axis = algebra.magnitude_axis(magnitude, torch.Size(_as_magnitude_has_it(low.shape(), magnitude)))
        return low, output_column(magnitude, low) if axis == 0 else magnitude
    raise ConfigError(
        f"{path} is of the kind {type(delta).__name__}; this version writes LoRA and DoRA only. Resize or "
        "bake it first."
    )


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
            if not bool(torch.isfinite(tensor).all()):
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


def _as_magnitude_has_it(shape: tuple[int, ...], magnitude: Tensor) -> tuple[int, ...]:
    if magnitude.dim() == 4 and len(shape) == 2:
        return (*shape, 1, 1)
    if magnitude.dim() == 2 and shape[2:] == (1, 1):
        return shape[:2]
    return shape


def ranks_and_alphas(deltas: Mapping[str, Delta]) -> tuple[dict[str, int], dict[str, float]]:
    """Per path, for descriptions of an adapter."""
    lows = {path: factors(path, delta)[0] for path, delta in deltas.items()}
    return {p: low.rank for p, low in lows.items()}, {p: float(low.alpha) for p, low in lows.items()}
