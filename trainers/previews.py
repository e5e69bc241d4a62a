"""Pictures while training, worn by the trainable form itself: the run's own every so often, and single ones asked for.

The training's own chance is not touched: a run with pictures is bit for bit the run without. A picture that cannot be
made or saved is said, and the training goes on.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from lora_core.errors import ConfigError, LoraError, SaveFailed, Stopped
from lora_core.generation import GenerationRequest, save_png
from trainers.bench import Bench
from trainers.control import Sample, StopRequest
from trainers.events import Note, Preview
from trainers.resting import awake


def render(bench: Bench, step: int, stop: StopRequest) -> None:
    """One picture per prompt of the preset."""
    folder = bench.folder.previews
    wanted = {
        folder / f"step-{step:06d}-{i}.png": request(bench, Sample(prompt))
        for i, prompt in enumerate(bench.config.preview.prompts)
    }
    draw_or_say(bench, step, wanted, stop)


def render_sample(bench: Bench, step: int, sample: Sample, stop: StopRequest) -> None:
    """One picture of the user's own; several of one step are numbered."""
    folder, number = bench.folder.previews, 0
    while (path := folder / f"sample-{step:06d}-{number}.png").exists():
        number += 1
    try:
        wanted = {path: request(bench, sample)}
    except ConfigError as problem:
        bench.emit(Note(text=f"The sample of step {step} was not made; the training goes on. {problem}"))
        return
    draw_or_say(bench, step, wanted, stop, weight=sample.weight)


def request(bench: Bench, sample: Sample) -> GenerationRequest:
    """What the sample leaves open is as in the preset's previews. Raises ConfigError."""
    usual = bench.config.preview
    return GenerationRequest(
        prompt=sample.prompt,
        seed=usual.seed if sample.seed is None else sample.seed,
        steps=usual.steps if sample.steps is None else sample.steps,
        guidance=usual.guidance if sample.guidance is None else sample.guidance,
    )


def draw_or_say(
    bench: Bench,
    step: int,
    wanted: Mapping[Path, GenerationRequest],
    stop: StopRequest,
    *,
    weight: float = 1.0,
) -> None:
    try:
        draw(bench, step, wanted, stop, weight=weight)
    except Stopped:
        why = "was not finished, because the training was asked to stop."
    except LoraError as problem:  # a full disk, or a prompt that asks for a LoRA that is not there
        why = f"was not {'saved' if isinstance(problem, SaveFailed) else 'made'}; the training goes on. {problem}"
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        why = "was not made: the device is out of memory for it. The training goes on."
    else:
        return
    bench.emit(Note(text=f"The preview of step {step} {why}"))


def draw(
    bench: Bench, step: int, wanted: Mapping[Path, GenerationRequest], stop: StopRequest, *, weight: float
) -> None:
    bench.form.eval()
    try:
        averaged = bench.averaged(bench.config.preview.ema)
        with torch.random.fork_rng(), awake(bench), averaged, bench.form.at_weight(weight):
            for path, asked in wanted.items():
                (picture,) = bench.live.generate(asked, on_step=lambda *_: not stop.asked)
                save_png(picture, path)
    finally:
        bench.form.train()  # dropout is on again, whatever happened
    prompts = tuple(asked.prompt for asked in wanted.values())
    bench.emit(Preview(step=step, paths=tuple(str(path) for path in wanted), prompts=prompts))
