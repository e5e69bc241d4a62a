"""The demo base's autoencoder: its training, and the latents of the scenes."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from trainers.demo_budget import Budget
from trainers.demo_models import SCALING, new_vae
from trainers.demo_scenes import SIZE


def scene_tensor(images: list[np.ndarray]) -> Tensor:
    """uint8 HWC pictures -> float NCHW in -1..1, channels last (a quarter faster for convolutions on a CPU)."""
    batch = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 127.5 - 1
    return batch.contiguous(memory_format=torch.channels_last)


def vae_batch(scenes: np.ndarray, side: int, count: int, rng: np.random.Generator) -> Tensor:
    """Random crops of `side` pixels; a quarter with permuted colour channels, for colours no object has."""
    batch = []
    for i in rng.integers(len(scenes), size=count):
        x, y = rng.integers(SIZE - side + 1, size=2)
        crop = scenes[i, y : y + side, x : x + side]
        batch.append(crop[:, :, rng.permutation(3)] if rng.random() < 0.25 else crop)
    return scene_tensor(batch)


def train_vae(scenes: np.ndarray, minutes: float, folder: Path, device: torch.device) -> AutoencoderKL:
    """Reconstruction (L2, a little L1) with a KL of 1e-6; then latents are centred and scaled in the weights.

    Early learning is bound by the number of steps, not of pixels: the first 60 % of the time goes to crops of
    half the side, four times as many steps; the rest to whole pictures, whose group-norm statistics differ.
    """
    torch.manual_seed(0)
    vae = new_vae().to(device, memory_format=torch.channels_last)
    nn.init.constant_(
        vae.quant_conv.bias[vae.config.latent_channels :].detach(), -6
    )  # begin with little noise
    optimizer = torch.optim.AdamW(vae.parameters(), lr=1e-3, betas=(0.9, 0.99), weight_decay=1e-3)
    rng, budget, step = np.random.default_rng(1), Budget(minutes), 0
    while not budget.over:
        x = vae_batch(scenes, SIZE // 2 if budget.done < 0.6 else SIZE, 8, rng).to(device)
        posterior = vae.encode(x).latent_dist
        error = vae.decode(posterior.sample()).sample - x
        loss = error.square().mean() + 0.1 * error.abs().mean() + 1e-6 * posterior.kl().mean()
        for group in optimizer.param_groups:
            group["lr"] = budget.rate(2e-3, warmup_s=30)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        step += 1
        if step % 25 == 0:
            db = -10 * math.log10(error.detach().square().mean().item() / 4)
            print(f"vae step {step}, {budget.elapsed_s / 60:.1f} min, {db:.1f} dB", flush=True)
    vae.eval().requires_grad_(False)
    normalise_latents(vae, scene_tensor(list(scenes[:: max(1, len(scenes) // 512)])).to(device))
    vae.save_pretrained(folder / "vae")
    return vae


@torch.no_grad()
def normalise_latents(vae: AutoencoderKL, pictures: Tensor) -> None:
    """Fold each latent channel's mean and spread into the 1x1 convolutions around the latent.

    After this `latent * SCALING` has mean 0 and deviation 1 per channel, so a pipeline needs no shift.
    """
    latents = torch.cat([vae.encode(part).latent_dist.mean for part in torch.split(pictures, 64)])
    mean = latents.mean((0, 2, 3))  # (4,)
    factor = 1 / (SCALING * latents.std((0, 2, 3)))  # new = (old - mean) * factor
    quant, post = vae.quant_conv, vae.post_quant_conv
    n = len(mean)
    quant.weight[:n] *= factor[:, None, None, None]
    quant.bias[:n] = (quant.bias[:n] - mean) * factor
    quant.bias[n:] += 2 * factor.log()  # rows n.. give log variances
    post.bias += (post.weight[:, :, 0, 0] * mean).sum(1)
    post.weight /= factor[None, :, None, None]


@torch.no_grad()
def encode_scenes(vae: AutoencoderKL, scenes: np.ndarray) -> tuple[Tensor, Tensor]:
    """-> mean and std of the scaled latents, (scenes, 4, SIZE/4, SIZE/4) each."""
    means, stds = [], []
    for start in range(0, len(scenes), 64):
        posterior = vae.encode(scene_tensor(list(scenes[start : start + 64])).to(vae.device)).latent_dist
        means.append(posterior.mean * SCALING)
        stds.append(posterior.std * SCALING)
    return torch.cat(means), torch.cat(stds)
