"""The rows that need whole models: loading, weighing, undoing, fusing, one UNet call, a contact sheet."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import swap_models
from benchmarks.measure import Row, alternating, compared, extra, interleaved, median_seconds
from lora_core import GenerationRequest, LivePipeline

WEIGHTS = {"a": 0.8, "b": 0.5, "c": 0.3}
OTHER_WEIGHTS = {"a": 0.2, "b": -0.4, "c": 0.9}


class Wrong(RuntimeError):
    """What was measured is not what it claims to be: figures of it would mean nothing."""


@dataclass(frozen=True)
class Setting:
    """size is one of swap_models.SIZES; swaps: rounds of the row of that name; folder: for LoRA files."""

    size: str
    dtype: torch.dtype
    repeats: int
    swaps: int
    folder: Path

    def lora(self, pipe: Any, name: str, *, rank: int) -> Path:
        """Written once per kind of base, rank and name."""
        kind = f"{type(pipe).__name__}-{sum(p.numel() for p in pipe.unet.parameters())}-{rank}-{name}"
        path = self.folder / f"{kind}.safetensors"
        return path if path.exists() else swap_models.write_lora(pipe, path, rank=rank, seed=ord(name[0]))

    @cached_property
    def sides(self) -> Sides:
        """Built for the first row that asks, and checked: a LoRA must do the same to both."""
        sides = Sides(self)
        sides.check()
        return sides


class Sides:
    """One base; three trees of modules over it: bare, ours, the peer's. A row leaves them without LoRAs."""

    def __init__(self, setting: Setting) -> None:
        self.bare = swap_models.base(setting.size, setting.dtype)
        self.ours = LivePipeline(swap_models.twin(self.bare))
        self.peer = swap_models.twin(self.bare)
        rank = swap_models.RANK[setting.size]
        self.files = {name: setting.lora(self.bare, name, rank=rank) for name in WEIGHTS}

    @property
    def components(self) -> list[str]:
        return list(swap_models.components(self.peer))

    def load(self, names: Sequence[str]) -> None:
        for name in names:
            self.ours.load(self.files[name], name=name, weight=WEIGHTS[name])

    def load_peer(self, names: Sequence[str], among: Sequence[str] = ()) -> None:
        """After loading, only the newest LoRA is on: `set_adapters` belongs to getting several ready."""
        for name in names:
            self.peer.load_lora_weights(self.files[name], adapter_name=name)
        active = list(among or names)
        self.weigh_peer({name: WEIGHTS[name] for name in active})

    def weigh_peer(self, weights: dict[str, float]) -> None:
        self.peer.set_adapters(list(weights), adapter_weights=list(weights.values()))

    def clear(self) -> None:
        self.ours.unload()
        self.peer.unload_lora_weights()

    def check(self) -> None:
        before = swap_models.answers(self.bare)
        self.load("a")
        self.load_peer("a")
        worn, theirs = swap_models.answers(self.ours.pipeline), swap_models.answers(self.peer)
        for model, plain in before.items():
            change = _norm(worn[model] - plain)
            if not (torch.isfinite(plain).all() and change > 0.01 * _norm(plain)):
                raise Wrong(f"{model}: a LoRA changed its output by {change:.3g} of {_norm(plain):.3g}")
            apart = _norm(worn[model] - theirs[model])
            if (
                not apart < 0.25 * change
            ):  # bf16 sums in two orders; a wrong alpha is at least half the change
                raise Wrong(f"{model}: the sides are {apart:.3g} apart where the LoRA changed {change:.3g}")
        self.clear()
        for model, after in swap_models.answers(self.ours.pipeline).items():
            if not torch.equal(after, before[model]):
                raise Wrong(f"{model} answers differently after unload")


