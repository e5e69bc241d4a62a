"""Under which names other programs look for a LoRA's layers, stated anew from their source.

A1111    stable-diffusion-webui 1.10, extensions-builtin/Lora/networks.py: convert_diffusers_name_to_compvis,
         assign_network_names_to_compvis_modules and load_network
ComfyUI  of 2025, comfy/lora.py: model_lora_keys_unet, model_lora_keys_clip; comfy/utils.py: unet_to_diffusers
InvokeAI of 2025, backend/patches/lora_conversions/{sd,sdxl}_lora_conversion_utils.py; what a file is for,
         backend/model_manager/configs/lora.py and util/model_util.py

Their models' own names are sgm's, which test_formats proves against diffusers' converter.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from lora_core.ldm_names import to_sgm
from tests.lora_core.full_size import UP_WITH_ATTENTION, everything

# ---------------------------------------------------------------- what the models of A1111 and ComfyUI are built of


def sgm_names(family: str) -> dict[str, str]:
    """Adapter path of a UNet's layer -> its name in the original layout."""
    names = {}
    for path in everything(family):
        component, _, inside = path.partition(".")
        if component == "unet":
            sgm = to_sgm(inside, attention_up=UP_WITH_ATTENTION[family])
            assert sgm is not None, path
            names[path] = sgm
    return names


_OPEN_CLIP = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}


def open_clip_name(inside: str) -> str | None:
    """Of transformers' names; None for what is no module there: q, k and v are one parameter of `attn`."""
    found = re.fullmatch(r"text_model\.encoder\.layers\.(\d+)\.(.+)", inside)
    if found is None:
        fixed = {
            "text_model.embeddings.token_embedding": "token_embedding",
            "text_model.final_layer_norm": "ln_final",
        }
        return fixed.get(inside)
    known = _OPEN_CLIP.get(found[2])
    return None if known is None else f"transformer.resblocks.{found[1]}.{known}"


# ---------------------------------------------------------------- A1111


def a1111_modules(family: str) -> dict[str, str]:
    """Its network_layer_mapping: flattened module name -> our adapter path (q, k and v share one module)."""
    modules = {f"diffusion_model_{sgm.replace('.', '_')}": path for path, sgm in sgm_names(family).items()}
    for path in everything(family):
        component, _, inside = path.partition(".")
        if component == "unet":
            continue
        number = {"text_encoder": "0_", "text_encoder_2": "1_"}[component] if family == "sdxl" else ""
        if family == "sd2" or component == "text_encoder_2":
            name = open_clip_name(inside)
            if name is not None:
                modules[f"{number}model_{name.replace('.', '_')}"] = path
            if inside.endswith("self_attn.q_proj"):
                layer = inside.split(".")[3]
                modules[f"{number}model_transformer_resblocks_{layer}_attn"] = path.removesuffix(".q_proj")
        else:
            modules[f"{number}transformer_{inside.replace('.', '_')}"] = path
    return modules


_RESIDUAL = {
    "conv1": "in_layers_2",
    "conv2": "out_layers_3",
    "norm1": "in_layers_0",
    "norm2": "out_layers_0",
    "time_emb_proj": "emb_layers_1",
    "conv_shortcut": "skip_connection",
}


