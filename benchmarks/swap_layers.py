"""The rows that a small model shows as well as a large one: one layer's operations and overhead, compiled graphs, and
what many swaps leave behind."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import psutil
import torch
from torch import nn
from torch._dynamo.utils import counters

from benchmarks import swap_models
from benchmarks.measure import Row, compared, extra, interleaved, operations
from benchmarks.swap_rows import Setting, Wrong, hooks_left, verify
from lora_core import LivePipeline

LAYER = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"  # 32 -> 32 in the tiny model, no bias
RANK = 4
CALLS = 200  # of a layer, timed as one
FLAT = 10.0  # MB of growth that pass for none: allocators keep what they once had


class Layers:
    """The same tiny layer three times over the same weight: bare, in our pipeline, in the peer's."""

    def __init__(self, setting: Setting, dtype: torch.dtype) -> None:
        self.setting = setting
        self.bare = swap_models.base("tiny", dtype)
        self.live, self.peer = LivePipeline(swap_models.twin(self.bare)), swap_models.twin(self.bare)

    def calls(self, x: torch.Tensor, count: int) -> dict[str, Callable[[], torch.Tensor]]:
        """The layer's call on each side, with the first `count` LoRAs; a smaller count comes first."""
        names = list("abcde"[:count])
        for name in names[len(self.live.loaded) :]:
            file = self.setting.lora(self.bare, name, rank=RANK)
            self.live.load(file, name=name, weight=0.5)
            self.peer.load_lora_weights(file, adapter_name=name)
        self.peer.set_adapters(names, adapter_weights=[0.5] * count)

        def call(pipe: Any) -> Callable[[], torch.Tensor]:
            layer: nn.Module = pipe.unet.get_submodule(LAYER)
            return lambda: layer(x)

        pipes = {"bare": self.bare, "ours": self.live.pipeline, "peer": self.peer}
        found = {name: call(pipe) for name, pipe in pipes.items()}
        plain, ours, peer = (found[name]().float() for name in ("bare", "ours", "peer"))
        change = float((ours - plain).norm())
        if not change > 0.01 * float(plain.norm()) or float((ours - peer).norm()) > 0.1 * change:
            raise Wrong("the two sides' layers do not compute the same")
        return found


@torch.no_grad()
def operation_counts(setting: Setting) -> Iterator[Row]:
    x = torch.randn(2, 32, generator=torch.Generator().manual_seed(0)).to(setting.dtype)
    sides = Layers(setting, setting.dtype)
    for count in (1, 2, 3, 5):
        layers = sides.calls(x, count)
        bare, ours, peer = (operations(layers[name]) for name in ("bare", "ours", "peer"))
        own, theirs = ours.kernels - bare.kernels, peer.kernels - bare.kernels
        note = f"views counted and the base's own: {ours.all} and {peer.all}, the bare layer {bare.all}"
        what = f"ATen operations added to a Linear call (no mere views), {count} LoRA{'s' * (count > 1)}"
        yield Row("operations", what, float(own), float(theirs), "", "ours ≤ 4", own <= 4, note=note)


@torch.no_grad()
def overhead(setting: Setting) -> Iterator[Row]:
    """fp32: bf16 kernels of so small a matrix cost more than calling them, which is what this is about."""
    x = torch.randn(1, 32, generator=torch.Generator().manual_seed(0))
    layers = Layers(setting, torch.float32).calls(x, 3)

    def many(call: Callable[[], torch.Tensor]) -> Callable[[], object]:
        def run() -> None:
            for _ in range(CALLS):
                call()

        return run

    n = max(setting.repeats, 5)
    times = interleaved({name: many(call) for name, call in layers.items()}, n)
    bare = statistics.median(times["bare"])
    ours, peer = extra(times, "ours", "bare") / bare, extra(times, "peer", "bare") / bare
    note = f"bare {bare / CALLS * 1e6:.2f} µs; 32→32, batch 1, rank {RANK}, fp32, {CALLS} calls at a time"
    yield Row(
        "overhead",
        "extra of a small layer's call, 3 LoRAs",
        ours,
        peer,
        "× bare",
        "ours ≤ 3",
        ours <= 3,
        n,
        note,
    )


