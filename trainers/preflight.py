"""Before the night is lost: two steps of the largest batch, what they cost, and what speaks against the training.

    bench.emit(dry_run(bench, gradients))

Everything is afterwards as it was: the run is bit for bit the run without it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence

from lora_core.errors import ConfigError
from trainers import forecast
from trainers.advice import warnings_about
from trainers.bench import Bench
from trainers.config import TrainConfig
from trainers.events import Preflight, duration, size
from trainers.forecast import Ahead, Disk
from trainers.rehearsal import Rehearsal
from trainers.trial import Gradients, Room, Tried, makes_pictures, trial, untouched

SWAPPED = 0.05  # of main memory: more than that going out during two steps is no chance
TIGHT = 0.97  # of a card in use: Windows' driver then begins to put memory beside it, 10 to 100 times slower
LONG_S = 3600.0  # a training that nothing of is saved before its end should not be longer


def dry_run(bench: Bench, gradients: Gradients, *, rehearsal: Rehearsal | None = None) -> Preflight:
    """-> the figures. `rehearsal`: at whose bench this is; without it a training begins afterwards.

    Raises ConfigError where memory or disk would not do, or the base makes no numbers, with what to change.
    """
    config, ahead, pieces = bench.config, Ahead.of(bench, rehearsal), bench.pieces
    with untouched(bench):
        tried = trial(bench, ahead, gradients)
    shares = forecast.disk(bench, ahead, tried.costs)
    disks = forecast.disks(shares)
    more = forecast.more_seconds(bench, ahead, tried.costs)
    steps_s = tried.step_s * ahead.step.mean_work * (config.train.steps - ahead.first)
    total_s = steps_s + sum(more.values())
    found = Preflight(
        largest=tried.size,
        pictures=tried.pictures,
        pieces=bench.pieces,
        memory=tried.memory,
        memory_pictures=tried.memory_pictures,
        memory_total=tried.room.device or tried.room.memory,
        step_s=round(tried.step_s, 4),
        steps_s=round(steps_s, 1),
        more_s=more,
        total_s=round(total_s, 1),
        disk=sum(share.count for share in shares),
        disk_shares=forecast.told(shares),
        disk_free=min(disk.free for disk in disks),
        warnings=(
            *warnings_about(bench, ahead.dataset, ahead.held_out, ahead.step),
            *about_the_trial(bench, ahead, tried, total_s, halved=bench.pieces > pieces),
        ),
    )
    refuse(tried.room, disks, bench)
    return found


def about_the_trial(
    bench: Bench, ahead: Ahead, tried: Tried, total_s: float, *, halved: bool
) -> Iterator[str]:
    """What only the dry run can tell."""
    if halved:
        yield HALVED
    if makes_pictures(bench, ahead) and tried.costs.picture is None:
        yield NO_PICTURES
    elif tried.memory_pictures > TIGHT * tried.room.device > 0:
        yield SPILT_PICTURES
    if total_s > LONG_S and not bench.config.save.every:
        yield (
            f"Nothing is saved before the end, {duration(total_s)} from now: whatever stops it loses all. Set "
            f"save.every = {max(1, bench.config.train.steps // 5)} or so."
        )


HALVED = (
    "The device has no memory for a whole batch: it is computed in pieces and comes to the same step. "
    "train.batch_size = 1 with as many times train.gradient_accumulation says so, and "
    "train.gradient_checkpointing = true may be faster."
)
NO_PICTURES = (
    "The device has no memory for a picture: previews and the report will be left out. The training itself fits. Set "
    'preview.every = 0 and make pictures afterwards, or train.quantize = "nf4".'
)
SPILT_PICTURES = (
    "While a picture is made, more memory is taken than the card has: previews and the report may be slow. Set "
    "preview.every = 0, or close other programs."
)


def refuse(room: Room, disks: Sequence[Disk], bench: Bench) -> None:
    """Raises ConfigError, with every reason and what to change, where the training would end in the night."""
    why = []
    if room.device and room.used > TIGHT * room.device:
        why.append(
            f"It takes {size(room.used)} of the card's {size(room.device)}, other programs' share with it, and would "
            f"spill into main memory. {remedy(bench)}"
        )
    if not room.device and room.swapped > SWAPPED * room.memory:
        why.append(
            f"It takes more than the {size(room.memory)} of main memory: {size(room.swapped)} went to the swap file in "
            f"two steps. {remedy(bench)}"
        )
    for disk in disks:
        if disk.needed > disk.free:
            why.append(
                f"It writes about {size(disk.needed)} more, and {size(disk.free)} are free in {disk.folder}: "
                f"{parts(disk)}. {less(disk, bench.config)}"
            )
        elif not os.access(disk.folder, os.W_OK):
            why.append(f"Nothing can be written in {disk.folder}. Choose another place.")
    if why:
        raise ConfigError("The training would not come to its end. " + " ".join(why))


def parts(disk: Disk) -> str:
    return ", ".join(f"{what} {size(count)}" for what, count in forecast.told(disk.shares).items())


def less(disk: Disk, config: TrainConfig) -> str:
    """What would make the largest part smaller."""
    largest = max(disk.shares, key=lambda share: share.count + share.besides - share.there)
    every = config.save.every or "only at the end"
    means = {
        "states": f"Lower save.keep (now {config.save.keep}) or lora.rank (now {config.lora.rank})",
        "LoRA": f"Raise save.every (now {every}), lower lora.rank (now {config.lora.rank})",
        "previews": f"Raise preview.every (now {config.preview.every})",
        "TensorBoard": "Set report.tensorboard = false",
        "latents": "Set train.cache_latents = false and train.cache_text = false",
        "class": "Lower data.class_count, choose another data.class_images",
    }
    first = next((said for name, said in means.items() if name in largest.what), "Raise save.every")
    return f"{first}, make room, or choose another `output`."


def remedy(bench: Bench) -> str:
    """What of the usual means this training does not use yet."""
    config = bench.config
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
    if train.trains_text_encoder:
        means.append("train.text_encoder_learning_rate = 0")
    elif bench.prompts is None:
        means.append("data.shuffle_tags = false and data.tag_dropout = 0 (the text encoders can then leave)")
    means.append("a lower data.resolution")
    return f"Set {', or '.join(means)}."
