"""A model's layers read from disk one by one are the opened model's; what is measured on them is the same."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from lora_core import Adapter, LivePipeline, layers_of, overlap, resize, strength_of
from lora_core.adapter import resolve, weight_of
from lora_core.deltas.low_rank import LowRank
from lora_core.errors import FileRefused, NotLoaded, WrongFamily
from lora_core.families import by
from tests.lora_core.test_pipeline import random_adapter
from tests.small_models import save_folder, small_pipeline


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_folder(small_pipeline("sdxl"), tmp_path_factory.mktemp("base") / "base")


@pytest.fixture(scope="module")
def live(folder: Path) -> LivePipeline:
    return LivePipeline.open(folder, device="cpu", dtype=torch.float32)


def test_layers_from_disk_are_those_of_the_opened_model(folder: Path, live: LivePipeline) -> None:
    layers = layers_of(folder)
    expected = resolve(layers, live.models)
    linear = [path for path, layer in expected.items() if isinstance(layer, nn.Linear)]
    assert len(expected) == len(layers)
    assert len(linear) > 200
    for path in linear[::20]:
        assert type(layers[path]) is type(expected[path])
        assert torch.equal(weight_of(layers[path]), weight_of(expected[path])), by(
            expected[path].weight.shape
        )
        x = torch.ones(1, weight_of(expected[path]).shape[1])
        assert torch.equal(layers[path](x), expected[path](x))


@pytest.mark.parametrize("variant", ["lora", "dora"])
def test_strength_on_a_model_that_is_not_opened(variant: str, folder: Path, live: LivePipeline) -> None:
    ink = random_adapter(live, 4, variant=variant)
    found = strength_of(ink, folder, 0.5)
    live.load(ink, "ink", 0.5)
    try:
        assert found == pytest.approx(live.strengths(), rel=1e-5)
    finally:
        live.unload()
    # the naive figure of one block
    moved = whole = 0.0
    for path, layer in resolve(ink.deltas, live.models).items():
        if path.startswith("unet.mid_block"):
            moved += float((0.5 * ink.deltas[path].delta(weight_of(layer))).square().sum())
            whole += float(weight_of(layer).square().sum())
    assert found["mid"] == pytest.approx((moved / whole) ** 0.5, rel=1e-4)


def test_a_dora_is_compared_and_resized_with_layers_from_disk(folder: Path, live: LivePipeline) -> None:
    dora, ink = random_adapter(live, 4, variant="dora"), random_adapter(live, 5)
    layers = layers_of(folder)
    at = overlap(dora, ink, layers)
    assert (at.left_out, at.compared) == ((), len(ink.deltas))
    assert at.cosine == pytest.approx(overlap(dora, ink, resolve(ink.deltas, live.models)).cosine, abs=1e-6)
    some = Adapter(dict(list(dora.deltas.items())[:3]), family="sdxl")
    for path, delta in resize(some, rank=2, layers=layers).deltas.items():
        assert isinstance(delta, LowRank)
        assert delta.rank == 2
        change = dora.deltas[path].delta(weight_of(layers[path]))
        u, s, vh = torch.linalg.svd(change)
        assert torch.allclose(delta.delta(change), (u[:, :2] * s[:2]) @ vh[:2], atol=1e-4)


def test_refusals(folder: Path) -> None:
    low = LowRank(torch.ones(1, 4, 3, 3), torch.ones(4, 1, 1, 1), 2.0)
    with pytest.raises(NotLoaded, match='None of the 1 layers of "ink" exist in base'):
        strength_of(Adapter({"unet.down_blocks.7.resnets.0.conv1": low}, name="ink"), folder)
    with pytest.raises(WrongFamily):
        strength_of(random_adapter(LivePipeline(small_pipeline("sd1")), 1), folder)
    weights = folder / "vae/diffusion_pytorch_model.safetensors"
    layers = layers_of(folder)
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-8])
    try:
        with pytest.raises(FileRefused):
            layers_of(folder)
    finally:
        weights.write_bytes(whole)
    assert len(layers)
