"""A checkpoint in one .safetensors file: what kind of file it is, and the model's measures.

    model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight   the UNet
    first_stage_model.decoder.up.0.block.0.conv1.weight                             the VAE
    cond_stage_model.transformer.text_model.encoder.layers.0.mlp.fc1.weight         SD 1: CLIP's text encoder
    cond_stage_model.model.transformer.resblocks.0.mlp.c_fc.weight                  SD 2: OpenCLIP's
    conditioner.embedders.0.transformer.text_model...                               SDXL has both
    conditioner.embedders.1.model.transformer.resblocks...

Written by CompVis' and Stability's scripts, A1111's merger, kohya's trainer and ComfyUI; the layout of civitai. The
file has no configuration: widths and counts follow from shapes (ldm_measures.py), the rest lies in data/*.json.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import resources
from typing import Any

from lora_core.clip_vocabulary import SIZE
from lora_core.errors import FileRefused
from lora_core.families import FAMILIES
from lora_core.ldm_measures import (
    SIZES,
    Shapes,
    clip_measures,
    family_of,
    openclip_measures,
    side,
    unet_measures,
    vae_measures,
)
from lora_core.ldm_names import OPENCLIP, PREFIXES, Key, ldm_keys
from lora_core.prediction import told
from lora_core.safe_header import Header

_UNET = PREFIXES["sd1"]["unet"]
# Other beginnings of the same keys: early mergers dropped "text_model.", sgm's trainer names SD 2's encoder as SDXL's.
_PREFIXES = {
    "cond_stage_model.transformer.text_model.": ("cond_stage_model.transformer.",),
    "cond_stage_model.model.": ("conditioner.embedders.0.model.",),
}
# Programs that took diffusers' names of 2023 for older ones: their VAE has to_q where everybody's has q.
_VAE_ATTENTION = {"q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}

# Left aside knowingly: the weights' averaged twin, the noise schedule as tables, the VAE's training loss, and what CLIP
# needs to compare words with pictures.
_CLIP = r"(cond_stage_model|conditioner\.embedders\.[01])\."
_IGNORED = re.compile(
    r"model_ema\..*|first_stage_model\.(loss|model_ema)\..*|betas|(sqrt_)?(recip(m1)?_)?(log_)?(one_minus_)?"
    r"alphas_cumprod(_prev)?|sqrt_recipm1_alphas_cumprod|posterior_(variance|log_variance_clipped|mean_coef[12])|"
    r"lvlb_weights|logvar|scale_factor|ddim_(sigmas|alphas|alphas_prev|sqrt_one_minus_alphas)|denoiser\.sigmas|"
    r"global_step|v_pred|ztsnr|"
    rf"{_CLIP}transformer\.(text_model\.)?(embeddings\.position_ids|text_projection\.weight)|"
    rf"{_CLIP}(model\.)?(logit_scale|attn_mask|text_projection)"
)

# Other kinds of file: a key that only they have, what they are, and what to do. The first that fits is told.
_PLAIN = "Open a text-to-image model."
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
    (r"embedder\.model\..*", "a model that varies pictures (unCLIP)", _PLAIN),
    (r"depth_model\..*", "a depth-to-image model", _PLAIN),
    (r"edm_(mean|std)|edm_vpred\..*", "an SDXL model with another kind of noise (EDM)", _PLAIN),
    (
        r"cond_stage_model\.roberta\..*",
        "an AltDiffusion model, whose words are read by another encoder",
        _PLAIN,
    ),
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
_SPECIAL = {9: "an inpainting model", 8: "an instruct-pix2pix model", 7: "an upscaler"}
PADS = {
    "sd1": ("<|endoftext|>",),
    "sd2": ("!",),
    "sdxl": ("<|endoftext|>", "!"),
}  # of the tokenizers, OpenCLIP's 0
TOKENIZERS = ("tokenizer", "tokenizer_2")


@dataclass(frozen=True)
class SingleFile:
    """What a header says about a model.

    configs     component -> keyword arguments for its class
    scheduler   "class" and its keyword arguments; without what the UNet predicts where that is not `told`
    prefixes    component -> what its keys begin with in this file
    """

    header: Header
    family: str
    configs: dict[str, dict[str, Any]]
    scheduler: dict[str, Any]
    prefixes: dict[str, str]
    told: str | None

    def keys(self, component: str, names: Iterable[str]) -> dict[str, Key]:
        """The parameters' names -> where they lie in this file."""
        standard = PREFIXES[self.family][component]
        keys = ldm_keys(self.family, component, names)
        return {
            name: self._spelled(key._replace(name=self.prefixes[component] + key.name.removeprefix(standard)))
            for name, key in keys.items()
        }

    def leftovers(self, used: set[str]) -> tuple[str, ...]:
        """Keys that belong to nothing known: neither used nor of a kind that is left aside knowingly."""
        unused = self.configs["text_encoder"]["num_hidden_layers"]
        last = f"{self.prefixes['text_encoder']}transformer.resblocks.{unused}."  # SD 2's
        return tuple(
            k
            for k in self.header.tensors
            if k not in used
            and not _IGNORED.fullmatch(k)
            and not (self.family == "sd2" and k.startswith(last))
        )

    def _spelled(self, key: Key) -> Key:
        if key.name in self.header.tensors:
            return key
        if key.transposed and f"{key.name}.weight" in self.header.tensors:
            return Key(f"{key.name}.weight")
        before, at, rest = key.name.partition(".attn_1.")
        part, _, kind = rest.rpartition(".")
        other = f"{before}{at}{_VAE_ATTENTION.get(part, part)}.{kind}"
        return key._replace(name=other) if at and other in self.header.tensors else key


