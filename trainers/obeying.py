"""What a training does between two steps because somebody asked for it (trainers.control)."""

from __future__ import annotations

import time

from lora_core.errors import ConfigError
from trainers import events, previews
from trainers.bench import Bench
from trainers.config import TrainSettings
from trainers.control import Orders
from trainers.resting import give_back
from trainers.saving import keep_preset, save_or_say

POLL_S = 0.1  # while paused


def obey(bench: Bench, step: int, orders: Orders) -> float:
    """Do what waits in the control folder, and stay while paused -> seconds in which nothing was trained."""
    began = time.monotonic()
    do_now(bench, step, orders)
    if orders.hold():
        bench.emit(events.Paused(step=step))
        give_back()  # whoever asked for the pause may want the card
        while orders.hold():
            time.sleep(POLL_S)
            do_now(bench, step, orders)
        if not orders.stop.asked:
            bench.emit(events.Continued(step=step))
    return time.monotonic() - began


def do_now(bench: Bench, step: int, orders: Orders) -> None:
    def refuse(why: str) -> None:
        bench.emit(events.Note(text=why))

    for sample in orders.take_samples(refuse):
        previews.render_sample(bench, step, sample, orders.stop)
    wanted = orders.take_steps(refuse)
    if wanted is not None:
        try:
            change_steps(bench, step, wanted)
        except ConfigError as problem:
            refuse(f"The number of steps was not changed: {problem}")
    if orders.take_save():
        save_or_say(bench, step)
    orders.pass_over_the_rest(refuse)


def change_steps(bench: Bench, step: int, wanted: int) -> None:
    """The run is to have `wanted` steps: in its preset too, for when it is resumed, and saved here, since the schedule
    of the steps up to now was that of the old number."""
    before = bench.config.train.steps
    if wanted == before:
        return
    if wanted < step:
        raise ConfigError(f"{step} are done and {wanted} were asked for. Stop and save instead.")
    old = bench.config.train
    # a share of the steps stays the step it was: the encoder has stopped there, or was going to
    stops = {f"{c}_stop": float(at) for c in ("text_encoder", "text_encoder_2") if (at := old.stop_of(c))}
    train = TrainSettings.model_validate({**dict(old), **stops, "steps": wanted})
    bench.config = bench.config.model_copy(update={"train": train})
    bench.emit(events.StepsChanged(step=step, steps=wanted, before=before))
    keep_preset(bench)
    if step < wanted:
        save_or_say(bench, step)