def load(setting: Setting) -> Iterator[Row]:
    s, file = setting.sides, setting.sides.files["a"]
    ours = median_seconds(lambda: s.load("a"), setting.repeats, after=s.ours.unload)

    def load_peer() -> None:
        s.peer.load_lora_weights(file, adapter_name="a")  # on at weight 1 without a set_adapters

    peer = median_seconds(load_peer, setting.repeats, after=s.peer.unload_lora_weights)
    layers = sum(1 for _ in swap_models.targets(s.bare))
    note = f"{file.stat().st_size / 1e6:.1f} MB, {layers} layers, file in the page cache"
    yield compared(
        "load", "load a kohya LoRA, ready", ours, peer, repeats=setting.repeats, at_most=0.2, note=note
    )


def third(setting: Setting) -> Iterator[Row]:
    s = setting.sides
    s.load("ab")
    s.load_peer("ab")
    ours = median_seconds(lambda: s.load("c"), setting.repeats, after=lambda: s.ours.delete("c"))
    peer = median_seconds(
        lambda: s.load_peer("c", "abc"), setting.repeats, after=lambda: s.peer.delete_adapters("c")
    )
    s.clear()
    note = "peer: with the set_adapters that puts all three on"
    yield compared(
        "third", "load the third LoRA, ready", ours, peer, repeats=setting.repeats, at_most=0.1, note=note
    )


def weights(setting: Setting) -> Iterator[Row]:
    """Each call changes every weight, so that a side which notices that nothing changed gains nothing."""
    s = setting.sides
    s.load("abc")
    s.load_peer("abc")
    ours_next, peer_next = (itertools.cycle((OTHER_WEIGHTS, WEIGHTS)) for _ in range(2))
    count = max(setting.repeats, 5)
    ours = median_seconds(lambda: s.ours.set_weights(next(ours_next)), count)
    peer = median_seconds(lambda: s.weigh_peer(next(peer_next)), count)
    s.ours.set_weights(WEIGHTS)
    one = swap_models.answers(s.ours.pipeline)["unet"]
    s.ours.set_weights(OTHER_WEIGHTS)
    if torch.equal(one, swap_models.answers(s.ours.pipeline)["unet"]):
        raise Wrong("the call after set_weights did not see the new weights")
    s.clear()
    yield compared("weights", "new weights for 3 LoRAs", ours, peer, repeats=count, at_most=0.05)


def unload(setting: Setting) -> Iterator[Row]:
    s = setting.sides
    s.load("abc")
    ours = median_seconds(s.ours.unload, setting.repeats, after=lambda: s.load("abc"))
    s.load_peer("abc")
    peer = median_seconds(s.peer.unload_lora_weights, setting.repeats, after=lambda: s.load_peer("abc"))
    s.clear()
    verify(s.ours)
    yield compared("unload", "unload all of 3", ours, peer, repeats=setting.repeats, at_most=0.1)


@torch.no_grad()
def fuse(setting: Setting) -> Iterator[Row]:
    """One side after the other: both write into the same base."""
    s, n = setting.sides, setting.repeats
    s.load("a")
    fuse_ours, unfuse_ours = alternating(s.ours.fuse, s.ours.unfuse, n)
    verify(s.ours)
    s.ours.unload()

    originals = [(layer.weight, layer.weight.clone()) for _, _, layer in swap_models.targets(s.bare)]
    s.load_peer("a")

    def fuse_peer() -> None:
        s.peer.fuse_lora(components=s.components)

    def unfuse_peer() -> None:
        s.peer.unfuse_lora(components=s.components)

    fuse_peer()
    if all(torch.equal(now, then) for now, then in originals):
        raise Wrong("the peer's fuse_lora wrote nothing")
    unfuse_peer()
    changed = sum(int((now != then).sum()) for now, then in originals)
    total = sum(then.numel() for _, then in originals)
    fused, unfused = alternating(fuse_peer, unfuse_peer, n)
    s.clear()
    for now, then in originals:
        now.copy_(then)
    verify(s.ours)
    drift = f"base after one cycle: ours bit for bit, peer {changed:,} of {total:,} elements differ"
    what = f"1 LoRA of rank {swap_models.RANK[setting.size]}"
    yield compared("fuse", f"fuse {what}", fuse_ours, fused, repeats=n, at_most=0.5)
    yield compared("fuse", f"unfuse {what}", unfuse_ours, unfused, repeats=n, at_most=0.4, note=drift)


