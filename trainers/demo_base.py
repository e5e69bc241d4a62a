"""Make the demo base: a small latent-diffusion model of our own, from nothing, in diffusers' folder layout.

    python -m trainers.demo_base --minutes 120          # autoencoder, text encoder, UNet; resumes where it was
    python -m trainers.demo_base --check                # the bar it must pass, measured; sheet and README figures

The folder it writes (`presets/demo/base`) is opened by the very code that opens SD 1.5. `state.safetensors` lies
beside the result (git ignores it), so a run that was cut off goes on where it was, and one that ended goes on with
more `--minutes`. The learning rate follows a cosine over the *time* budget: a contended machine ends at zero too.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from trainers.demo_budget import Budget
from trainers.demo_check import check
from trainers.demo_data import write_sprites, write_views
from trainers.demo_models import new_scheduler, new_text_encoder, new_tokenizer, new_unet
from trainers.demo_scenes import DEMO, SIZE, training_scenes, training_things
from trainers.demo_vae import encode_scenes, train_vae
from trainers.demo_words import caption_ids, sample_captions, train_words
from trainers.diffusion import NoiseSchedule

SCENES_PER_THING = 100
WORD_STEPS = 1500


def draw_scenes(per_thing: int) -> np.ndarray:
    """-> uint8 [scene, SIZE, SIZE, 3], in the order of `training_scenes`."""
    return np.stack([np.asarray(scene.draw()) for scene in training_scenes(per_thing)])


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


def tokenizer_of(folder: Path) -> CLIPTokenizer:
    """The one in the folder: its text encoder knows the words by those numbers. Else a new one."""
    if (folder / "tokenizer" / "vocab.json").exists():
        found: CLIPTokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
        return found
    return new_tokenizer()


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
    tokenizer, schedule = tokenizer_of(args.out), NoiseSchedule.from_scheduler(new_scheduler()).to(device)
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
