"""Small base models with the full topology of the real ones: the same blocks, names and counts, only narrow.

    pipe = small_pipeline("sd1")                        # StableDiffusionPipeline, works end to end
    pipe = small_pipeline("sdxl", text_layers=4)        # deeper text encoders where a test wants them
    pipe = small_pipeline("sd1", clip_vocabulary=True)  # CLIP's own 49,408 tokens, and what else a single file needs
    save_folder(pipe, path); save_ldm_single_file(pipe, path)

Pictures are 128 x 128, so that the innermost 2 x 2 latent still has something to attend to: with one token a
softmax is constant and changes of to_q and to_k there would show nowhere. Each call returns fresh modules.
"""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from trainers.demo_models import new_tokenizer

FAMILIES = ("sd1", "sd2", "sdxl")
TEXT_WIDTH = 32
TEXT_WIDTH_2 = 48  # SDXL's second encoder; unequal, so that exchanged encoders cannot go unseen
LATENT = 16  # 128 pixels


def small_pipeline(
    family: str = "sd1",
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    *,
    text_layers: int = 2,
    clip_vocabulary: bool = False,
) -> Any:
    """-> a diffusers pipeline of `family` on the CPU, in eval mode, its modules shared with no other call.

    `text_layers`: of each text encoder; `clip_vocabulary`: CLIP's tokenizer in place of a small one, and heads and
    groups as a single file means them without saying so."""
    template = _template(family, seed, text_layers, clip_vocabulary)
    own = ("unet", "vae", "text_encoder", "text_encoder_2", "scheduler")
    parts = {k: copy.deepcopy(v) if k in own else v for k, v in template.items()}
    if family == "sdxl":
        pipe = StableDiffusionXLPipeline(**parts, force_zeros_for_empty_prompt=True, add_watermarker=False)
    else:
        pipe = StableDiffusionPipeline(
            **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
        )
    pipe.set_progress_bar_config(disable=True)
    if dtype != torch.float32:
        for component in pipe.components.values():
            if isinstance(component, nn.Module):
                nn.Module.to(component, dtype=dtype)  # diffusers' own `to` logs a line per model
    return pipe


def save_folder(pipe: Any, path: Path) -> Path:
    """The pipeline as a diffusers folder -> its path."""
    pipe.save_pretrained(path, safe_serialization=True)
    return Path(path)


def save_ldm_single_file(pipe: Any, path: Path, metadata: dict[str, str] | None = None) -> Path:
    """A pipeline as one `.safetensors` in the layout of the original checkpoints -> its path."""
    save_file(ldm_tensors(pipe), path, metadata=metadata)
    return Path(path)


def ldm_tensors(pipe: Any) -> dict[str, Tensor]:
    """As the original checkpoints have them; SD 2's with the last layer of OpenCLIP that no Stable Diffusion uses."""
    from lora_core.families import family_of_unet  # noqa: PLC0415 - this module must load without them
    from lora_core.ldm_names import PREFIXES, as_in_file, ldm_keys  # noqa: PLC0415

    family = family_of_unet(pipe.unet).key
    found: dict[str, dict[int, Tensor]] = {}
    for component in PREFIXES[family]:
        state = getattr(pipe, component).state_dict()
        for name, key in ldm_keys(family, component, state).items():
            found.setdefault(key.name, {})[key.part] = state[name]
    tensors = {
        k: as_in_file(k, [parts[n] for n in sorted(parts)]).clone().contiguous() for k, parts in found.items()
    }
    if family == "sd2":
        layers = f"{PREFIXES['sd2']['text_encoder']}transformer.resblocks."
        last = pipe.text_encoder.config.num_hidden_layers - 1
        tensors |= {
            k.replace(f"{layers}{last}.", f"{layers}{last + 1}."): torch.randn(t.shape).to(t.dtype)
            for k, t in tensors.items()
            if k.startswith(f"{layers}{last}.")
        }
    return tensors


