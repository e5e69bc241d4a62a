"""One UNet call, as the steps and the measurements make it: with the LoRA, or as the base model alone would answer."""

from __future__ import annotations

import torch
from torch import Tensor

from trainers.batches import Batch
from trainers.bench import Bench
from trainers.conditioning import added_conditions
from trainers.words import Words


def predict(bench: Bench, batch: Batch, z_t: Tensor, words: Words | None = None) -> Tensor:
    """-> what the UNet says of z_t (N, 4, h, w) at the batch's timesteps and prompts, like z_t."""
    unet = bench.live.pipeline.unet
    with bench.accelerator.autocast():
        said = (words or bench.words)(batch.captions).to(bench.device, unet.dtype)
        prediction: Tensor = unet(
            z_t.to(unet.dtype),
            batch.t,
            encoder_hidden_states=said.hidden,
            added_cond_kwargs=added_conditions(said, batch.time_ids),
        ).sample
    return prediction


@torch.no_grad()
def predict_as_base(bench: Bench, batch: Batch, z_t: Tensor) -> Tensor:
    """The same without the LoRA, in the UNet and in the prompts."""
    with bench.form.disabled():
        return predict(bench, batch, z_t, bench.base_words)
