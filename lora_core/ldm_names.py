"""The names of a Stable Diffusion model's tensors in the original checkpoints, derived from how its parts are built.

    unet            down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k.weight
                    model.diffusion_model.input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight
    vae             decoder.up_blocks.3.resnets.0.conv1.weight
                    first_stage_model.decoder.up.0.block.0.conv1.weight
    text_encoder    encoder.layers.0.mlp.fc1.weight                                            OpenAI's CLIP
                    cond_stage_model.transformer.text_model.encoder.layers.0.mlp.fc1.weight    SD 1
                    conditioner.embedders.0.transformer.text_model.encoder.layers.0...         SDXL, the first
    text_encoder    encoder.layers.0.self_attn.k_proj.weight                                   OpenCLIP
                    cond_stage_model.model.transformer.resblocks.0.attn.in_proj_weight         SD 2: its second third
                    conditioner.embedders.1.model.transformer.resblocks.0...                   SDXL, the second

Written by CompVis' latent-diffusion, Stability's generative-models (sgm) and everything after them; kohya's trainer
writes the LoRAs of SDXL's UNet under the same names. There the UNet is one list of blocks: input 0 is conv_in, then
each level of the way down has its residual blocks and, as one more block, its downsampler; each level of the way up
has one residual block more, and the upsampler is the last part of its last block.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

PER_LEVEL = 2  # residual blocks of a level on the way down, in SD 1, SD 2 and SDXL
_LEVELS = 16  # more than any UNet has
_UNET, _VAE = "model.diffusion_model.", "first_stage_model."
PREFIXES = {
    "sd1": {"unet": _UNET, "vae": _VAE, "text_encoder": "cond_stage_model.transformer.text_model."},
    "sd2": {"unet": _UNET, "vae": _VAE, "text_encoder": "cond_stage_model.model."},
    "sdxl": {
        "unet": _UNET,
        "vae": _VAE,
        "text_encoder": "conditioner.embedders.0.transformer.text_model.",
        "text_encoder_2": "conditioner.embedders.1.model.",
    },
}
OPENCLIP = (("sd2", "text_encoder"), ("sdxl", "text_encoder_2"))

_ENDS = {
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
_RESIDUAL = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_RESIDUAL_BACK = {sgm: ours for ours, sgm in _RESIDUAL.items()}
_VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out": "proj_out"}
_OPENCLIP_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}


class Key(NamedTuple):
    """Where a parameter lies in a file: a whole tensor, or the `part`-th of `of` equal parts of its rows; as it is, or
    transposed."""

    name: str
    part: int = 0
    of: int = 1
    transposed: bool = False


def ldm_keys(family: str, component: str, names: Iterable[str]) -> dict[str, Key]:
    """All parameter names of one component of a "sd1", "sd2" or "sdxl" model -> their keys in a single file.

    Raises KeyError for a component or a name that the family does not have.
    """
    names, prefix = list(names), PREFIXES[family][component]
    if (family, component) in OPENCLIP:
        keys = {name: _openclip_key(name) for name in names}
        return {name: key._replace(name=prefix + key.name) for name, key in keys.items()}
    if component == "vae":
        levels = 1 + max(int(name.split(".")[2]) for name in names if name.startswith("decoder.up_blocks."))
        return {name: Key(prefix + _vae_key(name, levels)) for name in names}
    if component != "unet":
        return {name: Key(prefix + name.removeprefix("text_model.")) for name in names}
    layers = 1 + max(int(name.split(".")[3]) for name in names if name.startswith("down_blocks.0.resnets."))
    inside = {name: name.rpartition(".")[::2] for name in names}
    attention_up = frozenset(
        int(name.split(".")[1]) for name in names if re.match(r"up_blocks\.\d+\.attentions", name)
    )
    found = {
        name: (to_sgm(path, attention_up=attention_up, layers=layers), kind)
        for name, (path, kind) in inside.items()
    }
    if unknown := [name for name, (path, _) in found.items() if path is None]:
        raise KeyError(unknown[0])
    return {name: Key(f"{prefix}{path}.{kind}") for name, (path, kind) in found.items()}


def as_in_file(key: str, parts: Sequence[Tensor]) -> Tensor:
    """The parameters of a key, in their order -> its tensor. The VAE's attention is written as 1x1 convolutions,
    OpenCLIP's q, k and v as one matrix, and its projection transposed."""
    tensor = parts[0] if len(parts) == 1 else torch.cat(list(parts))
    if key.startswith(_VAE) and ".attn_1." in key and tensor.dim() == 2:
        return tensor[:, :, None, None]
    return tensor.T if key.endswith(".text_projection") else tensor


