"""Files of other models and other files altogether are refused by what they are. The keys are of files out there."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lora_core.errors import FileRefused
from lora_core.formats import describe_adapter, read_adapter
from tests.lora_core.adapters_on_disk import PAIR, saved

DOWN, A = ".lora_down.weight", ".lora_A.weight"
# a key, how wide its input is -> what the file is
LORAS: dict[str, tuple[str, int]] = {
    "lora_unet_double_blocks_0_img_attn_qkv" + DOWN: ("a Flux", 3072),
    "transformer.single_transformer_blocks.0.attn.to_q" + A: ("a Flux", 3072),
    "double_blocks.0.processor.proj_lora1.down.weight": ("a Flux", 3072),
    "diffusion_model.single_blocks.37.linear1" + A: ("a Flux", 3072),
    "lora_unet_distilled_guidance_layer_layers_0_in_layer" + DOWN: ("a Chroma", 5120),
    "lora_unet_double_blocks_0_img_mlp_fc1" + DOWN: ("a Hunyuan Video", 3072),
    "lora_unet_joint_blocks_0_x_block_attn_qkv" + DOWN: ("an SD3", 1536),
    "transformer.transformer_blocks.0.attn.add_q_proj" + A: ("an SD3", 1536),
    "transformer.transformer_blocks.1.attn.to_q" + A: ("an SD3.5", 2432),
    "transformer.transformer_blocks.2.attn.to_q" + A: ("a Qwen-Image or Flux", 3072),
    "diffusion_model.transformer_blocks.0.img_mlp.net.2" + A: ("a Qwen-Image", 12288),
    "lora_unet_transformer_blocks_0_txt_mod_1" + DOWN: ("a Qwen-Image", 3072),
    "diffusion_model.blocks.0.self_attn.q" + A: ("a Wan (video)", 5120),
    "lora_unet_blocks_0_cross_attn_k_img" + DOWN: ("a Wan (video)", 5120),
    "transformer.blocks.0.attn1.to_q" + A: ("a Wan (video)", 5120),
    "lora_unet_blocks_0_cross_attn_k_proj" + DOWN: ("a Cosmos", 2048),
    "transformer.transformer_blocks.0.attn1.to_q" + A: ("an LTX-Video", 2048),
    "diffusion_model.transformer_blocks.0.attn2.to_k" + A: ("an LTX-Video", 4096),
    "lora_transformer_transformer_blocks_0_attn1_to_q" + DOWN: ("a PixArt", 1152),
    "base_model.model.transformer_blocks.0.attn1.to_q" + A: ("a PixArt", 1152),
    "transformer_blocks.0.attn1.to_q" + A: ("a Sana", 2240),
    "transformer.transformer_blocks.3.attn1.to_q" + A: ("a CogVideoX", 1920),
    "diffusion_model.layers.0.attention.qkv" + A: ("a Lumina", 2304),
    "lora_unet_layers_0_attention_to_q" + DOWN: ("a Z-Image", 3840),
    "transformer.noise_refiner.0.attention.to_k" + A: ("a Z-Image", 3840),
    "transformer.double_stream_blocks.0.block.attn1.to_q" + A: ("a HiDream", 2560),
    "transformer.joint_transformer_blocks.0.attn.to_q" + A: ("an AuraFlow", 3072),
    "transformer.transformer_blocks.0.attn1.to_out.0.lora_B.weight": ("a PixArt, LTX-Video or CogVideoX", 64),
    "lora_prior_unet_down_blocks_0_11_attention_attn_to_q" + DOWN: ("a Stable Cascade", 2048),
    "unet.down_blocks.0.motion_modules.0.temporal_transformer.transformer_blocks.0.attention_blocks.0.to_q"
    + A: ("an AnimateDiff motion (video)", 320),
    "unet.down_blocks.0.attentions.0.temporal_transformer_blocks.0.attn1.to_q" + A: (
        "a Stable Video Diffusion",
        320,
    ),
    "unet.down_blocks.0.temp_attentions.0.transformer_blocks.0.attn1.to_q" + A: ("a ModelScope (video)", 320),
    "unet.down_blocks.1.attentions.0.processor.add_k_proj_lora.down.weight": (
        "a Kandinsky or DeepFloyd IF",
        768,
    ),
    "lora_te3_encoder_block_0_layer_0_SelfAttention_k" + DOWN: ("an SD3 or Flux", 4096),
    "transformer.some_block.proj" + A: ("a diffusion transformer", 64),
}


@pytest.mark.parametrize("key", LORAS)
def test_a_lora_of_another_model_is_named_as_such(key: str, tmp_path: Path) -> None:
    """Whatever else the file holds: its text encoder may be ours."""
    what, width = LORAS[key]
    path = saved({**PAIR, key: torch.ones(1, width)}, tmp_path)
    for read in (read_adapter, describe_adapter):
        with pytest.raises(FileRefused) as refusal:
            read(path)
        assert str(refusal.value).startswith(f"lora.safetensors is {what} LoRA ({key[:80]}")


MODELS = {
    "double_blocks.0.img_attn.qkv.weight": "a Flux model",
    "model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight": "an SD3 model",
    "model.diffusion_model.blocks.0.self_attn.q.weight": "a Wan (video) model",
    "layers.0.attention.qkv.weight": "a Z-Image model",
    "control_model.input_blocks.0.0.weight": "a ControlNet",
    "controlnet_cond_embedding.conv_in.weight": "a ControlNet",
    "zero_convs.0.0.weight": "a ControlNet",
    "lora_controlnet": "a Control-LoRA",
    "lllite_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q.down.0.weight": "a ControlNet-LLLite",
    "adapter.body.0.resnets.0.block1.weight": "a T2I-Adapter",
    "body.0.block1.weight": "a T2I-Adapter",
    "image_proj.proj.weight": "an IP-Adapter",
    "ip_adapter.1.to_k_ip.weight": "an IP-Adapter",
    "320.linear.0.weight": "a hypernetwork",
    "model.1.sub.0.RDB1.conv1.0.weight": "an upscaler",
    "body.0.rdb1.conv1.weight": "an upscaler",
    "layers.0.residual_group.blocks.0.norm1.weight": "an upscaler",
    "model.diffusion_model.input_blocks.1.0.in_layers.0.weight": "a base model",
    "decoder.conv_in.weight": "a VAE",
    "first_stage_model.encoder.down.0.block.0.conv1.weight": "a VAE",
    "down_blocks.0.resnets.0.conv1.weight": "the UNet of a base model",
    "conditioner.embedders.0.transformer.text_model.final_layer_norm.weight": "a text encoder",
    "text_model.encoder.layers.0.mlp.fc1.weight": "a text encoder",
    "vision_model.encoder.layers.0.mlp.fc1.weight": "an image encoder",
}


@pytest.mark.parametrize("key", MODELS)
def test_what_is_no_lora_at_all_is_named_as_such(key: str, tmp_path: Path) -> None:
    content = torch.ones(0) if key == "lora_controlnet" else torch.ones(4, 3840)  # a marker without elements
    path = saved({key: content, "another.weight": torch.ones(2)}, tmp_path)
    for read in (read_adapter, describe_adapter):
        with pytest.raises(FileRefused) as refusal:
            read(path)
        assert str(refusal.value).startswith(f"lora.safetensors is {MODELS[key]}")
        assert "not a LoRA" in str(refusal.value)
