"""Whose turn it is: an order that can be taken up again anywhere, and batches that never mix two buckets."""

from __future__ import annotations

import random
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from lora_core.errors import ConfigError


@dataclass(frozen=True)
class Draw:
    """One example's turn: `index` into the turns of an epoch, `number` since the run began."""

    index: int
    number: int
    seed: int

    def rng(self) -> random.Random:
        """For this turn's crop and flip: the same whenever and wherever it is asked for."""
        return random.Random(f"draw {self.seed} {self.number}")

    def words_rng(self) -> random.Random:
        """For this turn's caption: of its own, so that other words leave crop and flip as they were."""
        return random.Random(f"words {self.seed} {self.number}")


class Sampler:
    """Draws without end: every epoch all turns once, shuffled anew.

    The order is a function of (seed, epoch), so one number is the whole state, in mid-epoch too.
    """

    def __init__(self, count: int, *, seed: int, number: int = 0) -> None:
        if count < 1:
            raise ValueError("a sampler needs at least one example")
        self.count, self.seed, self.number = count, seed, number

    def take(self, n: int) -> list[Draw]:
        """The next n draws."""
        numbers = range(self.number, self.number + n)
        self.number += n
        return [self.at(number) for number in numbers]

    def at(self, number: int) -> Draw:
        """The draw of that number."""
        index = _order(self.seed, number // self.count, self.count)[number % self.count]
        return Draw(index, number, self.seed)

    @property
    def epoch(self) -> int:
        """Of the next draw, from 0."""
        return self.number // self.count

    def state(self) -> dict[str, int]:
        return {"count": self.count, "seed": self.seed, "number": self.number}

    @classmethod
    def from_state(cls, state: Mapping[str, int], *, count: int) -> Sampler:
        """Go on where `state` was taken. Raises ConfigError if there are now other than as many examples."""
        if state["count"] != count:
            raise ConfigError(
                f"The run was saved with {state['count']} pictures and now there are {count}: it cannot go "
                "on in the same order. Put the folder back as it was, or start a new run from its LoRA "
                "(lora.start_from)."
            )
        return cls(count, seed=state["seed"], number=state["number"])


class BatchSampler:
    """The sampler's draws, gathered by bucket until a batch is full.

    With one bucket that is the sampler's own order. Otherwise a draw waits for others of its bucket, at most an epoch:
    then its batch goes out as it is, so that a rare shape is seen as often as the others. Nothing is dropped.
    """

    def __init__(self, buckets: Sequence[Hashable], *, seed: int) -> None:
        """`buckets`: of each turn of an epoch."""
        self._buckets = buckets
        self._draws = Sampler(len(buckets), seed=seed)
        self._waiting: dict[Hashable, list[Draw]] = {}

    def take(self, n: int) -> list[Draw]:
        """The next batch: n draws of one bucket, or fewer that have waited for an epoch."""
        while True:
            (draw,) = self._draws.take(1)
            bucket = self._buckets[draw.index]
            self._waiting.setdefault(bucket, []).append(draw)
            if len(self._waiting[bucket]) >= n:
                return self._leave(bucket, n)
            oldest = min(self._waiting, key=lambda b: self._waiting[b][0].number)
            if oldest != bucket and draw.number - self._waiting[oldest][0].number >= self._draws.count:
                return self._leave(oldest, n)

    def _leave(self, bucket: Hashable, n: int) -> list[Draw]:
        row = self._waiting.pop(bucket)
        if rest := row[n:]:  # a resumed run may have a smaller batch than the one that was saved
            self._waiting[bucket] = rest
        return row[:n]

    def state(self) -> dict[str, Any]:
        """Plain JSON."""
        waiting = sorted(draw.number for row in self._waiting.values() for draw in row)
        return {**self._draws.state(), "waiting": waiting}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Raises ConfigError as `Sampler.from_state`."""
        self._draws = Sampler.from_state(state, count=len(self._buckets))
        self._waiting = {}
        for number in state.get("waiting", ()):
            draw = self._draws.at(number)
            self._waiting.setdefault(self._buckets[draw.index], []).append(draw)


@lru_cache(maxsize=8)
def _order(seed: int, epoch: int, count: int) -> tuple[int, ...]:
    order = list(range(count))
    random.Random(f"epoch {seed} {epoch}").shuffle(order)
    return tuple(order)
