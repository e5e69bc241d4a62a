"""The DreamBooth loss (arXiv 2208.12242): MSE on the instance pictures plus lambda times MSE on the class."""

from __future__ import annotations

from torch import Tensor


def dreambooth(
    prediction: Tensor, target: Tensor, weight: Tensor, *, instances: int, prior_weight: float
) -> Tensor:
    """prediction, target (N, C, h, w) with the `instances` first, the class pictures after; weight (N,) by timestep.

    fp32 whatever the model computes in. Each part is a mean over its own pictures.
    """
    each = (prediction.float() - target.float()).square().mean((1, 2, 3)) * weight  # (N,)
    loss = each[:instances].mean()
    if len(each) > instances:
        loss = loss + prior_weight * each[instances:].mean()
    return loss
