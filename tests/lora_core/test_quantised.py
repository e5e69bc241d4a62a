"""A base kept in fewer bits against naive loops, and everything that is worn on it against the unpacked model."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_core import Adapter, GenerationRequest, LivePipeline
from lora_core.adapter import resolve
from lora_core.burn import strength
from lora_core.errors import ConfigError, LoraError
from lora_core.models import open_base
from lora_core.quantised import KINDS, count_weights, quantise, size_bytes
from lora_core.storages import bitsandbytes, dequantised, storage_of
from tests.lora_core.test_pipeline import bits, close, outputs, random_adapter, same_bits, tree
from tests.small_models import save_folder, small_pipeline

LAYER = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_out.0"  # 64 x 64, with a bias


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_folder(small_pipeline("sd1"), tmp_path_factory.mktemp("base"))


def opened(folder: Path, kind: str, dtype: torch.dtype = torch.float32) -> LivePipeline:
    live = LivePipeline.open(folder, device="cpu", dtype=dtype, quantize=kind)
    live.pipeline.set_progress_bar_config(disable=True)
    return live


@pytest.fixture(scope="module", params=KINDS)
def base(folder: Path, request: pytest.FixtureRequest) -> LivePipeline:
    return opened(folder, request.param)


@pytest.fixture
def live(base: LivePipeline) -> Iterator[LivePipeline]:
    yield base
    base.unload()


def kind_of(live: LivePipeline) -> str:
    assert live.opened is not None
    assert live.opened.quantised is not None
    return live.opened.quantised.kind


def layer_of(live: LivePipeline, path: str = LAYER) -> Any:
    return resolve([path], live.models)[path]


def unpacked(live: LivePipeline) -> LivePipeline:
    """A dense model with the numbers that the quantised one computes with."""
    plain = LivePipeline(small_pipeline("sd1"))
    for component, model in live.models.items():
        for path, layer in model.named_modules():
            if storage_of(layer) is not None:
                own: Any = plain.models[component].get_submodule(path)
                with torch.no_grad():
                    own.weight.copy_(dequantised(layer))
                    if own.bias is not None:
                        own.bias.copy_(layer.bias.float())
    return plain


def naive(weight: Tensor, kind: str) -> Tensor:
    """Number by number, from the papers; the code book of nf4 is bitsandbytes' table of the paper's values."""
    if kind == "fp8":
        return torch.stack([w.to(torch.float8_e4m3fn).float() for w in weight.flatten()]).reshape(
            weight.shape
        )
    out = weight.clone().flatten()
    if kind == "nf4":
        code = bnb.functional.get_4bit_type("nf4", device="cpu")
        for start in range(0, len(out), 64):
            block = out[start : start + 64].clone()
            top = block.abs().max()
            for i, w in enumerate(block):
                out[start + i] = code[(code - w / top).abs().argmin()] * top
        return out.reshape(weight.shape)
    rows = []
    for row in weight.half().float():
        top = row.abs().max()
        rows.append(torch.round(row * (127 / top)) * top / 127)
    return torch.stack(rows)


def test_the_weight_that_is_read_is_the_rounded_one_and_the_one_it_computes_with(
    live: LivePipeline,
) -> None:
    kind = kind_of(live)
    original: Any = small_pipeline("sd1").unet.get_submodule(LAYER.removeprefix("unet."))
    layer = layer_of(live)
    found = dequantised(layer)
    assert found.dtype is torch.float32
    torch.testing.assert_close(found, naive(original.weight, kind), rtol=1e-6, atol=1e-7)
    assert not torch.equal(found, original.weight)
    x = torch.randn(2, 5, 64)
    bias = layer.bias.float()
    with torch.no_grad():
        error = (layer(x) - F.linear(x, found, bias)).norm() / F.linear(x, found, bias).norm()
    # int8 rounds the input to 127 steps of its largest entry as well
    assert error < (2e-2 if kind == "int8" else 1e-6)


def test_bytes_and_weights_are_counted(live: LivePipeline) -> None:
    plain, kind = LivePipeline(small_pipeline("sd1")), kind_of(live)
    assert live.opened is not None
    said = live.opened.quantised
    assert said is not None
    assert said.before == size_bytes(plain.models)
    assert said.after == size_bytes(live.models)
    assert {c: count_weights(m) for c, m in live.models.items()} == {
        c: sum(p.numel() for p in m.parameters()) for c, m in plain.models.items()
    }
    saved = 0.0
    for component, model in plain.models.items():
        for path, layer in model.named_modules():
            if storage_of(live.models[component].get_submodule(path)) is None:
                continue
            numbers = sum(p.numel() for p in layer.parameters())
            if kind == "fp8":
                saved += 3 * numbers
            else:
                assert isinstance(layer, nn.Linear)
                each = {"nf4": 3.5, "int8": 3.0}[kind]
                saved += each * layer.weight.numel()
                scales = -(-layer.weight.numel() // 64) if kind == "nf4" else layer.out_features
                saved -= 4 * scales
    assert said.before - said.after == saved
    assert f"layers kept in {kind}" in str(said)


@pytest.mark.parametrize("kind", KINDS)
def test_a_quantised_bf16_base_is_verified_too(folder: Path, kind: str) -> None:
    live = opened(folder, kind, torch.bfloat16)
    assert live.pipeline.unet.dtype is torch.bfloat16
    assert live.verify_base()


def test_verify_base_quantises_the_checkpoint_again(live: LivePipeline) -> None:
    report = live.verify_base()
    assert report
    assert "quantised again" in str(report)
    layer = layer_of(live)
    with torch.no_grad():
        layer.weight.data.view(torch.uint8)[3] += 1
    report = live.verify_base()
    assert not report
    assert report.changed == (f"{LAYER}.weight",)
    assert live.heal()
    if kind_of(live) != "fp8":
        storage = storage_of(layer)
        assert storage is not None
        scales = storage.scales(layer)
        assert scales is not None
        scales[0] *= 1.1
        assert not live.verify_base()
        assert live.heal()


def test_a_wrapped_quantised_model_is_compared_with_what_it_was() -> None:
    pipe = small_pipeline("sd1")
    quantise({"unet": pipe.unet}, "nf4")
    live = LivePipeline(pipe)
    assert live.verify_base()
    layer_of(live).weight.quant_state.absmax[0] *= 1.1
    assert not live.verify_base()


# --- worn --------------------------------------------------------------------------------------------------


def test_lora_and_dora_on_the_rack_are_those_of_the_unpacked_model(live: LivePipeline) -> None:
    plain = unpacked(live)
    before, trees = bits(live), tree(live)
    for i, (variant, targets) in enumerate([("lora", "attention"), ("dora", "all-linear+conv")]):
        adapter = random_adapter(plain, i, variant=variant, targets=targets)
        for each in (live, plain):
            each.load(adapter, name=variant, weight=0.6 + i / 4)
    found, expected = outputs(live), outputs(plain)
    if (
        kind_of(live) == "int8"
    ):  # its inputs are rounded layer after layer: see the next test for each layer alone
        for key in expected:
            assert (found[key] - expected[key]).norm() < 0.1 * expected[key].norm()
    else:
        close(found, expected)
    live.unload()
    assert same_bits(live, before)
    assert tree(live) == trees
    assert live.verify_base()


@pytest.mark.parametrize("variant", ["lora", "dora"])
def test_a_layer_adds_its_change_to_what_the_packed_layer_answers(live: LivePipeline, variant: str) -> None:
    """Against y = base + w ((g - 1) (base - bias) + g ΔW x) from the dense ΔW, W' = W + w (W'(1) - W)."""
    adapter = random_adapter(unpacked(live), 4, variant=variant)
    layer, delta = layer_of(live), adapter.deltas[LAYER]
    weight, x = dequantised(layer), torch.randn(2, 5, 64)
    with torch.no_grad():
        base, bias = layer(x), layer.bias.float()
        live.load(Adapter({LAYER: delta}), name="a", weight=0.7)
        worn = layer(x)
    change = delta.delta(weight)
    expected = base + 0.7 * F.linear(x, change)
    if variant == "dora":
        v = weight + delta.inner.delta(weight)  # type: ignore[attr-defined]
        g = delta.tensors()["magnitude"].flatten() / v.norm(dim=1)
        low = F.linear(x, delta.inner.delta(weight))  # type: ignore[attr-defined]
        expected = base + 0.7 * ((g - 1) * (base - bias) + g * low)
        assert (g - 1).abs().max() > 0.05
    torch.testing.assert_close(worn, expected, rtol=1e-4, atol=1e-5)


def test_fusing_is_refused_and_nothing_changed(live: LivePipeline) -> None:
    live.load(random_adapter(unpacked(live), 1), name="a")
    worn = outputs(live)
    with pytest.raises(LoraError, match="cannot be fused"):
        live.fuse()
    assert not live.fused
    for key, value in outputs(live).items():
        assert torch.equal(value, worn[key])


def test_how_far_loras_move_a_quantised_base_is_measured(live: LivePipeline) -> None:
    plain = unpacked(live)
    adapter = random_adapter(plain, 2, variant="dora")
    measured = []
    for each in (live, plain):
        layers = resolve(adapter.deltas, each.models)
        measured.append(strength(layers, {p: [(0.5, adapter.deltas[p])] for p in layers}))
    assert measured[0] == pytest.approx(measured[1], rel=1e-5)


def test_pictures_are_made_on_a_quantised_base(live: LivePipeline) -> None:
    request = GenerationRequest(prompt="a cat", steps=2, seed=1, width=64, height=64)
    bare = live.generate(request)[0].image
    live.load(random_adapter(unpacked(live), 1, variant="dora"), name="a")
    assert live.generate(request)[0].image.tobytes() != bare.tobytes()
    live.unload()
    assert live.generate(request)[0].image.tobytes() == bare.tobytes()


def test_a_model_is_baked_from_the_original_weights(live: LivePipeline, tmp_path: Path) -> None:
    adapter = random_adapter(unpacked(live), 1)
    live.load(adapter, name="a", weight=0.5)
    live.bake(tmp_path / "baked")
    baked = LivePipeline.open(tmp_path / "baked", device="cpu")
    original: Any = small_pipeline("sd1").unet.get_submodule(LAYER.removeprefix("unet."))
    expected = original.weight + 0.5 * adapter.deltas[LAYER].delta(original.weight)
    torch.testing.assert_close(layer_of(baked).weight, expected.detach(), rtol=1e-5, atol=1e-5)


# --- refusals ----------------------------------------------------------------------------------------------


def test_without_bitsandbytes_it_is_a_sentence(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bitsandbytes.cache_clear()
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    for kind in ("nf4", "int8"):
        with pytest.raises(LoraError, match=r'pip install "lora-loom\[quant\]"'):
            open_base(folder, device="cpu", quantize=kind)
    open_base(folder, device="cpu", quantize="fp8")


def test_what_cannot_be_quantised_is_refused_before_anything_is_changed(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r'quantize = "nf5" is unknown\. Did you mean "nf4"'):
        open_base(folder, quantize="nf5")
    live = LivePipeline(small_pipeline("sd1"))
    before = copy.deepcopy(live.models["unet"].state_dict())
    live.load(random_adapter(live, 1), name="a")
    for kind in KINDS:
        with pytest.raises(LoraError, match="carries a LoRA"):
            quantise(live.models, kind)
    live.unload()
    with torch.no_grad():
        live.pipeline.unet.conv_in.weight[0, 0] = before["conv_in.weight"][0, 0] = 500.0
    with pytest.raises(LoraError, match=r"conv_in\.weight holds a value of 500"):
        quantise(live.models, "fp8")
    assert all(torch.equal(v, before[k]) for k, v in live.models["unet"].state_dict().items())
    quantise(live.models, "int8")
    with pytest.raises(LoraError, match="quantised already"):
        quantise(live.models, "nf4")
    live.load(random_adapter(LivePipeline(small_pipeline("sd1")), 1), name="a")
    with pytest.raises(LoraError, match="offloaded or quantised"):
        live.bake(folder.parent / "never", dtype=torch.float32)
