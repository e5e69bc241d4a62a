"""Before the night is lost: two steps of the largest batch, what they cost, and what speaks against the training.

    bench.emit(dry_run(bench, gradients))

Everything is afterwards as it was: the run is bit for bit the run without it. It costs the time of two steps; the first
fills the allocator and chooses kernels, the second is timed.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import torch

from lora_core.dtypes import DTYPES
from lora_core.errors import ConfigError, LoraError
from lora_core.train_form import collect
from trainers import checkpoints
from trainers.advice import warnings_about
from trainers.batches import Batch
from trainers.bench import Bench
from trainers.config import TrainConfig
from trainers.dataset import Dataset
from trainers.events import Preflight, size

PNG_BYTES_PER_PIXEL = 1.7  # of photograph-like pictures, measured on SD's; noise takes 3
HEADER_BYTES = 120  # of a tensor in a safetensors file: its name, dtype, shape and place
SWAPPED = 0.05  # of main memory: more than that going out during two steps is no chance
TIGHT = 0.97  # of a card in use: Windows' driver then begins to put memory beside it, 10 to 100 times slower


@dataclass(frozen=True)
class Room:
    """What the machine has, in bytes. `device` and `used` are 0 without a card: there main memory counts."""

    device: int
    used: int  # of the card at the peak of the dry run, by all programs
    swapped: int  # written to the swap file during the dry run
    memory: int  # main memory
    disk: int  # free where the runs are


# the training's own: of each turn of gradient accumulation its batches
Gradients = Callable[[Bench, Sequence[Sequence[Batch]]], list[torch.Tensor]]


def dry_run(
    bench: Bench, gradients: Gradients, *, dataset: Dataset | None = None, cached: int | None = None
) -> Preflight:
    """-> the figures of two steps. `dataset`: what will be trained on, where the bench has only a part of it; `cached`:
    bytes that its latents will take on disk, where they are not there yet.

    Raises ConfigError where memory or disk would not do, with what to change.
    """
    config = bench.config
    with untouched(bench):
        batches = bench.feeder.largest(torch.Generator().manual_seed(0), len(bench.schedule))
        swap_before, peak = psutil.swap_memory().used, Peak(bench.device)
        pieces = bench.pieces
        try:
            one_step(bench, batches, gradients)
            before = time.perf_counter()
            batch_s = one_step(bench, batches, gradients)
        except LoraError as problem:  # no smaller pieces are left
            raise ConfigError(f"This training does not fit into memory. {problem}") from problem
        step_s = time.perf_counter() - before + (config.train.gradient_accumulation - 1) * batch_s
        memory = peak.bytes()
        state = state_bytes(bench)
    room = Room(
        peak.total(),
        peak.used(),
        max(0, psutil.swap_memory().used - swap_before),
        psutil.virtual_memory().total,
        free_disk(config.output),
    )
    height, width = (int(side) for side in batches[0].time_ids[0, 4:])
    found = Preflight(
        largest=f"{width} x {height}",
        pictures=sum(map(len, batches)),
        pieces=bench.pieces,
        memory=memory,
        memory_total=room.device or room.memory,
        step_s=round(step_s, 4),
        total_s=round(step_s * config.train.steps, 1),
        disk=disk_bytes(bench, state) + (cached_bytes(bench.folder.cache) if cached is None else cached),
        disk_free=room.disk,
        warnings=(
            *warnings_about(bench, dataset or bench.feeder.dataset),
            *([HALVED] if bench.pieces > pieces else []),
        ),
    )
    refuse(found, room, config)
    return found


HALVED = (
    "The device has no memory for a whole batch: it is computed in pieces and comes to the same step. "
    "train.batch_size = 1 "
    "with as many times train.gradient_accumulation says so, and train.gradient_checkpointing = true may "
    "be faster."
)


def refuse(found: Preflight, room: Room, config: TrainConfig) -> None:
    """Raises ConfigError, with every reason and what to change, where the training would end in the night."""
    why = []
    if room.device and room.used > TIGHT * room.device:
        why.append(
            f"It takes {size(room.used)} of the card's {size(room.device)}, other programs' share with "
            f"it, and would spill "
            f"into main memory. {remedy(config)}"
        )
    if not room.device and room.swapped > SWAPPED * room.memory:
        why.append(
            f"It takes more than the {size(room.memory)} of main memory: {size(room.swapped)} went to "
            f"the swap file in two "
            f"steps. {remedy(config)}"
        )
    if found.disk > room.disk:
        why.append(
            f"It writes about {size(found.disk)}, and {size(room.disk)} are free where its `output` is. "
            f"Raise save.every "
            f"(now {config.save.every or 'only at the end'}), lower save.keep (now {config.save.keep}), "
            f"make room, or "
            "choose another `output`."
        )
    if why:
        raise ConfigError("The training would not come to its end. " + " ".join(why))


def remedy(config: TrainConfig) -> str:
    """What of the usual means this training does not use yet."""
    train, means = config.train, []
    if not train.gradient_checkpointing:
        means.append("train.gradient_checkpointing = true")
    if train.batch_size > 1:
        means.append(
            f"train.batch_size = 1 with train.gradient_accumulation = "
            f"{train.batch_size * train.gradient_accumulation}"
        )
    if not train.cache_latents:
        means.append("train.cache_latents = true")
    if train.quantize == "none":
        means.append('train.quantize = "nf4"')
    means.append("a lower data.resolution")
    return f"Set {', or '.join(means)}."


# --- the two steps --------------------------------------------------------------------------------------------


def one_step(bench: Bench, batches: Sequence[Batch], gradients: Gradients) -> float:
    """As the training takes one, but for what it learns -> seconds of the gradients alone."""
    began = time.perf_counter()
    losses = gradients(bench, [batches])
    _ = [loss.item() for loss in losses]  # waits for the device
    done = time.perf_counter() - began
    bench.accelerator.clip_grad_norm_(list(bench.form.parameters()), bench.config.train.max_grad_norm)
    bench.optimizer.step()
    bench.optimizer.zero_grad(set_to_none=True)
    if bench.device.type == "cuda":
        torch.cuda.synchronize(bench.device)
    return done


@contextmanager
def untouched(bench: Bench) -> Iterator[None]:
    """Whatever steps are taken inside: weights, optimizer, every generator and the feeder are "
    "afterwards as before."""
    weights = [p.detach().clone() for p in bench.form.parameters()]
    chance, run_chance = checkpoints.get_chance(), bench.generator.get_state()
    position, state = bench.feeder.state(), dict(bench.optimizer.state)
    scaler = bench.accelerator.scaler
    scale = None if scaler is None else scaler.state_dict()
    try:
        yield
    finally:
        bench.optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            for p, before in zip(bench.form.parameters(), weights, strict=True):
                p.copy_(before)
        bench.optimizer.state.clear()
        bench.optimizer.state.update(state)
        bench.feeder.restore(position)
        bench.generator.set_state(run_chance)
        checkpoints.set_chance(*chance)
        if scaler is not None:
            scaler.load_state_dict(scale)


