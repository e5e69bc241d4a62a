"""Changes written into weights: one rounding, from the original, in the memory that is there (MATHS §4)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lora_core import algebra
from lora_core.worn import Worn

CHUNK = 2**20  # elements of a layer summed in fp32 at a time: 4 MB, which stay in the processor's cache


def fold(target: Tensor, w0: Tensor, worn: Sequence[tuple[float, Worn]], *, begun: bool = False) -> None:
    """target = round(fp32(W0) + sum w ΔW), in place, a few rows at a time; target may be fp32 to see the exact sum.

    `begun`: the target holds W0 already, and if it is fp32 the sum is made in it.
    """
    down = torch.cat([algebra.flat(one.down) for _, one in worn]) if worn else None  # (R, in*k*k)
    up = torch.cat([w * one.up.float() for w, one in worn], dim=1) if worn else None  # (out, R)
    flat_w0, flat_target = w0.reshape(len(w0), -1), target.detach().view(len(target), -1)
    step = max(1, CHUNK // flat_w0.shape[1])
    in_place = begun and target.dtype is torch.float32
    scratch = torch.empty(0 if in_place else min(step, len(flat_w0)), flat_w0.shape[1], device=w0.device)
    for start in range(0, len(flat_w0), step):
        rows = slice(start, min(start + step, len(flat_w0)))
        total = flat_target[rows] if in_place else scratch[: rows.stop - rows.start].copy_(flat_w0[rows])
        if down is not None and up is not None:
            total.addmm_(up[rows], down)
        for weight, one in worn:
            for extra in one.extras:
                total += weight * extra.delta(rows, flat_w0)
        if not in_place:
            flat_target[rows].copy_(total)


def fold_bias(target: Tensor, before: Tensor, changes: Sequence[tuple[float, Tensor]]) -> Tensor:
    """target = round(fp32(b) + sum w Δb), in place -> target."""
    total = before.float()
    for weight, change in changes:
        total = total + weight * change.to(before.device).float()
    return target.detach().copy_(total)
