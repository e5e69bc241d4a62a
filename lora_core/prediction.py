"""What a model's UNet predicts, the noise ("epsilon") or the velocity ("v_prediction"): said by its file, or measured.

    v_pred, ztsnr                     tensors without elements, which ComfyUI and NoobAI put into v models; the second
                                      says that the noise schedule ends without any signal (arXiv 2305.08891)
    modelspec.prediction_type         metadata: "epsilon" or "v"
    modelspec.architecture            stable-diffusion-v2-768-v, stable-diffusion-v2-512
    ss_base_model_version             sd_v2_v, sd_v2
    name.yaml beside name.safetensors LDM's configuration, of which A1111 takes `parameterization: "v"`

SD 2.x files are the ones that have both kinds and mostly say nothing. At the last timestep what the UNet is given is
noise but for 0.5 % of its energy (abar = 0.0047), so one that predicts noise hands back its input: a correlation near
one. One that predicts v = sqrt(abar) eps - sqrt(1 - abar) z hands back the negative of the picture it imagines, which
has little to do with that noise: near zero or below. A1111 runs the UNet once for the same question
(sd_models_config.py); there the input is constant and the difference's mean is looked at.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from lora_core.errors import ConfigError, did_you_mean
from lora_core.families import FAMILIES
from lora_core.safe_header import Header

PREDICTIONS = ("epsilon", "v_prediction")
NAMES = {"epsilon": "the noise (epsilon)", "v_prediction": "the velocity (v)"}
EPSILON_FROM, V_UP_TO = 0.8, 0.4  # correlations; in between nothing is claimed
_SAID = {"epsilon": "epsilon", "eps": "epsilon", "v": "v_prediction", "v_prediction": "v_prediction"}
_YAML = re.compile(
    r"^\s*(?:parameterization:\s*[\"']?(?P<said>v|eps)[\"']?|target:\s*sgm\.\S+\.(?P<scaling>V|Eps)Scaling)\s*(?:#.*)?$",
    re.MULTILINE,
)
_LDM_YAML = re.compile(r"^\s*target:\s*[\"']?ldm\.models\.diffusion\.ddpm\.", re.MULTILINE)
_MOST_YAML = 2**16  # bytes; the real ones have 2,000


def check(prediction: str | None) -> None:
    """Raise ConfigError for a prediction that there is not."""
    if prediction is not None and prediction not in PREDICTIONS:
        raise ConfigError(
            f"prediction = {prediction!r:.60} is unknown.{did_you_mean(str(prediction), PREDICTIONS)}"
        )


def told(header: Header) -> str | None:
    """What the file says its UNet predicts; None if it does not."""
    said, metadata = _SAID.get(header.metadata.get("modelspec.prediction_type", "")), header.metadata
    if any(marker in header.tensors for marker in ("v_pred", "ztsnr")):
        return "v_prediction"  # a schedule that ends in noise alone leaves epsilon nothing to be scaled by
    if said is not None:
        return said
    architecture = metadata.get("modelspec.architecture", "").partition("/")[0]
    version = metadata.get("ss_base_model_version", "")
    row = FAMILIES["sd2"]
    kinds = zip(
        PREDICTIONS,
        row.base_versions,
        (name.removesuffix("/lora") for name in row.architectures),
        strict=True,
    )
    return next((kind for kind, *names in kinds if version in names or architecture in names), None)


def told_beside(path: Path) -> str | None:
    """What LDM's or sgm's configuration beside a checkpoint says; lines are looked for, nothing is interpreted."""
    beside = path.with_suffix(".yaml")
    try:
        if not beside.is_file() or beside.stat().st_size > _MOST_YAML:
            return None
        text = beside.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    if found := _YAML.search(text):
        return "v_prediction" if "v" in (found["said"] or found["scaling"]).lower() else "epsilon"
    return "epsilon" if _LDM_YAML.search(text) else None  # LDM's default


@torch.no_grad()
def correlation(unet: Any, words: torch.Tensor) -> float:
    """Of the UNet's answer with the noise it is given at the last of 1,000 timesteps. words (1, tokens, width).

    Not a number where the UNet makes none.
    """
    generator = torch.Generator("cpu").manual_seed(0)
    noise = torch.randn(1, unet.config.in_channels, 16, 16, generator=generator).to(words.device, words.dtype)
    said = unet(noise, torch.tensor([999], device=words.device), words).sample
    pair = torch.stack([noise.flatten(), said.flatten()]).double()
    return float(torch.corrcoef(pair)[0, 1])


def measured(pipeline: Any) -> tuple[str | None, float]:
    """What the UNet of an SD 1.x or 2.x pipeline is measured to predict, None where that is not clear, and the
    correlation."""
    ids = pipeline.tokenizer("", padding="max_length", truncation=True, return_tensors="pt").input_ids
    with torch.no_grad():
        words = pipeline.text_encoder(ids.to(pipeline.device)).last_hidden_state
    found = correlation(pipeline.unet, words.to(pipeline.unet.dtype))
    if found >= EPSILON_FROM:
        return "epsilon", found
    return ("v_prediction" if found <= V_UP_TO else None), found
