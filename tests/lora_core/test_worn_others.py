"""Kinds beside LoRA, LoHa and LoKr on one model: (IA)³, GLoRA, OFT, BOFT, whole changes and biases, on linear layers,
convolutions, embeddings and norms: live = fused = the weights written by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.func import functional_call

from lora_core import Adapter, LivePipeline
from lora_core.adapter import live_path, weight_of
from lora_core.deltas.bias import WithBias
from lora_core.deltas.full import Full
from lora_core.deltas.low_rank import LowRank
from lora_core.errors import LoraError, WrongFamily
from lora_core.mix import AdapterWeight
from lora_core.quantised import quantise
from lora_core.storages import dequantised, storage_of
from lora_core.terms import Dense, Gain, InputGain, Turn
from lora_core.worn import wear
from tests.lora_core.kinds_by_hand import KINDS, adapter_of, generalized, scaling, turning, wearers
from tests.lora_core.test_pipeline import bits, close, outputs, random_adapter, same_bits, tree
from tests.small_models import small_pipeline

WHAT = [*((kind, "none") for kind in KINDS), ("low rank", "beside"), ("whole", "beside"), ("", "alone")]


@pytest.fixture(scope="module")
def live() -> LivePipeline:
    return LivePipeline(small_pipeline("sd1"))


@torch.no_grad()
def by_hand(adapters: dict[str, tuple[Adapter, Any]]) -> LivePipeline:
    """Another pipeline with W + sum w (W'(1) - W) and b + sum w Δb written into it."""
    oracle = LivePipeline(small_pipeline("sd1"))
    before = {path: weight_of(layer).detach().clone() for path, layer in wearers(oracle).items()}
    for name, (adapter, value) in adapters.items():
        for path, delta in adapter.deltas.items():
            component, _, inside = path.partition(".")
            model = oracle.models[component]
            layer: Any = model.get_submodule(live_path(inside, model))
            weight = AdapterWeight.parse(name, value).at(path)
            layer.weight += weight * delta.delta(before[path])
            if isinstance(delta, WithBias):
                layer.bias += weight * delta.bias
    return oracle


@pytest.mark.parametrize(("kind", "biases"), WHAT)
def test_live_is_fused_is_written_by_hand(live: LivePipeline, kind: str, biases: str) -> None:
    before, bare, trunk = bits(live), outputs(live), tree(live)
    adapter = adapter_of(live, kind, 1, biases)
    assert len(adapter.deltas) > 40
    live.load(adapter, name="a", weight=0.7)
    worn = outputs(live)
    close(worn, outputs(by_hand({"a": (adapter, 0.7)})))
    assert all((worn[c] - bare[c]).abs().max() > 1e-3 for c in worn)
    live.fuse()
    assert not live.verify_base()
    close(outputs(live), worn)
    live.unfuse()
    assert same_bits(live, before)
    live.set_weights({"a": 0.0})
    assert all(torch.equal(outputs(live)[c], bare[c]) for c in bare)
    live.unload()
    assert same_bits(live, before)
    assert tree(live) == trunk
    assert live.verify_base()


def several(live: LivePipeline) -> dict[str, Adapter]:
    """All of them on the same layers: every fifth, norms, convolutions and both embeddings among them."""
    made = {
        "dora": random_adapter(live, 2, variant="dora", targets=("attention", "feed-forward")),
        **{kind: adapter_of(live, kind, 3 + i, "beside") for i, kind in enumerate(KINDS)},
    }
    chosen = [p for i, p in enumerate(wearers(live)) if i % 5 == 0 or "embedding" in p]
    return {name: Adapter({p: a.deltas[p] for p in chosen if p in a.deltas}) for name, a in made.items()}


def test_all_together_in_any_order(live: LivePipeline) -> None:
    """A DoRA's share of W x is that of the base, whatever else changes the layer's output or its bias."""
    adapters, before = several(live), bits(live)
    weights = [0.5, 0.3, -0.4, 0.6, 0.2, -0.3, 0.4]
    mix = dict(zip(adapters, weights, strict=True))
    oracle = by_hand({name: (adapters[name], mix[name]) for name in mix})
    for order in (list(mix), list(reversed(mix))):
        for name in order:
            live.load(adapters[name], name=name, weight=mix[name])
        worn = outputs(live)
        close(worn, outputs(oracle))
        live.fuse()
        close(outputs(live), worn)
        live.unload()
    assert same_bits(live, before)


def test_fifty_mixes_leave_nothing(live: LivePipeline) -> None:
    adapters, before, bare, trunk = several(live), bits(live), outputs(live), tree(live)
    g = torch.Generator().manual_seed(0)
    for i in range(50):
        drawn = torch.randn(len(adapters), generator=g).tolist()
        chosen = {name: w for name, w in zip(adapters, drawn, strict=True) if w > 0} or {"dora": 1.0}
        for name, w in chosen.items():
            if name not in live.loaded:
                live.load(adapters[name], name=name, weight=w)
        live.set_weights(chosen, only=True)
        if i % 10 == 0:
            live.fuse()
        for name in set(live.loaded) - set(chosen):
            live.delete(name)
    live.unload()
    assert same_bits(live, before)
    assert tree(live) == trunk
    assert all(torch.equal(outputs(live)[c], bare[c]) for c in bare)


def test_a_mix_per_picture(live: LivePipeline) -> None:
    adapters = several(live)
    for name, adapter in adapters.items():
        live.load(adapter, name=name)
    names = list(adapters)
    weights: list[dict[str, float]] = [
        dict.fromkeys(names, 0.0),
        {name: 0.15 * (i - 3) for i, name in enumerate(names)},
    ]
    live._rack.set_mixes([live._changed(w, only=False) for w in weights])
    together = outputs(live, batch=2)
    live.unload()
    for i, mine in enumerate(weights):
        alone = outputs(by_hand({name: (adapters[name], w) for name, w in mine.items()}), batch=2)
        for key in alone:
            error = (together[key][i] - alone[key][i]).abs().max() / alone[key].abs().max()
            assert error < 1e-4, key


def test_forms_are_the_small_ones(live: LivePipeline) -> None:
    """Scales and turns act on what the layer has computed; only what has no such form is a dense change."""
    layers, g = wearers(live), torch.Generator().manual_seed(0)
    path = next(p for p in layers if p.endswith("ff.net.0.proj"))
    layer, norm = layers[path], path.replace("ff.net.0.proj", "norm1")
    shape = weight_of(layer).shape

    def forms(delta: Any, at: str = path) -> list[type]:
        return [type(extra) for extra in wear("a", delta, layers[at], at).extras]

    assert forms(scaling(shape, g, 0)) == [Gain]
    assert forms(scaling(shape, g, 1)) == [InputGain]
    assert forms(turning(shape, g, 0)) == [Turn]
    thin = wear("a", generalized(shape, g, 1), layer, path)
    assert (thin.rank, thin.extras) == (4, ())
    assert forms(generalized(shape, g, 0)) == [Dense]
    assert forms(Full(torch.ones(weight_of(layers[norm]).shape)), norm) == [Dense]


def test_a_bias_for_a_layer_without_one_is_worn_live_and_not_fused(live: LivePipeline) -> None:
    path = next(p for p, layer in wearers(live).items() if p.endswith("attn1.to_q") and layer.bias is None)
    layer = wearers(live)[path]
    change = torch.randn(layer.out_features)
    before, x = bits(live), torch.randn(2, 3, layer.in_features)
    live.load(Adapter({path: WithBias(None, change)}), name="a", weight=0.5)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), x @ layer.weight.T + 0.5 * change)
    with pytest.raises(
        LoraError, match=r"attn1\.to_q, which has none in this model: .* the picture is the same"
    ):
        live.fuse()
    assert same_bits(live, before)
    assert not live.fused
    live.unload()