def a1111_conversion(name: str, *, open_clip: bool) -> str:
    """A kohya name in diffusers' words -> the module's name; what it does not know stays as it is."""

    def inner(kind: str, rest: str) -> str:
        return _RESIDUAL.get(rest, rest) if kind == "resnets" else rest

    if found := re.match(r"lora_unet_conv_(in|out)(.*)", name):
        return f"diffusion_model_{'input_blocks_0_0' if found[1] == 'in' else 'out_2'}{found[2]}"
    if found := re.match(r"lora_unet_time_embedding_linear_(\d+)(.*)", name):
        return f"diffusion_model_time_embed_{2 * int(found[1]) - 2}{found[2]}"
    if found := re.match(r"lora_unet_(down|up)_blocks_(\d+)_(attentions|resnets)_(\d+)_(.+)", name):
        block, n = int(found[2]), int(found[4])
        way = f"input_blocks_{1 + 3 * block + n}" if found[1] == "down" else f"output_blocks_{3 * block + n}"
        return f"diffusion_model_{way}_{int(found[3] == 'attentions')}_{inner(found[3], found[5])}"
    if found := re.match(r"lora_unet_mid_block_(attentions|resnets)_(\d+)_(.+)", name):
        place = 1 if found[1] == "attentions" else 2 * int(found[2])
        return f"diffusion_model_middle_block_{place}_{inner(found[1], found[3])}"
    if found := re.match(r"lora_unet_down_blocks_(\d+)_downsamplers_0_conv", name):
        return f"diffusion_model_input_blocks_{3 * int(found[1]) + 3}_0_op"
    if found := re.match(r"lora_unet_up_blocks_(\d+)_upsamplers_0_conv", name):
        block = int(found[1])
        return f"diffusion_model_output_blocks_{3 * block + 2}_{2 if block else 1}_conv"
    if found := re.match(r"lora_te(2?)_text_model_encoder_layers_(\d+)_(.+)", name):
        if not found[1] and not open_clip:
            return f"transformer_text_model_encoder_layers_{found[2]}_{found[3]}"
        renamed = (("mlp_fc1", "mlp_c_fc"), ("mlp_fc2", "mlp_c_proj"), ("self_attn", "attn"))
        rest = next((found[3].replace(old, new) for old, new in renamed if old in found[3]), found[3])
        return f"{'1_' if found[1] else ''}model_transformer_resblocks_{found[2]}_{rest}"
    return name


def a1111_finds(name: str, modules: Mapping[str, str], *, open_clip: bool) -> str | None:
    """A kohya name -> the path of the layer it ends in, or None: the keys are passed over in silence."""
    tries = [a1111_conversion(name, open_clip=open_clip)]
    if (joined := re.fullmatch(r"(.*)_([qkv]_proj)", tries[0])) and joined[1] in modules:
        return f"{modules[joined[1]]}.{joined[2]}"  # a module of all three
    if "lora_unet" in name:
        tries.append(name.replace("lora_unet", "diffusion_model"))
    elif "lora_te1_text_model" in name:
        tries += [
            name.replace("lora_te1_text_model", f"{number}transformer_text_model") for number in ("0_", "")
        ]
    elif "oft_unet" in name:
        tries.append(name.replace("oft_unet", "diffusion_model"))
    return next((modules[found] for found in tries if found in modules), None)


# ---------------------------------------------------------------- ComfyUI

_COMFY_CLIP = ("mlp.fc1", "mlp.fc2", *(f"self_attn.{p}_proj" for p in ("k", "q", "v", "out")))


def comfyui_map(family: str) -> dict[str, str]:
    """What may stand before a key's last part -> the path of the layer."""
    found: dict[str, str] = {}
    for path, sgm in sgm_names(family).items():
        inside = path.removeprefix("unet.")
        found |= {f"lora_unet_{sgm.replace('.', '_')}": path, f"diffusion_model.{sgm}": path}
        found |= {f"{kind}_{inside.replace('.', '_')}": path for kind in ("lora_unet", "lycoris")}
        old = inside.replace(".to_", ".processor.to_").removesuffix(
            ".0" if inside.endswith(".to_out.0") else "\0"
        )
        found |= {f"{prefix}{old}": path for prefix in ("", "unet.")}
    clips = {"sd1": ("clip_l",), "sd2": ("clip_h",), "sdxl": ("clip_l", "clip_g")}[family]
    for path, built in everything(family).items():
        component, _, inside = path.partition(".")
        if component == "unet":
            continue
        clip = clips[component == "text_encoder_2"]
        found[f"text_encoders.{clip}.transformer.{inside}"] = path
        layer = re.fullmatch(r"text_model\.encoder\.layers\.(\d+)\.(.+)", inside)
        if layer is None or layer[2] not in _COMFY_CLIP or int(layer[1]) >= 32:
            continue
        flat = f"text_model_encoder_layers_{layer[1]}_{layer[2].replace('.', '_')}"
        prefixes = ("lora_te2_",) if component == "text_encoder_2" else ("lora_te_", "lora_te1_")
        found |= {f"{prefix}{flat}": path for prefix in prefixes}
        found[f"{component}.{inside}"] = path
        assert built.kind == "Linear"
    if family == "sdxl":
        found["lora_te2_text_projection"] = "text_encoder_2.text_projection"
    return found


