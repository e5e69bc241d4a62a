"""The demo base's architecture: every part of a latent-diffusion model, small, in diffusers' own classes."""

from __future__ import annotations

from itertools import pairwise

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from tokenizers import pre_tokenizers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from trainers.demo_scenes import COLOURS, PATTERNS, SIZE, things

SCALING = 0.18215  # SD 1.x's own factor; latents are rescaled inside the VAE until this is right

END = "</w>"  # of a word, in CLIP's spelling
TEXT_LENGTH = 32  # tokens; every one beyond a caption dilutes its words

COMMON_WORDS = (
    "a an the of on in at by and with photo picture painting drawing style color small large big little red blue "
    "background portrait close up view beautiful cute simple soft warm light dark new old wooden glass paper "
    "person man woman girl boy child face hair eyes hand city street forest beach snow mountain night day sky sea "
    "tree flower grass water fire stone floor table room window door wall best quality detailed high sharp toy"
)


def new_tokenizer(length: int = TEXT_LENGTH) -> CLIPTokenizer:
    """CLIP's byte-level BPE with a vocabulary of our own: every word a caption uses is one token, any other
    word falls into pieces down to single bytes, so every prompt tokenises."""
    words = {*COMMON_WORDS.split(), *COLOURS, *PATTERNS}
    words |= {word for t in things().values() for word in (t.name, t.kind)}
    merges = merges_for(sorted(words))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = [*alphabet, *(c + END for c in alphabet), *(a + b for a, b in merges)]
    vocab = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    for special in ("<|startoftext|>", "<|endoftext|>"):
        vocab[special] = len(vocab)
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=length)


def merges_for(words: list[str]) -> list[tuple[str, str]]:
    """Merges that make one token of each word, the same in every process.

    The library's own trainer breaks ties by the order of a hash table: of 1,096 tokens some twenty changed places
    from run to run. Later merges rank behind, so they can't take an earlier word apart.
    """
    rank: dict[tuple[str, str], int] = {}
    for word in words:
        pieces = [*word[:-1], word[-1] + END]
        while len(pieces) > 1:
            pairs = list(pairwise(pieces))
            at = min(range(len(pairs)), key=lambda i: (rank.get(pairs[i], len(rank)), i))
            rank.setdefault(pairs[at], len(rank))
            pieces[at : at + 2] = ["".join(pairs[at])]
    return list(rank)


def new_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """Words begin far apart: with CLIP's own small initial scale, two layers of width 128 learn them slowly."""
    encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=512,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=tokenizer.model_max_length,
            projection_dim=128,
            hidden_act="quick_gelu",
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    torch.nn.init.normal_(encoder.get_input_embeddings().weight, std=1.0)
    return encoder


def new_vae() -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(32, 64, 96),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=16,
        sample_size=SIZE,
        scaling_factor=SCALING,
    )


def new_unet() -> UNet2DConditionModel:
    """No attention at the highest resolution: a third faster on a CPU, and 16x16 latents lose little by it."""
    return UNet2DConditionModel(
        sample_size=SIZE // 4,
        block_out_channels=(64, 128, 192),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=128,
        attention_head_dim=(2, 4, 6),
        norm_num_groups=16,
    )


def new_scheduler() -> DDIMScheduler:
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        prediction_type="v_prediction",
        clip_sample=False,  # the default clips latents: the same weights scored 9 of 126 with it
        set_alpha_to_one=False,
        steps_offset=1,
    )