@torch.no_grad()
def forward(setting: Setting) -> Iterator[Row]:
    s, n = setting.sides, setting.repeats
    given = swap_models.unet_inputs(s.bare)
    s.load("abc")
    s.load_peer("abc")

    def call(pipe: Any) -> Callable[[], object]:
        return lambda: pipe.unet(**given)

    calls = {"bare": call(s.bare), "ours": call(s.ours.pipeline), "peer": call(s.peer)}
    times = interleaved(calls, n)
    side = given["sample"].shape[-1]
    bare = f"bare {statistics.median(times['bare']) * 1e3:.4g} ms; batch 2, {side}×{side} latents"
    what = "UNet call with 3 LoRAs: extra over bare"
    yield compared(
        "forward",
        what,
        extra(times, "ours", "bare"),
        extra(times, "peer", "bare"),
        repeats=n,
        at_most=0.5,
        note=bare,
    )
    s.ours.fuse()
    times = interleaved({"bare": call(s.bare), "fused": call(s.ours.pipeline)}, n)
    hooks = hooks_left(s.ours)
    s.clear()
    what, ours = "the same, fused: extra over bare", extra(times, "fused", "bare") * 1e3
    note = f"{hooks} hooks left to fire"
    yield Row("forward", what, ours, None, "ms", "0 hooks", hooks == 0, n, note)


def sheet(setting: Setting) -> Iterator[Row]:
    """Ours alone: the second column is the same eight pictures, asked for one by one."""
    if setting.size == "tiny":
        yield _sheet(setting, setting.sides.ours, "tiny", side=64, steps=1)
        return
    demo = LivePipeline.open("demo", device="cpu", dtype=torch.float32)
    yield _sheet(setting, demo, "demo base, fp32", side=demo.resolution, steps=8)
    if setting.size == "sd15":
        yield _sheet(setting, setting.sides.ours, "sd15", side=256, steps=2)


def _sheet(setting: Setting, live: LivePipeline, title: str, *, side: int, steps: int) -> Row:
    for name in "ab":
        live.load(setting.lora(live.pipeline, name, rank=swap_models.RANK[setting.size]), name=name)
    mixes: list[dict[str, Any]] = [{"a": i / 7, "b": 1 - i / 7} for i in range(8)]
    common: dict[str, Any] = {
        "prompt": "a cat on a mat",
        "seed": 3,
        "steps": steps,
        "width": side,
        "height": side,
    }
    pictures: list[Any] = []

    def together() -> None:
        pictures[:] = live.generate(GenerationRequest(**common, mixes=tuple(mixes)))

    def one_by_one() -> None:
        for mix in mixes:
            live.set_weights(mix)
            live.generate(GenerationRequest(**common))

    n = min(setting.repeats, 3)
    times = interleaved({"sheet": together, "separate": one_by_one}, n)
    live.unload()
    if len({picture.image.tobytes() for picture in pictures}) < 2:
        raise Wrong(f"{title}: eight mixes gave one picture")
    row = compared(
        "sheet",
        f"8 mixes in one request, {title}",
        statistics.median(times["sheet"]),
        statistics.median(times["separate"]),
        repeats=n,
        note=f"second figure: ours, 8 separate runs; {side}×{side} pixels, {steps} steps",
    )
    met = None if row.ratio is None else row.ratio <= 0.8
    return Row(row.name, row.what, row.ours, row.peer, "ms", "≤ 0.8 × separate", met, n, row.note)


def verify(live: LivePipeline) -> None:
    report = live.verify_base()
    if not report:
        raise Wrong(str(report))


def hooks_left(live: LivePipeline) -> int:
    """Whatever makes a call of one of the models do more than the module's own forward."""
    modules = [m for model in live.models.values() for m in model.modules()]
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + ("forward" in vars(m)) for m in modules)


def _norm(tensor: Tensor) -> float:
    return float(tensor.norm())