@functools.cache
def _template(family: str, seed: int, text_layers: int, clip_vocabulary: bool) -> dict[str, Any]:
    tokenizer = _tokenizer(clip_vocabulary, "!" if family == "sd2" else "<|endoftext|>")
    parts: dict[str, Any] = {
        "tokenizer": tokenizer,
        "vae": _vae(family),
        "unet": _unet(family, clip_vocabulary),
    }
    act = "quick_gelu" if family != "sd2" else "gelu"
    parts["text_encoder"] = CLIPTextModel(_text_config(tokenizer, TEXT_WIDTH, text_layers, act))
    if family == "sdxl":
        parts["tokenizer_2"] = _tokenizer(clip_vocabulary, "!")
        parts["text_encoder_2"] = CLIPTextModelWithProjection(
            _text_config(tokenizer, TEXT_WIDTH_2, text_layers, "gelu")
        )
    generator = torch.Generator().manual_seed(seed)
    for name in ("unet", "vae", "text_encoder", "text_encoder_2"):
        if name in parts:
            _fill(parts[name], generator)
            parts[name].eval().requires_grad_(False)
    parts["scheduler"] = _scheduler(family)
    return parts


@functools.cache
def _tokenizer(clip_vocabulary: bool, pad: str) -> CLIPTokenizer:
    """OpenCLIP fills short prompts with token 0, which is "!" in CLIP's own vocabulary."""
    if clip_vocabulary:
        from lora_core.base_parts import clip_tokenizer  # noqa: PLC0415 - this module must load without it

        return clip_tokenizer(pad)
    return new_tokenizer(77)


@torch.no_grad()
def _fill(model: nn.Module, generator: torch.Generator) -> None:
    """Weights N(0, 1/fan in), norms near one, every bias away from zero: nothing is a no-op by accident."""
    for name, p in model.named_parameters():
        noise = torch.randn(p.shape, generator=generator)
        if p.dim() >= 2:
            p.copy_(noise / p[0].numel() ** 0.5)
        else:
            p.copy_(0.1 * noise + (1.0 if name.endswith("weight") else 0.0))


def _text_config(tokenizer: CLIPTokenizer, width: int, layers: int, act: str) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        # 64 wide heads as in CLIP would be one head here
        num_attention_heads=1 if width < 64 else width // 64,
        max_position_embeddings=77,
        projection_dim=width,
        hidden_act=act,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def _vae(family: str) -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(32, 32, 64, 64),
        layers_per_block=2,
        latent_channels=4,
        norm_num_groups=32,
        sample_size=LATENT * 8,
        scaling_factor=0.13025 if family == "sdxl" else 0.18215,
        force_upcast=family == "sdxl",
    )


def _unet(family: str, single: bool) -> UNet2DConditionModel:
    groups = 32 if single or family == "sd1" else 8
    if family == "sdxl":
        return UNet2DConditionModel(
            sample_size=LATENT,
            block_out_channels=(32, 64, 64),
            layers_per_block=2,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=[1, 2, 10],
            cross_attention_dim=TEXT_WIDTH + TEXT_WIDTH_2,
            attention_head_dim=[1, 1, 1] if single else [2, 4, 4],  # heads; of 64 channels in a single file
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=TEXT_WIDTH_2 + 6 * 8,
            norm_num_groups=groups,
        )
    return UNet2DConditionModel(
        sample_size=LATENT,
        block_out_channels=(32, 64, 64, 64),
        layers_per_block=2,
        down_block_types=(*("CrossAttnDownBlock2D",) * 3, "DownBlock2D"),
        up_block_types=("UpBlock2D", *("CrossAttnUpBlock2D",) * 3),
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=8 if family == "sd1" else [1, 1, 1, 1] if single else [2, 4, 4, 4],
        use_linear_projection=family == "sd2",
        norm_num_groups=groups,
    )


def _scheduler(family: str) -> DDIMScheduler | EulerDiscreteScheduler:
    common = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
    if family == "sdxl":
        return EulerDiscreteScheduler(**common, timestep_spacing="leading")
    prediction = "v_prediction" if family == "sd2" else "epsilon"
    return DDIMScheduler(**common, prediction_type=prediction, clip_sample=False, set_alpha_to_one=False)
