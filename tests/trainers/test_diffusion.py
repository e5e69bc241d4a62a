"""Noise and weights of noise levels, beside diffusers' own tables and the statistics they must have."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr

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


@pytest.mark.parametrize("size", [(16, 16), (9, 14)])
def test_pyramid_noise_has_variance_one_and_coarse_parts(size: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(5)
    eps = draw_noise((4000, 1, *size), generator, pyramid=0.8)
    assert float(eps.var()) == pytest.approx(1, rel=0.02)
    neighbours = float((eps[..., :, 0] * eps[..., :, 1]).mean())  # of plain noise it is 0
    factors = [0.8 ** (2 * i) for i in range(4 if min(size) > 8 else 3)]
    assert 0.1 < neighbours < sum(factors) / (1 + sum(factors))
    plain = draw_noise((4000, 1, *size), generator)
    assert abs(float((plain[..., :, 0] * plain[..., :, 1]).mean())) < 0.02
