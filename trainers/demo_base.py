"""Make the demo base: a small latent-diffusion model of our own, from nothing, in diffusers' folder layout.

    python -m trainers.demo_base --minutes 120          # autoencoder, text encoder, UNet; resumes where it was
    python -m trainers.demo_base --check                # the bar it must pass, measured; sheet and README figures

The folder it writes (`presets/demo/base`) is opened by the very code that opens SD 1.5. State lies beside the
result until `--finish`, so a run can be continued with a larger budget: the learning rate follows a cosine over
the *time* budget, which makes a contended machine end at zero all the same.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from trainers.demo_check import check
from trainers.demo_data import write_sprites, write_views
from trainers.demo_models import SCALING, new_scheduler, new_text_encoder, new_tokenizer, new_unet, new_vae
from trainers.demo_scenes import DEMO, SIZE, training_scenes, training_things
from trainers.demo_words import caption_ids, sample_captions, train_words
from trainers.diffusion import NoiseSchedule

SCENES_PER_THING = 100
WORD_STEPS = 1500


class Budget:
    """Wall-clock training time of one phase, over all its sessions."""

    def __init__(self, minutes: float, spent_s: float = 0.0) -> None:
        self.total_s = minutes * 60
        self.spent_s = spent_s
        self._began = time.monotonic()

    @property
    def elapsed_s(self) -> float:
        return self.spent_s + time.monotonic() - self._began

    @property
    def over(self) -> bool:
        return self.elapsed_s >= self.total_s

    @property
    def done(self) -> float:
        return min(1.0, self.elapsed_s / self.total_s)

    def rate(self, peak: float, *, warmup_s: float = 60.0, floor: float = 0.01) -> float:
        """Learning rate now: linear warm-up, then cosine to `floor * peak` over the time budget."""
        warm = min(1.0, self.elapsed_s / warmup_s)
        return peak * warm * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * self.done)))


def scene_tensor(images: list[np.ndarray]) -> Tensor:
    """uint8 HWC pictures -> float NCHW in -1..1, channels last (a quarter faster for convolutions on a CPU)."""
    batch = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 127.5 - 1
    return batch.contiguous(memory_format=torch.channels_last)


def draw_scenes(per_thing: int) -> np.ndarray:
    """-> uint8 [scene, SIZE, SIZE, 3], in the order of `training_scenes`."""
    return np.stack([np.asarray(scene.draw()) for scene in training_scenes(per_thing)])


# --- autoencoder ---------------------------------------------------------------------------------------------


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


# --- UNet ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def encode_scenes(vae: AutoencoderKL, scenes: np.ndarray) -> tuple[Tensor, Tensor]:
    """-> mean and std of the scaled latents, (scenes, 4, SIZE/4, SIZE/4) each."""
    means, stds = [], []
    for start in range(0, len(scenes), 64):
        posterior = vae.encode(scene_tensor(list(scenes[start : start + 64])).to(vae.device)).latent_dist
        means.append(posterior.mean * SCALING)
        stds.append(posterior.std * SCALING)
    return torch.cat(means), torch.cat(stds)


# Colours are learnt at once and draw every attention head to their word, so the object's box counts three times.
OBJECT_WEIGHT = 3.0


def object_weights(per_thing: int) -> Tensor:
    """-> loss weight of every latent cell, (scenes, 1, SIZE/4, SIZE/4), mean 1 in each scene."""
    maps = []
    for s in training_scenes(per_thing):
        side = s.scale * SIZE / 4
        left, top = s.x * (SIZE / 4 - side), s.y * (SIZE / 4 - side)
        cells = torch.arange(SIZE // 4) + 0.5
        column, row = (cells > left) & (cells < left + side), (cells > top) & (cells < top + side)
        weight = torch.where(row[:, None] & column[None, :], OBJECT_WEIGHT, 1.0)
        maps.append(weight / weight.mean())
    return torch.stack(maps)[:, None]


def words_of(args: argparse.Namespace, tokenizer: CLIPTokenizer, captions: Tensor) -> CLIPTextModel:
    """The text encoder in the folder, else a new one, trained (two minutes); it stays as it is from here on."""
    folder = args.out / "text_encoder"
    if (folder / "config.json").exists():
        encoder: CLIPTextModel = CLIPTextModel.from_pretrained(folder).float()
        return encoder.eval().requires_grad_(False)
    torch.manual_seed(0)
    encoder = new_text_encoder(tokenizer)
    train_words(encoder, tokenizer, captions, steps=WORD_STEPS)
    encoder.half().save_pretrained(folder)  # what ships is what the UNet sees
    return encoder.float()


def train_unet(scenes: np.ndarray, args: argparse.Namespace, vae: AutoencoderKL) -> None:
    """v-prediction on cached latents with floored min-SNR, AdamW, EMA; writes the folder as it goes."""
    device, per_thing = vae.device, len(scenes) // len(training_things())
    tokenizer, schedule = new_tokenizer(), NoiseSchedule.from_scheduler(new_scheduler()).to(device)
    captions = caption_ids(tokenizer, per_thing)
    encoder = words_of(args, tokenizer, captions).to(device)
    torch.manual_seed(0)
    unet = new_unet().to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(
        unet.parameters(), lr=args.lr, betas=(0.9, 0.99), weight_decay=0.01, fused=True
    )
    ema = {name: p.detach().clone() for name, p in unet.named_parameters()}
    step, spent = load_state(args.out, unet, ema, optimizer)
    mean, std = encode_scenes(vae, scenes)
    cells = object_weights(per_thing).to(device)
    torch.manual_seed(1000 + step)
    budget, saved, losses = Budget(args.minutes, spent), time.monotonic(), []
    while not budget.over:
        rows = torch.randint(len(mean), (args.batch,))
        z = mean[rows] + std[rows] * torch.randn_like(mean[rows])
        # the later of two: words decide at high noise, where a uniform draw is too seldom
        t = torch.randint(len(schedule), (2, args.batch), device=device).amax(0)
        eps = torch.randn_like(z)
        with torch.no_grad():
            words = encoder(sample_captions(captions, rows).to(device)).last_hidden_state  # (N, length, 128)
        with torch.autocast(device.type, torch.bfloat16):
            v = unet(schedule.noise(z, eps, t), t, words).sample
        error = v.float() - schedule.target(z, eps, t)
        loss = (schedule.weight("min_snr_floored", t) * (cells[rows] * error.square()).mean((1, 2, 3))).mean()
        for group in optimizer.param_groups:
            group["lr"] = budget.rate(args.lr)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        step += 1
        decay = min(0.9995, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(ema.values()), [p.detach() for p in unet.parameters()], 1 - decay)
        losses.append(loss.detach())
        if step % 50 == 0:
            print(
                f"unet step {step}, {budget.elapsed_s / 60:.1f} of {args.minutes:g} min, "
                f"loss {torch.stack(losses[-200:]).mean().item():.4f}",
                flush=True,
            )
        if time.monotonic() - saved > 240 or budget.over:
            save_state(args.out, unet, ema, optimizer, step=step, spent_s=budget.elapsed_s)
            save_base(args.out, vae, encoder, unet, ema, tokenizer)
            saved = time.monotonic()


def save_state(
    folder: Path, model: nn.Module, ema: dict[str, Tensor], optimizer: torch.optim.Optimizer, **facts: float
) -> None:
    tensors = {f"ema.{k}": v for k, v in ema.items()}
    for name, p in model.named_parameters():
        tensors[f"model.{name}"] = p.detach()
        for key in ("exp_avg", "exp_avg_sq", "step"):
            tensors[f"{key}.{name}"] = optimizer.state[p][key]
    partial = folder / "state.partial"
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(tensors, partial, metadata={k: repr(v) for k, v in facts.items()})
    partial.replace(folder / "state.safetensors")


def load_state(
    folder: Path, unet: nn.Module, ema: dict[str, Tensor], optimizer: torch.optim.Optimizer
) -> tuple[int, float]:
    """Continue where `state.safetensors` ends -> (step, seconds spent). Without one, (0, 0.0): from the UNet in the
    folder, if there is one, with a fresh optimizer."""
    path = folder / "state.safetensors"
    if not path.exists():
        warm_start(folder, unet, ema)
        return 0, 0.0
    with safe_open(path, "pt") as state:
        facts = state.metadata()
        with torch.no_grad():
            for name, p in unet.named_parameters():
                p.copy_(state.get_tensor(f"model.{name}"))
                ema[name].copy_(state.get_tensor(f"ema.{name}"))
                optimizer.state[p] = {
                    key: state.get_tensor(f"{key}.{name}").to(p.device)
                    for key in ("exp_avg", "exp_avg_sq", "step")
                }
    return int(facts["step"]), float(facts["spent_s"])


def warm_start(folder: Path, unet: nn.Module, ema: dict[str, Tensor]) -> None:
    if (folder / "unet" / "config.json").exists():
        print(f"going on from the weights in {folder / 'unet'}", flush=True)
        unet.load_state_dict(UNet2DConditionModel.from_pretrained(folder / "unet").float().state_dict())
        with torch.no_grad():
            for name, p in unet.named_parameters():
                ema[name].copy_(p)


def save_base(
    folder: Path,
    vae: AutoencoderKL,
    encoder: CLIPTextModel,
    unet: nn.Module,
    ema: dict[str, Tensor],
    tokenizer: CLIPTokenizer,
) -> None:
    """The EMA weights as a diffusers folder, fp16."""
    averaged = copy.deepcopy(unet)
    averaged.load_state_dict(ema)
    pipeline = StableDiffusionPipeline(
        vae=copy.deepcopy(vae),
        text_encoder=copy.deepcopy(encoder),
        tokenizer=tokenizer,
        unet=averaged,
        scheduler=new_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.to(torch.float16).save_pretrained(folder)
    (folder / "tokenizer" / "vocab.json").write_text(json.dumps(tokenizer.get_vocab(), ensure_ascii=False))
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "tokenizer" / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m trainers.demo_base", description=__doc__)
    parser.add_argument(
        "--minutes", type=float, default=120, help="training time of the UNet, over all sessions"
    )
    parser.add_argument("--vae-minutes", type=float, default=20)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=1.2e-3)
    parser.add_argument("--out", type=Path, default=DEMO / "base")
    parser.add_argument("--check", action="store_true", help="measure the bar; write the sheet and figures")
    parser.add_argument("--data", action="store_true", help="write the views of held-out subjects and style")
    parser.add_argument(
        "--sprites", type=Path, help="make the sprites from this folder of Fluent Emoji 3D .webp"
    )
    parser.add_argument("--noto", type=Path, help="and from this NotoColorEmoji.ttf")
    args = parser.parse_args()
    if args.sprites:
        return write_sprites(args.sprites, args.noto)
    if args.data:
        return write_views()
    if args.check:
        check(args.out)
        return None
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    scenes = draw_scenes(SCENES_PER_THING)
    if (args.out / "vae" / "config.json").exists():
        vae = AutoencoderKL.from_pretrained(args.out / "vae").to(device).eval().requires_grad_(False)
    else:
        vae = train_vae(scenes, args.vae_minutes, args.out, device)
    train_unet(scenes, args, vae)
    return None


if __name__ == "__main__":
    main()
