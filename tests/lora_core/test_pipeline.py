"""The live pipeline's laws, on full-topology pipelines of every family."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import nn

from lora_core import Adapter, GenerationRequest, LivePipeline, LoraConfig, attach, collect, detach
from lora_core.adapter import live_path, weight_of
from lora_core.deltas.magnitude import WithMagnitude
from lora_core.errors import LoraError, NotFinite, NotLoaded, Stopped, WrongFamily
from lora_core.mix import AdapterWeight
from tests.small_models import small_pipeline


def random_adapter(
    live: LivePipeline, seed: int, *, variant: str = "lora", targets: Any = "attention", name: str = ""
) -> Adapter:
    """A LoRA with non-zero factors on UNet and text encoders; alpha is not rank."""
    g = torch.Generator().manual_seed(seed)
    configs = {
        c: LoraConfig(
            rank=3, alpha=5, init="random", variant=variant, targets=targets if c == "unet" else "attention"
        )
        for c in live.models
    }
    form = attach(live.models, configs, generator=g)
    with torch.no_grad():
        for path, p in form.named_parameters():
            if path.endswith("magnitude"):
                p.mul_(1 + 0.3 * torch.rand(p.shape, generator=g))
    try:
        return collect(form, name=name)
    finally:
        detach(form)


def inputs(live: LivePipeline, batch: int = 2) -> dict[str, Any]:
    g = torch.Generator().manual_seed(9)
    unet: Any = live.models["unet"]
    side, width = unet.config.sample_size, unet.config.cross_attention_dim
    given: dict[str, Any] = {
        "sample": torch.randn(batch, 4, side, side, generator=g),
        "timestep": torch.tensor(500),
        "encoder_hidden_states": torch.randn(batch, 7, width, generator=g),
    }
    if live.family.key == "sdxl":
        pooled = live.pipeline.text_encoder_2.config.projection_dim
        given["added_cond_kwargs"] = {
            "text_embeds": torch.randn(batch, pooled, generator=g),
            "time_ids": torch.tensor([[128.0, 128, 0, 0, 128, 128]] * batch),
        }
    return given


@torch.no_grad()
def outputs(live: LivePipeline, batch: int = 2) -> dict[str, torch.Tensor]:
    """What each model answers to fixed inputs."""
    ids = torch.arange(5 * batch).reshape(batch, 5) + 3
    found = {"unet": live.pipeline.unet(**inputs(live, batch)).sample}
    for component, model in live.models.items():
        if component != "unet":
            found[component] = model(ids).last_hidden_state
    return found


def tree(live: LivePipeline) -> dict[str, list[str]]:
    return {
        c: [
            f"{n} {type(m).__name__} {len(m._forward_hooks)} {len(m._forward_pre_hooks)}"
            for n, m in model.named_modules()
        ]
        for c, model in live.models.items()
    }


def bits(live: LivePipeline) -> dict[str, torch.Tensor]:
    return {f"{c}.{n}": t.clone() for c, m in live.models.items() for n, t in m.state_dict().items()}


def same_bits(live: LivePipeline, before: dict[str, torch.Tensor]) -> bool:
    now = {f"{c}.{n}": t for c, m in live.models.items() for n, t in m.state_dict().items()}
    return now.keys() == before.keys() and all(torch.equal(now[k], before[k]) for k in before)


def dense(live: LivePipeline, adapters: dict[str, tuple[Adapter, Any]]) -> None:
    """The oracle: W + sum w (W'(1) - W), written straight into the weights of a pipeline of its own."""
    for path in {p for a, _ in adapters.values() for p in a.deltas}:
        component, _, inside = path.partition(".")
        layer = live.models[component].get_submodule(live_path(inside, live.models[component]))
        weight = weight_of(layer)
        original = weight.detach().clone()
        total = original.clone()
        for name, (adapter, value) in adapters.items():
            if path in adapter.deltas:
                total += AdapterWeight.parse(name, value).at(path) * adapter.deltas[path].delta(original)
        with torch.no_grad():
            weight.copy_(total)


def close(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    for key, expected in b.items():
        error = (a[key] - expected).abs().max() / expected.abs().max()
        assert error < 1e-5, (key, float(error))


ALL = ("attention", "feed-forward", "conv")


@pytest.fixture(params=["sd1", "sd2", "sdxl"])
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def shared() -> LivePipeline:
    """One SD 1.x pipeline for the cheaper laws; each test leaves it as it was, which is itself a law."""
    return LivePipeline(small_pipeline("sd1"))


def test_live_equals_fused_equals_dense(family: str) -> None:
    live, oracle = LivePipeline(small_pipeline(family)), LivePipeline(small_pipeline(family))
    a = random_adapter(live, 1, targets=ALL)
    b = random_adapter(live, 2, variant="dora", targets=ALL)
    bare = outputs(live)
    coverage = live.load(a, name="a", weight=0.7)
    assert coverage.matched == coverage.total == len(a.deltas)
    weights = {"unet": -0.4, "text_encoder": 0.5, "blocks": {"down.1": 0.9, "up.1.attn": 0.0}}
    live.load(b, name="b", weight=weights)
    worn = outputs(live)
    dense(oracle, {"a": (a, 0.7), "b": (b, weights)})
    close(worn, outputs(oracle))
    live.fuse()
    assert live.fused
    assert not any(m._forward_hooks and live._rack.enabled for c in live.models.values() for m in c.modules())
    close(outputs(live), worn)
    assert any((worn[k] - bare[k]).abs().max() > 1e-3 * bare[k].abs().max() for k in bare)
    live.unload()
    assert all(torch.equal(bare[k], v) for k, v in outputs(live).items())


def test_weight_zero_is_the_base_bit_for_bit(family: str) -> None:
    live = LivePipeline(small_pipeline(family))
    bare = outputs(live)
    live.load(random_adapter(live, 3, variant="dora", targets=ALL), name="a", weight=0.0)
    assert all(torch.equal(bare[k], v) for k, v in outputs(live).items())


def test_fifty_random_changes_then_unload(family: str) -> None:
    """Load, weigh, fuse, unfuse, delete, in any order: then every tensor is bit-identical and the tree as it was."""
    live = LivePipeline(small_pipeline(family, dtype=torch.bfloat16))
    before, trunk, rng = bits(live), tree(live), random.Random(family)
    adapters = [random_adapter(live, i, variant=("lora", "dora")[i % 2], targets=ALL) for i in range(3)]
    fused = 0
    for _ in range(50):
        names = list(live.loaded)
        action = rng.choice(["load", "weigh", "fuse", "unfuse", "delete"])
        if action == "load" or not names:
            i = rng.randrange(3)
            live.load(adapters[i], name=f"n{i}", weight=rng.uniform(-1, 2))
        elif action == "weigh":
            live.set_weights({rng.choice(names): rng.uniform(-1, 2)}, only=rng.random() < 0.3)
        elif action == "delete":
            live.delete(rng.choice(names))
        else:
            getattr(live, action)()
        fused += live.fused
    assert fused > 0
    live.unload()
    assert same_bits(live, before)
    assert tree(live) == trunk
    report = live.verify_base()
    assert report
    assert report.total == sum(len(list(m.parameters())) for m in (*live.models.values(), live.pipeline.vae))


def test_fusing_really_writes_and_verify_sees_it(shared: LivePipeline) -> None:
    shared.load(random_adapter(shared, 4), name="a")
    shared.fuse()
    report = shared.verify_base()
    assert not report
    assert len(report.changed) == len(shared.loaded["a"].deltas)
    shared.set_weights({"a": 0.5})  # any touch goes back to the rack
    assert not shared.fused
    assert shared.verify_base()
    shared.unload()


def test_order_does_not_matter(shared: LivePipeline) -> None:
    a, b = random_adapter(shared, 5, variant="dora"), random_adapter(shared, 6, variant="dora")
    shared.load(a, name="a", weight=0.8)
    shared.load(b, name="b", weight=-0.5)
    first = outputs(shared)
    shared.unload()
    shared.load(b, name="b", weight=-0.5)
    shared.load(a, name="a", weight=0.8)
    close(outputs(shared), first)
    shared.unload()


def test_input_axis_dora_lives_on_the_rack_too(shared: LivePipeline) -> None:
    plain = random_adapter(shared, 7)
    deltas = {}
    for path, delta in plain.deltas.items():
        component, _, inside = path.partition(".")
        layer = shared.models[component].get_submodule(live_path(inside, shared.models[component]))
        deltas[path] = WithMagnitude(delta, weight_of(layer).detach().norm(dim=0, keepdim=True) * 1.1)
    oracle = LivePipeline(small_pipeline("sd1"))
    adapter = Adapter(deltas)
    shared.load(adapter, name="columns", weight=0.6)
    dense(oracle, {"columns": (adapter, 0.6)})
    close(outputs(shared), outputs(oracle))
    shared.unload()


def test_each_image_wears_its_own_mix(shared: LivePipeline) -> None:
    """Three mixes in one batch give the pictures of three separate calls."""
    shared.load(random_adapter(shared, 8, variant="dora"), name="a", weight=0.3)
    shared.load(random_adapter(shared, 9), name="b", weight=0.2)
    mixes: list[Any] = [{"a": 0.0, "b": 0.0}, {"a": 0.9}, {"a": 0.1, "b": {"unet": 1.0, "text_encoder": 0.0}}]
    ask = {"prompt": "a cat", "steps": 3, "seed": 5}
    together = shared.generate(GenerationRequest(**ask, mixes=mixes))
    assert shared.weights == {"a": 0.3, "b": 0.2}
    for mix, picture in zip(mixes, together, strict=True):
        shared.set_weights({"a": 0.3, "b": 0.2})
        shared.set_weights(mix)
        alone = shared.generate(GenerationRequest(**ask))[0]
        difference = (
            torch.tensor(list(alone.image.tobytes())).int()
            - torch.tensor(list(picture.image.tobytes())).int()
        )
        assert difference.abs().max() <= 1  # float sums of another batch size, rounded to bytes
        assert picture.weights == alone.weights
    assert together[0].image.tobytes() != together[1].image.tobytes()
    shared.unload()


def test_before_and_after_pictures_are_identical(shared: LivePipeline) -> None:
    ask = GenerationRequest(prompt="a dog on a red background", steps=3, seed=11)
    before = shared.generate(ask)[0]
    shared.load(random_adapter(shared, 10), name="a")
    worn = shared.generate(ask)[0]
    shared.fuse()
    fused = shared.generate(ask)[0]
    shared.unload()
    after = shared.generate(ask)[0]
    assert before.image.tobytes() == after.image.tobytes()
    assert worn.image.tobytes() != before.image.tobytes()
    assert fused.image.tobytes() != before.image.tobytes()
    assert "<lora:a:1>" in worn.parameters
    assert "lora" not in after.parameters


def test_seeds_follow_one_another_and_stand_alone(shared: LivePipeline) -> None:
    batch = shared.generate(GenerationRequest(prompt="a dog", steps=2, seed=40, count=2))
    assert [p.seed for p in batch] == [40, 41]
    alone = shared.generate(GenerationRequest(prompt="a dog", steps=2, seed=41))[0]
    a, b = (torch.tensor(list(p.image.tobytes())).int() for p in (alone, batch[1]))
    assert (a - b).abs().max() <= 1


def test_stopping_between_steps(shared: LivePipeline) -> None:
    seen: list[int] = []

    def on_step(step: int, steps: int) -> bool:
        seen.append(step)
        return step < 2

    with pytest.raises(Stopped):
        shared.generate(GenerationRequest(prompt="a dog", steps=6), on_step=on_step)
    assert seen == [1, 2]


def test_refusals_change_nothing(shared: LivePipeline) -> None:
    before, trunk = bits(shared), tree(shared)
    sdxl = LivePipeline(small_pipeline("sdxl"))
    with pytest.raises(WrongFamily, match=r"SDXL.*SD 1\.x"):
        shared.load(random_adapter(sdxl, 1), name="big")
    broken = random_adapter(shared, 12)
    path, delta = next(iter(broken.deltas.items()))
    delta.tensors()["up"].view(-1)[3] = float("nan")
    with pytest.raises(NotFinite, match=path.replace(".", r"\.")):
        shared.load(broken, name="broken")
    with pytest.raises(NotLoaded, match="None is loaded"):
        shared.set_weights({"cat": 1.0})
    with pytest.raises(LoraError, match="not a finite number"):
        shared.load(random_adapter(shared, 13), name="x", weight=float("inf"))
    with pytest.raises(LoraError, match="unknown"):
        shared.load(random_adapter(shared, 13), name="x", weight={"unett": 1.0})
    assert shared.loaded == {}
    assert tree(shared) == trunk
    assert same_bits(shared, before)


def test_an_error_while_fusing_restores_everything(shared: LivePipeline) -> None:
    before = bits(shared)
    adapter = random_adapter(shared, 14)
    shared.load(adapter, name="a")
    last = list(adapter.deltas)[-1]
    good = adapter.deltas[last]
    adapter.deltas[last] = next(d for d in adapter.deltas.values() if d.shape() != good.shape())
    with pytest.raises(RuntimeError):
        shared.fuse()
    adapter.deltas[last] = good
    assert same_bits(shared, before)
    shared.unload()


def test_opened_from_disk_is_compared_with_the_checkpoint(tmp_path: Any) -> None:
    small_pipeline("sd1").save_pretrained(tmp_path / "base")
    live = LivePipeline.open(tmp_path / "base", device="cpu")
    assert live.verify_base().against == "the checkpoint"
    assert live.verify_base()
    layer = next(m for m in live.models["unet"].modules() if isinstance(m, nn.Linear))
    with torch.no_grad():
        layer.weight.view(-1)[0] += 1e-3
    report = live.verify_base()
    assert (report.total - report.equal, len(report.changed)) == (1, 1)


def test_all_linear_of_sdxls_second_encoder_is_matched_whole() -> None:
    """Its text_projection stands beside `text_model`, not in it."""
    live = LivePipeline(small_pipeline("sdxl"))
    form = attach(
        live.models["text_encoder_2"], LoraConfig(rank=2, alpha=3, targets="all-linear", init="random")
    )
    adapter = collect(form)
    detach(form)
    assert "text_encoder_2.text_projection" in adapter.deltas
    coverage = live.load(adapter, name="a")
    assert coverage.matched == coverage.total
    assert not coverage.unused


def test_block_names() -> None:
    weight = AdapterWeight.parse(
        "a", {"unet": 0.5, "blocks": {"down": 0.1, "down.1": 0.2, "down.1.attn": 0.3, "mid": 0.4}}
    )
    at = {
        "unet.down_blocks.0.attentions.0.proj_in": 0.1,
        "unet.down_blocks.1.resnets.0.conv1": 0.2,
        "unet.down_blocks.1.attentions.0.proj_in": 0.3,
        "unet.mid_block.attentions.0.proj_in": 0.4,
        "unet.up_blocks.1.attentions.0.proj_in": 0.5,
        "text_encoder.text_model.encoder.layers.0.mlp.fc1": 1.0,
    }
    assert {path: weight.at(path) for path in at} == at
