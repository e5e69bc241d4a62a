"""docs/engine.md, held to it: when a change takes effect, how the hooks stand to other parties, where W0 is."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

from lora_core import GenerationRequest, LivePipeline
from lora_core.adapter import weight_of
from lora_core.errors import ConfigError, LoraError, NotLoaded, Stopped
from lora_core.layer_rack import bucket
from lora_core.parameters import parse_parameters
from lora_core.quantised import quantise
from lora_core.storages import dequantised, storage_of
from tests.lora_core.test_pipeline import (
    ALL,
    bits,
    close,
    dense,
    inputs,
    outputs,
    random_adapter,
    same_bits,
    tree,
)
from tests.small_models import small_pipeline

STEPS = 4


@pytest.fixture
def live() -> Iterator[LivePipeline]:
    """A pipeline with two LoRAs worn."""
    live = LivePipeline(small_pipeline("sd1"))
    live.load(random_adapter(live, 1), name="a", weight=0.8)
    live.load(random_adapter(live, 2, variant="dora"), name="b", weight=0.5)
    yield live
    live.unload()


def latents_of(
    live: LivePipeline, at: int = 0, action: Callable[[], Any] | None = None, **request: Any
) -> list[torch.Tensor]:
    """The latents after each step; `action` is asked for by another thread while step `at` ends."""
    seen: list[torch.Tensor] = []
    failed: list[BaseException] = []

    def act() -> None:
        assert action is not None
        try:
            action()
        except BaseException as problem:
            failed.append(problem)

    def on_step(step: int, _: int) -> bool:
        if action is not None and step == at:
            thread = threading.Thread(target=act)
            thread.start()
            deadline = time.monotonic() + 30
            while thread.is_alive() and not live._lock._queue:
                assert time.monotonic() < deadline
                time.sleep(0.001)
        return True

    ask = {"prompt": "a cat", "steps": STEPS, "seed": 3, **request}
    try:
        live.generate(GenerationRequest(**ask), on_step=on_step, on_latents=lambda x: seen.append(x.clone()))
    finally:
        if failed:
            raise failed[0]
    return seen


def same_until(one: list[torch.Tensor], other: list[torch.Tensor]) -> int:
    """How many steps are bit-equal before the first that is not."""
    return next(
        (i for i, (a, b) in enumerate(zip(one, other, strict=False)) if not torch.equal(a, b)), len(one)
    )


CHANGES: dict[str, Callable[[LivePipeline], Any]] = {
    "set_weights": lambda p: p.set_weights({"a": -0.3}),
    "text encoder": lambda p: p.set_weights({"a": {"text_encoder": 2.0}}),
    "load": lambda p: p.load(random_adapter(p, 3), name="c"),
    "delete": lambda p: p.delete("b"),
    "unload": lambda p: p.unload(),
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_change_from_another_thread_acts_from_the_next_step_on(live: LivePipeline, what: str) -> None:
    adapters = live.loaded
    unchanged = latents_of(live)
    for at in range(1, STEPS):
        changed = latents_of(live, at, lambda: CHANGES[what](live))
        assert same_until(unchanged, changed) == at
        live.unload()
        for name, weight in (("a", 0.8), ("b", 0.5)):
            live.load(adapters[name], name=name, weight=weight)
    assert same_until(unchanged, latents_of(live)) == STEPS


def test_a_weight_changed_at_step_10_of_25_leaves_ten_latents_and_alters_the_eleventh(
    live: LivePipeline,
) -> None:
    unchanged = latents_of(live, steps=25)
    assert len(unchanged) == 25
    assert same_until(unchanged, latents_of(live, 10, lambda: CHANGES["set_weights"](live), steps=25)) == 10


def test_what_follows_a_change_is_what_the_new_mix_would_make_of_that_latent(live: LivePipeline) -> None:
    """The tail of a changed run equals a run of the new mix, started from the latent at which it changed."""
    live.set_weights({"a": 0.8})
    changed = latents_of(live, 2, lambda: live.set_weights({"a": 0.1, "b": {"text_encoder": 1.5}}))
    other = LivePipeline(small_pipeline("sd1"))
    other.load(live.loaded["a"], name="a", weight=0.8)
    other.load(live.loaded["b"], name="b", weight=0.5)
    seen: list[torch.Tensor] = []

    def on_step(step: int, _: int) -> bool:  # the same from within: the lock is reentrant
        if step == 2:
            other.set_weights({"a": 0.1, "b": {"text_encoder": 1.5}})
        return True

    other.generate(
        GenerationRequest(prompt="a cat", steps=STEPS, seed=3),
        on_step=on_step,
        on_latents=lambda x: seen.append(x.clone()),
    )
    assert same_until(changed, seen) == STEPS


def test_fusing_and_unfusing_in_the_middle_change_nothing_but_roundings(live: LivePipeline) -> None:
    unchanged = latents_of(live)
    for at in range(1, STEPS):
        fused = latents_of(live, at, live.fuse)
        assert live.fused
        unfused = latents_of(live, at, live.unfuse)
        assert not live.fused
        for run in (fused, unfused):
            assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(run, unchanged, strict=True))
        assert same_until(unchanged, fused) >= at


def test_stopping_from_another_thread_at_every_step(live: LivePipeline) -> None:
    before = bits(live)
    for at in range(1, STEPS):
        with pytest.raises(Stopped, match=f"after step {at} of"):
            latents_of(live, at, live.stop)
    assert same_bits(live, before)
    assert len(latents_of(live)) == STEPS


def test_the_picture_remembers_the_weights_of_each_step(live: LivePipeline) -> None:
    def on_step(step: int, _: int) -> bool:
        if step == 2:
            live.set_weights({"a": 0.25})
        return True

    picture = live.generate(GenerationRequest(prompt="a cat", steps=STEPS), on_step=on_step)[0]
    assert picture.history == ((1, {"a": 0.8, "b": 0.5}), (3, {"a": 0.25, "b": 0.5}))
    assert picture.weights == {"a": 0.25, "b": 0.5}


def test_a_curve_is_the_weights_of_each_step(live: LivePipeline) -> None:
    """Against a run whose weight is set by hand before each step."""
    points = [[0, 1.0], [0.5, 0.2], [1, 0.6]]
    by_hand: list[torch.Tensor] = []
    live.set_weights({"a": {"unet": 0.8 * 1.0}})

    def on_step(step: int, steps: int) -> bool:
        progress = step / (steps - 1)
        factor = 1 - 1.6 * progress if progress <= 0.5 else 0.2 + 0.8 * (progress - 0.5)
        live.set_weights({"a": {"unet": 0.8 * factor}})
        return True

    live.generate(
        GenerationRequest(prompt="a cat", steps=5, seed=3),
        on_step=on_step,
        on_latents=lambda x: by_hand.append(x.clone()),
    )
    live.set_weights({"a": {"unet": 0.8, "curve": points}})
    curved = latents_of(live, steps=5)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(curved, by_hand, strict=True))
    live.set_weights({"a": 0.8})
    assert same_until(curved, latents_of(live, steps=5)) == 1  # the first step's factor is 1
    live.set_weights({"a": {"curve": points}})
    with pytest.raises(LoraError, match="curve"):
        live.fuse()


def test_the_conditional_half_alone(live: LivePipeline) -> None:
    """On the prompt's rows as if worn, on the others as if not."""
    live.delete("b")
    unet = live.pipeline.unet
    given = inputs(live, 4)
    with torch.no_grad():
        worn = unet(**given).sample
        live._rack.enabled = False
        bare = unet(**given).sample
        live._rack.enabled = True
        live.set_weights({"a": {"half": "conditional"}})
        live._rack.set_mixes([live._mix] * 2, guided=True)
        half = unet(**given).sample
    assert torch.allclose(half[:2], bare[:2], atol=1e-5)
    assert torch.allclose(half[2:], worn[2:], atol=1e-5)
    assert (worn - bare).abs().max() > 1e-2
    both = latents_of(live, count=2)
    live.set_weights({"a": {"half": "both"}})
    assert same_until(both, latents_of(live, count=2)) == 0
    live.set_weights({"a": {"half": "conditional"}})
    without = latents_of(live, guidance=1.0)  # no unconditional half: as if worn whole
    live.set_weights({"a": {"half": "both"}})
    assert same_until(without, latents_of(live, guidance=1.0)) == STEPS


