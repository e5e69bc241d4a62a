"""EMA: an exponential average of what is trained, which the previews and the finished file may hold.

a_n = d a_(n-1) + (1 - d) p_n with d = min(decay, (1 + n) / (10 + n)), so that a short run forgets its beginning.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Average:
    """Of every parameter of `form`, beside it on its device: 4 bytes each."""

    def __init__(self, form: nn.Module, decay: float) -> None:
        self._decay = decay
        self._parameters = dict(form.named_parameters())
        self.tensors = {name: p.detach().clone() for name, p in self._parameters.items()}

    @torch.no_grad()
    def follow(self, step: int) -> None:
        """After optimizer step number `step`, counted from 1."""
        decay = min(self._decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self.tensors.values()), list(self._parameters.values()), 1 - decay)

    @torch.no_grad()
    def load(self, tensors: dict[str, Tensor]) -> None:
        for name, own in self.tensors.items():
            own.copy_(tensors[name])

    @contextmanager
    def worn(self) -> Iterator[None]:
        """Inside, the parameters are the average; afterwards bit for bit what they were."""
        kept = {name: p.detach().clone() for name, p in self._parameters.items()}
        self._put(self.tensors)
        try:
            yield
        finally:
            self._put(kept)

    @torch.no_grad()
    def _put(self, tensors: dict[str, Tensor]) -> None:
        for name, p in self._parameters.items():
            p.copy_(tensors[name])
