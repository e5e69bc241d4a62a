"""One run of a diffusers pipeline under a mix that may change between its steps (docs/engine.md)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from lora_core.errors import Stopped
from lora_core.generation import GenerationRequest, Steps
from lora_core.mix import Mix
from lora_core.samplers import scheduler_for
from lora_core.upcast import overflows, same_dtype, to_fp32

OnStep = Callable[[int, int], bool | None]  # step, steps -> False asks to stop
OnLatents = Callable[[Tensor], None]  # (images, channels, h, w), after each step


class Wardrobe(Protocol):
    """What a run needs to know of the mix, and where it lets changes in."""

    def lend(self) -> None:
        """Let the changes through that wait."""
        ...

    def show(self, progress: float) -> None:
        """Put what the mix is at this progress (0..1) of the denoising onto the model."""
        ...

    def mixes(self) -> Sequence[Mix]:
        """As they are now, one per picture."""
        ...

    def stopped(self) -> bool: ...


def denoise(
    pipeline: Any,
    request: GenerationRequest,
    seeds: Sequence[int],
    wardrobe: Wardrobe,
    on_step: OnStep | None = None,
    on_latents: OnLatents | None = None,
) -> tuple[list[Any], list[Steps]]:
    """-> the pictures, and for each the weights by the step from which they held. Raises Stopped."""
    worn = _Diary(len(seeds))
    worn.note(1, wardrobe.mixes())
    texts = _texts(wardrobe.mixes())

    def after_step(pipe: Any, step: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        nonlocal texts
        if on_latents is not None:
            on_latents(kwargs["latents"])
        on = on_step is None or on_step(step + 1, request.steps) is not False
        wardrobe.lend()
        if not on or wardrobe.stopped():
            raise Stopped(f"Stopped after step {step + 1} of {request.steps}.")
        last = pipe.num_timesteps - 1
        if step < last:
            wardrobe.show((step + 1) / last)
            worn.note(step + 2, wardrobe.mixes())
            if texts != (texts := _texts(wardrobe.mixes())):
                kwargs = {**kwargs, **encode(pipe, request, len(seeds))}
        elif overflows(pipe.vae) and hasattr(pipe, "upcast_vae"):
            # before SDXL's pipeline does it, whose own way is deprecated and warns at every picture; SD 1's and 2's
            # decode in fp16 and have always done so
            to_fp32(pipe.vae)
            kwargs = {**kwargs, "latents": kwargs["latents"].float()}
        return kwargs

    pipeline.set_progress_bar_config(disable=True)
    # noise drawn on the CPU, one generator per image: the same seed is the same picture on every device
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    own = pipeline.scheduler
    pipeline.scheduler = scheduler_for(request.sampler, own)
    try:
        wardrobe.show(0.0)
        with same_dtype(pipeline.vae):
            result = pipeline(
                prompt=[request.prompt] * len(seeds),
                negative_prompt=[request.negative_prompt] * len(seeds),
                num_inference_steps=request.steps,
                guidance_scale=request.guidance,
                width=request.width,
                height=request.height,
                generator=generators,
                callback_on_step_end=after_step,
            )
    finally:
        pipeline.scheduler = own
    return list(result.images), worn.steps


def encode(pipe: Any, request: GenerationRequest, count: int) -> dict[str, Tensor]:
    """The prompts again, with what the text encoders wear now: as the pipeline's loop keeps them."""
    guided = pipe.do_classifier_free_guidance
    made = pipe.encode_prompt(
        [request.prompt] * count,
        device=pipe._execution_device,
        num_images_per_prompt=1,
        do_classifier_free_guidance=guided,
        negative_prompt=[request.negative_prompt] * count,
    )
    names = ("prompt_embeds", "add_text_embeds")  # SDXL's four are words and pooled, each with its negative
    pairs = zip(made[::2], made[1::2], strict=True)
    return {
        name: torch.cat([without, words]) if guided else words
        for name, (words, without) in zip(names, pairs, strict=False)
    }


def _texts(mixes: Sequence[Mix]) -> Any:
    return [sorted((n, w.text_encoder, w.text_encoder_2) for n, w in mix.items()) for mix in mixes]


class _Diary:
    def __init__(self, pictures: int) -> None:
        self.steps: list[Steps] = [() for _ in range(pictures)]

    def note(self, step: int, mixes: Sequence[Mix]) -> None:
        for i, mix in enumerate(mixes):
            plain = {name: weight.plain for name, weight in mix.items()}
            if not self.steps[i] or self.steps[i][-1][1] != plain:
                self.steps[i] = (*self.steps[i], (step, plain))