# --- other parties -----------------------------------------------------------------------------------------


def offloaded(live: LivePipeline) -> None:
    accelerate.cpu_offload(live.models["unet"], execution_device=torch.device("cpu"))


@pytest.mark.parametrize("first", ["offload", "load"])
def test_sequential_offload(first: str) -> None:
    """Weights on the meta device between the calls: LoRA and DoRA are right, whoever comes first; fusing is refused."""
    plain, live = (LivePipeline(small_pipeline("sd1")) for _ in range(2))
    steps = [
        lambda: offloaded(live),
        lambda: live.load(random_adapter(plain, 1, variant="dora", targets=ALL), name="a"),
    ]
    for step in steps if first == "offload" else steps[::-1]:
        step()
    plain.load(random_adapter(plain, 1, variant="dora", targets=ALL), name="a")
    assert next(m for m in live.models["unet"].modules() if isinstance(m, nn.Linear)).weight.is_meta
    close({"unet": outputs(live)["unet"]}, {"unet": outputs(plain)["unet"]})
    with pytest.raises(LoraError, match="cannot be fused"):
        live.fuse()
    assert not live.fused
    close({"unet": outputs(live)["unet"]}, {"unet": outputs(plain)["unet"]})
    live.unload()
    assert not any(m._forward_hooks for m in live.models["unet"].modules())


