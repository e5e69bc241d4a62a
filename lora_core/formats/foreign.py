"""Names for what is no LoRA of Stable Diffusion 1, 2 or XL: other families of model, other kinds of file.

Told from names alone, and where families share their names, from how wide a layer's input is.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Container, Iterable
from functools import lru_cache

from lora_core.errors import FileRefused
from lora_core.formats.endings import role_of, told
from lora_core.formats.kinds import KINDS
from lora_core.formats.names import path_of
from lora_core.safe_files import Header

# Models of others, the most particular first. One such key is enough: their text encoder's layers may well look like
# ours. `/` stands for a dot or kohya's underscore, `<` for whatever stands before a model's own names.
OTHERS = (
    (r"motion_modules/", "AnimateDiff motion (video)"),
    (r"(?:^|/)(?:temporal_transformer_blocks|time_stack|time_mix)", "Stable Video Diffusion"),
    (r"(?:^|/)(?:temp_attentions|temp_convs|transformer_in)/", "ModelScope (video)"),
    (r"(?:down|mid|up)_blocks?/.*/add_[kv]_proj", "Kandinsky or DeepFloyd IF"),
    (r"(?:^|/)(?:double|single)_stream_blocks/", "HiDream"),
    (r"(?:^|/)joint_transformer_blocks/|(?:^|/)(?:double|single)_layers/\d", "AuraFlow"),
    (r"token_refiner/|double_blocks/\d+/(?:img|txt)_(?:mlp/fc[12]|mod/linear)", "Hunyuan Video"),
    (r"distilled_guidance_layer/", "Chroma"),
    (r"(?:^|/)(?:double_blocks|single_blocks|single_transformer_blocks)/", "Flux"),
    (r"(?:^|/)joint_blocks/", "SD3"),
    (r"<transformer_blocks/\d+/(?:img_mlp|txt_mlp|img_mod|txt_mod)/", "Qwen-Image"),
    (r"<transformer_blocks/\d+/attn/|/(?:add_[qkv]_proj|to_add_out)/", "SD3, Qwen-Image or Flux"),
    (r"<transformer_blocks/\d+/", "PixArt, LTX-Video or CogVideoX"),
    (r"<(?:layers|noise_refiner|context_refiner)/\d+/(?:attention|attn|feed_forward)/", "Lumina or Z-Image"),
    (r"<blocks/\d+/(?:self_attn|cross_attn)/(?:[qkv]|output)_proj|adaln_modulation", "Cosmos"),
    (r"<blocks/\d+/(?:self_attn|cross_attn|attn[12]|ffn)/", "Wan (video)"),
    (r"^lora_prior_|<down_blocks/\d+/\d+/(?:attention|channelwise|depthwise)/", "Stable Cascade"),
    (r"^lora_te3_|^text_encoder_3/|^(?:text_encoders/)?t5xxl/", "SD3 or Flux"),
    (r"^transformer/|^lora_transformer_", "diffusion transformer"),
)
BY_WIDTH = {
    "SD3, Qwen-Image or Flux": {1536: "SD3", 2432: "SD3.5", 3072: "Qwen-Image or Flux"},
    "PixArt, LTX-Video or CogVideoX": {
        1152: "PixArt",
        1920: "CogVideoX",
        2048: "LTX-Video",
        2240: "Sana",
        3072: "CogVideoX",
        4096: "LTX-Video",
    },
    "Lumina or Z-Image": {2304: "Lumina", 3840: "Z-Image"},
}
_BEFORE = "|".join(
    f"{model}/"
    for model in ("diffusion_model", "lora_transformer", "lora_unet", "lycoris", "transformer", "unet")
)
_MODELS = tuple(
    (re.compile(pattern.replace("<", f"^(?:base_model/|model/|{_BEFORE})*").replace("/", "[._]")), name)
    for pattern, name in OTHERS
)
# Other files, and then what only base models have
_FILES = tuple(
    (re.compile(pattern), name)
    for pattern, name in (
        (r"^lllite_", "a ControlNet-LLLite"),
        (r"^lora_controlnet$", "a Control-LoRA (a ControlNet)"),
        (r"^control_model\.|controlnet_|^input_hint_block\.|^zero_convs\.", "a ControlNet"),
        (r"^(?:adapter\.)?body\.\d+\.(?:block[12]|resnets|in_conv|down_opt)\b", "a T2I-Adapter"),
        (r"^(?:ip_adapter|image_proj)\b", "an IP-Adapter"),
        (r"^(?:320|640|768|1024|1280)\.(?:linear|\d)", "a hypernetwork"),
        (
            r"\bRDB\d\b|\brdb\d\b|^(?:conv_first|conv_body|RRDB_trunk)\b|^model\.1\.sub\.",
            "an upscaler (ESRGAN)",
        ),
        (r"^layers\.\d+\.residual_group\.", "an upscaler (SwinIR)"),
        (r"^model\.diffusion_model\.", "a base model (checkpoint)"),
        (r"^(?:first_stage_model\.)?(?:encoder|decoder)\.(?:conv_in|mid|down|up|conv_out)", "a VAE"),
        (r"^(?:down_blocks|mid_block|up_blocks|input_blocks|output_blocks)\.", "the UNet of a base model"),
        (r"^(?:vision_model|visual)\.", "an image encoder (CLIP)"),
        (
            r"^(?:cond_stage_model|conditioner|text_model|transformer\.(?:resblocks|text_model))\.",
            "a text encoder",
        ),
    )
)
_KIND_OF_ROLE = {role: kind.name for kind in KINDS for role in kind.roles.values()}


def describe(key: str, keys: Container[str]) -> str:
    """How an unused key is named to the user. `keys`: the whole file's."""
    if key.startswith("bundle_emb."):
        return f"{key} (of a bundled word, but no embedding of a text encoder of Stable Diffusion)"
    found = role_of(key, keys)
    kind = None if found is None else _KIND_OF_ROLE.get(found[1])
    return key if kind is None else f"{key} ({kind} of a layer that Stable Diffusion does not have)"


