"""sd-scripts' train_network.py and sdxl_train_network.py: their arguments, whether from a command line or a TOML file.

Argument names and defaults as of 2026: dim 4, alpha 1, learning rate 2e-6, 1,600 steps, batch 1, kaiming beginnings.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from trainers.importing import kohya_data, kohya_network, kohya_previews
from trainers.importing.carrying import Carrying, counterparts, finite, is_yes, text, whole
from trainers.importing.kohya_folder import Counted
from trainers.importing.kohya_left import IDLE, REASONS
from trainers.importing.reading import Given, table_of, text_of, without_sections
from trainers.importing.shared import (
    PRECISIONS,
    carry_base,
    carry_name,
    carry_optimizer,
    carry_schedule,
)

RULES = counterparts(
    {
        "seed": whole,
        "gradient_accumulation_steps": whole,
        "gradient_checkpointing": is_yes,
        "prior_loss_weight": finite,
        "network_weights": text,
        "save_every_n_steps": whole,
        "noise_offset": finite,
        "ip_noise_gamma": finite,
        "metadata_author": text,
        "metadata_description": text,
        "validation_split": finite,
    }
)


def carry(given: Given) -> Carrying:
    return carry_arguments(given, given.settings)


def carry_arguments(given: Given, settings: dict[str, Any]) -> Carrying:
    c = Carrying({**_config_file(settings, given.folder), **settings})
    carry_name(c, c.take("output_name"), given.file.stem)
    carry_base(c, given.folder, "./sd15.safetensors")
    if output := c.take("output_dir"):
        c.set("output", text(output))
    if is_yes(c.given.get("fp8_base", False)) | is_yes(c.given.get("fp8_base_unet", False)):
        c.take("fp8_base"), c.take("fp8_base_unet")
        c.set("train.quantize", "fp8")
    if c.yes("v_parameterization"):
        c.set("prediction", "v_prediction")
    c.apply(RULES)
    blocks = kohya_network.carry(c, sdxl=_is_sdxl(c, given.script))
    data = kohya_data.carry(c, given.folder)
    _precision(c)
    _rates(c)
    if blocks is not None:
        blocks.carry_rates(c)
    _stop(c)
    _length(c, data)
    _loss(c)
    kohya_previews.carry(c, given.folder)
    if c.take("save_model_as", default="safetensors") not in ("safetensors", "same as source model"):
        c.change("save_model_as", "ckpt", "files are always safetensors")
    for name, (why, harmless) in REASONS.items():
        c.leave_if(name, why, harmless=harmless)
    c.finish(IDLE)
    return c


def _config_file(settings: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The TOML that a command line names, whose own words count more; `settings` keeps the name if it is not there."""
    named = settings.get("config_file")
    if not isinstance(named, str) or not named:
        return {}
    file = folder / (named if named.endswith(".toml") else f"{named}.toml")
    if not file.is_file():
        return {}
    del settings["config_file"]
    return without_sections(table_of(file, text_of(file)))


def _is_sdxl(c: Carrying, script: str) -> bool:
    """By the script, the GUI's field or the base's name; where lists of blocks are given, their length says it."""
    return script.startswith("sdxl") or _is_on(c, "sdxl") or "xl" in str(c.preset["base"]).lower()


def _precision(c: Carrying) -> None:
    mixed = text(c.take("mixed_precision", default="no"))
    c.set("train.base_dtype", PRECISIONS.get(mixed, "auto"))
    saved = text(c.take("save_precision", default="float"))
    c.set("save.dtype", {"float": "fp32", "fp32": "fp32", "bf16": "bf16"}.get(saved, "fp16"))


def _rates(c: Carrying) -> None:
    """The UNet's rate is ours; the text encoders' are told apart where two are given."""
    common = c.number("learning_rate", 2e-6) or 0.0
    unet = c.number("unet_lr")
    words = c.given.pop("text_encoder_lr", None)
    several = words if isinstance(words, list) else [] if words in (None, "") else [words]
    encoders = [c.read("text_encoder_lr", rate, finite, 0.0) for rate in several]
    if is_yes(c.take("network_train_unet_only", default=False)) or _is_on(c, "cache_text_encoder_outputs"):
        encoders = [0.0]
    if unet == 0:
        c.leave("unet_lr", 0, "the UNet is always trained")
    peak = unet or common or 1e-4
    optimizer = carry_optimizer(c, peak)
    if optimizer is not None:  # its rates are factors near 1
        shares = [rate / peak for rate in encoders]
        peak, encoders = optimizer, [optimizer * share for share in shares]
    c.set("train.learning_rate", peak)
    if encoders:
        c.set("train.text_encoder_learning_rate", encoders[0])
    elif common and common != peak and optimizer is None:
        c.set("train.text_encoder_learning_rate", common)
    if len(encoders) > 1 and encoders[1] != encoders[0]:
        c.set("train.text_encoder_2_learning_rate", encoders[1])