def test_model_offload(live: LivePipeline) -> None:
    worn = outputs(live)
    _, hook = accelerate.cpu_offload_with_hook(live.models["unet"], torch.device("cpu"))
    close(outputs(live), worn)
    live.fuse()
    close(outputs(live), worn)
    hook.offload()
    live.unfuse()
    close(outputs(live), worn)
    hook.remove()


def test_fp8_layerwise_casting() -> None:
    """The factors stay in the dtype in which the layer computes, a DoRA's norm is that of the fp8 weights; fusing is
    refused."""
    live, oracle = (LivePipeline(small_pipeline("sd1")) for _ in range(2))
    adapters = {v: random_adapter(live, i, variant=v) for i, v in enumerate(("lora", "dora"))}
    for each in (live, oracle):
        each.models["unet"].enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
    bare = outputs(live)["unet"]
    for name, adapter in adapters.items():
        live.load(adapter, name=name)
    for path in adapters["lora"].deltas:  # the oracle's layers compute in fp32 from the fp8 weights
        if path.startswith("unet."):
            layer = oracle.models["unet"].get_submodule(path.removeprefix("unet."))
            weight = weight_of(layer).float()
            change = adapters["lora"].deltas[path].delta(weight) + adapters["dora"].deltas[path].delta(weight)
            layer.register_forward_hook(
                lambda _, x, out, change=change: out + nn.functional.linear(x[0], change)
            )
    worn = outputs(live)["unet"]
    close({"unet": worn}, {"unet": outputs(oracle)["unet"]})
    assert (worn - bare).abs().max() > 1e-2
    with pytest.raises(LoraError, match="cannot be fused"):
        live.fuse()
    live.unload()
    assert torch.equal(outputs(live)["unet"], bare)


def test_gradient_checkpointing(live: LivePipeline) -> None:
    """The hook runs again in the backward pass, and the gradient of the input is that of the plain call."""
    unet, given = live.models["unet"], inputs(live)
    grads = []
    for wrapped in (False, True):
        sample = given["sample"].clone().requires_grad_()
        call = {**given, "sample": sample}
        if wrapped:
            unet.enable_gradient_checkpointing()
            unet.train()
        unet(**call).sample.square().sum().backward()
        grads.append(sample.grad)
    unet.eval()
    unet.disable_gradient_checkpointing()
    assert torch.allclose(grads[0], grads[1], rtol=1e-4, atol=1e-4)
    live._rack.enabled = False
    sample = given["sample"].clone().requires_grad_()
    unet(**{**given, "sample": sample}).sample.square().sum().backward()
    live._rack.enabled = True
    assert not torch.allclose(grads[0], sample.grad, rtol=1e-2)


