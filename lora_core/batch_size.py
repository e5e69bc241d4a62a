"""How many pictures fit into memory at once: a guess from the models' widths, and how to tell that it was wrong."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import psutil
import torch

from lora_core.generation import GenerationRequest

if TYPE_CHECKING:
    from lora_core.pipeline import LivePipeline

MAX_BATCH = 16  # beyond it a batch is hardly faster per picture, and a stop waits longer for its step
USABLE = 0.8  # of the free memory: the rest is for what the estimate does not know


def batch_that_fits(pipe: LivePipeline, request: GenerationRequest) -> int:
    """-> pictures (1..MAX_BATCH) that free memory has room for, by a rough estimate that errs towards few."""
    parts = pipe.pipeline
    scale, side = int(parts.vae_scale_factor), pipe.resolution
    latent_cells = ((request.height or side) // scale) * ((request.width or side) // scale)
    rows = 2 if request.guidance > 1 else 1
    # Values alive at once, in maps of the first and widest-open level: about 12 skips and, in a feed-forward,
    # 8 + 4 times the channels, with as much again for what lies between; the decoder keeps about 4 maps at full size.
    denoising = rows * latent_cells * 32 * _channels(parts.unet)[0] * _bytes_per_value(parts.unet)
    decoding = latent_cells * scale**2 * 4 * _channels(parts.vae)[:2][-1] * _bytes_per_value(parts.vae)
    room = int(_free_bytes(torch.device(parts._execution_device)) * USABLE)
    fitting = room // denoising
    if getattr(parts.vae, "use_slicing", False):
        fitting = (
            fitting if decoding <= room else 1
        )  # the decoding comes after the denoising, not on top of it
    else:
        fitting = min(fitting, room // decoding)
    return max(1, min(MAX_BATCH, fitting))


def _channels(model: Any) -> Sequence[int]:
    return tuple(model.config.get("block_out_channels") or (320,))


def _bytes_per_value(model: Any) -> int:
    if model.config.get(
        "force_upcast"
    ):  # SDXL's decoder overflows in half precision and is widened for the decoding
        return 4
    return max(2, int(model.dtype.itemsize))  # fp8 is storage, not what is calculated in


def _free_bytes(device: torch.device) -> int:
    if device.type != "cuda":
        return int(psutil.virtual_memory().available)
    ours = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # kept by torch for reuse
    return int(torch.cuda.mem_get_info(device)[0]) + ours


def ran_out_of_memory(problem: RuntimeError) -> bool:
    """torch has a class for it on CUDA alone; on the CPU and on Apple's GPUs the words must tell. "Primitive" is
    oneDNN's, which says no more where it gets no working memory."""
    words = ("can't allocate memory", "not enough memory", "out of memory", "could not create a primitive")
    return isinstance(problem, torch.OutOfMemoryError) or any(w in str(problem) for w in words)
