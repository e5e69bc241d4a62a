"""Figures about pictures: likeness, obedience to a named background, drift. DreamBooth's three questions.

Two spaces, because either alone can be fooled: 8 x 8 colour thumbnails (layout and colour) and the latents of
the model's own VAE (shape). Distances are root mean squares, so that they do not depend on the picture's size.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lora_core.upcast import upcast
from trainers.demo_scenes import COLOURS

Spaces = dict[str, Tensor]  # "thumbnail" (N, 192) and "latent" (N, C*h*w)


def rgb(images: Sequence[Image.Image], size: tuple[int, int] | None = None) -> Tensor:
    """-> (N, 3, h, w) in -1..1, all at the first one's size unless given."""
    size = size or images[0].size
    fitted = [
        i.convert("RGB") if i.size == size else i.convert("RGB").resize(size, Image.Resampling.LANCZOS)
        for i in images
    ]
    return torch.stack(
        [torch.from_numpy(np.asarray(i).copy()).permute(2, 0, 1).float() / 127.5 - 1 for i in fitted]
    )


@torch.no_grad()
def embed(images: Sequence[Image.Image], vae: Any, size: tuple[int, int] | None = None) -> Spaces:
    """Both spaces of each picture."""
    pixels = rgb(images, size)
    small = torch.nn.functional.interpolate(pixels, (8, 8), mode="area").flatten(1)
    with upcast(vae):
        parts = [
            vae.encode(part.to(vae.device, vae.dtype)).latent_dist.mean.float().cpu().flatten(1)
            for part in torch.split(pixels, 16)
        ]
    return {"thumbnail": small, "latent": torch.cat(parts) * vae.config.scaling_factor}


def distances(a: Tensor, b: Tensor) -> Tensor:
    """(n, d), (m, d) -> (n, m) root mean square distances."""
    table: Tensor = torch.cdist(a, b) / a.shape[1] ** 0.5
    return table


def nearest_colour(image: Image.Image) -> str:
    """Of the named colours, the one nearest to the middle (median) of the picture's edge."""
    pixels = np.asarray(image.convert("RGB")).astype(np.float32)
    rim = max(1, min(image.size) // 20)
    edge = np.concatenate(
        [part.reshape(-1, 3) for part in (pixels[:rim], pixels[-rim:], pixels[:, :rim], pixels[:, -rim:])]
    )
    middle = np.median(edge, axis=0)
    return min(COLOURS, key=lambda name: float(np.square(middle - np.array(COLOURS[name])).sum()))


def named_background(prompt: str) -> str | None:
    """The colour in "... on a [striped] red background", where a prompt names one and it is plain."""
    match = re.search(rf"\ba ({'|'.join(COLOURS)}) background\b", re.sub(r"\ban\b", "a", prompt))
    return match[1] if match else None
