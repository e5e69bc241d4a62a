"""From the CPU to the device, without the host waiting there."""

from __future__ import annotations

import torch
from torch import Tensor


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy from ordinary memory to a GPU waits until all that the GPU was told before is done; from pinned memory it
    is only put in order with what is computed from it."""
    if device.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
