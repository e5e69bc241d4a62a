"""Save a run so that it can go on bit-exactly, and write the LoRA file that leaves it.

A checkpoint is one safetensors file, written atomically: trainable tensors and their average, AdamW's moments, the
state of every random generator, the sampler's position; the small facts are JSON in its metadata, beside a checksum of
it all. No pickle anywhere.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lora_core.errors import FileRefused, NotFinite
from lora_core.safe_files import Header, read_header, read_tensors, save_tensors
from lora_core.train_form import LoraForm
from trainers.average import Average
from trainers.kept_tensors import checksum

KIND = "lora-loom training state 2"
_MOMENTS = ("exp_avg", "exp_avg_sq", "step")


@dataclass(frozen=True)
class Position:
    """Where a run stands: optimizer steps done, the samplers' state, what they show (trainers.unchanged), the preset it
    is trained with, and what a lack of memory has changed, as plain JSON. States of earlier versions know less."""

    step: int
    sampler: dict[str, Any]
    shown: dict[str, str] = field(default_factory=dict)
    preset: str = ""
    pieces: int = 1  # in which a batch is computed: dropout draws for each piece
    checkpointed: bool = False


@dataclass(frozen=True)
class Trained:
    """All of a run that a step changes."""

    form: LoraForm
    optimizer: torch.optim.Optimizer
    generator: torch.Generator
    scaler: Any = None
    average: Average | None = None


def save_state(path: Path, position: Position, of: Trained) -> None:
    """Raises NotFinite instead of writing a state from which nothing could be learnt any more."""
    tensors, chance = get_chance()
    tensors["rng.run"] = of.generator.get_state()
    for name, start in of.form.named_buffers():
        tensors[f"start.{name}"] = start
    for name, p in of.form.named_parameters():
        tensors[f"lora.{name}"] = p.detach()
        for key, value in of.optimizer.state[p].items():
            tensors[f"{key}.{name}"] = value
    if of.average is not None:
        tensors |= {f"ema.{name}": t for name, t in of.average.tensors.items()}
    if bad := first_not_finite(tensors):
        raise NotFinite(
            f"The state at step {position.step} holds NaN or Inf ({bad}) and was not saved; what was saved before is "
            "whole. Resume from there, with a lower train.learning_rate."
        )
    facts = {
        "position": vars(position),
        "scaler": of.scaler.state_dict() if of.scaler is not None else None,
        "chance": chance,
    }
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    told = json.dumps(facts)
    said = {"loom.kind": KIND, "loom.state": told, "loom.sha256": checksum(told, contiguous)}
    save_tensors(path, contiguous, said)


def load_state(path: Path, of: Trained) -> Position:
    """Put everything back. A LoRA file, or the state of another training, is refused with nothing changed."""
    header = read_header(path)
    if header.metadata.get("loom.kind") != KIND:
        raise FileRefused(
            f"{path.name} holds weights only: without the optimizer's state a resumed run would be another run. "
            "Resume from the run's own folder, or set lora.start_from to this file to begin a new training from it."
        )
    tensors = _whole(header)
    wanted = {f"lora.{name}": p for name, p in of.form.named_parameters()}
    found = {name: t for name, t in tensors.items() if name.startswith("lora.")}
    if {n: tuple(p.shape) for n, p in wanted.items()} != {n: tuple(t.shape) for n, t in found.items()}:
        raise FileRefused(
            f"{path.name} belongs to another training: it holds {len(found)} tensors, this run trains {len(wanted)}, "
            "or their shapes differ. Resume with the preset the run was started with."
        )
    refuse_other_start(path, of.form, tensors)
    ema = {name.removeprefix("ema."): t for name, t in tensors.items() if name.startswith("ema.")}
    if bool(ema) != (of.average is not None):
        raise FileRefused(
            f"{path.name} was saved {'with' if ema else 'without'} an average of the weights, and this run goes on "
            f"{'without' if ema else 'with'} one. Set train.ema_decay as the run was started with."
        )
    if of.average is not None:
        of.average.load(ema)
    with torch.no_grad():
        for name, p in of.form.named_parameters():
            p.copy_(tensors[f"lora.{name}"])
            # the fused AdamW counts its steps beside the parameter too
            state = {key: tensors[f"{key}.{name}"] for key in _MOMENTS if f"{key}.{name}" in tensors}
            of.optimizer.state[p] = {key: t.to(p.device) for key, t in state.items()}
    facts = json.loads(header.metadata["loom.state"])
    of.generator.set_state(tensors["rng.run"])
    set_chance(tensors, facts["chance"])
    if of.scaler is not None and facts["scaler"]:
        of.scaler.load_state_dict(facts["scaler"])
    return Position(**facts["position"])


def _whole(header: Header) -> dict[str, Tensor]:
    """The tensors, if they and the facts are what was saved: a flipped bit would go on as another run, and nobody would
    know. A state of an earlier version has no checksum. Raises FileRefused."""
    tensors, said = read_tensors(header), header.metadata.get("loom.sha256")
    if said is not None and said != checksum(header.metadata.get("loom.state", ""), tensors):
        raise FileRefused(
            f"{header.path.name} is not what was saved: its checksum differs, so the disk or a copy has changed it."
        )
    return tensors


def get_chance() -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Every generator of the process: torch's on each kind of device as tensors, Python's and numpy's as JSON."""
    kind, keys, *rest = np.random.get_state()
    return get_torchs_chance(), {
        "python": random.getstate(),
        "numpy": [kind, np.asarray(keys).tolist(), *rest],
    }


