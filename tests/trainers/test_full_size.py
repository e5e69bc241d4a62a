"""Every shipped preset at the size of its real base: SD 1.5's and SDXL's layers with random weights, made for pictures
of 128 pixels so that two cores can take a step. One process each, with up to 12 GB of memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from torch import nn

from tests.lora_core.full_size import models_of, vae_of
from tests.small_models import small_pipeline
from tests.trainers.runs import pictures
from trainers import presets

ROOT = Path(__file__).parents[2]
SIDE = 128
WEIGHTS = {"sd1": 859_520_964, "sdxl": 2_567_463_684}  # of the published UNets
OURS = [name for name, _, _ in presets.list_presets() if not name.startswith("demo")]


def fill(module: nn.Module) -> nn.Module:
    """A module on the meta device -> the same with weights of about unit gain, all cut from one strip of noise: drawing
    billions would take minutes."""
    strip = 2 * torch.rand(2**22 + 1, generator=torch.Generator().manual_seed(0)) - 1
    module = module.to(torch.bfloat16).to_empty(device="cpu")
    for name, p in module.named_parameters():
        flat = p.data.view(-1)
        if p.ndim == 1:
            flat.fill_(float(name.endswith("weight")))
            continue
        scale = (3 / max(1, p[0].numel())) ** 0.5
        for at in range(0, len(flat), len(strip)):
            piece = flat[at : at + len(strip)]
            piece.copy_(strip[: len(piece)] * scale)
    return module


def write_base(folder: Path, family: str) -> None:
    parts = small_pipeline(family, clip_vocabulary=True)
    models: dict[str, Any] = {name: fill(model) for name, model in models_of(family).items()}
    models["vae"] = fill(vae_of(family))
    models["unet"].register_to_config(sample_size=SIDE // 8)
    plain: dict[str, Any] = {"scheduler": parts.scheduler, "tokenizer": parts.tokenizer}
    if family == "sdxl":
        plain["tokenizer_2"] = parts.tokenizer_2
        pipe: Any = StableDiffusionXLPipeline(**models, **plain, add_watermarker=False)
    else:
        pipe = StableDiffusionPipeline(
            **models, **plain, safety_checker=None, feature_extractor=None, requires_safety_checker=False
        )
    pipe.save_pretrained(folder)


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Written by a child, whose memory goes with it."""
    found = {}
    for family in WEIGHTS:
        folder = tmp_path_factory.mktemp("full") / family
        code = f"from tests.trainers.test_full_size import *; write_base(Path({str(folder)!r}), {family!r})"
        subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
        found[family] = folder
    return found


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", OURS)
def test_a_shipped_preset_passes_preflight_at_full_size(
    tmp_path: Path, bases: dict[str, Path], name: str
) -> None:
    family = "sdxl" if "sdxl" in name else "sd1"
    pictures(tmp_path / "images", 5, side=SIDE)
    changes = [f"output={tmp_path}/runs", f"base={bases[family]}", f"data.images={tmp_path}/images"]
    changes += [f"data.resolution={SIDE}", "train.base_dtype=bf16"]  # fp16 needs a card
    words = [word for change in changes for word in ("--set", change)]
    done = subprocess.run(
        [sys.executable, str(ROOT / "launch.py"), "--preflight", name, "--json", *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONWARNINGS": "ignore"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    print(name, found)
    assert found["event"] == "Preflight"
    assert found["warnings"] == []
    assert found["largest"] == f"{SIDE} x {SIDE}"
    assert found["memory"] > 2 * WEIGHTS[family]  # bytes of the UNet in bf16
    assert {"previews", "the report"} <= found["more_s"].keys()
    assert found["disk"] < found["disk_free"]
    assert not (tmp_path / "runs").exists()
