"""Parameter groups, the optimizer, and the learning rate as a pure function of the step."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lora_core.errors import ConfigError, did_you_mean


def constant(step: int, steps: int) -> float:
    return 1.0


def cosine(step: int, steps: int) -> float:
    """From 1 at the first step to 0 after the last."""
    return 0.5 * (1 + math.cos(math.pi * step / steps))


SCHEDULES: dict[str, Callable[[int, int], float]] = {"constant": constant, "cosine": cosine}


def rate_factor(schedule: str, step: int, *, steps: int, warmup: int) -> float:
    """What the peak learning rate is multiplied by at `step` (0 is the first). Linear warm-up, then the schedule."""
    if schedule not in SCHEDULES:
        raise ConfigError(f'Schedule "{schedule}" is unknown.{did_you_mean(schedule, SCHEDULES)}')
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return SCHEDULES[schedule](step - warmup, steps - warmup)


def adamw(groups: Sequence[Mapping[str, Any]], *, weight_decay: float) -> torch.optim.AdamW:
    """`groups` as `LoraForm.parameter_groups` gives them, each with its own peak rate; betas (0.9, 0.999), epsilon 1e-8
    as the reference script. Fused: all tensors in one kernel, which can leave a step out without the host knowing."""
    with_peaks = [{**group, "peak": group["lr"]} for group in groups]
    return torch.optim.AdamW(with_peaks, betas=(0.9, 0.999), eps=1e-8, weight_decay=weight_decay, fused=True)


def leave_out_if(optimizer: torch.optim.AdamW, bad: Tensor) -> None:
    """The next step changes nothing, neither weights nor moments, where `bad` (a bool on the device) is true. It is how
    a GradScaler speaks to fused optimizers."""
    optimizer.found_inf = bad.float()  # type: ignore[attr-defined]


def set_rate(optimizer: torch.optim.Optimizer, factor: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * factor
