"""A look at a latent while it is being denoised, without the cost of the VAE.

    rgb = latent · M + b        a (4, 3) matrix and a bias, one colour per latent cell

Every program ships such a matrix per model family, found by hand. Here it is fitted once to the model's own VAE
(least squares over what the VAE makes of smooth random latents), so a model of any family has the right one.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from lora_core.upcast import upcast

SIDE, COUNT = 16, 6  # latents the fit looks at: 1,536 cells for 15 unknowns


class LatentPreview:
    """`image(latents)` -> the batch as a nearly square grid, one pixel per latent cell."""

    def __init__(self, vae: Any) -> None:
        self.matrix, self.bias = fit(vae)

    @torch.no_grad()
    def image(self, latents: Tensor) -> Image.Image:
        """latents (N, C, h, w), as the denoiser has them -> RGB; the last row's empty places are gray."""
        cells = latents.detach().float().cpu().movedim(1, -1)  # (N, h, w, C)
        rgb = ((cells @ self.matrix + self.bias).clamp(-1, 1) + 1) * 127.5
        number, high, wide = rgb.shape[:3]
        columns = math.ceil(math.sqrt(number))
        rows = math.ceil(number / columns)
        grid = torch.full((rows * columns, high, wide, 3), 127.5)
        grid[:number] = rgb
        grid = (
            grid.reshape(rows, columns, high, wide, 3).transpose(1, 2).reshape(rows * high, columns * wide, 3)
        )
        return Image.fromarray(grid.round().to(torch.uint8).numpy())


@torch.no_grad()
def fit(vae: Any) -> tuple[Tensor, Tensor]:
    """-> M (C, 3) and b (3,), fp32 on the CPU, for latents scaled as the denoiser's."""
    channels, generator = vae.config.latent_channels, torch.Generator("cpu").manual_seed(0)
    coarse = torch.randn(COUNT, channels, 4, 4, generator=generator)
    smooth = F.interpolate(coarse, (SIDE, SIDE), mode="bicubic")
    with upcast(vae):
        latents = (smooth / vae.config.scaling_factor).to(vae.device, vae.dtype)
        pixels = vae.decode(latents).sample.float().cpu()
    colours = F.interpolate(pixels, (SIDE, SIDE), mode="area").movedim(1, -1).reshape(-1, 3)
    cells = smooth.movedim(1, -1).reshape(-1, channels)
    known = torch.cat([cells, torch.ones(len(cells), 1)], dim=1)
    solution = torch.linalg.lstsq(known, colours).solution  # (C + 1, 3)
    return solution[:channels], solution[channels]