def describe(header: Header) -> SingleFile:
    """The measures of a checkpoint of one of the families. Raises FileRefused for any other file, saying what it is."""
    name, tensors = header.path.name, header.tensors
    for pattern, kind, advice in _OTHERS:
        if any(re.fullmatch(pattern, key) for key in tensors):
            raise FileRefused(f"{name} is {kind}. {advice}")
    if not any(key.startswith(_UNET) for key in tensors):
        vae = all(
            re.match(r"(first_stage_model\.)?(en|de)coder\.|(\w+\.)?(post_)?quant_conv", k) for k in tensors
        )
        first = next(iter(tensors), "none")
        kind = "a VAE alone" if vae else f"no Stable Diffusion model (its first tensor is {first})"
        raise FileRefused(f"{name} is {kind}; a checkpoint was expected. Open a base model.")
    shapes = {key: info.shape for key, info in tensors.items()}
    unet = _under(shapes, _UNET)
    family = family_of(unet)
    try:
        _refuse_special(unet, tensors, name)
        prefixes = _prefixes(family, tensors, name)
        found = {component: _under(shapes, prefix) for component, prefix in prefixes.items()}
        said = told(header) or (None if family == "sd2" else "epsilon")
        data = _constants(family)
        configs = {c: data[c] | _measures(family, c, found[c]) for c in prefixes}
        if family == "sdxl":
            _check_sdxl(configs)
    except KeyError as problem:
        raise FileRefused(
            f"{name} lacks {problem.args[0]}, which every {FAMILIES[family].title} checkpoint has: it is incomplete or "
            "of another kind. Download it again, or open another."
        ) from problem
    for component in PREFIXES[family]:
        rows = configs[component].get("vocab_size", SIZE)
        if rows < SIZE:
            raise FileRefused(
                f"{name} knows {rows:,} words; CLIP's {SIZE:,} were expected, as its prompts could not be read "
                "otherwise. Open its diffusers folder instead."
            )
    scheduler = data["scheduler"] | ({"prediction_type": said} if said else {})
    if "ztsnr" in tensors:
        scheduler |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    return SingleFile(header, family, configs, scheduler, prefixes, said)


def _refuse_special(unet: Shapes, tensors: Iterable[str], name: str) -> None:
    inputs = side(unet, "input_blocks.0.0.weight", 1)
    if inputs != 4:
        raise FileRefused(
            f"{name} is {_SPECIAL.get(inputs, 'a special model')}: its UNet takes {inputs} channels where 4 were "
            f"expected. {_PLAIN}"
        )
    openclip_first = any(key.startswith("conditioner.embedders.0.model.") for key in tensors)
    if openclip_first and "label_emb.0.0.weight" in unet:
        raise FileRefused(
            f"{name} is SDXL's refiner, which only finishes another model's pictures. Open an SDXL base model."
        )


def _prefixes(family: str, tensors: Iterable[str], name: str) -> dict[str, str]:
    """What each component's keys begin with here. Raises FileRefused where one is not there at all."""
    found = {}
    for component, standard in PREFIXES[family].items():
        known = (standard, *_PREFIXES.get(standard, ()))
        prefix = next((p for p in known if any(key.startswith(p) for key in tensors)), None)
        if prefix is None:
            missing = {"vae": "VAE", "text_encoder_2": "second text encoder"}.get(component, "text encoder")
            raise FileRefused(
                f"{name} has the UNet of {FAMILIES[family].title} but no {missing}; all parts were expected in it. "
                "Open the complete version, or its diffusers folder."
            )
        found[component] = prefix
    return found


def _measures(family: str, component: str, shapes: Shapes) -> dict[str, Any]:
    if component == "unet":
        return unet_measures(shapes, family)
    if component == "vae":
        return vae_measures(shapes)
    return openclip_measures(shapes, family) if (family, component) in OPENCLIP else clip_measures(shapes)


def _check_sdxl(configs: dict[str, dict[str, Any]]) -> None:
    """SDXL's size conditioning takes what the second encoder's summary leaves of its entry."""
    config = configs["unet"]
    left = config["projection_class_embeddings_input_dim"] - configs["text_encoder_2"]["projection_dim"]
    if left <= 0 or left % SIZES:
        raise KeyError("a label_emb.0.0.weight that fits its second text encoder")
    config["addition_time_embed_dim"] = left // SIZES


def _under(shapes: Shapes, prefix: str) -> Shapes:
    return {key.removeprefix(prefix): shape for key, shape in shapes.items() if key.startswith(prefix)}


@functools.cache
def _constants(family: str) -> dict[str, Any]:
    data: dict[str, Any] = json.loads(
        resources.files("lora_core").joinpath("data", f"{family}.json").read_text(encoding="utf-8")
    )
    return data
