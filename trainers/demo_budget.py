"""Training by the clock: the demo base is made in the time there is, on whatever machine."""

from __future__ import annotations

import math
import time


class Budget:
    """Wall-clock training time of one phase, over all its sessions."""

    def __init__(self, minutes: float, spent_s: float = 0.0) -> None:
        self.total_s = minutes * 60
        self.spent_s = spent_s
        self._began = time.monotonic()

    @property
    def elapsed_s(self) -> float:
        return self.spent_s + time.monotonic() - self._began

    @property
    def over(self) -> bool:
        return self.elapsed_s >= self.total_s

    @property
    def done(self) -> float:
        return min(1.0, self.elapsed_s / self.total_s)

    def rate(self, peak: float, *, warmup_s: float = 60.0, floor: float = 0.01) -> float:
        """Learning rate now: linear warm-up, then cosine to `floor * peak` over the time budget."""
        warm = min(1.0, self.elapsed_s / warmup_s)
        return peak * warm * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * self.done)))