@pytest.fixture
def packed() -> Iterator[LivePipeline]:
    """A LoRA and a DoRA worn by an nf4 UNet and text encoder."""
    live = LivePipeline(small_pipeline("sd1"))
    adapters = [random_adapter(live, i, variant=v) for i, v in enumerate(("lora", "dora"))]
    quantise(live.models, "nf4")
    for i, adapter in enumerate(adapters):
        live.load(adapter, name="ab"[i], weight=0.8 - i / 4)
    yield live
    live.unload()


def test_nf4_is_worn_live_and_never_fused(packed: LivePipeline) -> None:
    worn = outputs(packed)
    with pytest.raises(LoraError, match="cannot be fused"):
        packed.fuse()
    plain = LivePipeline(small_pipeline("sd1"))
    for component, model in packed.models.items():
        for path, layer in model.named_modules():
            if storage_of(layer) is not None:
                with torch.no_grad():
                    weight_of(plain.models[component].get_submodule(path)).copy_(dequantised(layer))
    for name, adapter in packed.loaded.items():
        plain.load(adapter, name=name, weight=packed.weights[name])
    close(worn, outputs(plain))


def test_nf4_under_gradient_checkpointing(packed: LivePipeline) -> None:
    unet, given, grads = packed.models["unet"], inputs(packed), []
    for wrapped in (False, True):
        sample = given["sample"].clone().requires_grad_()
        if wrapped:
            unet.enable_gradient_checkpointing()
            unet.train()
        unet(**{**given, "sample": sample}).sample.square().sum().backward()
        grads.append(sample.grad)
    assert torch.allclose(grads[0], grads[1], rtol=1e-4, atol=1e-4)


def test_nf4_under_model_offload(packed: LivePipeline) -> None:
    worn = outputs(packed)
    _, hook = accelerate.cpu_offload_with_hook(packed.models["unet"], torch.device("cpu"))
    close(outputs(packed), worn)
    hook.offload()
    close(outputs(packed), worn)
    hook.remove()


def test_nf4_under_sequential_offload_is_refused(packed: LivePipeline) -> None:
    """bitsandbytes cannot compute with a weight that comes and goes by itself; whoever comes first, it is said."""
    adapter = packed.loaded["a"]
    offloaded(packed)
    for ask in (
        lambda: packed.load(adapter, name="c"),
        lambda: packed.generate(GenerationRequest(prompt="a cat", steps=1)),
    ):
        with pytest.raises(LoraError, match="quantised and offloaded layer by layer"):
            ask()
    assert sorted(packed.loaded) == ["a", "b"]


def test_fp8_under_sequential_offload() -> None:
    live, plain = (LivePipeline(small_pipeline("sd1")) for _ in range(2))
    adapter = random_adapter(live, 1, variant="dora", targets=ALL)
    for each in (live, plain):
        each.models["unet"].enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
    offloaded(live)
    for each in (live, plain):
        each.load(adapter, name="a")
    close({"unet": outputs(live)["unet"]}, {"unet": outputs(plain)["unet"]})


def test_a_compiled_unet_is_never_compiled_again_within_a_bucket() -> None:
    live = LivePipeline(small_pipeline("sd1"))
    live.arm(rank=16)
    armed = tree(live)
    counted = CompileCounter()
    torch._dynamo.reset()
    compiled: Any = torch.compile(live.models["unet"], backend=counted)
    given = inputs(live)
    with torch.no_grad():
        bare = compiled(**given).sample
        frames = counted.frame_count
        plain = LivePipeline(small_pipeline("sd1"))
        for i in range(5):
            live.load(random_adapter(plain, i), name=f"n{i}", weight=0.5)
            if i > 1:
                live.delete(f"n{i - 2}")
            plain.load(random_adapter(plain, i), name=f"n{i}", weight=0.5)
            if i > 1:
                plain.delete(f"n{i - 2}")
            close({"unet": compiled(**given).sample}, {"unet": outputs(plain)["unet"]})
        assert counted.frame_count == frames > 0
        with pytest.raises(LoraError, match="not armed"):
            live.load(random_adapter(plain, 9, targets=("conv",)), name="deaf")
        live.unload()
        assert tree(live) == armed  # the hooks stay as long as the model is armed
        close({"unet": compiled(**given).sample}, {"unet": bare})
        assert counted.frame_count == frames
    live.disarm()
    assert not any(m._forward_hooks for m in live.models["unet"].modules())
    torch._dynamo.reset()


