"""What kohya's scripts and diffusers' say in the same words: base, name, optimizer, schedule."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from trainers.importing.carrying import Carrying, finite, text

PRECISIONS = {"no": "fp32", "fp32": "fp32", "float": "fp32", "fp16": "fp16", "bf16": "bf16"}
EIGHT_BIT = ("adamw8bit", "pagedadamw8bit", "pagedadamw", "pagedadamw32bit", "ademamix8bit")
ADAPTIVE = ("prodigy", "dadapt", "adafactor")  # find their own rate; what they are given is a factor
USUAL_RATE = 1e-4


def carry_name(c: Carrying, wanted: Any, fallback: str) -> None:
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", text(wanted or fallback)).strip("-._")[:64] or "imported"
    c.set("name", name)
    if wanted and name != wanted:
        c.change("output_name", wanted, f'"{name}" here: it is a file\'s name')


def carry_base(c: Carrying, folder: Path, example: str) -> None:
    """A model's file or folder as a path from where the settings lie; anything else is a hub's id."""
    base = c.take("pretrained_model_name_or_path")
    if base is None:
        c.leave("pretrained_model_name_or_path", None, f'it is not said: set base, such as "{example}"')
        c.set("base", example)
        return
    plain = text(base).replace("\\", "/")
    if plain.endswith((".ckpt", ".pt")):
        c.leave(
            "pretrained_model_name_or_path",
            base,
            "such a file can run code and is never opened: use .safetensors",
        )
    near = (folder / plain).exists() or Path(plain).is_absolute() or plain.startswith("~")
    is_path = near or plain.endswith((".safetensors", ".ckpt")) or plain.count("/") > 1
    c.set(
        "base",
        plain
        if not is_path or plain.startswith(("/", "~", "./", "../")) or plain[1:2] == ":"
        else f"./{plain}",
    )


def carry_optimizer(c: Carrying, rate: float) -> float | None:
    """-> the rate to use in place of the one given, for optimizers to which a rate is something else."""
    name = text(c.take("optimizer_type", "optimizer", default="AdamW"))
    if c.yes("use_8bit_adam"):
        name = "AdamW8bit"
    plain = name.rpartition(".")[2].lower()
    replaced = None
    if plain.startswith(ADAPTIVE):
        replaced = USUAL_RATE
        c.change(
            "optimizer_type",
            name,
            f"AdamW here, at {USUAL_RATE}: the rate {rate} was a factor on one that {name} finds by itself",
        )
    elif plain.startswith("lion"):
        replaced = 3 * rate
        c.change(
            "optimizer_type",
            name,
            f"AdamW here, at three times the rate, which is about as fast as Lion at {rate}",
        )
    elif plain in EIGHT_BIT:
        c.change("optimizer_type", name, "AdamW here, whose moments of a LoRA are small in fp32 too")
    elif plain != "adamw":
        c.leave("optimizer_type", name, "AdamW is used")
    _optimizer_args(c)
    return replaced


def _optimizer_args(c: Carrying) -> None:
    """`weight_decay=0.1 betas=0.9,0.99` as kohya writes them, in one text or a list."""
    given = c.given.pop("optimizer_args", None) or []
    words = [word for part in (given if isinstance(given, list) else [given]) for word in str(part).split()]
    for word in words:
        name, _, value = word.partition("=")
        value = value.strip("\"'")
        if name == "weight_decay":
            c.apply({name: ("train.weight_decay", finite)}, {name: value})
        elif (name, value.replace(" ", "").strip("()")) not in (
            ("betas", "0.9,0.999"),
            ("eps", "1e-8"),
            ("eps", "1e-08"),
        ):
            c.leave(f"optimizer_args {name}", value)


def carry_schedule(c: Carrying, steps: int) -> None:
    """`lr_warmup_steps` below 1 is a share of the steps."""
    name = text(c.take("lr_scheduler", default="constant"))
    warmup = c.number("lr_warmup_steps") or 0.0
    warmup = warmup * steps if warmup < 1 else warmup
    cycles, power = c.number("lr_scheduler_num_cycles", None), c.take("lr_scheduler_power", "lr_power")
    if c.take("lr_num_cycles") not in (None, 1, "1") and name == "cosine_with_restarts":
        cycles = 2  # any number above one is the same loss
    schedule = "constant" if name.startswith("constant") else "cosine"
    if name == "cosine_with_restarts" and cycles not in (None, 0, 1):
        c.change("lr_scheduler", name, f'"cosine" here, once from the peak to 0 and not {cycles:.0f} times')
    elif name in ("linear", "polynomial"):
        c.change("lr_scheduler", name, '"cosine" here: it too falls to 0, slower at first and at the end')
        if power not in (None, 1, "1", "1.0"):
            c.leave("lr_scheduler_power", power)
    elif name not in ("constant", "constant_with_warmup", "cosine", "cosine_with_restarts"):
        c.leave("lr_scheduler", name, '"constant" is used')
        schedule = "constant"
    c.set("train.schedule", schedule)
    if name == "constant":
        warmup = 0.0  # there "constant" has no warm-up, whatever lr_warmup_steps says
    least = min(round(warmup), max(0, steps - 1))
    if least < round(warmup):
        c.change("lr_warmup_steps", round(warmup), f"{least} here: the training has {steps} steps")
    c.set("train.warmup_steps", least)
