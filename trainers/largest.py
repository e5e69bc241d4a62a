"""The largest step of a training, found by going through the draws it will make: nothing is read or computed for it.

With buckets that is no matter of the largest picture alone. Pictures and class share one UNet call where they have one
shape and take two otherwise, a shape with few pictures never fills a batch, and `class_from = "model"` shows every
picture twice.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from trainers.batches import Feeder, Row
from trainers.buckets import View
from trainers.config import TrainConfig
from trainers.dataset import Dataset, Example
from trainers.folders import Kind
from trainers.sampler import Draw

MOST = 20_000  # draws that are looked at; of a training of more, the first ones


@dataclass(frozen=True)
class Largest:
    """The pictures of the drawing that takes the most memory, and what the others are like beside it.

    mean_work      pixels of all drawings on average, as a share of this one's
    mean_pictures  pictures to learn in a batch on average
    """

    instances: tuple[Example, ...]
    classes: tuple[Example, ...]
    mean_work: float
    mean_pictures: float

    def rows(self, turn: int) -> dict[Kind, list[Row]]:
        """As the feeder draws them, with other words each turn where captions are drawn."""
        found: dict[Kind, list[Row]] = {
            "instance": [_row(e, turn * len(self.instances) + i) for i, e in enumerate(self.instances)]
        }
        if self.classes:
            found["class"] = [_row(e, i) for i, e in enumerate(self.classes)]
        return found


def _row(example: Example, number: int) -> Row:
    return example, View(example.plan), example.words(Draw(0, number, 0))


def largest(dataset: Dataset, config: TrainConfig) -> Largest:
    train = config.train
    feeder = Feeder(dataset, None, None, batch_size=train.batch_size, seed=config.seed)
    count = min(train.steps * train.gradient_accumulation, MOST)
    work, shown = 0, 0
    chosen: tuple[tuple[int, int], tuple[Example, ...], tuple[Example, ...]] | None = None
    for _ in range(count):
        drawn = {kind: tuple(example for example, _ in feeder.turn(kind)) for kind in feeder.kinds}
        instances, classes = drawn["instance"], drawn.get("class", ())
        size = _pixels(instances, classes)
        work, shown = work + size[1], shown + len(instances)
        if chosen is None or size > chosen[0]:
            chosen = size, instances, classes
    assert chosen is not None  # a training has a step
    (_, most), instances, classes = chosen
    return Largest(instances, classes, work / count / most, shown / count)


def _pixels(instances: Sequence[Example], classes: Sequence[Example]) -> tuple[int, int]:
    """-> in the larger UNet call, in all calls."""
    twice = sum(e.source.settings.class_from == "model" for e in instances)
    own = (len(instances) + twice) * math.prod(instances[0].plan.bucket)
    others = len(classes) * math.prod(classes[0].plan.bucket) if classes else 0
    together = not classes or classes[0].plan.bucket == instances[0].plan.bucket
    return own + others if together else max(own, others), own + others
