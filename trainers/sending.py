"""From the CPU to the device, without the host waiting there."""

from __future__ import annotations

import torch
from torch import Tensor


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy from ordinary memory to a GPU waits until all that the GPU was told before is done; from pinned memory it
    is only put in order with what is computed from it."""
    if device.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    # contiguous: an expanded one, as one latent for all timesteps of the held-out loss, cannot be pinned
    return tensor.contiguous().pin_memory().to(device, non_blocking=True)


def fetched(tensor: Tensor) -> Tensor:
    """From a GPU into pinned memory, which holds it when the GPU has come to that. Only to be `sent` again, which is in
    order with it; whoever reads it here has to wait first."""
    if tensor.device.type != "cuda":
        return tensor
    there = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return there.copy_(tensor, non_blocking=True)
