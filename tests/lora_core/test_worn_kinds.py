"""Every kind together on one model: live = fused = dense, per picture too."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lora_core import Adapter, LivePipeline
from lora_core.adapter import weight_of
from lora_core.config import LoraConfig
from lora_core.deltas import Delta
from lora_core.deltas.hadamard import Hadamard
from lora_core.deltas.kronecker import Kronecker
from lora_core.deltas.magnitude import WithMagnitude
from lora_core.targets import GROUPS, find_targets
from lora_core.terms import Dense, Kron
from lora_core.worn import wear
from tests.lora_core.test_pipeline import ALL, bits, close, dense, outputs, random_adapter, same_bits
from tests.small_models import small_pipeline


def layers_of(live: LivePipeline) -> dict[str, Any]:
    # not proj_in: at these narrow widths it is what tells SD 1.x from SD 2.x, and flat factors look like a Linear's
    groups = tuple(group for group in GROUPS if group != "projection")
    found = find_targets(live.models["unet"], LoraConfig(targets=groups))
    return {f"unet.{path}": layer for path, layer in found}


def loha(shape: torch.Size, g: torch.Generator, rank: int = 2) -> Hadamard:
    """Factors flat, as LyCORIS stores a convolution without a core."""
    out, inn = shape[0], shape[1:].numel()
    make = [torch.randn(n, m, generator=g) / rank**0.5 for n, m in ((out, rank), (rank, inn)) * 2]
    return Hadamard(*make, alpha=0.05 * rank)


def lokr(shape: torch.Size, g: torch.Generator, whole: bool) -> Kronecker:
    out1 = in1 = 2
    out2, in2 = shape[0] // out1, shape[1] // in1
    w1 = torch.randn(out1, in1, generator=g)
    if whole:
        return Kronecker((0.1 * w1,), (torch.randn(out2, in2, *shape[2:], generator=g) * 0.1,), 1.0)
    tail = shape[2:].numel()
    b, a = torch.randn(out2, 3, generator=g), torch.randn(3, in2 * tail, generator=g)
    return Kronecker((w1,), (b, a), 0.1)


def adapter_of(live: LivePipeline, kind: str, seed: int) -> Adapter:
    g = torch.Generator().manual_seed(seed)
    deltas: dict[str, Delta] = {}
    for i, (path, layer) in enumerate(layers_of(live).items()):
        shape = weight_of(layer).shape
        if kind == "loha":
            deltas[path] = loha(shape, g)
        elif all(n % 2 == 0 for n in shape[:2]):
            deltas[path] = lokr(shape, g, whole=i % 2 == 0)
        if path in deltas and i % 5 == 0:  # a magnitude around some of them
            norm = weight_of(layer).detach().flatten(1).norm(dim=1).reshape(-1, *[1] * (len(shape) - 1))
            deltas[path] = WithMagnitude(deltas[path], norm * 1.2)
    return Adapter(deltas)


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_all_kinds_together(family: str) -> None:
    live, oracle = LivePipeline(small_pipeline(family)), LivePipeline(small_pipeline(family))
    worn = {
        "lora": (random_adapter(live, 1, targets=ALL), 0.7),
        "dora": (random_adapter(live, 2, variant="dora", targets=ALL), 0.4),
        "loha": (adapter_of(live, "loha", 3), 0.6),
        "lokr": (adapter_of(live, "lokr", 4), -0.5),
    }
    before, bare = bits(live), outputs(live)
    for name in worn:
        oracle = LivePipeline(small_pipeline(family))
        dense(oracle, {name: worn[name]})
        live.load(worn[name][0], name=name, weight=worn[name][1])
        close(outputs(live), outputs(oracle))
        assert (outputs(live)["unet"] - bare["unet"]).abs().max() > 1e-3
        live.unload()
    oracle = LivePipeline(small_pipeline(family))
    dense(oracle, worn)
    for name in ("lokr", "dora", "loha", "lora"):
        live.load(worn[name][0], name=name, weight=worn[name][1])
    together = outputs(live)
    close(together, outputs(oracle))
    live.fuse()
    close(outputs(live), together)
    live.unload()
    assert same_bits(live, before)


def test_forms_are_the_small_ones() -> None:
    """LoHa as factors where that is smaller, LoKr by reshape, and only what has no form as a dense change."""
    live = LivePipeline(small_pipeline("sd1"))
    path, layer = next((p, m) for p, m in layers_of(live).items() if p.endswith("ff.net.0.proj"))
    shape, g = weight_of(layer).shape, torch.Generator().manual_seed(0)
    small = wear("a", loha(shape, g), layer, path)
    assert (small.rank, small.extras) == (4, ())
    big = wear("a", loha(shape, g, rank=min(shape)), layer, path)
    assert big.rank == 0
    assert isinstance(big.extras[0], Dense)
    assert isinstance(wear("a", lokr(shape, g, whole=True), layer, path).extras[0], Kron)
