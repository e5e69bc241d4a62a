"""A LoRA from two checkpoints: a naive SVD per layer is the oracle, and base + LoRA is the tuned model again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lora_core import Adapter, LivePipeline, bake, extract, open_base
from lora_core.adapter import file_path, live_path
from lora_core.deltas.bias import WithBias
from lora_core.deltas.full import Full
from lora_core.deltas.low_rank import LowRank
from lora_core.errors import ConfigError, LoraError, NothingMatched, WrongFamily
from lora_core.extracting import FROM, LOST_BY_LAYER
from lora_core.lower_rank import LEFT_OUT, LOST
from tests.lora_core.test_pipeline import bits, random_adapter, same_bits
from tests.small_models import save_folder, save_ldm_single_file, small_pipeline

COMPONENTS = ("unet", "text_encoder", "text_encoder_2")


def tuned_from(family: str, *, parts: tuple[str, ...] = COMPONENTS, seed: int = 1) -> Any:
    """Every parameter of these parts moved by a few hundredths of its size."""
    pipe, g = small_pipeline(family), torch.Generator().manual_seed(seed)
    for component in parts:
        for p in getattr(getattr(pipe, component, None), "parameters", tuple)():
            p.add_(0.05 * torch.randn(p.shape, generator=g) * p.norm() / p.numel() ** 0.5)
    return pipe


def layers_of(pipe: Any) -> dict[str, nn.Module]:
    """Adapter path -> every module with parameters."""
    return {
        file_path(component, path): module
        for component in COMPONENTS
        if getattr(pipe, component, None) is not None
        for path, module in getattr(pipe, component).named_modules()
        if list(module.parameters(recurse=False))
    }


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_each_layer_is_the_best_of_its_rank_and_the_errors_are_said(family: str) -> None:
    base, tuned = small_pipeline(family), tuned_from(family)
    lora = extract(base, tuned, rank=4)
    before, after = layers_of(base), layers_of(tuned)
    kinds = (nn.Linear, nn.Conv2d)
    assert set(lora.deltas) == {path for path, layer in before.items() if isinstance(layer, kinds)}
    stated = json.loads(lora.metadata[LOST_BY_LAYER])
    gone = whole = 0.0
    for path, delta in lora.deltas.items():
        assert isinstance(delta, LowRank)
        old, new = before[path].weight, after[path].weight
        change = (new - old).flatten(1).double()
        u, s, vh = torch.linalg.svd(change, full_matrices=False)
        best = torch.zeros_like(change)
        for i in range(min(4, len(s))):
            best += s[i] * torch.outer(u[:, i], vh[i])
        found = delta.delta(old).flatten(1).double()
        lost, least = (change - found).norm(), (change - best).norm()
        assert lost <= 1.005 * least + 1e-6 * change.norm()
        assert stated[path] == pytest.approx(float(lost / change.norm()), abs=1e-5)
        gone, whole = gone + float(lost) ** 2, whole + float(change.norm()) ** 2
    assert float(lora.metadata[LOST]) == pytest.approx((gone / whole) ** 0.5, abs=1e-5)
    assert lora.family == family
    # what a low rank cannot say is named, all of it
    named = set(json.loads(lora.metadata[LEFT_OUT]))
    assert named == {
        f"{path}.{kind}"
        for path, layer in before.items()
        for kind, _ in layer.named_parameters(recurse=False)
        if not (isinstance(layer, kinds) and kind == "weight")
    }


def restored(base: Any, lora: Adapter) -> Any:
    """base + LoRA, written into the parameters one by one."""
    for path, delta in lora.deltas.items():
        component, _, inside = path.partition(".")
        model = getattr(base, component)
        layer: Any = model.get_submodule(live_path(inside, model))
        inner = delta.inner if isinstance(delta, WithBias) else delta
        if inner is not None:
            layer.weight.copy_(layer.weight + inner.delta(layer.weight))
        if isinstance(delta, WithBias):
            layer.bias.copy_(layer.bias + delta.bias)
    return base


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_at_full_rank_with_the_others_stored_base_and_lora_are_the_tuned_model(family: str) -> None:
    tuned = tuned_from(family, parts=("unet", "text_encoder", "text_encoder_2", "vae"))
    lora = extract(small_pipeline(family), tuned, rank=4096, others="store")
    back = restored(small_pipeline(family), lora)
    for component in COMPONENTS:
        expected = dict(getattr(tuned, component, nn.Module()).named_parameters())
        for key, p in getattr(back, component, nn.Module()).named_parameters():
            assert torch.allclose(p, expected[key], atol=1e-5), (component, key)
    named = json.loads(lora.metadata[LEFT_OUT])
    assert named == [f"vae.{key}" for key, _ in tuned.vae.named_parameters()]
    assert isinstance(lora.deltas["text_encoder.text_model.embeddings.token_embedding"], Full)
    assert isinstance(lora.deltas["unet.conv_norm_out"], WithBias)
    assert float(lora.metadata[LOST]) < 1e-5


def test_a_fused_lora_comes_back_and_no_layer_that_it_lacks() -> None:
    live = LivePipeline(small_pipeline("sd1"))
    worn = random_adapter(live, 3, targets=("attention", "conv"))
    live.load(worn, "ink", 0.7)
    live.fuse()
    lora = extract(small_pipeline("sd1"), live, rank=3)
    assert set(lora.deltas) == set(worn.deltas)
    for path, delta in lora.deltas.items():
        zero = torch.zeros(delta.shape())
        assert torch.allclose(delta.delta(zero), 0.7 * worn.deltas[path].delta(zero), atol=1e-5), path
    assert float(lora.metadata[LOST]) < 1e-4
    assert LEFT_OUT not in lora.metadata
    live.unfuse()
    # on the rack it is not in the weights: nothing differs, and that is said
    with pytest.raises(LoraError, match="the same weights"):
        extract(small_pipeline("sd1"), live, rank=3)


def test_energy_gives_each_layer_the_smallest_rank_that_holds_it() -> None:
    base, tuned = small_pipeline("sd1"), tuned_from("sd1")
    before, after = layers_of(base), layers_of(tuned)
    lora = extract(base, tuned, energy=0.6, targets=("attention", "conv"))
    for path, delta in lora.deltas.items():
        assert isinstance(delta, LowRank)
        change = (after[path].weight - before[path].weight).flatten(1)
        shares = torch.linalg.svdvals(change).square().cumsum(0) / change.square().sum()
        assert shares[delta.rank - 1] >= 0.6 - 1e-6
        assert delta.rank == 1 or shares[delta.rank - 2] < 0.6 + 1e-6
    assert float(lora.metadata[LOST]) <= 0.4**0.5


def test_targets_choose_and_a_clamp_is_counted_as_loss() -> None:
    base, tuned = small_pipeline("sd1"), tuned_from("sd1")
    lora = extract(base, tuned, rank=2, targets=("attn2.to_k", "conv"))
    assert lora.deltas
    assert all(
        path.endswith(("attn2.to_k", "conv", "conv1", "conv2", "conv_shortcut")) for path in lora.deltas
    )
    assert any(path.endswith("attn1.to_q.weight") for path in json.loads(lora.metadata[LEFT_OUT]))
    held = extract(base, tuned, rank=2, targets=("attn2.to_k", "conv"), clamp=0.9)
    assert float(held.metadata[LOST]) > float(lora.metadata[LOST])
    with pytest.raises(NothingMatched, match="attn3"):
        extract(base, tuned, rank=2, targets=("attention", "attn3"))


def test_files_and_opened_models_give_the_same(tmp_path: Path) -> None:
    base, tuned = (pipe_with_clip(seed) for seed in (None, 1))
    opened = extract(base, tuned, rank=2, name="x")
    folder, file = (
        save_folder(base, tmp_path / "old"),
        save_ldm_single_file(tuned, tmp_path / "new.safetensors"),
    )
    for pair in ((folder, file), (open_base(folder, device="cpu", dtype=torch.float32), str(file))):
        lora = extract(*pair, rank=2)
        assert set(lora.deltas) == set(opened.deltas)
        for path, delta in lora.deltas.items():
            for key, tensor in delta.tensors().items():
                assert torch.equal(tensor, opened.deltas[path].tensors()[key])
        assert lora.metadata[FROM] == "new minus old; rank 2"


def pipe_with_clip(seed: int | None) -> Any:
    pipe = small_pipeline("sd1", clip_vocabulary=True)
    if seed is not None:
        for layer in (pipe.unet.mid_block, pipe.text_encoder.encoder.layers[0]):
            for p in layer.parameters():
                p.add_(0.03 * torch.randn(p.shape, generator=torch.Generator().manual_seed(seed)))
    return pipe


def test_the_same_model_in_another_precision_is_the_same(tmp_path: Path) -> None:
    base = save_folder(small_pipeline("sd1"), tmp_path / "full")
    half = save_folder(small_pipeline("sd1", dtype=torch.float16), tmp_path / "half")
    with pytest.raises(LoraError, match="full and half have the same weights"):
        extract(base, half, rank=2)
    weights = half / "unet/diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    tensors["mid_block.attentions.0.proj_in.weight"] += 0.5
    save_file(tensors, weights, metadata={"format": "pt"})
    assert list(extract(base, half, rank=2).deltas) == ["unet.mid_block.attentions.0.proj_in"]


def test_models_that_do_not_belong_together_are_refused_in_a_sentence() -> None:
    base = small_pipeline("sd1")
    with pytest.raises(WrongFamily, match=r"is SD 1\.x and .* is SDXL"):
        extract(base, small_pipeline("sdxl"), rank=2)
    with pytest.raises(WrongFamily, match=r"text_encoder.*does not exist"):
        extract(base, small_pipeline("sd1", text_layers=3), rank=2)
    broken = tuned_from("sd1")
    broken.unet.conv_in.weight[0, 0, 0, 0] = float("nan")
    with pytest.raises(LoraError, match=r"unet\.conv_in\.weight holds values that are NaN"):
        extract(base, broken, rank=2)
    norms = small_pipeline("sd1")
    norms.unet.conv_norm_out.weight.add_(0.1)
    with pytest.raises(LoraError, match="only in 1 other parameters"):
        extract(base, norms, rank=2)
    assert list(extract(base, norms, rank=2, others="store").deltas) == ["unet.conv_norm_out"]
    with pytest.raises(ConfigError, match="others"):
        extract(base, norms, rank=2, others="drop")  # type: ignore[arg-type]
    with pytest.raises(LoraError, match="no model with a UNet"):
        extract(nn.Linear(2, 2), base, rank=2)


@pytest.mark.parametrize("family", ["sd2", "sdxl"])
def test_from_single_files_whose_openclip_is_fused(family: str, tmp_path: Path) -> None:
    """What a baked LoRA has changed is found again, in q, k and v and the projection too; and what is written over a
    live model comes back from the parts of the file."""
    pipe = small_pipeline(family, clip_vocabulary=True)
    base = tmp_path / "base.safetensors"
    save_ldm_single_file(pipe, base, {"modelspec.prediction_type": "v"} if family == "sd2" else None)
    live = LivePipeline.open(base, device="cpu", dtype=torch.float32)
    ink = random_adapter(live, 1, name="ink")
    bake(base, [(ink, 0.8)], tmp_path / "tuned.safetensors")
    found = extract(base, tmp_path / "tuned.safetensors", rank=3, targets="attention")
    component = "text_encoder" if family == "sd2" else "text_encoder_2"
    assert found.deltas.keys() == ink.deltas.keys()
    fused = [
        path
        for path in ink.deltas
        if path.startswith(f"{component}.") and path.endswith(("q_proj", "v_proj"))
    ]
    assert len(fused) == 4
    for path in fused:
        w = torch.zeros(ink.deltas[path].shape())
        assert torch.allclose(found.deltas[path].delta(w), 0.8 * ink.deltas[path].delta(w), atol=1e-5), path
    before, live._base.keep = bits(live), "checkpoint"
    live.load(ink, "ink", 0.8)
    live.fuse()
    assert not same_bits(live, before)
    live.unload()
    assert same_bits(live, before)
    assert live.verify_base()
