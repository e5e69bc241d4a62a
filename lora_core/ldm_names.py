"""diffusers' names of a Stable Diffusion model's tensors -> those of the original single-file checkpoints.

    unet          down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k.weight
                  model.diffusion_model.input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight
    vae           decoder.up_blocks.3.resnets.0.conv1.weight
                  first_stage_model.decoder.up.0.block.0.conv1.weight
    text_encoder  encoder.layers.0.mlp.fc1.weight
                  cond_stage_model.transformer.text_model.encoder.layers.0.mlp.fc1.weight

Written by CompVis' latent-diffusion and everything after it (SD 1.x; civitai, A1111, ComfyUI). There the UNet
is one list of blocks: each level of the way down is its layers and then a downsampler, each level of the way
up its layers with the upsampler inside the last one. The numbers follow from the names alone, so no
configuration is needed.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

PREFIXES = {
    "unet": "model.diffusion_model.",
    "vae": "first_stage_model.",
    "text_encoder": "cond_stage_model.transformer.text_model.",
}
_UNET_ENDS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_UNET_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out": "proj_out"}


def ldm_keys(component: str, names: Iterable[str]) -> dict[str, str]:
    """All parameter names of one component ("unet", "vae", "text_encoder") -> their keys in a single file.

    Raises KeyError for a component or a name that SD 1.x does not have.
    """
    names = list(names)
    prefix = PREFIXES[component]
    if component == "text_encoder":
        return {name: prefix + name.removeprefix("text_model.") for name in names}
    if component == "vae":
        levels = 1 + max(int(name.split(".")[2]) for name in names if name.startswith("decoder.up_blocks."))
        return {name: prefix + _vae_key(name, levels) for name in names}
    layers = 1 + max(int(name.split(".")[3]) for name in names if name.startswith("down_blocks.0.resnets."))
    attended = {
        name.split(".")[1] for name in names if name.startswith("up_blocks.") and ".attentions." in name
    }
    return {name: prefix + _unet_key(name, layers, attended) for name in names}


def _unet_key(name: str, layers: int, attended: set[str]) -> str:
    """`layers`: resnets per level of the way down; `attended`: up blocks with attention."""
    level = layers + 1  # down: and a downsampler; up: one more resnet
    match name.split("."):
        case ["down_blocks", i, "resnets", j, part, kind]:
            return f"input_blocks.{1 + int(i) * level + int(j)}.0.{_UNET_RESNET[part]}.{kind}"
        case ["down_blocks", i, "attentions", j, *rest]:
            return f"input_blocks.{1 + int(i) * level + int(j)}.1.{'.'.join(rest)}"
        case ["down_blocks", i, "downsamplers", "0", "conv", kind]:
            return f"input_blocks.{(int(i) + 1) * level}.0.op.{kind}"
        case ["mid_block", "resnets", j, part, kind]:
            return f"middle_block.{2 * int(j)}.{_UNET_RESNET[part]}.{kind}"
        case ["mid_block", "attentions", "0", *rest]:
            return f"middle_block.1.{'.'.join(rest)}"
        case ["up_blocks", i, "resnets", j, part, kind]:
            return f"output_blocks.{int(i) * level + int(j)}.0.{_UNET_RESNET[part]}.{kind}"
        case ["up_blocks", i, "attentions", j, *rest]:
            return f"output_blocks.{int(i) * level + int(j)}.1.{'.'.join(rest)}"
        case ["up_blocks", i, "upsamplers", "0", "conv", kind]:
            return f"output_blocks.{int(i) * level + layers}.{2 if i in attended else 1}.conv.{kind}"
    end, _, kind = name.rpartition(".")
    return f"{_UNET_ENDS[end]}.{kind}"


def _vae_key(name: str, levels: int) -> str:
    """`levels`: number of blocks; the decoder's count the other way round in the file."""
    match name.split("."):
        case ["encoder" | "decoder" as half, "mid_block", "resnets", j, *rest]:
            return f"{half}.mid.block_{int(j) + 1}.{_vae_resnet(rest)}"
        case ["encoder" | "decoder" as half, "mid_block", "attentions", "0", part, *_, kind]:
            return f"{half}.mid.attn_1.{_VAE_ATTENTION[part]}.{kind}"
        case ["encoder", "down_blocks", i, "resnets", j, *rest]:
            return f"encoder.down.{i}.block.{j}.{_vae_resnet(rest)}"
        case ["encoder", "down_blocks", i, "downsamplers", "0", "conv", kind]:
            return f"encoder.down.{i}.downsample.conv.{kind}"
        case ["decoder", "up_blocks", i, "resnets", j, *rest]:
            return f"decoder.up.{levels - 1 - int(i)}.block.{j}.{_vae_resnet(rest)}"
        case ["decoder", "up_blocks", i, "upsamplers", "0", "conv", kind]:
            return f"decoder.up.{levels - 1 - int(i)}.upsample.conv.{kind}"
        case ["encoder" | "decoder" as half, "conv_norm_out", kind]:
            return f"{half}.norm_out.{kind}"
        case ["encoder" | "decoder", "conv_in" | "conv_out", _] | ["quant_conv" | "post_quant_conv", _]:
            return name
    raise KeyError(name)


def _vae_resnet(rest: list[str]) -> str:
    return ".".join(rest).replace("conv_shortcut", "nin_shortcut")


def as_in_file(key: str, tensor: Tensor) -> Tensor:
    """The VAE's attention is written as 1x1 convolutions: (out, in) -> (out, in, 1, 1). Others as they
    are."""
    if key.startswith("first_stage_model.") and ".attn_1." in key and tensor.dim() == 2:
        return tensor[:, :, None, None]
    return tensor
