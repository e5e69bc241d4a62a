"""SDXL's VAE overflows in fp16 and asks to be in fp32: for pictures, previews and latents, from one file too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from lora_core import GenerationRequest, LivePipeline
from lora_core.preview import LatentPreview, fit
from tests.small_models import save_ldm_single_file, small_pipeline
from trainers.measures import embed


@pytest.fixture(scope="module")
def overflowing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Values of 100,000 behind the first convolutions, which norms bring back: nothing in fp32, infinity in fp16."""
    pipe = small_pipeline("sdxl", dtype=torch.float16, clip_vocabulary=True)
    for half in (pipe.vae.encoder, pipe.vae.decoder):
        half.conv_in.weight *= 3e4 / half.conv_in.weight.abs().max()
        half.conv_in.bias += 6e4
    return save_ldm_single_file(pipe, tmp_path_factory.mktemp("sdxl") / "fp16.safetensors")


@pytest.fixture
def live(overflowing: Path) -> LivePipeline:
    return LivePipeline.open(overflowing, device="cpu", dtype=torch.float16)


def latents() -> torch.Tensor:
    return torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))


def test_pictures_previews_and_figures_come_from_fp32(live: LivePipeline, overflowing: Path) -> None:
    vae, wide = (
        live.pipeline.vae,
        LivePipeline.open(overflowing, device="cpu", dtype=torch.float32).pipeline.vae,
    )
    assert vae.config.force_upcast
    with torch.no_grad():
        assert not vae.decode(latents().half()).sample.isfinite().all()  # else this test would prove nothing
    for found, expected in zip(fit(vae), fit(wide), strict=True):
        assert torch.allclose(found, expected, atol=1e-4)
    assert np.asarray(LatentPreview(vae).image(latents())).std() > 0
    grey = Image.new("RGB", (64, 64), "gray")
    assert torch.allclose(embed([grey], vae)["latent"], embed([grey], wide)["latent"], atol=1e-4)
    (picture,) = live.generate(GenerationRequest(prompt="a red cat", seed=1, steps=1, width=64, height=64))
    assert np.asarray(picture.image).std() > 1
    assert vae.dtype == torch.float16
    assert live.verify_base()


def test_a_decoding_that_fails_leaves_the_vae_as_it_was(
    live: LivePipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_room(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(live.pipeline.vae, "decode", no_room)
    with pytest.raises(torch.OutOfMemoryError):
        live.generate(GenerationRequest(prompt="a red cat", seed=1, steps=1, width=64, height=64))
    assert live.pipeline.vae.dtype == torch.float16
