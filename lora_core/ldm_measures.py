"""A model's widths and counts from the shapes of its tensors in the original layout: keyword arguments for diffusers'
and transformers' classes. What shapes do not tell is the same for a whole family, and lies in data/*.json.

Every function raises KeyError, whose argument names what a checkpoint of the family has and this one does not.
"""

from __future__ import annotations

import re
from itertools import count
from typing import Any

from lora_core.families import family_of_whole_unet
from lora_core.formats.keys import unet_layers

HEAD_WIDTH = (
    64  # of every attention in CLIP, OpenCLIP and the UNets of SD 2 and SDXL; SD 1 has 8 heads everywhere
)
OPENCLIP_USED = 23  # of SD 2's 24 layers: Stable Diffusion takes what enters the last one
SIZES = 6  # numbers of SDXL's size conditioning: original size, crop, target size

Shapes = dict[str, tuple[int, ...]]


def family_of(unet: Shapes) -> str:
    """What tells nothing is taken for the commonest: what it lacks is said afterwards."""
    return family_of_whole_unet(unet_layers(unet)).key or "sd1"


def unet_measures(shapes: Shapes, family: str) -> dict[str, Any]:
    """Levels end with a downsampler: input_blocks.<n>.0.op. All of them have the same number of layers."""
    ends = sorted(
        int(k.split(".")[1]) for k in shapes if re.fullmatch(r"input_blocks\.[0-9]{1,4}\.0\.op\.weight", k)
    )
    if not ends or ends != [ends[0] * (i + 1) for i in range(len(ends))]:
        raise KeyError("input_blocks.3.0.op.weight and one such block per level")
    starts = [1, *(end + 1 for end in ends)]
    channels = [side(shapes, f"input_blocks.{start}.0.out_layers.3.weight", 0) for start in starts]
    if any(width % 32 for width in channels):
        raise KeyError(f"levels of a multiple of 32 channels (it has {channels})")
    depths = [_depth(shapes, f"input_blocks.{start}.1") for start in starts]
    down = tuple("CrossAttnDownBlock2D" if depth else "DownBlock2D" for depth in depths)
    up = tuple("CrossAttnUpBlock2D" if depth else "UpBlock2D" for depth in reversed(depths))
    context = next(
        (s[1] for k, s in shapes.items() if k.endswith(".attn2.to_k.weight") and len(s) == 2), None
    )
    if context is None:
        raise KeyError("input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight")
    found: dict[str, Any] = {
        "in_channels": side(shapes, "input_blocks.0.0.weight", 1),
        "out_channels": side(shapes, "out.2.weight", 0),
        "block_out_channels": tuple(channels),
        "layers_per_block": ends[0] - 1,
        "down_block_types": down,
        "up_block_types": up,
        "cross_attention_dim": context,
    }
    if family != "sd1":
        found["attention_head_dim"] = tuple(max(1, width // HEAD_WIDTH) for width in channels)
    if family == "sdxl":
        found["transformer_layers_per_block"] = tuple(max(1, depth) for depth in depths)
        found["projection_class_embeddings_input_dim"] = side(shapes, "label_emb.0.0.weight", 1)
    return found


def _depth(shapes: Shapes, attention: str) -> int:
    return next(n for n in count() if f"{attention}.transformer_blocks.{n}.attn1.to_q.weight" not in shapes)


def is_pruned(shapes: Shapes, depths: tuple[int, ...]) -> bool:
    """Whether an SDXL UNet has other depths in the middle or on the way up than on the way down: SSD-1B, Vega and KOALA
    do, and are another architecture."""
    middle = _depth(shapes, "middle_block.1")
    first = _depth(shapes, "output_blocks.0.1")
    return (middle, first) != (depths[-1], depths[-1])


def vae_measures(shapes: Shapes) -> dict[str, Any]:
    levels = next(n for n in count() if f"encoder.down.{n}.block.0.conv1.weight" not in shapes)
    channels = [side(shapes, f"encoder.down.{n}.block.0.conv1.weight", 0) for n in range(levels)]
    layers = next(n for n in count() if f"encoder.down.0.block.{n}.conv1.weight" not in shapes)
    if not layers or any(width % 32 for width in channels):
        raise KeyError("encoder.down.0.block.0.conv1.weight in a width that is a multiple of 32")
    return {
        "in_channels": side(shapes, "encoder.conv_in.weight", 1),
        "out_channels": side(shapes, "decoder.conv_out.weight", 0),
        "latent_channels": side(shapes, "post_quant_conv.weight", 0),
        "block_out_channels": tuple(channels),
        "layers_per_block": layers,
        "down_block_types": ("DownEncoderBlock2D",) * len(channels),
        "up_block_types": ("UpDecoderBlock2D",) * len(channels),
    }


def clip_measures(shapes: Shapes) -> dict[str, Any]:
    """OpenAI's CLIP in the layout of transformers."""
    table, layer = "embeddings.token_embedding.weight", "encoder.layers.{}.mlp.fc1.weight"
    found = _text(shapes, table, "embeddings.position_embedding.weight", layer)
    return found | {"projection_dim": found["hidden_size"]}


def openclip_measures(shapes: Shapes, family: str) -> dict[str, Any]:
    """OpenCLIP in its own layout. Of SD 2's the last layer is not used; diffusers' own script leaves it out."""
    found = _text(
        shapes, "token_embedding.weight", "positional_embedding", "transformer.resblocks.{}.mlp.c_fc.weight"
    )
    if family == "sd2":
        layers = found["num_hidden_layers"]
        return found | {"num_hidden_layers": layers - (layers != OPENCLIP_USED)}
    projection = "text_projection" if "text_projection" in shapes else "text_projection.weight"
    return found | {"projection_dim": side(shapes, projection, int(projection == "text_projection"))}


def _text(shapes: Shapes, table: str, positions: str, layer: str) -> dict[str, Any]:
    """`layer`: a key of each layer, with braces for its number."""
    rows, width = side(shapes, table, 0), side(shapes, table, 1)
    heads = max(1, width // HEAD_WIDTH)
    if width % heads:
        raise KeyError(f"{table} in a width that is a multiple of {HEAD_WIDTH}")
    return {
        "vocab_size": rows,
        "hidden_size": width,
        "num_hidden_layers": next(n for n in count() if layer.format(n) not in shapes),
        "num_attention_heads": heads,
        "intermediate_size": side(shapes, layer.format(0), 0),
        "max_position_embeddings": side(shapes, positions, 0),
    }


def side(shapes: Shapes, key: str, axis: int) -> int:
    """One side of a tensor's shape. Raises KeyError where there is no such tensor, or it is too flat."""
    if len(shapes.get(key, ())) <= axis:
        raise KeyError(key)
    return shapes[key][axis]
