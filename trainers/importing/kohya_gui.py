"""What kohya_ss saves as JSON: the scripts' arguments, by other names and in other units, every field written."""

from __future__ import annotations

import re
from typing import Any

from trainers.importing import kohya
from trainers.importing.carrying import NOTHING, Carrying, is_yes
from trainers.importing.reading import Given
from trainers.importing.reading import arguments as arguments_of

RENAMED = {
    "max_resolution": "resolution",
    "optimizer": "optimizer_type",
    "sdxl_no_half_vae": "no_half_vae",
    "sdxl_cache_text_encoder_outputs": "cache_text_encoder_outputs",
    "lora_network_weights": "network_weights",
    "conv_dims": "conv_block_dims",  # of older versions
    "conv_alphas": "conv_block_alphas",
}
KINDS = {  # LoRA_type -> network_module, algo
    "Standard": ("networks.lora", ""),
    "Kohya LoCon": ("networks.lora", ""),
    "Kohya DyLoRA": ("networks.dylora", ""),
    "LoRA-FA": ("networks.lora_fa", ""),
    "LoCon": ("lycoris.kohya", "locon"),
    "LyCORIS/LoCon": ("lycoris.kohya", "locon"),
    "LyCORIS/LoHa": ("lycoris.kohya", "loha"),
    "LyCORIS/LoKr": ("lycoris.kohya", "lokr"),
    "LyCORIS/iA3": ("lycoris.kohya", "ia3"),
    "LyCORIS/DyLoRA": ("lycoris.kohya", "dylora"),
    "LyCORIS/GLoRA": ("lycoris.kohya", "glora"),
    "LyCORIS/Diag-OFT": ("lycoris.kohya", "diag-oft"),
    "LyCORIS/BOFT": ("lycoris.kohya", "boft"),
    "LyCORIS/Native Fine-Tuning": ("lycoris.kohya", "full"),
}
_NETWORK = """
    use_tucker use_scalar use_cp rank_dropout module_dropout rank_dropout_scale bypass_mode dora_wd factor
    decompose_both train_norm train_on_input constrain rescaled unit block_dims block_alphas conv_block_dims
    conv_block_alphas down_lr_weight mid_lr_weight up_lr_weight block_lr_zero_threshold
"""
NETWORK = _NETWORK.split()
LYCORIS_ONLY = ["use_scalar", "bypass_mode", "train_norm", "train_on_input", "constrain", "rescaled"]


# of other models' training, written whether these are trained or not
OTHER_MODELS = re.compile(
    r"(flux|sd3|lumina|anima|t5xxl|clip_[lg]$|clip_[lg]_drop|ae$|guidance_scale|discrete_flow_shift|model_prediction_type|"
    r"timestep_sampling|sigmoid_scale|weighting_scheme|logit_|mode_scale|split_|train_blocks|train_double|train_single|"
    r"train_t5xxl|blocks_to_swap|single_blocks|double_blocks|single_dim|single_mod|double_mod|img_|txt_|in_dims|"
    r"training_shift|apply_|save_clip|save_t5|enable_all_linear|pos_emb|ggpo)"
)


def carry(given: Given) -> Carrying:
    return kohya.carry_arguments(given, arguments(given.settings))


def arguments(gui: dict[str, Any]) -> dict[str, Any]:
    """The GUI's fields -> the scripts' arguments. A field that is empty or zero is one it does not pass on."""
    left = {RENAMED.get(name, name): value for name, value in gui.items() if not OTHER_MODELS.match(name)}
    kind = str(left.pop("LoRA_type", "Standard"))
    module, algo = KINDS.get(kind, (kind, ""))
    network: dict[str, Any] = {name: left.pop(name) for name in NETWORK if name in left}
    conv: dict[str, Any] = {name: left.pop(name) for name in ("conv_dim", "conv_alpha") if name in left}
    preset = left.pop("LyCORIS_preset", None)
    if module == "lycoris.kohya":
        network |= {**conv, "algo": algo, "preset": preset or "full"}
    else:
        network = {
            k: v
            for k, v in network.items()
            if k in NETWORK[NETWORK.index("block_dims") :] or k.endswith("_dropout")
        }
        network |= conv if kind == "Kohya LoCon" else {}
    named = left | {
        "network_module": module,
        "network_args": {k: v for k, v in network.items() if v not in ("", None)},
    }
    named |= arguments_of(str(named.pop("additional_parameters", "") or ""))[1]
    _lengths(named)
    _rates(named)
    return {
        name: value
        for name, value in named.items()
        if value not in NOTHING or name in ("seed", "text_encoder_lr")
    }


def _lengths(named: dict[str, Any]) -> None:
    """Warm-up and the end of the text encoder's training are percentages; steps win over epochs."""
    percent = float(named.pop("lr_warmup", 0) or 0)
    if not named.get("lr_warmup_steps"):
        named["lr_warmup_steps"] = percent / 100
    epochs, steps = (int(float(named.pop(n, 0) or 0)) for n in ("epoch", "max_train_steps"))
    more = int(float(named.pop("max_train_epochs", 0) or 0))
    if steps and not more:
        named["max_train_steps"] = steps
    elif more:
        named["max_train_epochs"] = more
    else:
        named["gui_epochs"] = epochs
    if str(named.get("lr_scheduler")) == "cosine_with_restarts" and not named.get("lr_scheduler_num_cycles"):
        named["lr_scheduler_num_cycles"] = epochs
    if ended := float(named.pop("stop_text_encoder_training", 0) or 0):
        named["stop_text_encoder_training"] = ended / 100


def _rates(named: dict[str, Any]) -> None:
    """0 for one part means that it is not trained; 0 for both, that both have `learning_rate`."""
    unet, words = (float(named.get(n) or 0) for n in ("unet_lr", "text_encoder_lr"))
    if not unet and not words:
        named.pop("unet_lr", None)
        named.pop("text_encoder_lr", None)
    if is_yes(named.get("cache_text_encoder_outputs") or False):
        named["text_encoder_lr"] = 0
