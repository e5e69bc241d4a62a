"""What the worker makes for the page: pictures, contact sheets, and figures about the mix."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from app import mixing
from app.gpu_lease import leased
from app.jobs import Job
from app.pictures import data_uri
from lora_core.burn import advice
from lora_core.contact_sheet import cells_of_loras, cells_of_seeds, rendered, sheet
from lora_core.errors import LoraError
from lora_core.generation import GenerationRequest, settled
from lora_core.mix import AdapterWeight, WeightValue
from lora_core.pipeline import LivePipeline
from lora_core.prompt_tags import split_tags

if TYPE_CHECKING:
    from app.session import Session


def measure(session: Session, job: Job) -> str:
    """How far the mix moves the model, and which LoRAs pull the same way."""
    pipe = session.ready(job)
    if not pipe.loaded:
        raise LoraError("There is no LoRA to measure. Drop one onto the page, or load one from the library.")
    pipe.unfuse()
    try:
        strengths, overlaps = pipe.strengths(), pipe.overlaps()
    finally:
        session.apply(pipe)
    most = sorted(strengths, key=lambda block: -strengths[block])[:3]
    said = [f"Moved furthest: {', '.join(f'{block} by {strengths[block]:.1%}' for block in most)}."]
    said += [f"{a} and {b} overlap by {cosine:.2f}." for (a, b), cosine in overlaps.items()]
    return " ".join(filter(None, [*said, advice(strengths)]))


def normalise(session: Session, job: Job) -> str:
    """Every block that the mix moves too far is brought down to the limit; the rows show by which weights."""
    pipe = session.ready(job)
    if not pipe.loaded:
        raise LoraError(
            "There is no LoRA to bring down. Drop one onto the page, or load one from the library."
        )
    session.wanted.fused = False
    session.apply(pipe)
    pipe.unfuse()  # what fuses by itself is fused again by itself
    said = pipe.normalise()
    with session.lock:
        before, weights = mixing.heard(session), pipe.weights
        for name in before:
            if name in weights:
                session.rows[name] = session.rows[name].wearing(_for(pipe, name, weights[name]))
        session.put = mixing.heard(session)
        if session.put != before:
            session.before = before
    session.mix_now()
    session.changed()
    return said


def _for(pipe: LivePipeline, name: str, value: WeightValue) -> AdapterWeight:
    """Where there is no second text encoder, it follows the first: nobody asks for a number that means nothing."""
    weight = AdapterWeight.parse(name, value)
    return weight if "text_encoder_2" in pipe.models else replace(weight, text_encoder_2=weight.text_encoder)


def generate(session: Session, request: GenerationRequest, job: Job) -> str:
    job.show(steps=request.steps)
    with leased(session.training, job.check):
        pipe = session.ready(job)
        session.apply(pipe)
        session.last_request = request
        passing = _wear_for_now(session, pipe, request.prompt)
        try:
            made = pipe.generate(request, on_step=job.step, on_latents=_preview_onto(session, job))
        finally:
            for name in passing:
                pipe.delete(name)
            session.apply(pipe)
    for picture in made:
        session.pictures.keep(picture)
    seeds = f"seed {made[0].seed}" + (f" to {made[-1].seed}" if len(made) > 1 else "")
    return f"{len(made)} {'pictures' if len(made) > 1 else 'picture'} made, {seeds}."


def contact_sheet(
    session: Session, request: GenerationRequest, kind: str, weights: Sequence[float], job: Job
) -> str:
    job.show(steps=request.steps)
    with leased(session.training, job.check):
        pipe = session.ready(job)
        session.wanted.fused = False  # fused, all pictures of a batch would be alike
        pipe.unfuse()
        session.apply(pipe)
        worn = {name: value for name, value in session.weights(pipe).items() if session.rows[name].on}
        if not worn:
            raise LoraError("A contact sheet needs a LoRA to weigh. Drop one onto the page, or turn one on.")
        seed = settled(request.seed)
        cells = (
            cells_of_loras(list(worn), weights, seed)
            if kind == "loras"
            else cells_of_seeds(range(seed, seed + 3), worn, weights)
        )
        pictures = []
        for picture in rendered(pipe, replace(request, count=1), cells, on_step=job.step):
            session.pictures.keep(picture)
            pictures.append(picture)
    page = sheet(pictures, cells, len(weights))
    session.pictures.keep(replace(pictures[0], image=page))
    return f"A sheet of {len(cells)} pictures: {len(cells) // len(weights)} rows of {len(weights)}."


def _wear_for_now(session: Session, pipe: LivePipeline, prompt: str) -> list[str]:
    """LoRAs of the library that the prompt names, <lora:ink:0.8>, and that are not in the mixer."""
    passing: list[str] = []
    try:
        for name in split_tags(prompt)[1]:
            if name not in pipe.loaded:
                pipe.load(session.library.find(name).path, name=name, weight=0.0)
                passing.append(name)
    except LoraError:
        for name in passing:
            pipe.delete(name)
        raise
    return passing


def _preview_onto(session: Session, job: Job) -> Callable[[torch.Tensor], None]:
    return lambda latents: job.show(preview=data_uri(session.look.image(latents)))