# ---------------------------------------------------------------- InvokeAI


def invokeai_name(name: str, family: str) -> str:
    """The flattened name it looks a layer up by. ValueError where it refuses the file.

    Its SDXL models have diffusers' names: it translates sgm's by the longest prefix of a list.
    """
    if family != "sdxl" or name.startswith(("lora_te1_", "lora_te2_")):
        return name
    if not name.startswith("lora_unet_"):
        raise ValueError(f"Unrecognized SDXL LoRA key prefix: {name}")
    inside = name.removeprefix("lora_unet_")
    known = [sgm for sgm in _INVOKE if inside.startswith(sgm)]
    if not known:
        return name
    sgm = max(known, key=len)
    return f"lora_unet_{_INVOKE[sgm]}{inside.removeprefix(sgm)}"


def _invokeai_prefixes() -> dict[str, str]:
    pairs = {
        "input_blocks_0_0": "conv_in",
        "out_0": "conv_norm_out",
        "out_2": "conv_out",
        "middle_block_1": "mid_block_attentions_0",
    }
    pairs |= {f"time_embed_{2 * i}": f"time_embedding_linear_{i + 1}" for i in (0, 1)}
    pairs |= {f"label_emb_0_{2 * i}": f"add_embedding_linear_{i + 1}" for i in (0, 1)}
    residual = {f"middle_block_{2 * i}": f"mid_block_resnets_{i}" for i in (0, 1)}
    for block in range(3):
        pairs[f"input_blocks_{3 * block + 3}_0_op"] = f"down_blocks_{block}_downsamplers_0_conv"
        pairs[f"output_blocks_{3 * block + 2}_2"] = f"up_blocks_{block}_upsamplers_0"
        for way, sgm, first, count in (("down", "input", 1, 2), ("up", "output", 0, 3)):
            for i in range(count):
                entry, ours = f"{sgm}_blocks_{3 * block + first + i}", f"{way}_blocks_{block}"
                residual[f"{entry}_0"] = f"{ours}_resnets_{i}"
                pairs[f"{entry}_1"] = f"{ours}_attentions_{i}"
    pairs |= {f"{a}_{sgm}": f"{b}_{ours}" for a, b in residual.items() for ours, sgm in _RESIDUAL.items()}
    return pairs


_INVOKE = _invokeai_prefixes()


def invokeai_family(shapes: Mapping[str, Sequence[int]]) -> str | None:
    """Key -> shape of a kohya file's tensors -> "sd1", "sd2", "sdxl", or None: it does not take the file.

    The width of a text embedding decides: of the first attn2 to_k or to_v, or of a text encoder's attention, whichever
    comes first in the file; of SDXL's encoders the sum of both. Beside that, only SDXL's deep attention tells.
    """
    widths: dict[str, int] = {}
    for key, shape in shapes.items():
        name, _, role = key.partition(".")
        if role not in ("lora_down.weight", "hada_w1_b", "hada_w2_b"):
            continue
        if name.startswith("lora_unet_") and name.endswith(("_attn2_to_k", "_attn2_to_v")):
            widths["whole"] = shape[1]
        elif found := re.match(r"lora_(te[12]?)_.*_self_attn_", name):
            widths["whole" if found[1] == "te" else found[1]] = shape[1]
        if {"te1", "te2"} <= widths.keys():
            widths["whole"] = widths["te1"] + widths["te2"]
        if "whole" in widths:
            return {768: "sd1", 1024: "sd2", 1280: "sdxl", 2048: "sdxl"}.get(widths["whole"])
    blocks = (
        r"(?:(?:down|up)_blocks_\d+_attentions_\d+|mid_block_attentions_\d+|(?:input|output)_blocks_\d+_\d+"
        r"|middle_block_\d+)"
    )
    depths = [re.match(rf"lora_unet_{blocks}_transformer_blocks_(\d+)_", key) for key in shapes]
    return "sdxl" if any(found and int(found[1]) >= 2 for found in depths) else None