def test_what_does_not_fit_its_layer_is_refused(live: LivePipeline) -> None:
    layers = wearers(live)
    words = next(p for p in layers if p.endswith("token_embedding"))
    query = next(p for p in layers if p.endswith("attn1.to_q"))
    norm = next(p for p, layer in layers.items() if isinstance(layer, nn.GroupNorm))
    out, width = weight_of(layers[query]).shape
    low = LowRank(torch.ones(1, width), torch.ones(out, 1), 2.0)
    g = torch.Generator()
    wrong = {
        "an embedding has none": {words: WithBias(None, torch.ones(len(weight_of(layers[words]))))},
        f"changes a weight of {out + 4}, in": {query: turning(torch.Size((out + 4, width)), g, 0)},
        rf"of \? x {width + 1}, in": {query: scaling(torch.Size((out, width + 1)), g, 1)},
        f"of {out} x {width}, in this model it has": {norm: low},
        f"of {out}, in this model it has {out} x {width}": {query: Full(torch.ones(out))},
        "changes a weight of": {query: WithBias(low, torch.ones(out + 1))},
    }
    for why, deltas in wrong.items():
        with pytest.raises(WrongFamily, match=why):
            live.load(Adapter(deltas), name="a")  # type: ignore[arg-type]
    assert live.loaded == {}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_the_same_to_its_rounding(live: LivePipeline, dtype: torch.dtype) -> None:
    """Each layer alone: what all of them add up to says little."""
    short = LivePipeline(small_pipeline("sd1", dtype=dtype))
    g = torch.Generator().manual_seed(4)
    layers = wearers(short)
    for kind in KINDS:
        adapter = adapter_of(short, kind, 5, "beside")
        short.load(adapter, name="a")
        for path in list(adapter.deltas)[::7]:
            layer, delta = layers[path], adapter.deltas[path]
            if isinstance(layer, nn.Embedding):
                x: Any = torch.randint(0, layer.num_embeddings, (2, 5), generator=g)
            elif isinstance(layer, nn.Conv2d | nn.GroupNorm):
                x = torch.randn(2, layer.weight.shape[int(layer.weight.dim() > 1)], 6, 6, generator=g).to(
                    dtype
                )
            else:
                x = torch.randn(2, 5, layer.weight.shape[-1], generator=g).to(dtype)
            with torch.no_grad():
                worn = layer(x).float()
                changed = {"weight": layer.weight.float() + delta.delta(layer.weight)}
                if isinstance(delta, WithBias):
                    changed["bias"] = layer.bias.float() + delta.bias
                short._rack.enabled = False
                exact = functional_call(layer, changed, x.float() if x.is_floating_point() else x)
                short._rack.enabled = True
            error = (worn - exact).norm() / exact.norm()
            assert error < (3e-3 if dtype is torch.float16 else 2e-2), (kind, path, float(error))
        short.unload()


