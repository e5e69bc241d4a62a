"""DreamBooth LoRA training (arXiv 2208.12242, 2106.09685), read downwards.

    train(config)                    a new run in config.output
    train(config, resume=folder)     the same run, from its newest whole checkpoint, bit for bit

What it does, in this order, and what each thing costs:
  open the base, frozen, in its own precision                      memory: the base
  class pictures, made by the base where the folder lacks them     time, once per prompt
  attach the LoRA in fp32                                          memory: 16 bytes per trainable parameter with AdamW
  latents cached as mean and deviation; the VAE leaves the device  time, once per picture
  text embeddings cached when the encoders do not train
  steps: batch -> noise -> UNet -> loss -> backward -> AdamW
  the LoRA is written, read back and compared; before and after are measured
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from accelerate.state import AcceleratorState

from lora_core.batch_size import ran_out_of_memory
from lora_core.errors import ConfigError, LoraError, NotFinite, Stopped
from lora_core.formats import read_adapter
from lora_core.safe_files import tensors_sha256
from lora_core.train_form import detach
from trainers import checkpoints, events, losses, optim, previews
from trainers.batches import Batch
from trainers.bench import Bench, prepare, trained_components
from trainers.config import TrainConfig
from trainers.control import Orders, StopRequest, listening, signals_ask
from trainers.event_log import EventLog
from trainers.freezing import stop_learning
from trainers.obeying import obey
from trainers.predicting import predict, predict_as_base
from trainers.preflight import dry_run
from trainers.rehearsal import Rehearsal
from trainers.report_page import ReportPage
from trainers.room import make_room, out_of_memory
from trainers.run_folder import RunFolder
from trainers.saving import (
    keep_preset,
    once_there_is_room,
    save,
    save_or_say,
    saved_for,
    take_up,
    write_file,
)
from trainers.telling import announce, report_or_say
from trainers.tensorboard import TensorBoard, check_installed
from trainers.validation import make_probe, measure
from trainers.versions import versions
from trainers.watch import Watch


def train(
    config: TrainConfig,
    *,
    resume: Path | None = None,
    stop: StopRequest | None = None,
    listeners: Sequence[events.Emit] = (),
    preflight: bool = False,
) -> Path:
    """-> the finished LoRA file. Raises Stopped when asked to stop (saved), LoraError when something is wrong."""
    if config.report.tensorboard:
        check_installed()
    folder = RunFolder.reopen(resume)[0] if resume else RunFolder.create(config)
    stop = stop or StopRequest()
    with folder.lock():
        log = EventLog(folder.events, *listeners)
        if config.report.tensorboard:
            log.listeners.append(TensorBoard(folder.tensorboard))
        log.listeners.append(ReportPage(folder, config, log))
        try:
            log(events.TakenUp(pid=os.getpid(), versions=versions()))
            with signals_ask(stop), listening(folder.control, stop) as orders:
                return run(config, folder, orders, log, resuming=resume is not None, preflight=preflight)
        except Stopped:
            raise
        except LoraError as problem:
            log(events.Failed(reason=str(problem)))
            raise
        except RuntimeError as problem:
            if not ran_out_of_memory(problem):
                raise
            refusal = out_of_memory(problem)
            log(events.Failed(reason=str(refusal)))
            raise refusal from problem
        except Exception as problem:  # a mistake of ours or of a driver's
            log(events.Failed(reason=f"{type(problem).__name__}: {problem}"))
            raise
        finally:
            log.close()


def rehearse(
    config: TrainConfig, *, stop: StopRequest | None = None, listeners: Sequence[events.Emit] = ()
) -> events.Preflight:
    """Preflight alone: nothing is trained, and no picture made. Raises like `train`."""

    def emit(event: events.TrainEvent) -> None:
        for listener in listeners:
            listener(event)

    rehearsal = Rehearsal(config)
    with tempfile.TemporaryDirectory() as folder:
        try:
            place = RunFolder(Path(folder), config.name)
            place.keep_preset(config)
            bench = prepare(
                config, place, stop or StopRequest(), emit, find=rehearsal.find, narrow=rehearsal.narrow
            )
            try:
                found = dry_run(bench, gradients, rehearsal=rehearsal)
            finally:
                detach(bench.form)
        except RuntimeError as problem:
            if not ran_out_of_memory(problem):
                raise
            raise ConfigError(
                f"This training does not fit into memory. {out_of_memory(problem)}"
            ) from problem
        finally:
            AcceleratorState._reset_state(True)
    emit(found)
    return found


def run(
    config: TrainConfig,
    folder: RunFolder,
    orders: Orders,
    emit: events.Emit,
    *,
    resuming: bool,
    preflight: bool,
) -> Path:
    began = time.monotonic()
    try:
        bench = prepare_or_say(config, folder, orders.stop, emit, preflight=preflight)
        first = take_up(bench) if resuming else 0
        if resuming:
            keep_preset(bench)  # with what --set has changed
        bench.probe = make_probe(bench)
        announce(bench, first)
        try:
            steps(bench, first, orders)
        finally:
            detach(bench.form)
    finally:
        AcceleratorState._reset_state(True)  # a second run in this process may choose another precision
    config = bench.config  # its steps may have been changed
    lora = once_there_is_room(
        bench, lambda: write_file(bench, folder.lora, config.train.steps), lambda: orders.stop.asked
    )
    adapter = read_adapter(lora)
    emit(
        events.Finished(
            path=str(lora),
            seconds=round(time.monotonic() - began, 1),
            layers=len(adapter.deltas),
            sha256=tensors_sha256(lora) if lora.is_file() else "",
        )
    )
    report_or_say(bench, lora, orders.stop)
    return lora


def prepare_or_say(
    config: TrainConfig, folder: RunFolder, stop: StopRequest, emit: events.Emit, *, preflight: bool
) -> Bench:
    try:
        bench = prepare(config, folder, stop, emit)
        stop.check()
        if preflight:
            emit(dry_run(bench, gradients))
            stop.check()
        return bench
    except Stopped:
        step = checkpoints.last_step(folder.checkpoints)
        emit(events.Interrupted(step=step, path="", resume=folder.resume_command))
        raise


# --- the steps -----------------------------------------------------------------------------------------------


def steps(bench: Bench, first: int, orders: Orders) -> None:
    config = bench.config.train
    parameters = list(bench.form.parameters())
    optimizer, scaled = bench.accelerator.prepare(bench.optimizer), bench.accelerator.scaler is not None
    watch = Watch(config.log_every or (1 if bench.device.type == "cpu" else 10))
    stops = {c: last for c in trained_components(bench.config, bench.live) if (last := config.stop_of(c))}
    began, step = time.monotonic(), first
    while step < (total := bench.config.train.steps):  # which may be changed while it runs
        step += 1
        for component in [c for c, last in stops.items() if step > last]:
            stop_learning(bench, component)
            bench.emit(events.Note(text=f"{component} stays as it is after step {stops.pop(component)}."))
        optim.set_rate(
            bench.optimizer,
            optim.rate_factor(config.schedule, step - 1, steps=total, warmup=config.warmup_steps),
        )
        drawn = bench.feeder.next(bench.generator, len(bench.schedule), config.gradient_accumulation)
        found = gradients(bench, drawn)
        norm = bench.accelerator.clip_grad_norm_(parameters, config.max_grad_norm)
        bad = watch.keep(step, bench.optimizer.param_groups[0]["lr"], found, norm, drawn)
        if not scaled:  # a GradScaler sees to it itself
            optim.leave_out_if(bench.optimizer, bad)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if bench.average is not None:
            bench.average.follow(step)

        preview_now = bool(bench.config.preview.every) and step % bench.config.preview.every == 0
        save_now = bool(bench.config.save.every) and step % bench.config.save.every == 0 and step < total
        every = bench.config.validation.every
        measure_now = step == total or (every > 0 and step % every == 0)
        if (
            watch.due
            or preview_now
            or measure_now
            or save_now
            or orders.waiting
            or orders.stop.asked
            or step == total
        ):
            try:
                for done, loss, rate in watch.read(scaled=scaled):
                    eta = (time.monotonic() - began) / (step - first) * (total - done)
                    bench.emit(
                        events.Step(
                            step=done, steps=total, loss=loss, learning_rate=rate, eta_s=round(eta, 1)
                        )
                    )
            except NotFinite as problem:
                raise saved_for(bench, step, problem) from None
        if measure_now:
            measure(bench, step)
        if preview_now:
            previews.render(bench, step, orders.stop)
        if orders.waiting:
            began += obey(bench, step, orders)
        total = bench.config.train.steps
        if orders.stop.asked and step < total:
            path = once_there_is_room(bench, partial(save, bench, step), lambda: False)
            resume = bench.folder.resume_command
            bench.emit(events.Interrupted(step=step, path=str(path), resume=resume))
            raise Stopped(f"Stopped at step {step} of {total}; saved. Go on with: {resume}")
        if save_now:
            save_or_say(bench, step)
    once_there_is_room(bench, partial(save, bench, step), lambda: orders.stop.asked)


def gradients(bench: Bench, drawn: Sequence[Sequence[Batch]]) -> list[torch.Tensor]:
    """Added up over the batches of a step -> each drawing's part of its loss, on the device. What memory has no room
    for is done again in smaller pieces: the step is the same."""
    chance = checkpoints.get_torchs_chance()
    while True:
        try:
            return [torch.stack([backward(bench, batch) for batch in batches]).sum() for batches in drawn]
        except RuntimeError as problem:
            if not ran_out_of_memory(problem):
                raise
            why = str(problem)  # the exception itself holds on to the memory
        make_room(bench, max(len(batch) for batches in drawn for batch in batches), why)
        checkpoints.set_torchs_chance(chance)


def backward(bench: Bench, batch: Batch) -> torch.Tensor:
    parts = []
    for piece in batch.pieces(bench.pieces):
        loss = batch_loss(bench, piece.to(bench.device))
        bench.accelerator.backward(loss)
        parts.append(loss.detach())
    return torch.stack(parts).sum()


def batch_loss(bench: Bench, batch: Batch) -> torch.Tensor:
    """One UNet call -> the DreamBooth loss, fp32, with gradients to the LoRA."""
    config, schedule = bench.config.train, bench.schedule
    seen = batch.eps
    if config.input_perturbation:
        seen = seen + config.input_perturbation * torch.randn_like(seen)
    z_t, target = schedule.noise(batch.z, seen, batch.t), schedule.target(batch.z, batch.eps, batch.t)
    weight = batch.share * schedule.weight(config.loss_weighting, batch.t, gamma=config.snr_gamma)
    if any(batch.from_base):
        own = batch.from_base.index(True)  # the rows from there on are the class's, without pictures of it
        taught = batch.part(slice(own, None))
        target = torch.cat([target[:own], predict_as_base(bench, taught, z_t[own:]).to(target.dtype)])
    prediction = predict(bench, batch, z_t)
    return losses.dreambooth(prediction, target, weight, batch.mask)