@dataclass
class Narrowed:
    """For a preflight alone: of the pictures the largest is encoded and no more, and it stands for those of the class
    too, which are not made."""

    has_class: bool
    whole: Dataset | None = None

    def __call__(self, dataset: Dataset) -> Dataset:
        self.whole = dataset
        largest = max(dataset.instances, key=lambda e: math.prod(e.plan.bucket))
        return replace(dataset, instances=(largest,), classes=(largest,) if self.has_class else ())


def without_class(config: TrainConfig) -> TrainConfig:
    alone = {"class_images": None, "class_count": 0, "class_prompt": None}
    folders = tuple(folder.model_copy(update=alone) for folder in config.dataset)
    data = config.data.model_copy(update=alone)
    return config.model_copy(update={"data": data, "dataset": folders})


def cached_later(dataset: Dataset, config: TrainConfig, factor: int) -> int:
    """Of the latents: mean and deviation of every view, four channels of fp32, `factor` times less wide and high."""
    if not config.train.cache_latents:
        return 0
    sides = [example.plan.bucket for example in dataset.examples for _ in example.views()]
    return sum(
        2 * 4 * 4 * (width // factor) * (height // factor) + 5 * HEADER_BYTES for width, height in sides
    )


class Peak:
    """Memory at its height since this was made: of a card, or of this process."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)

    def bytes(self) -> int:
        if self.device.type == "cuda":
            return int(torch.cuda.max_memory_reserved(self.device))
        return int(psutil.Process().memory_info().rss)

    def total(self) -> int:
        return int(torch.cuda.mem_get_info(self.device)[1]) if self.device.type == "cuda" else 0

    def used(self) -> int:
        """Of the card, by every program; ours at its peak."""
        if self.device.type != "cuda":
            return 0
        free, total = torch.cuda.mem_get_info(self.device)
        now, peak = torch.cuda.memory_reserved(self.device), torch.cuda.max_memory_reserved(self.device)
        return int(total - free - now + peak)


# --- disk -----------------------------------------------------------------------------------------------------


def state_bytes(bench: Bench) -> int:
    """Of one state to resume from; asked after a step, when the optimizer has its moments."""
    tensors = [*bench.form.parameters(), *bench.form.buffers()]
    if bench.average is not None:
        tensors += bench.average.tensors.values()
    for state in bench.optimizer.state.values():
        tensors += [value for value in state.values() if isinstance(value, torch.Tensor)]
    return sum(t.nbytes + HEADER_BYTES for t in tensors)


def disk_bytes(bench: Bench, state: int) -> int:
    """What the run folder will hold at its end, but for what is cached: states, LoRAs, previews, the "
    "sheet."""
    config = bench.config
    steps, every = config.train.steps, config.save.every
    saves = 1 + ((steps - 1) // every if every else 0)
    adapter = collect(bench.form)
    tensors = [t for d in adapter.deltas.values() for t in d.tensors().values()]
    tensors += [t for rows in adapter.embeddings.values() for t in rows.values()]
    width = DTYPES[config.save.dtype].itemsize
    lora = sum(t.numel() * width + HEADER_BYTES for t in tensors)
    side = config.data.resolution or bench.live.resolution
    shown = (steps // config.preview.every if config.preview.every else 0) * len(config.preview.prompts)
    previews = shown * side**2 * PNG_BYTES_PER_PIXEL
    return math.ceil(min(saves, config.save.keep) * state + (saves + 1) * lora + previews)


def cached_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*")) if folder.is_dir() else 0


def free_disk(folder: Path) -> int:
    """Where `folder` is, or will be."""
    there = next(path for path in (folder, *folder.parents) if path.exists())
    return shutil.disk_usage(there).free