def _stop(c: Carrying) -> None:
    """Steps, or below 1 a share of them: what the GUI makes of its per cent. -1: never begun."""
    stop = c.number("stop_text_encoder_training") or 0.0
    if stop < 0:
        c.set("train.text_encoder_learning_rate", 0.0)
    elif stop:
        c.set("train.text_encoder_stop", stop)
        c.change("stop_text_encoder_training", stop, "heeded here; sd-scripts does not heed it for LoRAs")


def _is_on(c: Carrying, name: str) -> bool:
    return is_yes(c.given.get(name, False))


def _length(c: Carrying, data: Counted) -> None:
    """Steps, and what is counted in epochs or as a share of the steps."""
    accumulation = c.preset.get("train", {}).get("gradient_accumulation", 1)
    epochs, steps, all_in_one = c.whole("max_train_epochs"), c.whole("max_train_steps"), c.whole("gui_epochs")
    per_epoch = math.ceil(data.batches / accumulation) if data.batches else None
    here = 1.0  # steps for one there
    if epochs and per_epoch:
        total = epochs * per_epoch
    elif all_in_one and data.pictures:  # the GUI rounds once, at the end
        total = math.ceil(data.pictures / c.preset["train"]["batch_size"] / accumulation * all_in_one)
    else:
        epochs = epochs or all_in_one
        if epochs:
            c.leave(
                "max_train_epochs",
                epochs,
                "the folder of pictures is not there to count: set train.steps to epochs × pictures × "
                "repeats / batch",
            )
        total = steps or 1600
        if data.has_class and not epochs:
            here = 0.5
            total = max(1, total // 2)
            c.change(
                "max_train_steps",
                steps or 1600,
                f"{total} here: each step has a picture of the class beside each of the subject, there "
                f"they take turns. So is what counts steps",
            )
    c.set("train.steps", total)
    carry_schedule(c, total, of=here)
    if every := c.preset.get("save", {}).get("every"):
        c.set("save.every", max(1, round(every * here)))
    for name, setting in (
        ("save", "save.every"),
        ("validate", "validation.every"),
        ("sample", "preview.every"),
    ):
        _every(c, name, setting, per_epoch, here=here)


def _every(c: Carrying, name: str, setting: str, per_epoch: int | None, *, here: float) -> None:
    """Steps between, whichever way they are counted; a preview's are set where there is a prompt."""
    table, _, key = setting.partition(".")
    steps, epochs = c.whole(f"{name}_every_n_steps"), c.whole(f"{name}_every_n_epochs")
    if key in c.preset.get(table, {}):
        return
    if name == "validate" and not c.preset.get("validation", {}).get("share"):
        return
    if name == "validate" and not steps:
        epochs = epochs or 1
    if steps:
        c.set(setting, max(1, round(steps * here)))
    elif epochs and per_epoch:
        c.set(setting, epochs * per_epoch)
    elif epochs:
        c.leave(f"{name}_every_n_epochs", epochs, f"{setting} counts steps")


def _loss(c: Carrying) -> None:
    gamma = c.number("min_snr_gamma")
    if gamma:
        c.set("train.loss_weighting", "min_snr")
        c.set("train.snr_gamma", gamma)
    rounds, discount = c.whole("multires_noise_iterations"), c.number("multires_noise_discount", 0.3)
    if rounds and discount:
        c.set("train.pyramid_noise", discount)
        c.change("multires_noise_iterations", rounds, "here down to a single pixel")
    norm = c.number("max_grad_norm", 1.0)
    c.set("train.max_grad_norm", norm or 1e9)
    if not norm:
        c.change("max_grad_norm", 0, "1e9 here: never shortened")
