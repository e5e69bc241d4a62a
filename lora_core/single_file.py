"""An SD 1.x checkpoint in one .safetensors file: what kind of file it is, and the model's measures.

    model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight   the UNet
    first_stage_model.decoder.up.0.block.0.conv1.weight                             the VAE
    cond_stage_model.transformer.text_model.encoder.layers.0.mlp.fc1.weight         CLIP's text encoder

Written by CompVis' scripts, A1111's merger and every trainer since; the layout of civitai. The file has no
configuration. Widths and counts follow from the shapes of its tensors; what shapes do not tell (8 heads, 32
groups, the noise schedule) is the same for the whole family and lies in data/sd1.json.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from itertools import count
from pathlib import Path
from typing import Any

import torch

from lora_core.clip_vocabulary import SIZE, clip_vocabulary
from lora_core.errors import ConfigError, FileRefused
from lora_core.families import by
from lora_core.ldm_names import PREFIXES
from lora_core.safe_header import DTYPES, Header, TensorInfo

_UNET, _VAE, _TEXT = PREFIXES["unet"], PREFIXES["vae"], PREFIXES["text_encoder"]
_TEXT_2022 = "cond_stage_model.transformer."  # some early mergers dropped "text_model."

# Left aside knowingly: the weights' averaged twin, the noise schedule as tables, the VAE's training loss.
_IGNORED = re.compile(
    r"model_ema\..*|first_stage_model\.(loss|model_ema)\..*|betas|(sqrt_)?(recip(m1)?_)?(log_)?(one_minus_)?"
    r"alphas_cumprod(_prev)?|sqrt_recipm1_alphas_cumprod|posterior_(variance|log_variance_clipped|mean_coef[12])|"
    r"lvlb_weights|logvar|scale_factor|ddim_(sigmas|alphas|alphas_prev|sqrt_one_minus_alphas)|denoiser\.sigmas|"
    r"cond_stage_model\.transformer\.(text_model\.)?embeddings\.position_ids"
)

# Other kinds of file: a key that only they have, what they are, and what to do. The first that fits is told.
_OTHERS: tuple[tuple[str, str, str], ...] = (
    (
        r".*(\.lora_(down|up|A|B)(\.default)?\.weight|\.lora\.(down|up)\.weight|_lora\.(down|up)\.weight|lora_linear_layer.*|"
        r"\.(hada_w[12]_a|lokr_w[12](_a)?|oft_blocks|oft_diag|on_input|dora_scale)|:\d+:(up|down))",
        "a LoRA, not a base model",
        "Open a base model first, then load this file as a LoRA.",
    ),
    (r"control_model\..*|controlnet_.*", "a ControlNet, not a base model", "Open a base model."),
    (
        r"(string_to_param\..*|emb_params|clip_[lg])",
        "a textual inversion, not a base model",
        "Open a base model.",
    ),
    (r"conditioner\.embedders\..*", "an SDXL checkpoint; single files are read for SD 1.x only", ""),
    (r"cond_stage_model\.model\..*", "an SD 2.x checkpoint; single files are read for SD 1.x only", ""),
    (
        r"(model\.diffusion_model\.)?(joint_blocks|double_blocks|transformer_blocks|double_layers)\..*",
        "a transformer model (SD 3, Flux or the like)",
        "Open an SD 1.x, SD 2.x or SDXL model.",
    ),
    (
        r"(unet\.)?(down_blocks|mid_block)\..*",
        "a UNet alone, in diffusers' spelling",
        "Open the folder it belongs to.",
    ),
)
_SCHEDULE = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "prediction_type")
_FOLDER = "Open its diffusers folder instead."

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class SingleFile:
    """What a header says about an SD 1.x model: keyword arguments for its parts, and how keys are spelled."""

    header: Header
    unet: dict[str, Any]
    vae: dict[str, Any]
    text_encoder: dict[str, Any]
    scheduler: dict[str, Any]
    text_prefix: str

    def key(self, key: str) -> str:
        """A key as ldm_names spells it -> as this file does."""
        return self.text_prefix + key.removeprefix(_TEXT) if key.startswith(_TEXT) else key

    def leftovers(self, used: set[str]) -> tuple[str, ...]:
        """Keys that belong to nothing known: neither used nor of a kind that is left aside knowingly."""
        return tuple(k for k in self.header.tensors if k not in used and not _IGNORED.fullmatch(k))


def describe(header: Header) -> SingleFile:
    """The measures of an SD 1.x checkpoint. Raises FileRefused for any other file, saying what it is."""
    name, tensors = header.path.name, header.tensors
    for pattern, kind, advice in _OTHERS:
        if any(re.fullmatch(pattern, key) for key in tensors):
            raise FileRefused(f"{name} is {kind}. {advice or _FOLDER}")
    if not any(key.startswith(_UNET) for key in tensors):
        vae = all(
            re.match(r"(first_stage_model\.)?(en|de)coder\.|(\w+\.)?(post_)?quant_conv", k) for k in tensors
        )
        first = next(iter(tensors), "none")
        kind = "a VAE alone" if vae else f"no Stable Diffusion model (its first tensor is {first})"
        raise FileRefused(f"{name} is {kind}; an SD 1.x checkpoint was expected. Open a base model.")
    prefix = _TEXT if any(key.startswith(_TEXT) for key in tensors) else _TEXT_2022
    for part, start in (("VAE", _VAE), ("text encoder", prefix)):
        if not any(key.startswith(start) for key in tensors):
            raise FileRefused(
                f"{name} has a UNet but no {part}; all three parts were expected. Open the complete version."
            )
    shapes = {key: info.shape for key, info in tensors.items()}
    try:
        data = _constants()
        return SingleFile(
            header=header,
            unet=data["unet"] | _unet(_under(shapes, _UNET), name),
            vae=data["vae"] | _vae(_under(shapes, _VAE)),
            text_encoder=_text_encoder(_under(shapes, prefix), dict(data["text_encoder"]), name),
            scheduler=data["scheduler"] | _prediction(header),
            text_prefix=prefix,
        )
    except KeyError as problem:
        raise FileRefused(
            f"{name} lacks {problem.args[0]}, which every SD 1.x checkpoint has: it is incomplete or of "
            "another kind. Download it again, or open another."
        ) from problem


def refuse_unlike(
    outlines: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    metadata: dict[str, str],
    pipeline: Any,
    name: str,
) -> None:
    """Raise ConfigError unless a file of these tensors (name -> dtype and shape), read back, is this very pipeline.

    A single file has no configuration and no vocabulary: what is not as in every SD 1.x model would be lost.
    """
    kinds = {dtype: kind for kind, dtype in DTYPES.items()}
    infos = {key: TensorInfo(kinds[dtype], shape, 0, 0) for key, (dtype, shape) in outlines.items()}
    try:
        file = describe(Header(infos, metadata, 0, Path(name)))
    except FileRefused as problem:
        raise ConfigError(f"This model cannot be one file: {problem} Write it as a folder.") from problem
    schedule = {key: value for key, value in file.scheduler.items() if key in _SCHEDULE}
    expected = {"unet": file.unet, "vae": file.vae, "text_encoder": file.text_encoder, "scheduler": schedule}
    for part, config in expected.items():
        own = getattr(pipeline, part).config
        for key, value in config.items():
            has = own.get(key) if isinstance(own, Mapping) else getattr(own, key, None)
            # sample_size is the size of pictures nobody has asked another for
            if key != "sample_size" and _plain(has) != _plain(value):
                raise ConfigError(
                    f"{part}.{key} of this model is {has}; a single file is read as {value}, and cannot say otherwise. "
                    "Write it as a folder."
                )
    if pipeline.tokenizer.get_vocab() != clip_vocabulary():
        raise ConfigError(
            f"This model has a vocabulary of its own ({len(pipeline.tokenizer):,} words); a single file is read with "
            "CLIP's. Write it as a folder."
        )


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _unet(shapes: Shapes, name: str) -> dict[str, Any]:
    """Levels end with a downsampler: input_blocks.<n>.0.op. All of them have the same number of layers."""
    inputs = _side(shapes, "input_blocks.0.0.weight", 1)
    if inputs != 4:
        kind = {9: "an inpainting model", 8: "an instruct-pix2pix model"}.get(inputs, "a special model")
        raise FileRefused(
            f"{name} is {kind}: its UNet takes {inputs} channels where 4 were expected. Open a "
            "text-to-image model."
        )
    ends = sorted(
        int(k.split(".")[1]) for k in shapes if re.fullmatch(r"input_blocks\.[0-9]{1,4}\.0\.op\.weight", k)
    )
    if not ends or ends != [ends[0] * (i + 1) for i in range(len(ends))]:
        raise KeyError("input_blocks.3.0.op.weight and one such block per level")
    starts = [1, *(end + 1 for end in ends)]
    channels = [_side(shapes, f"input_blocks.{start}.0.out_layers.3.weight", 0) for start in starts]
    attended = [f"input_blocks.{start}.1.norm.weight" in shapes for start in starts]
    for key, shape in shapes.items():
        if key.endswith(".proj_in.weight") and len(shape) == 2:
            raise FileRefused(
                f"{name} has the UNet of SD 2.x or SDXL; single files are read for SD 1.x only. {_FOLDER}"
            )
    if any(width % 32 for width in channels):
        raise FileRefused(
            f"{name} has a UNet of {by(channels)} channels; multiples of 32 were expected. It is no SD 1.x "
            "model."
        )
    down = tuple("CrossAttnDownBlock2D" if a else "DownBlock2D" for a in attended)
    up = tuple("CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attended))
    context = next(
        (s[1] for k, s in shapes.items() if k.endswith(".attn2.to_k.weight") and len(s) == 2), None
    )
    if context is None:
        raise KeyError("input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight")
    return {
        "in_channels": inputs,
        "out_channels": _side(shapes, "out.2.weight", 0),
        "block_out_channels": tuple(channels),
        "layers_per_block": ends[0] - 1,
        "down_block_types": down,
        "up_block_types": up,
        "cross_attention_dim": context,
    }


def _vae(shapes: Shapes) -> dict[str, Any]:
    levels = next(n for n in count() if f"encoder.down.{n}.block.0.conv1.weight" not in shapes)
    channels = [_side(shapes, f"encoder.down.{n}.block.0.conv1.weight", 0) for n in range(levels)]
    layers = next(n for n in count() if f"encoder.down.0.block.{n}.conv1.weight" not in shapes)
    if not layers or any(width % 32 for width in channels):
        raise KeyError("encoder.down.0.block.0.conv1.weight in a width that is a multiple of 32")
    return {
        "in_channels": _side(shapes, "encoder.conv_in.weight", 1),
        "out_channels": _side(shapes, "decoder.conv_out.weight", 0),
        "latent_channels": _side(shapes, "post_quant_conv.weight", 0),
        "block_out_channels": tuple(channels),
        "layers_per_block": layers,
        "down_block_types": ("DownEncoderBlock2D",) * len(channels),
        "up_block_types": ("UpDecoderBlock2D",) * len(channels),
    }


def _text_encoder(shapes: Shapes, fixed: dict[str, Any], name: str) -> dict[str, Any]:
    table = "embeddings.token_embedding.weight"
    rows, width = _side(shapes, table, 0), _side(shapes, table, 1)
    if rows < SIZE:
        raise FileRefused(
            f"{name} knows {rows:,} words; CLIP's {SIZE:,} were expected, as its prompts could not be read "
            f"otherwise. {_FOLDER}"
        )
    head = fixed.pop("head_width")
    layers = next(n for n in count() if f"encoder.layers.{n}.mlp.fc1.weight" not in shapes)
    heads = max(1, width // head)
    if width % heads:
        raise KeyError(f"{table} in a width that is a multiple of {head}")
    return fixed | {
        "vocab_size": rows,
        "hidden_size": width,
        "projection_dim": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": _side(shapes, "encoder.layers.0.mlp.fc1.weight", 0),
        "max_position_embeddings": _side(shapes, "embeddings.position_embedding.weight", 0),
    }


def _prediction(header: Header) -> dict[str, Any]:
    """eps unless the file says otherwise: an SD 1.x file of a v model is rare, and then marked."""
    v = header.metadata.get("modelspec.prediction_type") == "v"
    return {"prediction_type": "v_prediction" if v else "epsilon"}


def _side(shapes: Shapes, key: str, axis: int) -> int:
    """One side of a tensor's shape. Raises KeyError where there is no such tensor, or it is too flat."""
    if len(shapes.get(key, ())) <= axis:
        raise KeyError(key)
    return shapes[key][axis]


def _under(shapes: Shapes, prefix: str) -> Shapes:
    return {key.removeprefix(prefix): shape for key, shape in shapes.items() if key.startswith(prefix)}


@functools.cache
def _constants() -> dict[str, Any]:
    data: dict[str, Any] = json.loads(
        resources.files("lora_core").joinpath("data", "sd1.json").read_text(encoding="utf-8")
    )
    return data