# --- the buffers -------------------------------------------------------------------------------------------


def test_a_change_of_weight_writes_one_buffer_and_touches_no_layer(live: LivePipeline) -> None:
    rack = live._rack
    addresses = [group.buffer.data_ptr() for group in rack._groups]
    assert len(addresses) == 2  # the UNet's and the text encoder's
    kept = {p: (s.downs.data_ptr(), s.ups.data_ptr(), s.ups.clone()) for p, s in rack.layers.items()}
    live.set_weights({"a": 0.1, "b": {"blocks": {"down": 0.7}}})
    assert [group.buffer.data_ptr() for group in rack._groups] == addresses
    for path, slot in rack.layers.items():
        assert slot.weights.untyped_storage().data_ptr() in addresses
        assert kept[path][:2] == (slot.downs.data_ptr(), slot.ups.data_ptr())
        assert torch.equal(kept[path][2], slot.ups)


def test_a_new_lora_is_copied_into_its_own_slots_only(live: LivePipeline) -> None:
    kept = {p: (s.downs.data_ptr(), sum(s.ranks)) for p, s in live._rack.layers.items()}
    assert all(used + 3 <= bucket(used) for _, used in kept.values())
    live.load(random_adapter(live, 5), name="c")
    for path, (address, used) in kept.items():
        slot = live._rack.layers[path]
        assert slot.downs.data_ptr() == address
        assert sum(slot.ranks) == used + 3
    live.delete("a")
    live.delete("c")
    assert {p: len(s.downs) for p, s in live._rack.layers.items()} == dict.fromkeys(kept, 16)


@pytest.mark.parametrize(
    ("rank", "size"), [(0, 0), (1, 16), (16, 16), (17, 64), (129, 256), (257, 384), (512, 512)]
)
def test_buckets(rank: int, size: int) -> None:
    assert bucket(rank) == size


# --- where W0 is -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", ["device", "host", "checkpoint"])
def test_w0_comes_back_from_wherever_it_is(keep: Any, tmp_path: Path) -> None:
    small_pipeline("sd1").save_pretrained(tmp_path / "base")
    for dtype in (torch.float32, torch.bfloat16):
        live = LivePipeline.open(tmp_path / "base", device="cpu", dtype=dtype)
        before = bits(live)
        live._base.keep = keep
        live.load(random_adapter(live, 1, variant="dora"), name="a")
        worn = None if dtype is torch.bfloat16 else outputs(live)
        for _ in range(3):
            said = live.fuse()
            assert not live.verify_base()
            assert ("checkpoint" in said) == (keep == "checkpoint")
            assert bool(live._base._originals) == (keep != "checkpoint")
            if worn is not None:
                close(outputs(live), worn)
        live.unload()
        assert same_bits(live, before)
        assert live.verify_base()


def test_the_next_fuse_uses_the_memory_of_the_last_and_unload_gives_it_back(live: LivePipeline) -> None:
    live._base.keep = "device"
    weight = weight_of(live.models["unet"].get_submodule(next(iter(live._rack.layers)).removeprefix("unet.")))
    live.fuse()
    memory = {t.data_ptr() for t in live._base._originals}
    live.unfuse()
    with torch.no_grad():
        weight.add_(1)  # somebody else changes the base meanwhile: that is what comes back
    changed = weight.clone()
    live.fuse()
    assert {t.data_ptr() for t in live._base._originals} == memory
    assert not torch.equal(weight, changed)
    live.unfuse()
    assert torch.equal(weight, changed)
    live.unload()
    assert not live._base._room


