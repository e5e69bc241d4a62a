"""Samplers by the names A1111 gave them. Each is a diffusers scheduler built from the model's own noise schedule."""

from __future__ import annotations

from typing import Any

from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    UniPCMultistepScheduler,
)

from lora_core.errors import ConfigError

# clip_sample: diffusers' DDIM clips latents to -1..1 unless told not to, and a latent is no picture
SAMPLERS: dict[str, tuple[type[Any], dict[str, Any]]] = {
    "DDIM": (DDIMScheduler, {"clip_sample": False}),
    "Euler": (EulerDiscreteScheduler, {}),
    "Euler a": (EulerAncestralDiscreteScheduler, {}),
    "DPM++ 2M": (DPMSolverMultistepScheduler, {"algorithm_type": "dpmsolver++"}),
    "DPM++ 2M Karras": (
        DPMSolverMultistepScheduler,
        {"algorithm_type": "dpmsolver++", "use_karras_sigmas": True},
    ),
    "UniPC": (UniPCMultistepScheduler, {}),
}


def samplers_of(own: Any) -> list[str]:
    """The samplers a model with this scheduler can use. Karras' spacing divides the noise levels up to the largest
    one evenly (in a power), which betas that end without any signal send to infinity."""
    endless = bool(own.config.get("rescale_betas_zero_snr"))
    return [
        name for name, (_, changes) in SAMPLERS.items() if not (endless and "use_karras_sigmas" in changes)
    ]


def scheduler_for(sampler: str | None, own: Any) -> Any:
    """The scheduler of that name on the betas, prediction and spacing of `own`, the model's; None is `own` itself.

    Raises ConfigError for one that `samplers_of` leaves out.
    """
    if sampler is None:
        return own
    if sampler not in samplers_of(own):
        raise ConfigError(
            f"{sampler} cannot be used with this model, whose noise schedule ends without any signal. "
            f"Choose one of {', '.join(samplers_of(own))}."
        )
    kind, changes = SAMPLERS[sampler]
    return kind.from_config(own.config, **changes)


def sampler_name(sampler: str | None, own: Any) -> str:
    """What a picture's text says: the sampler's name, or the class of the model's own scheduler."""
    return sampler or type(own).__name__.removesuffix("Scheduler")
