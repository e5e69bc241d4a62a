"""Noising and targets: the only place that knows epsilon, v and SNR.

Symbols as in DDPM (arXiv 2006.11239) and the v paper (2202.00512): z a clean latent, eps the noise,
abar_t the cumulative product of 1 - beta, z_t = sqrt(abar_t) z + sqrt(1 - abar_t) eps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

PREDICTIONS = ("epsilon", "v_prediction")
NO_SIGNAL = (
    1e-6  # abar at the end of zero-terminal betas: 0, or 2^-24 where a scheduler must divide by it; else 5e-3
)


def draw_noise(
    shape: Sequence[int], generator: torch.Generator, *, offset: float = 0.0, pyramid: float = 0.0
) -> Tensor:
    """eps (N, C, h, w) ~ N(0, 1), on the CPU.

    `pyramid` adds coarser noise, see below; then `offset` so much of one number per picture and channel, which lets
    whole pictures become dark or light.
    """
    eps = torch.randn(shape, generator=generator)
    if pyramid:
        eps = add_pyramid(eps, generator, pyramid)
    if offset:
        eps = eps + offset * torch.randn((*shape[:2], 1, 1), generator=generator)
    return eps


def add_pyramid(eps: Tensor, generator: torch.Generator, discount: float) -> Tensor:
    """Multi-resolution noise, as sd-scripts' multires_noise_discount means it, from eps (N, C, h, w):

    (sqrt 2 eps + sum over i = 1, 2, ... of discount^i up(n_i)) / sqrt(its mean variance), n_i plain noise r^i times
    smaller, r drawn from 2 to 4 each time, up to a single row or column; `up` interpolates linearly. There the plain
    part is two draws, which are one of variance 2, and the sum is divided by the deviation that a batch happens to
    have: here by the expected one, so that a picture's noise does not depend on the others in its batch.
    """
    sides, total, variance = eps.shape[2:], 2**0.5 * eps, 2.0
    small, level = sides, 0
    while min(small) > 1:
        level += 1
        ratio = 2 + 2 * float(torch.rand((), generator=generator))
        small = torch.Size(max(1, int(side / ratio**level)) for side in sides)
        coarse = torch.randn((*eps.shape[:2], *small), generator=generator)
        total = total + discount**level * F.interpolate(coarse, sides, mode="bilinear")
        kept = [_variance_kept(*ends) for ends in zip(small, sides, strict=True)]
        variance += discount ** (2 * level) * kept[0] * kept[1]
    even: Tensor = total / variance**0.5
    return even


@lru_cache(maxsize=1024)
def _variance_kept(small: int, side: int) -> float:
    """Of plain noise along one axis, on average, when it is interpolated linearly from `small` to `side` places."""
    spread = F.interpolate(
        torch.eye(small)[None], side, mode="linear"
    )  # (1, small, side): each place's weights
    return float(spread.square().sum() / side)


@dataclass(frozen=True)
class NoiseSchedule:
    """The forward process of one base model: `abar` (T,) fp32 and what its UNet predicts."""

    abar: Tensor
    prediction: str

    def __post_init__(self) -> None:
        if self.prediction not in PREDICTIONS:
            raise ValueError(f"prediction {self.prediction!r} is unknown; known: {', '.join(PREDICTIONS)}")
        if self.prediction == "epsilon" and float(self.abar[-1]) < NO_SIGNAL:
            raise ValueError(
                "zero-terminal-SNR betas need v-prediction: at the last timestep the SNR is 0 and an epsilon "
                "loss would divide by it. Use prediction = 'v_prediction' or the plain betas."
            )

    @classmethod
    def from_scheduler(cls, scheduler: Any) -> NoiseSchedule:
        """From a diffusers scheduler; its config already tells zero-terminal betas from plain ones."""
        prediction = getattr(scheduler.config, "prediction_type", "epsilon")
        return cls(scheduler.alphas_cumprod.float().cpu(), prediction)

    def to(self, device: torch.device) -> NoiseSchedule:
        return NoiseSchedule(self.abar.to(device), self.prediction)

    def __len__(self) -> int:
        return len(self.abar)

    def _at(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """sqrt(abar_t) and sqrt(1 - abar_t), shaped to multiply `like`."""
        abar = self.abar[t].reshape(-1, *[1] * (like.dim() - 1))
        return abar.sqrt().to(like.dtype), (1 - abar).sqrt().to(like.dtype)

    def noise(self, z: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """z, eps (N, C, h, w), t (N,) integer timesteps -> z_t."""
        a, s = self._at(t, z)
        return a * z + s * eps

    def target(self, z: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """What the UNet should say at z_t: eps, or v = sqrt(abar) eps - sqrt(1 - abar) z."""
        if self.prediction == "epsilon":
            return eps
        a, s = self._at(t, z)
        return a * eps - s * z

    def snr(self, t: Tensor) -> Tensor:
        """Signal to noise at t: abar / (1 - abar), (N,)."""
        abar = self.abar[t]
        return abar / (1 - abar)

    def weight(self, name: str, t: Tensor, *, gamma: float = 5.0) -> Tensor:
        """Loss weight by name at t, (N,). See `WEIGHTINGS`."""
        if name not in WEIGHTINGS:
            raise ValueError(f"loss weighting {name!r} is unknown; known: {', '.join(WEIGHTINGS)}")
        return WEIGHTINGS[name](self.snr(t), gamma, self.prediction)


def _uniform(snr: Tensor, gamma: float, prediction: str) -> Tensor:
    return torch.ones_like(snr)


def _min_snr(snr: Tensor, gamma: float, prediction: str) -> Tensor:
    """min-SNR-gamma (arXiv 2303.09556): min(SNR, gamma)/SNR for epsilon, min(SNR, gamma)/(SNR + 1) for v."""
    return snr.clamp(max=gamma) / (snr if prediction == "epsilon" else snr + 1)


def _min_snr_floored(snr: Tensor, gamma: float, prediction: str) -> Tensor:
    """min-SNR on SNR + 1, for zero-terminal schedules: plain min-SNR gives weight 0 to the last timestep,
    where colours and layout are decided, so a model made from nothing would never learn it."""
    return (snr + 1).clamp(max=gamma) / (snr + 1)


WEIGHTINGS: dict[str, Callable[[Tensor, float, str], Tensor]] = {
    "uniform": _uniform,
    "min_snr": _min_snr,
    "min_snr_floored": _min_snr_floored,
}
