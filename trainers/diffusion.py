"""Noising and targets: the only place that knows epsilon, v and SNR.

Symbols as in DDPM (arXiv 2006.11239) and the v paper (2202.00512): z a clean latent, eps the noise,
abar_t the cumulative product of 1 - beta, z_t = sqrt(abar_t) z + sqrt(1 - abar_t) eps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

PREDICTIONS = ("epsilon", "v_prediction")


def draw_noise(
    shape: Sequence[int], generator: torch.Generator, *, offset: float = 0.0, pyramid: float = 0.0
) -> Tensor:
    """eps (N, C, h, w) ~ N(0, 1), on the CPU.

    `offset` adds so much of one number per picture and channel, which lets whole pictures become dark or light.
    `pyramid` adds noise of a half, a quarter, ... of the size, each `pyramid` times as strong as the one before, and
    brings the sum back to variance 1.
    """
    eps = torch.randn(shape, generator=generator)
    if pyramid:
        height, width, factor, variance = *shape[2:], 1.0, 1.0
        while min(height, width) > 1:
            height, width, factor = height // 2, width // 2, factor * pyramid
            coarse = torch.randn((*shape[:2], height, width), generator=generator)
            eps = eps + factor * F.interpolate(coarse, tuple(shape[2:]), mode="nearest")
            variance += factor**2
        eps = eps / variance**0.5
    if offset:
        eps = eps + offset * torch.randn((*shape[:2], 1, 1), generator=generator)
    return eps


@dataclass(frozen=True)
class NoiseSchedule:
    """The forward process of one base model: `abar` (T,) fp32 and what its UNet predicts."""

    abar: Tensor
    prediction: str

    def __post_init__(self) -> None:
        if self.prediction not in PREDICTIONS:
            raise ValueError(f"prediction {self.prediction!r} is unknown; known: {', '.join(PREDICTIONS)}")
        if self.prediction == "epsilon" and float(self.abar[-1]) <= 0:
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
