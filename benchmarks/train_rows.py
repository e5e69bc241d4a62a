"""The rows of benchmarks.train."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import PartialState
from PIL import Image

from benchmarks import swap_models
from benchmarks.measure import Row, compared, interleaved
from benchmarks.train_sides import Ours, Peer, write_first_lora
from lora_core import LoraConfig
from lora_core.errors import Stopped
from trainers.config import TrainConfig
from trainers.control import StopRequest
from trainers.dreambooth import train
from trainers.events import Step
from trainers.memory import Peak

RANK, ALPHA = 16, 8
STEPS = 100_000  # more than are ever taken: each side is stopped when enough was measured
ALONE = 4  # steps of a process whose memory is measured
PROMPT = "a photo of a zxq cat"


@dataclass(frozen=True)
class Setting:
    tiny: bool
    dtype: str
    repeats: int
    side: int  # of the picture, in pixels
    folder: Path


def write_base(setting: Setting) -> None:
    """The base as a diffusers folder, one picture, and the first LoRA of every kind that is trained."""
    dtype = swap_models.DTYPES[setting.dtype]
    pipe = swap_models.base("tiny" if setting.tiny else "sd15", dtype)
    if not setting.tiny:
        pipe.register_modules(vae=swap_models.sd15_vae(dtype))
    pipe.save_pretrained(setting.folder / "base")
    noise = np.random.default_rng(0).integers(0, 255, (setting.side, setting.side, 3), dtype=np.uint8)
    (setting.folder / "images").mkdir()
    Image.fromarray(noise).save(setting.folder / "images" / "0.png")
    for name, parts in (("unet", ("unet",)), ("both", ("unet", "text_encoder"))):
        for variant in ("lora", "dora"):
            write_first_lora(
                {part: getattr(pipe, part) for part in parts},
                LoraConfig(rank=RANK, alpha=ALPHA, variant=variant),
                setting.folder / f"{name}-{variant}.safetensors",
                seed=1,
            )


def config(
    setting: Setting, *, text_encoder: bool = False, variant: str = "lora", **more: Any
) -> TrainConfig:
    start = f"{'both' if text_encoder else 'unet'}-{variant}.safetensors"
    train: dict[str, Any] = {
        "steps": STEPS,
        "learning_rate": 1e-4,
        "base_dtype": "bf16" if setting.dtype == "bfloat16" else "fp32",
        "channels_last": True,
        "log_every": 1,  # as the loop reads it, on a GPU too
    }
    if not text_encoder:
        train["text_encoder_learning_rate"] = 0.0
    return TrainConfig.model_validate(
        {
            "name": "measured",
            "base": str(setting.folder / "base"),
            "output": str(setting.folder / "runs"),
            "lora": {
                "rank": RANK,
                "alpha": float(ALPHA),
                "variant": variant,
                "start_from": setting.folder / start,
            },
            "data": {"images": str(setting.folder / "images"), "prompt": PROMPT, "resolution": setting.side},
            "train": {**train, **more},
        }
    )


def step(setting: Setting) -> Iterator[Row]:
    for text_encoder, at_most in ((False, 0.75), (True, 0.8)):
        wanted = config(setting, text_encoder=text_encoder)
        ours, peer = Ours(wanted), Peer(wanted)
        times = interleaved({"ours": ours.step, "peer": peer.step}, setting.repeats)
        ours.close()
        apart = max(abs(a / b - 1) for a, b in zip(ours.losses, peer.losses, strict=True))
        yield compared(
            "step",
            f"a step, text encoder {'trained' if text_encoder else 'frozen'}",
            statistics.median(times["ours"]),
            statistics.median(times["peer"]),
            repeats=setting.repeats,
            at_most=at_most,
            note=f"losses at most {apart:.1e} apart in {len(ours.losses)} steps",
        )


def losses(setting: Setting) -> Iterator[Row]:
    """Exactness: a base in fp32, and the same order of sums. A rate at which rounding has not yet grown: on random
    weights AdamW makes steps of a full rate out of gradients that are mere rounding."""
    exact = replace(setting, dtype="float32", folder=setting.folder / "exact")
    exact.folder.mkdir(exist_ok=True)
    if not (exact.folder / "base").exists():
        write_base(exact)
    for text_encoder in (False, True):
        wanted = config(exact, text_encoder=text_encoder, learning_rate=1e-6, channels_last=False)
        ours, peer = Ours(wanted), Peer(wanted)
        for _ in range(max(3, setting.repeats) - 1):
            ours.step()
            peer.step()
        ours.close()
        pairs = list(zip(ours.losses, peer.losses, strict=True))
        apart = max(abs(a / b - 1) for a, b in pairs)
        yield Row(
            "losses",
            f"largest relative difference of a loss, text encoder {'trained' if text_encoder else 'frozen'}",
            apart,
            None,
            goal="≤ 1e-5",
            met=apart <= 1e-5,
            repeats=len(pairs),
            note=f"{sum(a == b for a, b in pairs)} of {len(pairs)} bit-equal",
        )


def dora(setting: Setting) -> Iterator[Row]:
    sides = {variant: Ours(config(setting, variant=variant)) for variant in ("dora", "lora")}
    n = setting.repeats
    times = interleaved({variant: side.step for variant, side in sides.items()}, n)
    for side in reversed(sides.values()):  # each gives the signals back as it has found them
        side.close()
    medians = [statistics.median(times[variant]) for variant in ("dora", "lora")]
    note = "second figure: ours, LoRA"
    yield compared("dora", "a step with DoRA", *medians, repeats=n, at_most=1.1, note=note)


def memory(setting: Setting) -> Iterator[Row]:
    """Of the steps alone: what opening the base takes at its worst is over by then."""
    for text_encoder in (False, True):
        peaks = [
            _peak_of_child(setting, f"{side}-{'both' if text_encoder else 'unet'}")
            for side in ("ours", "peer")
        ]
        ours, peer = peaks
        what = f"peak memory of steps, text encoder {'trained' if text_encoder else 'frozen'}"
        met = None if ours is None or peer is None else ours <= 0.9 * peer
        yield Row("memory", what, ours, peer, "MB", "≤ 0.9 × peer", met)


def _peak_of_child(setting: Setting, side: str) -> float | None:
    facts = {name: value for name, value in vars(setting).items() if name != "folder"}
    (setting.folder / "setting.json").write_text(json.dumps(facts), encoding="utf-8")
    command = [sys.executable, "-m", "benchmarks.train", "--alone", side, str(setting.folder)]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    return float(said[-1]) if said[-1] != "unknown" else None


def peak_alone(side: str, folder: Path) -> None:
    """Print the most memory, in MB, of a few steps of one side in this process: the GPU's, or else the resident set,
    which Linux alone tells."""
    setting = Setting(folder=folder, **json.loads((folder / "setting.json").read_text(encoding="utf-8")))
    who, parts = side.split("-")
    wanted = config(setting, text_encoder=parts == "both")
    device = PartialState().device
    peak = Peak(device)
    if not peak.exact:
        print("unknown")
        return
    stop = StopRequest()

    def after(step: int) -> None:
        nonlocal peak
        if step == 1:  # what opening has taken is over
            peak = Peak(device)
        elif step == 1 + ALONE:
            print(peak.bytes() / 2**20)
            stop.ask()

    if who == "peer":
        peer = Peer(wanted)  # has taken its first step
        after(1)
        for step in range(2, 2 + ALONE):
            peer.step()
            after(step)
        return
    with suppress(Stopped):  # in the main thread, as the command trains
        train(
            wanted,
            stop=stop,
            listeners=[lambda event: after(event.step) if isinstance(event, Step) else None],
        )