def get_torchs_chance() -> dict[str, Tensor]:
    """What a step draws from; some 20 µs, and no wait for a device."""
    tensors = {"rng.torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors["rng.cuda"] = torch.cuda.get_rng_state()
    if torch.backends.mps.is_available():
        tensors["rng.mps"] = torch.mps.get_rng_state()
    return tensors


def set_chance(tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
    set_torchs_chance(tensors)
    version, state, gauss = facts["python"]
    random.setstate((version, tuple(state), gauss))
    kind, keys, *rest = facts["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))


def set_torchs_chance(tensors: dict[str, Tensor]) -> None:
    torch.set_rng_state(tensors["rng.torch"])
    if torch.cuda.is_available() and "rng.cuda" in tensors:
        torch.cuda.set_rng_state(tensors["rng.cuda"])
    if torch.backends.mps.is_available() and "rng.mps" in tensors:
        torch.mps.set_rng_state(tensors["rng.mps"])


def first_not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """The name of one that holds NaN or Inf."""
    numbers = {name: t for name, t in tensors.items() if t.is_floating_point()}
    return next((name for name, t in numbers.items() if not bool(torch.isfinite(t).all())), None)


def refuse_other_start(path: Path, form: LoraForm, tensors: dict[str, Tensor]) -> None:
    """PiSSA and its like train the difference to factors that were computed from the base: another machine may compute
    others, and then what was saved means something else."""
    for name, start in form.named_buffers():
        saved = tensors.get(f"start.{name}")
        if saved is None or not torch.equal(saved, start.detach().cpu()):
            raise FileRefused(
                f"{path.name} was begun from other factors of the base than are computed here ({name}): on another "
                "kind of machine, or by another torch. Resume where it was begun, or start_from its LoRA file."
            )


def state_path(folder: Path, step: int) -> Path:
    return folder / f"step-{step:06d}.safetensors"


def saved_steps(folder: Path) -> list[tuple[int, Path]]:
    """Checkpoints in a folder, oldest first."""
    found = [
        (re.fullmatch(r"step-(\d{6,})\.safetensors", p.name), p) for p in folder.glob("step-*.safetensors")
    ]
    return sorted((int(match[1]), path) for match, path in found if match)


def last_step(folder: Path) -> int:
    """Of the newest checkpoint; 0 where there is none."""
    return max((step for step, _ in saved_steps(folder)), default=0)


def prune(folder: Path, keep: int) -> None:
    for _, path in saved_steps(folder)[:-keep]:
        path.unlink()


def newest_whole(folder: Path) -> tuple[Path, list[str]]:
    """The newest checkpoint that reads whole, and a sentence for each newer one that does not."""
    problems: list[str] = []
    for _, path in reversed(saved_steps(folder)):
        try:
            bad = first_not_finite(_whole(read_header(path)))
        except FileRefused as problem:
            problems.append(f"Checkpoint {path.name} is damaged and was passed over: {problem}")
            continue
        if bad is None:
            return path, problems
        problems.append(f"Checkpoint {path.name} holds NaN or Inf ({bad}) and was passed over.")
    raise FileRefused(
        f"{folder} holds no whole checkpoint to resume from{': ' + ' '.join(problems) if problems else '.'} "
        "Start the training again with its preset."
    )
