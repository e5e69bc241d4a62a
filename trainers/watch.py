"""The losses of the steps, kept on the device and read there once per log interval: a step waits for nothing.

A step on NaN or Inf is left out on the device itself (`optim.leave_out_if`); that it was is found at the next look.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_core.errors import NotFinite
from trainers.batches import Batch


@dataclass(frozen=True)
class Kept:
    """One step that was not looked at yet."""

    step: int
    rate: float
    losses: Tensor  # (drawings + 1,): each drawing's part, and the gradient's length
    drawn: Sequence[Sequence[Batch]]


class Watch:
    """`every` steps fit between two looks."""

    def __init__(self, every: int) -> None:
        self._every = every
        self._kept: list[Kept] = []

    def keep(
        self,
        step: int,
        rate: float,
        losses: Sequence[Tensor],
        norm: Tensor,
        drawn: Sequence[Sequence[Batch]],
    ) -> Tensor:
        """`drawn`: the batches of each loss -> whether the step must be left out: a bool on the device."""
        figures = torch.stack([*losses, norm])
        self._kept.append(Kept(step, rate, figures, drawn))
        return ~torch.isfinite(figures).all()

    @property
    def due(self) -> bool:
        return len(self._kept) >= self._every

    def read(self, *, scaled: bool) -> Iterator[tuple[int, float, float]]:
        """Wait for the device -> step, loss and rate of every step since the last look.

        Raises NotFinite at the first that was no number. `scaled`: with a GradScaler, whose gradients overflow now and
        then by design; it leaves such a step out and halves its scale.
        """
        kept, self._kept = self._kept, []
        found = torch.stack([k.losses for k in kept]).tolist() if kept else []
        for k, (*losses, norm) in zip(kept, found, strict=True):
            for loss, batches in zip(losses, k.drawn, strict=True):
                if not _finite(loss):
                    raise not_finite(f"The loss at step {k.step} is {loss}", batches)
            if not scaled and not _finite(norm):
                every = [batch for batches in k.drawn for batch in batches]
                raise not_finite(f"The gradient at step {k.step} has the length {norm}", every)
            yield k.step, sum(losses), k.rate


def not_finite(what: str, batches: Sequence[Batch]) -> NotFinite:
    names = ", ".join(name for batch in batches for name in batch.names)
    times = [t for batch in batches for t in batch.t.tolist()]
    damaged = [
        name
        for b in batches
        for name, z in zip(b.names, b.z, strict=True)
        if not bool(torch.isfinite(z).all())
    ]
    if damaged:
        remedy = (
            f"The latents of {', '.join(damaged)} are no numbers: take the picture out, or delete the cache"
        )
    else:
        remedy = 'Halve train.learning_rate, or set train.base_dtype to "bf16" or "fp32"'
    return NotFinite(
        f"{what}, with {names} (timesteps {times}). No step was taken on it. {remedy}, and resume."
    )


def _finite(value: float) -> bool:
    return abs(value) < float("inf")
