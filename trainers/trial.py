"""The dry run itself: two steps, a save and a picture, and nothing afterwards that was not before.

The first step fills the allocator and chooses kernels, the second is timed; then one save is made and taken away again,
and one picture begun, where the training makes any.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import psutil
import torch

from lora_core.errors import ConfigError, LoraError, SaveFailed
from trainers import checkpoints, forecast, optim
from trainers.batches import Batch
from trainers.bench import Bench
from trainers.costs import (
    SaveCost,
    synchronize,
    trial_answer,
    trial_latent,
    trial_picture,
    trial_prompt,
    trial_save,
)
from trainers.forecast import Ahead, Costs
from trainers.memory import Peak, memory_total

# the training's own: of each turn of gradient accumulation its batches
Gradients = Callable[[Bench, Sequence[Sequence[Batch]]], list[torch.Tensor]]


@dataclass(frozen=True)
class Room:
    """What the machine has, in bytes. `device` and `used` are 0 without a card: there main memory counts."""

    device: int
    used: int  # of the card at the peak of the dry run, by all programs
    swapped: int  # written to the swap file during the dry run
    memory: int  # main memory


@dataclass(frozen=True)
class Tried:
    """The two steps, and one of whatever else the training makes."""

    step_s: float
    size: str  # of the pictures
    pictures: int
    memory: int  # bytes, of steps and saves
    memory_pictures: int  # likewise, while a picture is made; 0: none is
    room: Room
    costs: Costs


def trial(bench: Bench, ahead: Ahead, gradients: Gradients) -> Tried:
    train = bench.config.train
    chance, timesteps = torch.Generator().manual_seed(0), len(bench.schedule)
    swap_before, peak = psutil.swap_memory().used, Peak(bench.device)
    drawings = [ahead.step.rows(0), ahead.step.rows(1)]
    first, second = (bench.feeder.batches([rows], chance, timesteps)[0] for rows in drawings)
    try:
        one_step(bench, first, gradients)
        before = time.perf_counter()
        batch_s = one_step(bench, second, gradients)
    except LoraError as problem:  # no smaller pieces are left
        raise ConfigError(f"This training does not fit into memory. {problem}") from problem
    step_s = time.perf_counter() - before + (train.gradient_accumulation - 1) * batch_s
    try:
        save = trial_save(bench)
    except SaveFailed as problem:
        raise ConfigError(f"The training could not be saved even once. {problem}") from problem
    memory, used = peak.bytes(), peak.used()
    swapped = max(0, psutil.swap_memory().used - swap_before)
    height, width = (int(side) for side in first[0].time_ids[0, 4:])
    costs = others(bench, ahead, save, first)
    return Tried(
        step_s,
        f"{width} x {height}",
        sum(map(len, first)),
        memory,
        peak.bytes() if costs.picture is not None else 0,
        Room(peak.total(), used, swapped, memory_total()),
        costs,
    )


def others(bench: Bench, ahead: Ahead, save: SaveCost, batches: Sequence[Batch]) -> Costs:
    """What else comes in this training, one of each."""
    config = bench.config
    answer_s, picture = 0.0, None
    if forecast.measured_rows(config, len(ahead.held_out)):
        answer_s = trial_answer(bench, batches[0])
    if makes_pictures(bench, ahead):
        words = (
            *config.preview.prompts,
            *config.report.subject_prompts,
            *config.report.unrelated_prompts,
            "",
        )
        picture = trial_picture(bench, words[0])
    latent_s, prompt = 0.0, (0.0, 0)
    if ahead.anew and config.train.cache_latents:
        latent_s = trial_latent(bench, ahead.step.instances[0])
    if forecast.kept_prompts(bench, ahead):
        prompt = trial_prompt(bench, batches[0].captions[0], forecast.encoders(bench))
    return Costs(save, picture, answer_s, latent_s, *prompt)


def makes_pictures(bench: Bench, ahead: Ahead) -> bool:
    config = bench.config
    return bool(ahead.to_make or forecast.previews(config, ahead.first) or forecast.shown(config))


def one_step(bench: Bench, batches: Sequence[Batch], gradients: Gradients) -> float:
    """As the training takes one, but for what it learns -> seconds of the gradients alone.

    Raises ConfigError where the loss is no number.
    """
    began = time.perf_counter()
    losses = gradients(bench, [batches])
    if bad := [loss.item() for loss in losses if not math.isfinite(loss.item())]:  # waits for the device
        names = ", ".join(dict.fromkeys(name for batch in batches for name in batch.names))
        raise ConfigError(
            f'The loss of {names} is {bad[0]} before anything is learnt. Set train.base_dtype to "bf16" or '
            '"fp32"; if it is that already, the base model is damaged.'
        )
    done = time.perf_counter() - began
    norm = bench.accelerator.clip_grad_norm_(list(bench.form.parameters()), bench.config.train.max_grad_norm)
    optim.leave_out_if(bench.optimizer, ~torch.isfinite(torch.as_tensor(norm)))
    bench.optimizer.step()
    del bench.optimizer.found_inf  # type: ignore[attr-defined]  # a GradScaler sets it itself
    bench.optimizer.zero_grad(set_to_none=True)
    synchronize(bench.device)
    return done


@contextmanager
def untouched(bench: Bench) -> Iterator[None]:
    """Whatever steps are taken inside: weights, optimizer, every generator and the feeder are afterwards as before."""
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