def refuse_other_family(header: Header) -> None:
    """Raise FileRefused if the file is an adapter of, or is, a model other than Stable Diffusion 1, 2 or XL."""
    strange = [key for key in header.tensors if not _is_ours(key) and _is_anothers(key)]
    for pattern, name in _MODELS:
        key = next((key for key in strange if pattern.search(key)), None)
        if key is None:
            continue
        widths = BY_WIDTH.get(name, {})
        name = next((widths[w] for k, w in _inputs(header) if w in widths and pattern.search(k)), name)
        said = f"{'an' if name[0] in 'AEIOU' or name.startswith(('SD3', 'LTX')) else 'a'} {name}"
        if any(role_of(k, header.tensors) for k in header.tensors):
            raise FileRefused(
                f"{header.path.name} is {said} LoRA ({key[:80]}); a LoRA of SD 1.x, SD 2.x or SDXL was "
                "expected. Use it with a program for that model."
            )
        raise FileRefused(
            f"{header.path.name} is {said} model ({key[:80]}), not a LoRA. Choose a LoRA of SD 1.x, SD 2.x or SDXL."
        )


def refuse(header: Header) -> None:
    """Raise FileRefused, saying what a file without any LoRA layer of ours is instead."""
    name, keys = header.path.name, header.tensors
    for pattern, what in _FILES:
        if any(pattern.search(key) and not role_of(key, keys) for key in keys):
            raise FileRefused(
                f"{name} is {what}, not a LoRA. Choose a LoRA file, or put this one where it belongs."
            )
    factors = [(found[1], key) for key in keys if (found := role_of(key, keys))]
    kinds = Counter(_KIND_OF_ROLE[role] for role, _ in factors if role in _KIND_OF_ROLE)
    first = ", ".join(sorted(keys)[:2])[:160] or "none"
    if kinds:
        raise FileRefused(
            f"{name} is of the kind {kinds.most_common(1)[0][0]}, for layers that no Stable Diffusion model has (its "
            f"first keys: {first}). Use it with a program for its model."
        )
    raise FileRefused(
        f"{name} holds no LoRA layer of Stable Diffusion that we know (its first keys: {first}). Check "
        "that it is a LoRA of SD 1.x, SD 2.x or SDXL."
    )


@lru_cache(maxsize=2**14)  # of a thousand files most have the same keys
def _is_ours(key: str) -> bool:
    found = told(key)
    return found is not None and path_of(found.layer) is not None


@lru_cache(maxsize=2**14)
def _is_anothers(key: str) -> bool:
    return any(pattern.search(key) for pattern, _ in _MODELS)


def _inputs(header: Header) -> Iterable[tuple[str, int]]:
    """How wide the layers' inputs are, where a LoRA or a weight tells it."""
    for key, info in header.tensors.items():
        found = role_of(key, header.tensors)
        if len(info.shape) == 2 and (found is None or found[1] == "down"):
            yield key, info.shape[1]
