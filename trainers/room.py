"""Out of memory in a step: smaller pieces of the same batch, then fewer activations kept, then a stop that says why."""

from __future__ import annotations

import gc

from lora_core.errors import LoraError
from trainers import events
from trainers.activations import checkpoint_activations
from trainers.bench import Bench
from trainers.resting import give_back

REMEDY = (
    "Set train.gradient_checkpointing = true, train.batch_size = 1 (and raise train.gradient_accumulation), or a lower "
    "data.resolution."
)


def make_room(bench: Bench, pictures: int, problem: str) -> None:
    """Take the next measure for batches of so many pictures, and say it. Raises LoraError when there is none left."""
    bench.optimizer.zero_grad(set_to_none=True)
    gc.collect()  # what the step that failed has left behind
    give_back()
    if bench.pieces < pictures:
        bench.pieces = min(2 * bench.pieces, pictures)
        at_once = -(-pictures // bench.pieces)
        done = f"{at_once} of the {pictures} pictures of a batch at a time, added up to the same step"
    elif not bench.checkpointed:
        checkpoint_activations(bench.live)
        bench.checkpointed = True
        done = "train.gradient_checkpointing is on, which is about a third slower"
    else:
        raise out_of_memory(problem)
    bench.emit(events.Note(text=f"The device is out of memory. From now on: {done}."))


def take_room_as_before(bench: Bench, pieces: int, checkpointed: bool) -> None:
    """A run that is resumed does not run out of memory a second time, and draws its dropout as it would have."""
    bench.pieces = max(bench.pieces, pieces)
    if checkpointed and not bench.checkpointed:
        checkpoint_activations(bench.live)
        bench.checkpointed = True


def out_of_memory(problem: object) -> LoraError:
    return LoraError(f"The device is out of memory. {REMEDY} ({problem})")
