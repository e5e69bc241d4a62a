"""Noise and weights of noise levels, beside diffusers' own tables and the statistics they must have."""

from __future__ import annotations

import random

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, EulerDiscreteScheduler
from diffusers.training_utils import compute_snr
from torch import Tensor

from trainers.diffusion import NoiseSchedule, draw_noise


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("zero_terminal", [False, True])
def test_min_snr_is_diffusers_scripts(prediction: str, zero_terminal: bool) -> None:
    """train_text_to_image's own lines, with v's SNR + 1 below."""
    scheduler = DDPMScheduler(prediction_type=prediction, rescale_betas_zero_snr=zero_terminal)
    if zero_terminal and prediction == "epsilon":
        with pytest.raises(ValueError, match="need v-prediction"):
            NoiseSchedule.from_scheduler(scheduler)
        return
    t = torch.tensor([0, 10, 400, 998, 999])
    snr = compute_snr(scheduler, t)
    gamma = 5.0
    wanted = torch.minimum(snr, torch.full_like(snr, gamma)) / (snr if prediction == "epsilon" else snr + 1)
    found = NoiseSchedule.from_scheduler(scheduler).weight("min_snr", t, gamma=gamma)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-7)
    assert bool(torch.isfinite(found).all())


def test_epsilon_without_a_signal_is_refused_whoever_made_the_betas() -> None:
    """Euler's zero-terminal betas end at 2^-24 and not at 0, for it divides by them."""
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    for kind in (DDPMScheduler, DDIMScheduler, EulerDiscreteScheduler):
        scheduler = kind(**betas, prediction_type="epsilon", rescale_betas_zero_snr=True)
        with pytest.raises(ValueError, match="need v-prediction"):
            NoiseSchedule.from_scheduler(scheduler)
        NoiseSchedule.from_scheduler(kind(**betas, prediction_type="epsilon"))
        NoiseSchedule.from_scheduler(
            kind(**betas, prediction_type="v_prediction", rescale_betas_zero_snr=True)
        )


def test_plain_noise_is_the_generators_own() -> None:
    """What the exact comparison with the reference loop rests on."""
    shape = (2, 4, 8, 8)
    wanted = torch.randn(shape, generator=torch.Generator().manual_seed(5))
    assert torch.equal(draw_noise(shape, torch.Generator().manual_seed(5)), wanted)


def test_offset_noise_is_one_number_for_each_picture_and_channel() -> None:
    shape = (3, 4, 8, 8)
    plain = draw_noise(shape, torch.Generator().manual_seed(5))
    shift = draw_noise(shape, torch.Generator().manual_seed(5), offset=0.1) - plain
    assert torch.allclose(shift, shift[:, :, :1, :1].expand(shape), atol=1e-6)
    assert len(shift[:, :, 0, 0].unique()) == 12
    many = draw_noise((4000, 1, 1, 1), torch.Generator().manual_seed(5), offset=3.0)
    assert float(many.var()) == pytest.approx(1 + 9, rel=0.1)


def multires(shape: tuple[int, ...], discount: float, chance: random.Random, g: torch.Generator) -> Tensor:
    """The published formula, as sd-scripts has it: the first level is as large as the noise itself."""
    noise, small, level = torch.randn(shape, generator=g), list(shape[2:]), 0
    while level == 0 or min(small) > 1:
        ratio = chance.uniform(2, 4)
        small = [max(1, int(side / ratio**level)) for side in shape[2:]]
        coarse = torch.randn((*shape[:2], *small), generator=g)
        noise = noise + torch.nn.Upsample(size=shape[2:], mode="bilinear")(coarse) * discount**level
        level += 1
    return noise / noise.std()


def covariances(noise: Tensor) -> list[float]:
    """Of latents next to each other, two and four apart, and the variance of a picture's mean."""
    along = [float((noise[..., :-k] * noise[..., k:]).mean()) for k in (1, 2, 4)]
    return [*along, float(noise.mean((2, 3)).var())]


@pytest.mark.parametrize("size", [(16, 16), (9, 14)])
@pytest.mark.parametrize("discount", [0.3, 0.8])
def test_pyramid_noise_is_multires_noise_of_variance_one(size: tuple[int, int], discount: float) -> None:
    g, chance, shape = torch.Generator().manual_seed(5), random.Random(5), (20, 4, *size)
    theirs = torch.cat([multires(shape, discount, chance, g) for _ in range(150)])
    ours = torch.cat([draw_noise(shape, g, pyramid=discount) for _ in range(150)])
    assert float(ours.var()) == pytest.approx(1, rel=0.02)
    assert covariances(ours) == pytest.approx(covariances(theirs), rel=0.1, abs=0.004)
    plain = draw_noise((3000, 4, *size), g)
    assert max(covariances(plain)) < 0.3 * max(covariances(ours))
