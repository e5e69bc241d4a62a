"""One LoRA to another rank, and every kind as a plain LoRA.

    resize(ink, energy=0.95)
    to_plain(dora, rank=64, layers=layers_of("sd15.safetensors"))

What was lost to a lower rank is said in the metadata (`LOST`), as a share of |ΔW|.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import nn

from lora_core.adapter import Adapter
from lora_core.changes import as_change, as_low_rank, is_of_norm, nearest, of_weight, with_weight
from lora_core.deltas import Delta
from lora_core.deltas.low_rank import LowRank
from lora_core.formats.metadata import HASHES, NAMES, parent
from lora_core.lower_rank import LOST, Lost, check_rank, held
from lora_core.progress import steps

FROM = "lora_loom.resized"  # metadata: JSON, what was asked for, and "of": name and hash of the LoRA


@torch.no_grad()
def resize(
    adapter: Adapter,
    *,
    rank: int | None = None,
    energy: float | None = None,
    clamp: float | None = None,
    layers: Mapping[str, nn.Module] | None = None,
) -> Adapter:
    """The best LoRA of this rank, or of the smallest rank per layer that keeps this share (0..1) of |ΔW|².

    What has factors never gets a higher rank than before. Norms and biases stay as they are. A DoRA, and what else
    depends on the base, needs `layers`, and `clamp` holds entries within a quantile of them, both as in `combine`.
    The result is not called what `adapter` is: what it was made of is told in the metadata (`FROM`).
    """
    check_rank(rank, energy, clamp)
    sums = Lost()
    deltas: dict[str, Delta] = {}
    for path in steps(adapter.deltas, "layers"):
        layer = (layers or {}).get(path)
        whole = as_change(path, adapter.deltas[path], layer)
        delta = of_weight(whole)
        if delta is None or is_of_norm(delta):
            deltas[path] = whole
            continue
        parts = [(delta, 1.0)]
        down, up, square, gone = nearest(path, parts, layer, rank=rank, energy=energy)
        sums.add(square, gone)
        low = as_low_rank(*held(down, up, clamp, sums), parts, layer)
        deltas[path] = with_weight(whole, low)
    asked = {"rank": rank, "energy": energy, "clamp": clamp}
    given = {name: value for name, value in asked.items() if value is not None}
    # hashes are of other tensors
    facts = {k: v for k, v in adapter.metadata.items() if k not in (*HASHES, *NAMES)}
    made_of = json.dumps({**given, "of": [parent(adapter, 1.0)]})
    return replace(adapter, deltas=deltas, metadata={**facts, FROM: made_of, LOST: f"{sums.share:.6f}"})


def to_plain(
    adapter: Adapter,
    *,
    rank: int | None = None,
    energy: float | None = None,
    layers: Mapping[str, nn.Module] | None = None,
) -> Adapter:
    """Every change of a weight as a plain LoRA, for programs that know no other kind: what is none becomes the nearest
    of that rank, as in `resize`, and what is one stays as it is. It is the same LoRA and keeps its name. `LOST` is the
    share of the layers that were none."""
    own = {path: as_change(path, d, (layers or {}).get(path)) for path, d in adapter.deltas.items()}
    others = {path: delta for path, delta in own.items() if not isinstance(of_weight(delta), LowRank)}
    made = resize(replace(adapter, deltas=others), rank=rank, energy=energy, layers=layers)
    names = {key: adapter.metadata[key] for key in NAMES if key in adapter.metadata}
    deltas = {path: made.deltas.get(path, delta) for path, delta in own.items()}
    return replace(made, deltas=deltas, metadata={**made.metadata, **names})
