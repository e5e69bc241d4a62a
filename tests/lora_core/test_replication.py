"""Replicated layers: the oracle is a stack of independent copies, each with its dense change written into it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lora_core import (
    Adapter,
    LivePipeline,
    LoraConfig,
    attach,
    bake,
    collect,
    combine,
    detach,
    read_adapter,
    resize,
    write_adapter,
)
from lora_core.adapter import live_path, weight_of
from lora_core.errors import ConfigError, LoraError
from lora_core.replication import KEY, read_map
from tests.lora_core.test_pipeline import bits, inputs, random_adapter, same_bits, tree
from tests.small_models import small_pipeline

TEXT = ((0, 2), (1, 3), (0, 1))  # of three layers: 0 1 1 2 0
BLOCKS = ((0, 1), (0, 2))  # of two blocks: 0 0 1
LISTS = {
    "text_encoder": "text_encoder.text_model.encoder.layers",
    "unet": "unet.mid_block.attentions.0.transformer_blocks",
}


def pipeline() -> Any:
    return small_pipeline("sdxl", text_layers=3)


def configs(variant: str = "lora") -> dict[str, LoraConfig]:
    common = {"rank": 3, "alpha": 5.0, "init": "random", "variant": variant}
    return {
        "unet": LoraConfig(**common, layer_replication={"mid_block.attentions.0.transformer_blocks": BLOCKS}),
        "text_encoder": LoraConfig(**common, layer_replication=TEXT),
    }


def replicated(pipe: Any, *, variant: str = "lora", seed: int = 0) -> Adapter:
    models = {c: getattr(pipe, c) for c in ("unet", "text_encoder")}
    form = attach(models, configs(variant), generator=torch.Generator().manual_seed(seed))
    try:
        return collect(form, family="sdxl", name="deep")
    finally:
        detach(form)


def dense(adapter: Adapter, weight: float) -> Any:
    """A pipeline whose lists are lists of independent layers, with w ΔW added to each."""
    pipe = pipeline()
    for path, ranges in (("text_encoder.encoder", TEXT), ("unet.mid_block.attentions.0", BLOCKS)):
        component, _, inside = path.partition(".")
        owner: Any = getattr(pipe, component).get_submodule(inside)
        name = "layers" if component == "text_encoder" else "transformer_blocks"
        own = getattr(owner, name)
        stack = [copy.deepcopy(own[i]) for start, end in ranges for i in range(start, end)]
        setattr(owner, name, nn.ModuleList(stack))
    for path, delta in adapter.deltas.items():
        component, _, inside = path.partition(".")
        model = getattr(pipe, component)
        layer = weight_of(model.get_submodule(live_path(inside, model)))
        with torch.no_grad():
            layer.copy_(layer + weight * delta.delta(layer))
    return pipe


@torch.no_grad()
def answers(pipe: Any) -> dict[str, Tensor]:
    ids = torch.arange(10).reshape(2, 5) + 3
    text = pipe.text_encoder(ids, output_hidden_states=True)
    return {
        "unet": pipe.unet(**inputs(LivePipeline(pipe))).sample,
        "text": text.last_hidden_state,
        "penultimate": text.hidden_states[-2],
        "count": torch.tensor(len(text.hidden_states)),
    }


def close(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    for key, expected in b.items():
        assert torch.allclose(a[key], expected, atol=1e-5 * float(expected.abs().max())), key


@pytest.mark.parametrize("called_before", [False, True])
@pytest.mark.parametrize("variant", ["lora", "dora"])
def test_a_loaded_stack_is_the_stack_of_dense_copies_and_leaves_no_trace(
    variant: str, called_before: bool, tmp_path: Path
) -> None:
    pipe = pipeline()
    adapter = replicated(pipeline(), variant=variant)
    live = LivePipeline(pipe)
    apart = answers(pipe) if called_before else answers(pipeline())
    before, modules, said = bits(live), tree(live), repr(live.models["unet"])
    covered = live.load(write_adapter(adapter, tmp_path / "deep"), "deep", 0.7)
    assert (covered.matched, covered.unused) == (len(adapter.deltas), ())
    close(answers(pipe), answers(dense(adapter, 0.7)))
    assert same_bits(live, before)  # names and shapes too: the tree has the base's own lists
    assert repr(live.models["unet"]) == said
    assert live.verify_base()
    with pytest.raises(LoraError, match="replicated layers"):
        live.fuse()
    live.set_weights({"deep": 0.0})
    close(answers(pipe), answers(dense(adapter, 0.0)))
    live.delete("deep")
    assert same_bits(live, before)
    if called_before:
        assert tree(live) == modules
    assert all(torch.equal(a, b) for a, b in zip(answers(pipe).values(), apart.values(), strict=True))


def test_paths_count_in_the_stack_and_the_map_is_in_the_file(tmp_path: Path) -> None:
    adapter = replicated(pipeline())
    layers = {p.split("encoder.layers.")[1].split(".")[0] for p in adapter.deltas if "encoder.layers" in p}
    assert layers == {"0", "1", "2", "3", "4"}
    blocks = {p.split("transformer_blocks.")[1].split(".")[0] for p in adapter.deltas if ".mid_block." in p}
    assert blocks == {"0", "1", "2"}
    expected = {LISTS["text_encoder"]: TEXT, LISTS["unet"]: BLOCKS}
    for spelling in ("kohya", "diffusers"):
        read = read_adapter(write_adapter(adapter, tmp_path / spelling, spelling=spelling))
        assert read_map(read.metadata) == expected
        assert set(read.deltas) == set(adapter.deltas)
    assert read_map(resize(adapter, rank=2).metadata) == expected
    assert read_map(combine([(adapter, 0.5), (adapter, 0.2)]).metadata) == expected
    with pytest.raises(ConfigError, match="different stacks"):
        combine([(adapter, 0.5), (random_adapter(LivePipeline(pipeline()), 1), 0.2)])
    with pytest.raises(LoraError, match="replicated layers"):
        bake(pipeline(), [(adapter, 1.0)], tmp_path / "new")


def test_an_sd1_lora_of_replicated_blocks_is_not_taken_for_sdxl(tmp_path: Path) -> None:
    pipe = small_pipeline("sd1")
    path = "mid_block.attentions.0.transformer_blocks"
    config = LoraConfig(rank=2, alpha=3, init="random", layer_replication={path: ((0, 1), (0, 1))})
    form = attach(pipe.unet, config)
    adapter = collect(form, family="sd1", name="deep")
    detach(form)
    file = write_adapter(adapter, tmp_path / "deep")
    assert read_adapter(file).family == "sd1"
    live = LivePipeline(pipe)
    assert live.load(file).unused == ()


@pytest.mark.parametrize("component", ["text_encoder", "unet"])
def test_gradients_are_those_of_the_dense_stack(component: str) -> None:
    pipe = pipeline()
    form = attach({component: getattr(pipe, component)}, configs()[component])
    given = inputs(LivePipeline(pipe))
    ids = torch.arange(10).reshape(2, 5) + 3

    def loss(of: Any) -> Tensor:
        out = of.unet(**given).sample if component == "unet" else of.text_encoder(ids).last_hidden_state
        return out.square().sum()

    loss(pipe).backward()
    naive = dense(collect(form), 1.0)
    model = getattr(naive, component).requires_grad_(True)
    loss(naive).backward()
    for path, layer in zip(form.paths, form.layers, strict=True):
        weight = weight_of(model.get_submodule(live_path(path.partition(".")[2], model)))
        factors: Any = layer.factors
        scale = 5.0 / 3.0
        expected = (scale * weight.grad @ factors.down.T).detach()
        # against the whole: single entries are differences of large fp32 sums, whose order the threads decide
        assert float((factors.up.grad - expected).norm()) < 1e-4 * float(expected.norm()), path
    detach(form)


def test_stacks_that_differ_are_refused_in_a_sentence_and_nothing_has_changed() -> None:
    live = LivePipeline(pipeline())
    deep, plain = replicated(pipeline()), random_adapter(live, 3, name="plain")
    live.load(plain, "plain")
    with pytest.raises(
        LoraError, match=r'"deep" is made for the stack .*, and "plain" for the list as it is'
    ):
        live.load(deep, "deep")
    assert list(live.loaded) == ["plain"]
    live.unload()
    live.load(deep, "deep", 0.5)
    now = answers(live.pipeline)
    with pytest.raises(LoraError, match='"plain" is made for the list as it is'):
        live.load(plain, "plain")
    with pytest.raises(LoraError, match="Delete it first"):
        live.load(plain, "deep")
    live.mode = "live"
    # of the same stack, or of layers elsewhere, they go together
    live.load(replicated(pipeline(), seed=5), "deeper", 0.0)
    elsewhere = {p: d for p, d in plain.deltas.items() if p.startswith("text_encoder_2.")}
    live.load(Adapter(elsewhere, {}, "sdxl"), "second", 0.0)
    close(answers(live.pipeline), now)
    live.delete("deep")
    live.delete("deeper")
    live.load(plain, "plain")
    live.unload()
    assert live.verify_base()


@pytest.mark.parametrize(
    ("component", "wanted", "said"),
    [
        (
            "text_encoder",
            ((0, 4),),
            "reaches to 4; there are 3 layers in this model. End every range at 3 or before",
        ),
        ("text_encoder", ((2, 1),), "0 <= start < end"),
        ("text_encoder", ((0, 3),) * 99, "more than 256"),
        ("unet", ((0, 1), (0, 1)), "which of"),
        ("unet", {"mid_blok": ((0, 1),)}, "names mid_blok, which is none of the lists"),
    ],
)
def test_maps_that_do_not_fit_are_refused_before_anything_is_touched(
    component: str, wanted: Any, said: str
) -> None:
    pipe = pipeline()
    with pytest.raises(ConfigError, match=said):
        attach(getattr(pipe, component), LoraConfig(rank=2, alpha=3, layer_replication=wanted))
    owner = pipe.text_encoder.encoder if component == "text_encoder" else pipe.unet.mid_block.attentions[0]
    assert not owner._forward_hooks
    assert not owner._forward_pre_hooks
    live = LivePipeline(pipe)
    damaged = Adapter(random_adapter(live, 1).deltas, {KEY: '{"unet.conv_in": [[0, 1]]}'}, "sdxl", "x")
    with pytest.raises(ConfigError, match="no list of layers"):
        live.load(damaged)
    with pytest.raises(LoraError, match="damaged"):
        live.load(Adapter(damaged.deltas, {KEY: "[1"}, "sdxl", "x"))
