"""Which layers a Stable Diffusion model can have, and how their names are written.

    down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_out.0     diffusers, dotted
    down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_out_0     kohya: every dot is an underscore
    input_blocks_4_1_transformer_blocks_0_attn1_to_out_0               kohya for SDXL: see ldm_names

The second form is ambiguous: `to_out_0` could be `to.out.0` as well. It is resolved by shape: with every
number replaced by `#`, each flattened name equals exactly one template of the grammar below, and the template
says which underscores were dots. Numbers are free, so that models with other counts of blocks resolve too;
whether a layer exists is the live model's to say (adapter.resolve).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache

from lora_core import ldm_names

_TRANSFORMER = (
    "norm",
    "transformer_blocks.#.norm1",
    "transformer_blocks.#.norm2",
    "transformer_blocks.#.norm3",
    "proj_in",
    "proj_out",
    *(f"transformer_blocks.#.attn{i}.{to}" for i in (1, 2) for to in ("to_q", "to_k", "to_v", "to_out.#")),
    "transformer_blocks.#.ff.net.#.proj",
    "transformer_blocks.#.ff.net.#",
)
_UNET = (
    "conv_in",
    "conv_norm_out",
    "conv_out",
    *(f"{which}_embedding.linear_#" for which in ("time", "add")),
    *(
        f"{block}.{inside}"
        for block in ("down_blocks.#", "mid_block", "up_blocks.#")
        for inside in (
            *(f"attentions.#.{layer}" for layer in _TRANSFORMER),
            # attention without text (AttnDownBlock2D), as small models have it
            *(f"attentions.#.{to}" for to in ("group_norm", "to_q", "to_k", "to_v", "to_out.#")),
            *(
                f"resnets.#.{layer}"
                for layer in ("norm1", "conv1", "time_emb_proj", "norm2", "conv2", "conv_shortcut")
            ),
            "downsamplers.#.conv",
            "upsamplers.#.conv",
        )
    ),
)
_SGM = (
    "time_embed.#",
    "label_emb.#.#",
    "out.#",
    *(
        f"{block}.{inside}"
        for block in ("input_blocks.#.#", "middle_block.#", "output_blocks.#.#")
        for inside in (
            "",
            *_TRANSFORMER,
            "in_layers.#",
            "out_layers.#",
            "emb_layers.#",
            "skip_connection",
            "op",
            "conv",
        )
    ),
)
_EMBEDDINGS = ("text_model.embeddings.token_embedding", "text_model.embeddings.position_embedding")
_TEXT = (
    *_EMBEDDINGS,
    "text_model.final_layer_norm",
    *(f"text_model.encoder.layers.#.layer_norm{i}" for i in (1, 2)),
    *(f"text_model.encoder.layers.#.self_attn.{p}" for p in ("q_proj", "k_proj", "v_proj", "out_proj")),
    *(f"text_model.encoder.layers.#.mlp.{p}" for p in ("fc1", "fc2")),
    "text_projection",
)
_OF_TEXT_MODEL = tuple(
    f"{name}{joint}"
    for name, joint in (*((n, j) for n in ("encoder", "embeddings") for j in "._"), ("final_layer_norm", ""))
)
_CONVOLUTIONS = frozenset({"conv", "conv1", "conv2", "conv_in", "conv_out"})  # 3x3; conv_shortcut is 1x1
_NUMBER = re.compile(r"(?<![^._])\d+(?![^._])")  # a number that stands alone: not the 1 of attn1


def _by_shape(templates: tuple[str, ...]) -> dict[str, str]:
    templates = tuple(t.rstrip(".") for t in templates)
    return {t.replace(".", "_"): t for t in templates}


_TEMPLATES = {"unet": _by_shape(_UNET + _SGM), "text_encoder": _by_shape(_TEXT)}
_TEMPLATES["text_encoder_2"] = _TEMPLATES["text_encoder"]
_DOTTED = {component: frozenset(shapes.values()) for component, shapes in _TEMPLATES.items()}


@lru_cache(maxsize=2**14)  # of a thousand files most have the same keys
def adapter_path(component: str, name: str) -> str | None:
    """A layer's name inside its component, flattened or dotted, in diffusers' or sgm's names -> its adapter
    path; None if no Stable Diffusion model has such a layer.

    >>> adapter_path("unet", "input_blocks_4_1_proj_in")
    'unet.down_blocks.1.attentions.0.proj_in'
    """
    if component != "unet" and name.startswith(_OF_TEXT_MODEL):
        name = f"text_model.{name}" if "." in name else f"text_model_{name}"  # transformers 5 leaves it out
    shape = _NUMBER.sub("#", name)
    if "." in name:
        path = name if shape in _DOTTED[component] else None
    else:
        path = _fill(_TEMPLATES[component].get(shape), name)
    if path is not None and component == "unet" and ldm_names.is_sgm(path):
        path = ldm_names.to_diffusers(path)
    return None if path is None else f"{component}.{path}"


def unet_layers(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """The weights of a UNet's tensors, by names inside it as diffusers or sgm have them -> adapter path: shape."""
    found = {
        adapter_path("unet", key.removesuffix(".weight")): key for key in shapes if key.endswith(".weight")
    }
    return {path: shapes[key] for path, key in found.items() if path is not None}


def kernel_of(path: str) -> int:
    """k of the k x k convolution that the layer at this adapter path is in every Stable Diffusion model; 1 for the
    others, of which some are linear here and 1x1 convolutions there."""
    return 3 if path.rpartition(".")[2] in _CONVOLUTIONS else 1


def is_embedding(path: str) -> bool:
    """Whether the layer at this adapter path is a table of words or positions."""
    return path.partition(".")[2] in _EMBEDDINGS


def flattened(path: str) -> str:
    """kohya's way of writing a dotted path."""
    return path.replace(".", "_")


def _fill(template: str | None, name: str) -> str | None:
    if template is None:
        return None
    numbers = iter(_NUMBER.findall(name))
    return re.sub("#", lambda _: next(numbers), template)