@torch.no_grad()
def as_it_computes(kept: nn.Module, plain: nn.Module) -> None:
    """Into `plain` the numbers that `kept`, which keeps them in fewer bits, computes with."""
    packed = {f"{path}.weight": m for path, m in kept.named_modules() if storage_of(m) is not None}
    for (name, own), other in zip(plain.named_parameters(), kept.parameters(), strict=True):
        own.copy_(dequantised(packed[name]) if name in packed else other.float())


@pytest.mark.parametrize("how", ["offloaded", "cast to fp8", "packed as nf4"])
def test_scales_turns_and_norms_wherever_the_weight_is(how: str) -> None:
    """Sequentially offloaded, cast to 8 bits between the calls, or packed: as on a model that has these weights
    plainly."""
    accelerate = pytest.importorskip("accelerate")
    live, plain = (LivePipeline(small_pipeline("sd1")) for _ in range(2))
    adapters = {
        kind: Adapter({p: d for p, d in adapter_of(plain, kind, 1, "beside").deltas.items() if "unet." in p})
        for kind in ("scaling", "turning", "whole", "generalized")
    }
    unet: Any = live.models["unet"]
    if how == "offloaded":
        accelerate.cpu_offload(unet, execution_device=torch.device("cpu"))
    else:
        if how == "packed as nf4":
            pytest.importorskip("bitsandbytes")
            quantise({"unet": unet}, "nf4")
        else:
            unet.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
        as_it_computes(unet, plain.models["unet"])
    bare = outputs(live)["unet"]
    for name, adapter in adapters.items():
        for each in (live, plain):
            each.load(adapter, name=name, weight=0.4)
    worn = outputs(live)["unet"]
    close({"unet": worn}, {"unet": outputs(plain)["unet"]})
    assert (worn - bare).abs().max() > 1e-2
    with pytest.raises(LoraError, match="cannot be fused"):
        live.fuse()
    live.unload()
    assert torch.equal(outputs(live)["unet"], bare)
    assert not any(m._forward_hooks for m in unet.modules())
