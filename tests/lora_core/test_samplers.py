"""Samplers by name, and the cheap look at what they are denoising."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler

from lora_core import GenerationRequest, LivePipeline
from lora_core.errors import ConfigError
from lora_core.preview import LatentPreview
from lora_core.samplers import SAMPLERS, samplers_of, scheduler_for
from tests.small_models import small_pipeline
from trainers.demo_scenes import centred, things


@pytest.fixture(scope="module")
def shared() -> LivePipeline:
    return LivePipeline(small_pipeline("sd1"))


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_every_sampler_arrives_at_the_same_picture(prediction: str) -> None:
    """All of them integrate one equation: with a Gaussian's exact denoiser they meet in its mean, whatever the start.

    The model's own betas, prediction and spacing must have reached each of them, or they would not.
    """
    own = DDIMScheduler(
        prediction_type=prediction,
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        rescale_betas_zero_snr=prediction == "v_prediction",
        timestep_spacing="trailing",
    )
    mean, spread = 3.0, 1e-3  # far outside -1..1, where clipping would show
    assert len(samplers_of(own)) == len(SAMPLERS) - (prediction == "v_prediction")
    for name in samplers_of(own):
        scheduler = scheduler_for(name, own)
        scheduler.set_timesteps(30)
        x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1)) * scheduler.init_noise_sigma
        for t in scheduler.timesteps:
            abar = own.alphas_cumprod[int(t)]
            z_t = scheduler.scale_model_input(x, t)
            gain = abar.sqrt() * spread**2 / (abar * spread**2 + 1 - abar)
            clean = mean + gain * (z_t - abar.sqrt() * mean)
            eps = (z_t - abar.sqrt() * clean) / (1 - abar).sqrt()
            said = eps if prediction == "epsilon" else abar.sqrt() * eps - (1 - abar).sqrt() * clean
            x = scheduler.step(said, t, x).prev_sample
        assert (x - mean).abs().max() < 0.15, name
    if prediction == "v_prediction":
        with pytest.raises(ConfigError, match="ends without any signal"):
            scheduler_for("DPM++ 2M Karras", own)


def test_a_sampler_is_for_one_request(shared: LivePipeline) -> None:
    own = shared.pipeline.scheduler
    made = {
        s: shared.generate(GenerationRequest(prompt="a dog", steps=3, sampler=s))[0]
        for s in (None, "Euler a")
    }
    assert shared.pipeline.scheduler is own
    assert "Sampler: Euler a" in made["Euler a"].parameters
    assert made[None].image.tobytes() != made["Euler a"].image.tobytes()
    with pytest.raises(ConfigError, match=r"sampler = 'Eular' is unknown. Did you mean \"Euler\""):
        GenerationRequest(prompt="a dog", sampler="Eular")


def test_latents_can_be_looked_at_while_they_are_denoised(shared: LivePipeline) -> None:
    seen: list[torch.Tensor] = []
    shared.generate(GenerationRequest(prompt="a dog", steps=3, count=2), on_latents=seen.append)
    assert [tuple(z.shape[:2]) for z in seen] == [(2, 4)] * 3
    look = LatentPreview(shared.pipeline.vae).image(seen[-1])
    assert look.size == (2 * seen[-1].shape[-1], seen[-1].shape[-2])


@pytest.mark.parametrize(("number", "columns", "rows"), [(1, 1, 1), (3, 2, 2), (6, 3, 2), (8, 3, 3)])
def test_the_look_at_a_batch_is_a_grid_in_reading_order(
    shared: LivePipeline, number: int, columns: int, rows: int
) -> None:
    latents = torch.randn(number, 4, 5, 7, generator=torch.Generator().manual_seed(3))
    look = LatentPreview(shared.pipeline.vae)
    grid = look.image(latents)
    assert grid.size == (7 * columns, 5 * rows)
    for i in range(number):
        x, y = 7 * (i % columns), 5 * (i // columns)
        assert grid.crop((x, y, x + 7, y + 5)).tobytes() == look.image(latents[i : i + 1]).tobytes()


def test_the_look_at_a_latent_has_the_pictures_colours() -> None:
    """On the demo base, whose VAE is trained: the cheap look is near the decoded picture, and far from another's."""
    vae = LivePipeline.open("demo", device="cpu").pipeline.vae
    look = LatentPreview(vae)
    scenes = [centred(things()["dog"], colour) for colour in ("red", "blue", "white")]
    pixels = torch.stack([torch.from_numpy(np.array(s.draw())).permute(2, 0, 1) / 127.5 - 1 for s in scenes])
    with torch.no_grad():
        latents = vae.encode(pixels).latent_dist.mean * vae.config.scaling_factor
    small = torch.nn.functional.interpolate(pixels, latents.shape[-2:], mode="area")
    for i in range(3):
        seen = torch.from_numpy(np.array(look.image(latents[i : i + 1]))).permute(2, 0, 1) / 127.5 - 1
        errors = (small - seen).square().mean((1, 2, 3))
        assert int(errors.argmin()) == i
        assert errors[i] < 0.5 * min(e for j, e in enumerate(errors) if j != i)
