"""What kohya's scripts and diffusers' say in the same words: base, name, optimizer, schedule."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from trainers.importing.carrying import Carrying, finite, is_yes, text

PRECISIONS = {"no": "fp32", "fp32": "fp32", "float": "fp32", "fp16": "fp16", "bf16": "bf16"}
ADAPTIVE = ("prodigy", "dadapt", "adafactor")  # find their own rate; what they are given is a factor
USUAL_RATE = 1e-4
MOST_RATE = 0.01  # a LoRA under AdamW learns nothing beyond it


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
    eight, lion = c.yes("use_8bit_adam"), c.yes("use_lion_optimizer")
    name = "Lion" if lion else "AdamW8bit" if eight else name
    plain = name.rpartition(".")[2].lower().removeprefix("paged").removesuffix("8bit").removesuffix("32bit")
    own = _optimizer_args(c)
    finds_it = plain.startswith(ADAPTIVE) and not (
        plain == "adafactor" and not is_yes(own.get("relative_step", True))
    )
    replaced = None
    if finds_it:
        replaced = USUAL_RATE
        c.change(
            "optimizer_type",
            name,
            f"AdamW here, at train.learning_rate = {USUAL_RATE}: the rate {rate} was a factor on one that {name} finds "
            "by itself. Watch the loss, and set a third or three times as much",
        )
    elif plain.startswith("lion"):
        replaced = 3 * rate
        c.change(
            "optimizer_type",
            name,
            f"AdamW here, at three times the rate, which is about as fast as Lion at {rate}",
        )
    elif plain == "adamw" and name.lower() != "adamw":
        c.change("optimizer_type", name, "AdamW here, whose moments of a LoRA are small in fp32 too")
    elif plain != "adamw":
        c.leave("optimizer_type", name, "AdamW is used")
    if replaced is None and plain != "adamw" and rate > MOST_RATE:
        replaced = USUAL_RATE
        c.change(
            "learning_rate", rate, f"train.learning_rate = {USUAL_RATE} here: AdamW would run away at that"
        )
    return replaced


def _optimizer_args(c: Carrying) -> dict[str, str]:
    """`weight_decay=0.1 betas=0.9,0.99` as kohya writes them, in one text or a list -> by name."""
    found: dict[str, str] = {}
    given = c.given.pop("optimizer_args", None) or []
    words = [word for part in (given if isinstance(given, list) else [given]) for word in str(part).split()]
    for word in words:
        name, _, value = word.partition("=")
        name, value = name.strip("\"'"), value.strip("\"'")
        found[name] = value
        if name == "weight_decay":
            c.apply({name: ("train.weight_decay", finite)}, {name: value})
        elif (name, value.replace(" ", "").strip("()")) not in (
            ("betas", "0.9,0.999"),
            ("eps", "1e-8"),
            ("eps", "1e-08"),
        ):
            c.leave(f"optimizer_args {name}", value)
    return found


def carry_schedule(c: Carrying, steps: int, *, of: float = 1.0) -> None:
    """`lr_warmup_steps` below 1 is a share of the steps. `of`: steps here for one there."""
    name = text(c.take("lr_scheduler", default="constant"))
    warmup = c.number("lr_warmup_steps") or 0.0
    warmup = warmup * steps if warmup < 1 else warmup * of
    power_name = "lr_power" if "lr_power" in c.given else "lr_scheduler_power"
    power, times = c.take(power_name), c.number("lr_num_cycles")  # diffusers' words
    cycles = c.number("lr_scheduler_num_cycles", times if times is not None and times > 1 else None)
    schedule = "constant" if name.startswith("constant") else "cosine"
    if name == "cosine_with_restarts" and cycles not in (None, 0, 1):
        c.change("lr_scheduler", name, f'"cosine" here, once from the peak to 0 and not {cycles:.0f} times')
    elif name in ("linear", "polynomial"):
        c.change("lr_scheduler", name, '"cosine" here: it too falls to 0, slower at first and at the end')
        if power not in (None, 1, "1", "1.0"):
            c.leave(power_name, power)
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
