"""The DreamBooth loss (arXiv 2208.12242): MSE on the instance pictures plus lambda times MSE on the class."""

from __future__ import annotations

from torch import Tensor


def dreambooth(prediction: Tensor, target: Tensor, weight: Tensor, mask: Tensor) -> Tensor:
    """prediction, target (N, C, h, w); weight (N,): each picture's share, 1/n of the n instances and lambda/m of the m
    class pictures, times what its timestep counts; mask (N, 1, h, w): what each latent counts, 1 on average in each
    picture. fp32 whatever the model computes in."""
    return ((prediction.float() - target.float()).square() * mask).mean((1, 2, 3)) @ weight