def recompilations(setting: Setting) -> Iterator[Row]:
    """Counted with the compiler's front end alone: recompiling is its decision, the back end would only add minutes."""
    what = "recompilations over 5 swaps within a rank"
    bare = swap_models.base("tiny")
    live, uncompiled = (LivePipeline(swap_models.twin(bare)) for _ in range(2))
    files = [setting.lora(bare, name, rank=RANK) for name in "abcdef"]
    live.load(files[0], name="swap0")
    live.arm(2 * RANK)  # two are worn between a load and a delete
    live.pipeline.unet.compile(backend="eager")
    given, stats = swap_models.unet_inputs(bare), counters["stats"]
    with torch.no_grad():
        live.pipeline.unet(**given)
        before, last = stats["unique_graphs"], bare.unet(**given).sample
        for i, file in enumerate(files[1:], 1):
            live.load(file, name=f"swap{i}")
            live.delete(f"swap{i - 1}")
            uncompiled.unload()
            uncompiled.load(file, name="same")
            now, expected = (side.pipeline.unet(**given).sample for side in (live, uncompiled))
            # a graph that kept the first LoRA's tensors would need no recompiling either
            if not float((now - expected).norm()) < 0.25 * float((expected - last).norm()):
                raise Wrong(f"the compiled UNet did not follow swap {i}")
            last = expected
    count = stats["unique_graphs"] - before
    note = "" if before else "no graph was compiled at all: nothing was measured"
    yield Row("recompilations", what, float(count), None, "", "0", count == 0 if before else None, note=note)


def swaps(setting: Setting) -> Iterator[Row]:
    """Loads 5 LoRAs and deletes them, over and over, on a small base: leaks grow with the count, not the size."""
    title = "tiny" if setting.size == "tiny" else "demo base"
    live = (
        LivePipeline(swap_models.base("tiny")) if title == "tiny" else LivePipeline.open("demo", device="cpu")
    )
    files = {name: setting.lora(live.pipeline, name, rank=RANK) for name in "abcde"}
    peer = swap_models.twin(live.pipeline)

    def ours_once() -> None:
        for name, file in files.items():
            live.load(file, name=name, weight=0.5)
        for name in files:
            live.delete(name)

    def peer_once() -> None:
        for name, file in files.items():
            peer.load_lora_weights(file, adapter_name=name)
        peer.set_adapters(list(files), adapter_weights=[0.5] * len(files))
        for name in files:
            peer.delete_adapters(name)

    def shape() -> tuple[int, int]:
        return sum(1 for model in live.models.values() for _ in model.modules()), hooks_left(live)

    fresh = shape()
    grown, each = _soak(ours_once, setting.swaps)
    if shape() != fresh:
        raise Wrong(f"modules and hooks before and after: {fresh}, {shape()}")
    verify(live)
    peer_rounds = max(1, min(setting.swaps // 20, 25))  # it is that much slower
    peer_grown, peer_each = _soak(peer_once, peer_rounds)
    what, n = f"{setting.swaps} swaps of 5 LoRAs, {title}", setting.swaps
    note = f"{fresh[0]} modules before and after, base bit for bit; peer: {peer_grown:.1f} MB in {peer_rounds} swaps"
    yield Row(
        "swaps", f"{what}: growth of memory", grown, None, "MB", f"≤ {FLAT:g} MB", grown <= FLAT, n, note
    )
    note = "load 5, delete 5; the mean"
    yield compared("swaps", f"{what}: one swap", each, peer_each, repeats=n, note=note)


def _soak(once: Callable[[], None], rounds: int) -> tuple[float, float]:
    """-> MB by which resident memory grew over `rounds`, after a warm-up of a tenth; mean seconds of a round."""
    process: Any = psutil.Process()
    for _ in range(max(1, rounds // 10)):
        once()
    gc.collect()
    before, start = process.memory_info().rss, time.perf_counter()
    for _ in range(rounds):
        once()
    taken = time.perf_counter() - start
    gc.collect()
    return (process.memory_info().rss - before) / 1e6, taken / rounds
