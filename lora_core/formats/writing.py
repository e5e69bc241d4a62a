"""From deltas to what a file says of them: what every spelling does alike."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from lora_core import algebra
from lora_core.adapter import Adapter, is_finite
from lora_core.deltas import Delta, factored
from lora_core.deltas.bias import WithBias
from lora_core.deltas.low_rank import LowRank
from lora_core.deltas.magnitude import WithMagnitude
from lora_core.errors import ConfigError, NotFinite
from lora_core.formats.kinds import kind_of_delta


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