# --- the UNet ------------------------------------------------------------------------------------------------


def is_sgm(path: str) -> bool:
    return path.startswith(
        ("input_blocks.", "middle_block.", "output_blocks.", "time_embed.", "label_emb.", "out.")
    )


def to_sgm(path: str, *, attention_up: frozenset[int], layers: int = PER_LEVEL) -> str | None:
    """diffusers' path of a UNet's layer -> the dotted sgm path, or None for a layer sgm has no name for.

    attention_up    the levels of the way up that have attention, since the upsampler stands behind it ({0, 1} in SDXL,
                    {1, 2, 3} in SD 1 and 2)
    layers          residual blocks of a level on the way down
    """
    parts = _parts(layers, attention_up)
    if path in parts:
        return parts[path]
    found = re.fullmatch(r"(.+?\.(resnets|attentions)\.\d+)\.(.+)", path)
    if found is None or found[1] not in parts:
        return None
    inner = _RESIDUAL.get(found[3]) if found[2] == "resnets" else found[3]
    return f"{parts[found[1]]}.{inner}" if inner else None


def to_diffusers(path: str) -> str | None:
    """A dotted sgm path of a UNet's layer -> diffusers' path, or None if no such layer exists."""
    parts = _parts_back()
    if path in parts:
        return parts[path]
    found = re.fullmatch(r"((?:input|output)_blocks\.\d+\.\d|middle_block\.\d)\.(.+)", path)
    if found is None or found[1] not in parts:
        return None
    part, rest = parts[found[1]], found[2]
    if ".resnets." in part:
        return f"{part}.{_RESIDUAL_BACK[rest]}" if rest in _RESIDUAL_BACK else None
    return f"{part}.{rest}" if rest.startswith(("norm", "proj_", "transformer_blocks.")) else None


@functools.cache
def _parts(layers: int, attention_up: frozenset[int]) -> dict[str, str]:
    return _ENDS | dict(_walk(layers, attention_up))


@functools.cache
def _parts_back() -> dict[str, str]:
    """Files do not say where there is attention: an upsampler is found in either place."""
    everywhere = frozenset(range(_LEVELS))
    return {sgm: ours for up in (frozenset(), everywhere) for ours, sgm in _parts(PER_LEVEL, up).items()}


def _walk(layers: int, attention_up: frozenset[int]) -> Iterator[tuple[str, str]]:
    """Through the blocks as the UNet runs them: diffusers' name of each part, and sgm's, which counts on."""
    block = 1
    for level in range(_LEVELS):
        for n in range(layers):
            yield f"down_blocks.{level}.resnets.{n}", f"input_blocks.{block}.0"
            yield f"down_blocks.{level}.attentions.{n}", f"input_blocks.{block}.1"
            block += 1
        yield f"down_blocks.{level}.downsamplers.0.conv", f"input_blocks.{block}.0.op"
        block += 1
    for n, part in enumerate(("resnets.0", "attentions.0", "resnets.1")):
        yield f"mid_block.{part}", f"middle_block.{n}"
    block = 0
    for level in range(_LEVELS):
        for n in range(layers + 1):
            yield f"up_blocks.{level}.resnets.{n}", f"output_blocks.{block}.0"
            yield f"up_blocks.{level}.attentions.{n}", f"output_blocks.{block}.1"
            block += 1
        behind = 2 if level in attention_up else 1
        yield f"up_blocks.{level}.upsamplers.0.conv", f"output_blocks.{block - 1}.{behind}.conv"


# --- the VAE and OpenCLIP ------------------------------------------------------------------------------------


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


def _openclip_key(name: str) -> Key:
    match name.removeprefix("text_model.").split("."):
        case ["embeddings", "token_embedding", "weight"]:
            return Key("token_embedding.weight")
        case ["embeddings", "position_embedding", "weight"]:
            return Key("positional_embedding")
        case ["final_layer_norm", kind]:
            return Key(f"ln_final.{kind}")
        case ["text_projection", "weight"]:
            return Key("text_projection", transposed=True)
        case ["encoder", "layers", n, "self_attn", "q_proj" | "k_proj" | "v_proj" as which, kind]:
            return Key(f"transformer.resblocks.{n}.attn.in_proj_{kind}", "qkv".index(which[0]), 3)
        case ["encoder", "layers", n, *inside, kind]:
            return Key(f"transformer.resblocks.{n}.{_OPENCLIP_LAYER['.'.join(inside)]}.{kind}")
    raise KeyError(name)
