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

SDXL_DEPTH = 10  # transformer layers of its lowest level, which its smaller siblings do not have

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
        found |= _sdxl_depths(shapes, len(starts), ends[0] - 1)
        found["projection_class_embeddings_input_dim"] = side(shapes, "label_emb.0.0.weight", 1)
    return found


def _depth(shapes: Shapes, attention: str) -> int:
    return next(n for n in count() if f"{attention}.transformer_blocks.{n}.attn1.to_q.weight" not in shapes)


def _sdxl_depths(shapes: Shapes, levels: int, layers: int) -> dict[str, Any]:
    """How many transformer layers stand where. SDXL has as many in a level on the way down as in the middle and on the
    way up; of its smaller siblings (SSD-1B, Segmind-Vega, KOALA) each has its own, and most have less of a middle."""
    down = [
        [_depth(shapes, f"input_blocks.{1 + i * (layers + 1) + n}.1") for n in range(layers)]
        for i in range(levels)
    ]
    up = [
        [_depth(shapes, f"output_blocks.{i * (layers + 1) + n}.1") for n in range(layers + 1)]
        for i in range(levels)
    ]
    if down[-1][0] == SDXL_DEPTH:  # what it lacks elsewhere is missing
        return {"transformer_layers_per_block": tuple(max(1, depths[0]) for depths in down)}
    found: dict[str, Any] = {"transformer_layers_per_block": tuple(map(_one_or_each, down))}
    reverse = tuple(map(_one_or_each, up))
    if reverse != found["transformer_layers_per_block"][::-1]:
        found["reverse_transformer_layers_per_block"] = reverse
    middle = _depth(shapes, "middle_block.1")
    if middle not in (0, down[-1][0]):
        raise KeyError(f"middle_block.1 of {down[-1][0]} transformer layers, as in the level before it,")
    if not middle:
        alone = any(key.startswith("middle_block.0.") for key in shapes)
        found["mid_block_type"] = "UNetMidBlock2D" if alone else None
    return found


def _one_or_each(depths: list[int]) -> int | tuple[int, ...]:
    """As diffusers takes them; of levels without attention it wants a number all the same."""
    return max(1, depths[0]) if len(set(depths)) == 1 else tuple(depths)


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
