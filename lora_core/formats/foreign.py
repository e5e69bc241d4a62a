"""Names for what is no LoRA of ours: other kinds of adapter, other families of model, other kinds of file."""

from __future__ import annotations

import re
from collections import Counter
from functools import lru_cache

from lora_core.errors import FileRefused
from lora_core.safe_files import Header

# Kinds of adapter: what their keys look like, what they are called. Of those in NAMED_ONLY_BY_KOHYA a key comes
# here only if its layer is none of ours; the others this version cannot use.
_KINDS = tuple(
    (re.compile(pattern), name)
    for pattern, name in (
        (r"\.(hada_w[12]_[ab]|hada_t[12])$", "LoHa"),
        (r"\.(lokr_w[12](?:_[ab])?|lokr_t2)$", "LoKr"),
        (r"\.(on_input)$|^lora_[a-z0-9]+_[^.]+\.(weight)$", "(IA)³"),
        (r"\.([ab][12]|bm)\.weight$", "GLoRA"),
        (r"\.?(oft_blocks|oft_diag|oft_R[^.]*|rescale)(?:\.|$)", "OFT"),
        (r"\.(diff|diff_b)$", "full difference"),
        (r"\.(w_norm|b_norm)$", "difference of a norm layer"),
        (r"^(bundle_emb)\.", "bundled textual inversion"),
        (r"\.(lora_B\.(?:[^.]+\.)?bias)$", "bias of a LoRA"),
    )
)
NAMED_ONLY_BY_KOHYA = (
    "LoHa",
    "LoKr",
    "(IA)³",
    "GLoRA",
    "OFT",
    "full difference",
    "difference of a norm layer",
)
# Adapters of other models. One such key is enough: their text encoder part may well look like ours.
_FAMILIES = tuple(
    (re.compile(pattern), name)
    for pattern, name in (
        (r"motion_modules[._]", "an AnimateDiff motion LoRA (video)"),
        (r"(?:^|[._])(?:double_blocks|single_blocks|single_transformer_blocks)[._]", "a Flux LoRA"),
        (r"(?:^|[._])joint_blocks[._]|[._](?:add_[qkv]_proj|to_add_out)\.", "an SD3 LoRA"),
        (r"(?:^|[._])blocks[._]\d+[._](?:self_attn|cross_attn)[._]", "a Wan LoRA (video)"),
        (
            r"^transformer\.|^lora_transformer_|^diffusion_model\.(?:transformer_blocks|layers)\.",
            "a LoRA of a transformer model",
        ),
        (r"^lora_prior_", "a Stable Cascade LoRA"),
        (r"^lora_te3_|^text_encoder_3\.", "a LoRA of a model with three text encoders"),
    )
)
_FILES = tuple(
    (re.compile(pattern), name)
    for pattern, name in (
        (r"^control_model\.|controlnet|^input_hint_block\.|^zero_convs\.", "a ControlNet"),
        (r"^model\.diffusion_model\.", "a base model (checkpoint)"),
        (r"^(?:first_stage_model\.)?(?:encoder|decoder)\.(?:conv_in|mid|down|up|conv_out)", "a VAE"),
        (r"^(?:down_blocks|mid_block|up_blocks|input_blocks|output_blocks)\.", "the UNet of a base model"),
        (r"^(?:cond_stage_model|conditioner|text_model|transformer\.resblocks)\.", "a text encoder"),
        (r"^(?:ip_adapter|image_proj)\b", "an IP-Adapter"),
        (r"^(?:emb_params|clip_[lg]|string_to_param.*)$", "a textual inversion embedding"),
    )
)


def kind_of(key: str) -> tuple[str, str] | None:
    """-> (kind, the telling part of the key) for a key of another kind of adapter."""
    for pattern, name in _KINDS:
        if found := pattern.search(key):
            return name, next(g for g in found.groups() if g)
    return None


def describe(key: str) -> str:
    """How an unused key is named to the user."""
    kind = kind_of(key)
    if kind is None:
        return key
    if kind[0] in NAMED_ONLY_BY_KOHYA:
        return f"{key} ({kind[0]} of a layer that kohya's spelling does not name)"
    return f"{key} ({kind[0]}: not supported by this version)"


@lru_cache(maxsize=2**14)  # of a thousand files most have the same keys
def _of_another_family(key: str) -> bool:
    return any(pattern.search(key) for pattern, _ in _FAMILIES)


def refuse_other_family(header: Header) -> None:
    """Raise FileRefused if the file is an adapter of a model other than Stable Diffusion 1, 2 or XL."""
    if not any(map(_of_another_family, header.tensors)):
        return
    for pattern, name in _FAMILIES:
        for key in header.tensors:
            if pattern.search(key):
                raise FileRefused(
                    f"{header.path.name} is {name} ({key[:80]}); a LoRA of SD 1.x, SD 2.x or SDXL was "
                    "expected. Use it with a program for that model."
                )


def refuse(header: Header) -> None:
    """Raise FileRefused, saying what a file without any LoRA layer of ours is instead."""
    name = header.path.name
    kinds = Counter(known for key in header.tensors if (known := kind_of(key)))
    if kinds:
        (kind, part), _ = kinds.most_common(1)[0]
        if kind in NAMED_ONLY_BY_KOHYA:
            raise FileRefused(
                f"{name} is of the kind {kind} ({part}), under names that are none of Stable Diffusion's layers "
                "in kohya's spelling (lora_unet_…, lora_te_…). Save it in that spelling."
            )
        raise FileRefused(
            f"{name} is of the kind {kind} ({part}): not supported by this version. Use a LoRA, DoRA, "
            f"{', '.join(NAMED_ONLY_BY_KOHYA[:-2])} file."
        )
    for pattern, what in _FILES:
        if any(pattern.search(key) for key in header.tensors):
            raise FileRefused(
                f"{name} is {what}, not a LoRA. Choose a LoRA file, or put this one where it belongs."
            )
    first = ", ".join(sorted(header.tensors)[:2])[:160] or "none"
    raise FileRefused(
        f"{name} holds no LoRA layer of Stable Diffusion that we know (its first keys: {first}). Check "
        "that it is a LoRA of SD 1.x, SD 2.x or SDXL."
    )
