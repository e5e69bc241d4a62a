"""kohya's flat spelling. Written by kohya's trainer, LyCORIS and OneTrainer, read by A1111, Forge, ComfyUI.

    lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q.lora_down.weight   (r, in[, k, k])
    lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q.lora_up.weight     (out, r[, 1, 1])
    lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q.alpha              ()
    lora_unet_input_blocks_4_1_proj_in.lora_down.weight            SDXL: kohya trains it under sgm's names
    lora_te_text_model_encoder_layers_0_mlp_fc1.lora_up.weight     SD 1 and 2; SDXL: lora_te1_, lora_te2_
    lora_unet_mid_block_resnets_0_conv1.lora_mid.weight            (r, r, k, k) LyCORIS' Tucker core
    lora_unet_mid_block_attentions_0_proj_in.dora_scale            (out, 1[, 1, 1]), or (1, in[, 1, 1])
    lora_unet_mid_block_resnets_0_conv1.hada_w1_a, hada_w1_b …     (out, r), (r, in*k*k): LyCORIS' LoHa
    lora_unet_mid_block_resnets_0_conv1.lokr_w1, lokr_w2 …         (out1, in1), (out2, in2, k, k): its LoKr
    lora_unet_conv_in.diff, diff_b                                 a whole difference, and that of a bias
    lora_unet_mid_block_resnets_0_norm1.w_norm, b_norm             (out,), (out,): LyCORIS' norms
    oft_unet_mid_block_attentions_0_proj_in.oft_blocks             (k, b, b): kohya's OFT, under a name of its own
    lora_te_text_model_embeddings_token_embedding.lora_up.weight   (words, r): ΔW = up · down, a row for each word
    bundle_emb.<fox>.string_to_param.*                             new words: see words

ΔW = alpha/r · up · down; without alpha it is the rank. The kinds' own keys: see factor_kinds and other_kinds.
"""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from lora_core.adapter import Adapter
from lora_core.deltas import Factored
from lora_core.deltas.bias import WithBias
from lora_core.errors import ConfigError
from lora_core.formats.assembly import Load, Reading
from lora_core.formats.endings import role_of
from lora_core.formats.keys import flattened
from lora_core.formats.kinds import KINDS, kind_of_delta
from lora_core.formats.metadata import with_hashes
from lora_core.formats.named import read_named
from lora_core.formats.words import bundled
from lora_core.formats.writing import alpha_tensor, unwrapped
from lora_core.ldm_names import to_sgm
from lora_core.safe_files import Header, read_tensors, save_tensors

SDXL_ATTENTION_UP = frozenset({0, 1})


class Kohya:
    name = "kohya"

    def recognises(self, header: Header) -> bool:
        found = (role_of(key, header.tensors) for key in header.tensors)
        return any(known is not None and "." not in known[0] for known in found)

    def read(self, header: Header, load: Load = read_tensors) -> Reading:
        return read_named(header, load)

    def write(self, adapter: Adapter, path: Path, metadata: dict[str, str]) -> Path:
        """With both hashes. An output-axis DoRA as (out, 1[, 1, 1]), an input-axis one as it came. ConfigError for
        a kind that has no keys here, before anything is written."""
        tensors: dict[str, Tensor] = {}
        names = _names(adapter)
        for layer, delta in adapter.deltas.items():
            change, magnitude, bias = unwrapped(delta)
            kind = kind_of_delta(change)
            if kind is None and change is not None:
                raise ConfigError(
                    f"{layer} is of the kind {type(change).__name__}; this version writes "
                    f"{', '.join(known.name for known in KINDS)} and DoRA. Bake it to a plain LoRA first."
                )
            if isinstance(delta, WithBias) and delta.of != "change":
                raise ConfigError(
                    f"{layer} has its bias as a {delta.of}, for which kohya's spelling has no key: it says changes. "
                    "Combine the LoRA by svd with the layers of the base model first."
                )
            stored = {} if kind is None or change is None else kind.stored(change)
            if isinstance(change, Factored):
                stored["alpha"] = alpha_tensor(change.alpha, next(iter(stored.values())).dtype)
            if magnitude is not None:
                stored["dora_scale"] = magnitude
            if bias is not None:
                stored["b_norm" if "w_norm" in stored else "diff_b"] = bias
            elif (
                "w_norm" in stored
            ):  # A1111 refuses a file with one of a norm's two keys; a difference may be alone
                stored["diff"] = stored.pop("w_norm")
            tensors |= {f"{names[layer]}.{ending}": tensor for ending, tensor in stored.items()}
        tensors |= bundled(adapter)
        save_tensors(path, tensors, with_hashes(tensors, metadata))
        return path


def _names(adapter: Adapter) -> dict[str, str]:
    """Adapter path -> kohya's name. One UNet in one spelling: readers take a mixture for damaged."""
    sdxl = adapter.family == "sdxl"
    inside = {layer: layer.partition(".")[2] for layer in adapter.deltas if layer.startswith("unet.")}
    if sdxl:
        sgm = {layer: to_sgm(path, attention_up=SDXL_ATTENTION_UP) for layer, path in inside.items()}
        if None not in sgm.values():
            inside = {layer: path for layer, path in sgm.items() if path is not None}
    first = "lora_te1_" if sdxl or "text_encoder_2" in adapter.components() else "lora_te_"
    prefixes = {"unet": "lora_unet_", "text_encoder": first, "text_encoder_2": "lora_te2_"}
    names: dict[str, str] = {}
    for layer in adapter.deltas:
        component, _, path = layer.partition(".")
        names[layer] = prefixes[component] + flattened(inside.get(layer, path))
    return names
