"""sgm's (LDM's) names of a UNet's layers against diffusers', derived from how the blocks are built.

    input_blocks.4.1.transformer_blocks.0.ff.net.2  down_blocks.1.attentions.0.transformer_blocks.0.ff.net.2
    middle_block.0.in_layers.2                      mid_block.resnets.0.conv1
    output_blocks.5.2.conv                          up_blocks.1.upsamplers.0.conv

kohya's trainer writes SDXL UNets so; the original checkpoints of every family do too. sgm counts through:
input 0 is conv_in; then each level has its residual blocks and, as one more entry, its downsampler. On the
way up each level has one residual block more, and the upsampler is the last part of the last entry.
"""

from __future__ import annotations

import re

PER_LEVEL = 2  # residual blocks of a level on the way down, in SD 1, SD 2 and SDXL; one more on the way up

_OUTSIDE = {
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "add_embedding.linear_1",
    "label_emb.0.2": "add_embedding.linear_2",
}
_RESIDUAL = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "emb_layers.1": "time_emb_proj",
    "skip_connection": "conv_shortcut",
}
_OUTSIDE_BACK = {ours: theirs for theirs, ours in _OUTSIDE.items()}
_RESIDUAL_BACK = {ours: theirs for theirs, ours in _RESIDUAL.items()}
_MIDDLE = ("resnets.0", "attentions.0", "resnets.1")


def is_sgm(path: str) -> bool:
    return path.startswith(
        ("input_blocks.", "middle_block.", "output_blocks.", "time_embed.", "label_emb.", "out.")
    )


def to_diffusers(path: str) -> str | None:
    """A dotted sgm path -> diffusers' path, or None if no such layer exists."""
    if path in _OUTSIDE:
        return _OUTSIDE[path]
    if found := re.fullmatch(r"middle_block\.([012])\.(.+)", path):
        part = _MIDDLE[int(found[1])]
        return _inside("mid_block", part, found[2])
    found = re.fullmatch(r"(input|output)_blocks\.(\d+)\.(\d)\.(.+)", path)
    if found is None:
        return None
    way, entry, slot, rest = found[1], int(found[2]), int(found[3]), found[4]
    level, n = divmod(entry - 1 if way == "input" else entry, PER_LEVEL + 1)
    block = f"down_blocks.{level}" if way == "input" else f"up_blocks.{level}"
    if level < 0:
        return None
    if way == "input" and n == PER_LEVEL:
        return f"{block}.downsamplers.0.conv" if (slot, rest) == (0, "op") else None
    if rest == "conv":
        return f"{block}.upsamplers.0.conv" if way == "output" and n == PER_LEVEL and slot in (1, 2) else None
    return _inside(block, ("resnets", "attentions")[slot] + f".{n}", rest) if slot < 2 else None


def to_sgm(path: str, *, attention_up: frozenset[int]) -> str | None:
    """diffusers' path -> the dotted sgm path, or None for a layer sgm has no name for.

    `attention_up`: the levels of the way up that have attention, since the upsampler stands behind it
    ({0, 1} in SDXL, {1, 2, 3} in SD 1 and 2).
    """
    if path in _OUTSIDE_BACK:
        return _OUTSIDE_BACK[path]
    found = re.fullmatch(
        r"(down_blocks\.\d+|mid_block|up_blocks\.\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)",
        path,
    )
    if found is None:
        return None
    block, kind, n, rest = found[1], found[2], int(found[3]), found[4]
    inner = _RESIDUAL_BACK.get(rest) if kind == "resnets" else rest
    if inner is None:
        return None
    if block == "mid_block":
        part = f"{kind}.{n}"
        return f"middle_block.{_MIDDLE.index(part)}.{inner}" if part in _MIDDLE else None
    way, level = block.split(".")
    first = int(level) * (PER_LEVEL + 1)
    if kind == "downsamplers":
        return f"input_blocks.{first + 1 + PER_LEVEL}.0.op"
    if kind == "upsamplers":
        return f"output_blocks.{first + PER_LEVEL}.{2 if int(level) in attention_up else 1}.conv"
    slot = ("resnets", "attentions").index(kind)
    return (
        f"input_blocks.{first + 1 + n}.{slot}.{inner}"
        if way == "down_blocks"
        else f"output_blocks.{first + n}.{slot}.{inner}"
    )


def _inside(block: str, part: str, rest: str) -> str | None:
    """A residual block's layers have other names in sgm, an attention block's the same."""
    if part.startswith("attentions"):
        return f"{block}.{part}.{rest}" if rest.startswith(("norm", "proj_", "transformer_blocks.")) else None
    return f"{block}.{part}.{_RESIDUAL[rest]}" if rest in _RESIDUAL else None