def test_healing_copies_back_what_differs_and_nothing_else(tmp_path: Path) -> None:
    small_pipeline("sd1").save_pretrained(tmp_path / "base")
    live = LivePipeline.open(tmp_path / "base", device="cpu")
    before = bits(live)
    layer = next(m for m in live.models["unet"].modules() if isinstance(m, nn.Linear))
    with torch.no_grad():
        layer.weight.view(-1)[:5] = 7.0
    assert not live.verify_base()
    assert live.heal()
    assert same_bits(live, before)
    with pytest.raises(LoraError, match="given from memory"):
        LivePipeline(small_pipeline("sd1")).heal()


# --- live or fused -----------------------------------------------------------------------------------------


def until(true: Callable[[], object]) -> None:
    deadline = time.monotonic() + 20
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_auto_fuses_what_stands_still_and_goes_back_at_a_touch(
    live: LivePipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lora_core.live_mix.STILL_S", 0.05)
    before = outputs(live)
    live.mode = "auto"
    until(lambda: live.fused)
    with live._lock:
        close(outputs(live), before)
    live.set_weights({"a": 0.7})
    assert not live.fused
    until(lambda: live.fused)
    live.set_weights({"a": {"curve": [[0, 1], [1, 0]]}})
    until(lambda: "curve" in live.fusing_note)
    assert not live.fused
    live.set_weights({"a": 0.7})
    live.mode = "live"
    time.sleep(0.2)
    assert not live.fused


def test_auto_leaves_a_lora_live_that_rounding_would_eat(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lora_core.live_mix.STILL_S", 0.05)
    live = LivePipeline(small_pipeline("sd1", dtype=torch.bfloat16))
    live.load(random_adapter(live, 1), name="a", weight=0.001)
    live.mode = "auto"
    until(lambda: "lost to the rounding" in live.fusing_note)
    assert not live.fused
    live.set_weights({"a": 1.0})
    until(lambda: live.fused)


def test_pinned_to_fused_every_change_is_fused_again(live: LivePipeline) -> None:
    live.mode = "fused"
    live.set_weights({"a": 0.2})
    assert live.fused
    fused = outputs(live)
    live.mode = "live"
    close(outputs(live), fused)
    with pytest.raises(ConfigError, match="unknown"):
        live.mode = "frozen"  # type: ignore[assignment]


def test_pinned_to_fused_what_has_no_fused_form_is_refused_before_anything_changes(
    live: LivePipeline,
) -> None:
    live.mode = "fused"
    before = outputs(live)
    with pytest.raises(LoraError, match="curve over the steps"):
        live.set_weights({"a": {"curve": [[0, 1], [1, 0]]}})
    with pytest.raises(LoraError, match="half alone"):
        live.load(random_adapter(live, 3), name="c", weight={"half": "conditional"})
    assert (live.fused, live.weights, set(live.loaded)) == (True, {"a": 0.8, "b": 0.5}, {"a", "b"})
    now = outputs(live)
    assert all(torch.equal(now[name], before[name]) for name in before)


def test_fused_no_layer_carries_a_hook(live: LivePipeline) -> None:
    def hooks() -> int:
        return sum(len(m._forward_hooks) for model in live.models.values() for m in model.modules())

    worn, before = hooks(), outputs(live)
    assert worn > 0
    live.fuse()
    assert hooks() == 0
    live.unfuse()
    assert hooks() == worn
    now = outputs(live)
    assert all(torch.equal(now[name], before[name]) for name in before)


# --- LoRAs named in the prompt ---------------------------------------------------------------------------------


def drawn(live: LivePipeline, prompt: str, **request: Any) -> Any:
    (made,) = live.generate(GenerationRequest(prompt=prompt, steps=STEPS, seed=3, **request))
    return made


def test_a_tag_weighs_a_loaded_lora_for_this_picture_alone(live: LivePipeline) -> None:
    tagged = drawn(live, "a cat <lora:a:0.3:0.6>, blurred")
    assert live.weights == {"a": 0.8, "b": 0.5}
    assert parse_parameters(tagged.parameters)["prompt"] == "a cat, blurred"
    assert tagged.weights["a"] == {"unet": 0.6, "text_encoder": 0.3, "text_encoder_2": 0.3}
    live.set_weights({"a": {"unet": 0.6, "text_encoder": 0.3}})
    by_hand = drawn(live, "a cat, blurred")
    assert by_hand.image.tobytes() == tagged.image.tobytes()
    assert by_hand.parameters == tagged.parameters
    assert drawn(live, "a cat, blurred <lora:a:0>").image.tobytes() != tagged.image.tobytes()


def test_a_tag_for_a_lora_that_is_not_there_changes_nothing(live: LivePipeline) -> None:
    live.fuse()
    with pytest.raises(NotLoaded, match='"c"'):
        drawn(live, "a cat <lora:c:1>")
    assert live.fused


def test_a_tag_makes_a_fused_mix_live_and_pinned_ones_are_fused_again(live: LivePipeline) -> None:
    expected = drawn(live, "a cat <lora:a:0.1>").image.tobytes()
    live.fuse()
    assert drawn(live, "a cat <lora:a:0.1>").image.tobytes() == expected
    assert not live.fused
    live.mode = "fused"
    assert drawn(live, "a cat <lora:a:0.1>").image.tobytes() == expected
    assert live.fused
    with pytest.raises(LoraError, match="weights of their own"):
        latents_of(live, 1, live.fuse, prompt="a cat <lora:a:0.1>")


def test_what_the_weights_were_at_each_step_is_in_the_picture(live: LivePipeline) -> None:
    def on_step(step: int, _: int) -> bool:
        if step == 2:
            thread = threading.Thread(target=lambda: live.set_weights({"a": 0.1}))
            thread.start()
            until(lambda: live._lock._queue)
        return True

    (made,) = live.generate(GenerationRequest(prompt="a cat", steps=STEPS, seed=3), on_step=on_step)
    fields = parse_parameters(made.parameters)["fields"]
    assert json.loads(fields["Lora steps"]) == [[1, {"a": 0.8, "b": 0.5}], [3, {"a": 0.1, "b": 0.5}]]
    assert parse_parameters(made.parameters)["loras"] == {"a": 0.1, "b": 0.5}
    assert "Lora steps" not in drawn(live, "a cat").parameters


# --- figures -----------------------------------------------------------------------------------------------


def test_normalised_no_block_is_above_the_limit_and_the_others_are_as_they_were(live: LivePipeline) -> None:
    before = live.strengths()
    limit = sorted(before.values())[len(before) // 2]
    assert "Brought down" in live.normalise(limit)
    for block, figure in live.strengths().items():
        assert figure == pytest.approx(min(before[block], limit), rel=1e-3), block
    assert "No block" in live.normalise(limit)
    live.fuse()
    with pytest.raises(LoraError, match="Unfuse first"):
        live.strengths()
    with pytest.raises(LoraError, match="fused"):
        live.overlaps()


def test_a_mix_with_a_curve_is_as_strong_as_at_its_strongest_step(live: LivePipeline) -> None:
    """Against the same weights held still: a LoRA that fades in is not weak because it begins at 0."""
    live.set_weights({"a": {"curve": [[0, 0], [0.5, 2], [1, 1]]}, "b": {"curve": [[0.2, 1], [1, 0]]}})
    curved = live.strengths()
    limit = max(curved.values()) / 2
    full = {}
    for at in (0, 0.2, 0.5, 1):
        factors = {"a": 0.8 * 4 * at if at <= 0.5 else 0.8, "b": 0.5 * min(1.0, (1 - at) / 0.8)}
        live.set_weights({name: {"unet": w, "curve": []} for name, w in factors.items()})
        for block, figure in live.strengths().items():
            full[block] = max(full.get(block, 0.0), figure)
    assert curved == pytest.approx(full, rel=1e-5)
    live.set_weights({"a": {"unet": 0.8, "curve": [[0, 0], [0.5, 2], [1, 1]]}})
    live.set_weights({"b": {"unet": 0.5, "curve": [[0.2, 1], [1, 0]]}})
    live.normalise(limit)
    assert max(live.strengths().values()) == pytest.approx(limit, rel=1e-3)


def test_a_lora_overlaps_itself_wholly(live: LivePipeline) -> None:
    live.load(random_adapter(live, 1), name="again")
    cosines = live.overlaps()
    assert cosines["a", "again"] == pytest.approx(1.0, abs=1e-5)
    assert abs(cosines["a", "b"]) < 0.9


# --- wrong use ---------------------------------------------------------------------------------------------


def test_a_mix_per_picture_and_fused_weights_exclude_each_other(live: LivePipeline) -> None:
    live.fuse()
    with pytest.raises(LoraError, match="Unfuse first"):
        live.generate(GenerationRequest(prompt="a cat", steps=2, mixes=[{"a": 0.0}, {"a": 1.0}]))
    live.unfuse()
    with pytest.raises(LoraError, match="weights of their own"):
        latents_of(live, 1, live.fuse, mixes=[{"a": 0.0}, {"a": 1.0}])
    with pytest.raises(ConfigError, match=r"down\.9.*Known: down, down\.0"):
        live.set_weights({"a": {"blocks": {"down.9": 1.0}}})
    assert live.weights == {"a": 0.8, "b": 0.5}


def test_all_off_is_the_base_over_every_other_weight_and_can_be_taken_back(live: LivePipeline) -> None:
    request = GenerationRequest(prompt="a cat <lora:a:1.5>", steps=2, mixes=({"a": 1.0}, {"b": 2.0}))
    worn = [p.image.tobytes() for p in live.generate(request)]
    bare = LivePipeline(small_pipeline("sd1"))
    base = [
        p.image.tobytes() for p in bare.generate(GenerationRequest(prompt="a cat", steps=2, mixes=({}, {})))
    ]
    weights = live.weights
    live.fuse()
    live.bypassed = True
    assert not live.fused
    off = live.generate(request)
    assert [p.image.tobytes() for p in off] == base != worn
    assert all(p.weights == {"a": 0.0, "b": 0.0} for p in off)
    with pytest.raises(LoraError, match="Switch them on"):
        live.fuse()
    live.mode = "fused"  # which waits until they are on
    assert not live.fused
    live.bypassed = False
    assert live.fused
    live.mode = "live"
    assert live.weights == weights
    assert [p.image.tobytes() for p in live.generate(request)] == worn


def test_all_off_acts_at_the_next_step(live: LivePipeline) -> None:
    unchanged = latents_of(live)
    assert same_until(unchanged, latents_of(live, 2, lambda: setattr(live, "bypassed", True))) == 2


def test_a_failed_load_leaves_everything_as_it_was(
    live: LivePipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Out of memory at any point, with a new name and with one that is worn."""
    before, trunk, mix = outputs(live), tree(live), live.weights
    for name in ("a", "new"):
        for allowed in (0, 1, 40, 200):
            left = [allowed]
            real = torch.empty

            def short(*shape: Any, left: Any = left, real: Any = real, **options: Any) -> torch.Tensor:
                left[0] -= 1
                if left[0] < 0:
                    raise torch.OutOfMemoryError("no memory left, for this test")
                return real(*shape, **options)

            fresh = random_adapter(live, 7, targets=ALL)
            with monkeypatch.context() as patched:
                patched.setattr("lora_core.layer_rack.torch.empty", short)
                with pytest.raises(torch.OutOfMemoryError):
                    live.load(fresh, name=name)
            assert live.weights == mix
            assert tree(live) == trunk
            assert all(torch.equal(before[k], v) for k, v in outputs(live).items())


def test_a_mix_per_picture_with_every_kind_of_variant() -> None:
    live, oracle = LivePipeline(small_pipeline("sd1")), None
    a, b = random_adapter(live, 1, targets=ALL), random_adapter(live, 2, variant="dora", targets=ALL)
    live.load(a, name="a")
    live.load(b, name="b")
    weights = [{"a": 0.0, "b": 1.0}, {"a": 0.7, "b": -0.2}]
    live._rack.set_mixes([live._changed(w, only=False) for w in weights])
    together = outputs(live, batch=2)
    for i, mine in enumerate(weights):
        oracle = LivePipeline(small_pipeline("sd1"))
        dense(oracle, {"a": (a, mine["a"]), "b": (b, mine["b"])})
        alone = outputs(oracle, batch=2)
        for key in alone:
            error = (together[key][i] - alone[key][i]).abs().max() / alone[key].abs().max()
            assert error < 1e-4, key
    live.unload()
