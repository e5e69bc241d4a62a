"""Pristine base weights: fuse from them, restore to them, prove it.

W_f = round(fp32(W0) + sum w ΔW), always from the untouched W0, in place, one rounding; unfuse copies W0 back.
(Adding and subtracting drifts: after 200 cycles 88 % of bf16 elements differ.)
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import psutil
import torch
from torch import Tensor, nn

from lora_core import algebra, quantised
from lora_core.adapter import weight_of
from lora_core.deltas import Delta
from lora_core.errors import LoraError
from lora_core.storages import storage_of
from lora_core.worn import Worn, wear


@dataclass(frozen=True)
class BaseReport:
    """`equal` of `total` tensors are bit-identical to the reference; `changed` names the others."""

    equal: int
    total: int
    changed: tuple[str, ...]
    against: str  # "the checkpoint" (quantised layers: what quantising it again gives) or "the model as it was given"

    def __bool__(self) -> bool:
        return self.equal == self.total and self.total > 0

    def __str__(self) -> str:
        verdict = "base verified" if self else f"base CHANGED ({', '.join(self.changed[:3])}...)"
        return f"{verdict}: {self.equal}/{self.total} tensors equal {self.against}"


Keep = Literal["auto", "device", "host", "checkpoint"]
_WHERE = {
    "device": "kept where the model is",
    "host": "kept in main memory",
    "checkpoint": "read again from the checkpoint",
}
# elements of a layer summed in fp32 at a time, 16 MB: fewer calls than with less, and faster
CHUNK = 2**22
SAMPLED = 8  # layers that `lost` looks at
Reference = Callable[[], Iterator[tuple[str, str, Tensor]]]  # component, parameter name, tensor


class BaseWeights:
    """Keeps W0 of fused layers; everything else of the base is never written to.

    `keep` says where: "auto" (the first of these that leaves a quarter of the memory free), "device", "host", or
    "checkpoint" (nowhere: it is read again).
    """

    def __init__(self, models: Mapping[str, nn.Module], checkpoint: Reference | None = None) -> None:
        self.models = dict(models)
        self.keep: Keep = "auto"
        self.kept: Keep | None = None  # while fused: where W0 is
        self.fused = False
        self._layers: dict[str, nn.Module] = {}  # the fused ones, by adapter path
        self._originals: dict[str, Tensor] = {}  # their W0, unless it is in the checkpoint alone
        self._checkpoint = checkpoint
        # a model that came from no file is compared with what it was when it was given
        self._digests = {} if checkpoint else self._digests_now()

    @torch.no_grad()
    def fuse(
        self, layers: Mapping[str, nn.Module], changes: Mapping[str, Sequence[tuple[float, Delta]]]
    ) -> str:
        """Write W0 + sum w ΔW into each layer of `changes` -> a sentence about it. What was fused is restored first.

        Raises LoraError, before anything is written, for a layer that cannot be fused. On any later error every
        layer is restored.
        """
        self.restore()
        for path in changes:
            refuse_unfusable(path, weight_of(layers[path]))
        self.kept = self._place([weight_of(layers[path]) for path in changes])
        try:
            for path, weighted in changes.items():
                layer, weight = layers[path], weight_of(layers[path])
                w0 = weight.detach().clone()
                if self.kept != "checkpoint":
                    self._originals[path] = w0 if self.kept == "device" else to_host(w0)
                self._layers[path] = layer
                worn = [(w, wear("", delta, layer, path, w0)) for w, delta in weighted if w != 0]
                fold(weight, w0, worn)
        except BaseException:
            self.restore()
            raise
        self.fused = bool(changes)
        size = sum(weight_of(layers[p]).numel() * weight_of(layers[p]).element_size() for p in changes)
        return (
            f"{len(changes)} layers fused; the original weights ({size / 1e9:.2f} GB) are {_WHERE[self.kept]}"
        )

    @torch.no_grad()
    def lost(
        self, layers: Mapping[str, nn.Module], changes: Mapping[str, Sequence[tuple[float, Delta]]]
    ) -> float:
        """The share of the LoRAs that fusing would round away, measured on a few layers: |round(W) - W| / |ΔW|."""
        paths = list(changes)[:: max(1, len(changes) // SAMPLED)]
        error = change = 0.0
        for path in paths:
            w0 = weight_of(layers[path]).detach()
            worn = [(w, wear("", delta, layers[path], path, w0)) for w, delta in changes[path] if w != 0]
            exact = torch.empty(w0.shape, device=w0.device)
            fold(exact, w0, worn)
            error += float((exact.to(w0.dtype).float() - exact).square().sum())
            change += float((exact - w0.float()).square().sum())
        return (error / change) ** 0.5 if change else 0.0

    @torch.no_grad()
    def restore(self) -> None:
        """Copy every W0 back, into the same storage."""
        if self.kept == "checkpoint":
            self._restore_from_checkpoint({id(weight_of(layer)) for layer in self._layers.values()})
        else:
            for path, w0 in self._originals.items():
                weight_of(self._layers[path]).copy_(w0)
        self._layers, self._originals, self.kept, self.fused = {}, {}, None, False

    @torch.no_grad()
    def heal(self) -> BaseReport:
        """Copy every parameter that differs from the checkpoint back from it -> the report afterwards."""
        if self._checkpoint is None:
            raise LoraError(
                "This model was given from memory, not opened from a file: there is nothing to heal it from. "
                "Open it again."
            )
        self._restore_from_checkpoint(None)
        return self.verify()

    def _restore_from_checkpoint(self, wanted: set[int] | None) -> None:
        """The parameters with these ids (None: all), read again from disk."""
        assert self._checkpoint is not None
        live = {f"{c}.{n}": t for c, n, t in self._live()}
        for component, name, tensor in self._checkpoint():
            parameter = live.get(f"{component}.{name}")
            if parameter is not None and (wanted is None or id(parameter) in wanted):
                quantised.write_as_in_checkpoint(self.models[component], name, parameter, tensor)

    def _place(self, weights: list[Tensor]) -> Keep:
        if self.keep != "auto":
            if self.keep == "checkpoint" and self._checkpoint is None:
                raise LoraError(
                    'keep = "checkpoint" needs a model that was opened from a file. Keep the original weights in '
                    '"host" memory.'
                )
            return self.keep
        need = sum(w.numel() * w.element_size() for w in weights)
        device = weights[0].device if weights else torch.device("cpu")
        if device.type == "cuda":
            free, total = torch.cuda.mem_get_info(device)
            if free - need > total / 4:
                return "device"
        memory = psutil.virtual_memory()
        if memory.available - need > memory.total / 4 or self._checkpoint is None:
            return "host" if device.type == "cuda" else "device"
        return "checkpoint"

    def verify(self) -> BaseReport:
        """Compare every parameter with the checkpoint (read again from disk), or with its digest at the start."""
        changed: list[str] = []
        if self._checkpoint is None:
            now = self._digests_now()
            changed = [n for n, d in self._digests.items() if now.get(n) != d]
            return BaseReport(
                len(self._digests) - len(changed),
                len(self._digests),
                tuple(changed),
                "the model as it was given",
            )
        live = {f"{c}.{n}": t for c, n, t in self._live()}
        total = 0
        for component, name, tensor in self._checkpoint():
            if component not in self.models:
                continue
            total, here = total + 1, live.pop(f"{component}.{name}", None)
            if here is None or not quantised.as_in_checkpoint(self.models[component], name, here, tensor):
                changed.append(f"{component}.{name}")
        changed += live  # a parameter the checkpoint does not know cannot be proved
        packed = sum(storage_of(m) is not None for model in self.models.values() for m in model.modules())
        against = f"the checkpoint, {packed} layers of it quantised again" if packed else "the checkpoint"
        return BaseReport(total - len(changed) + len(live), total + len(live), tuple(changed), against)

    def _digests_now(self) -> dict[str, str]:
        scales = [(c, n, t) for c, model in self.models.items() for n, t in quantised.scales_of(model)]
        return {f"{c}.{n}": digest(t) for c, n, t in [*self._live(), *scales]}

    def _live(self) -> Iterator[tuple[str, str, Tensor]]:
        for component, model in self.models.items():
            for name, p in model.named_parameters():
                yield component, name, p


def digest(tensor: Tensor) -> str:
    """Of the exact bytes, dtype and shape."""
    data = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
    return hashlib.blake2b(data, digest_size=16, person=f"{tensor.dtype}"[:16].encode()).hexdigest() + str(
        tuple(tensor.shape)
    )


def fold(target: Tensor, w0: Tensor, worn: Sequence[tuple[float, Worn]]) -> None:
    """target = round(fp32(W0) + sum w ΔW), in place, a few rows at a time; target may be fp32 to see the exact sum."""
    down = torch.cat([algebra.flat(one.down) for _, one in worn]) if worn else None  # (R, in*k*k)
    up = torch.cat([w * one.up.float() for w, one in worn], dim=1) if worn else None  # (out, R)
    flat_w0, flat_target = w0.flatten(1), target.detach().view(len(target), -1)
    step = max(1, CHUNK // flat_w0.shape[1])
    scratch = torch.empty(min(step, len(flat_w0)), flat_w0.shape[1], device=w0.device)
    many = any(one.extras for _, one in worn)
    for start in range(0, len(flat_w0), step):
        rows = slice(start, min(start + step, len(flat_w0)))
        total = scratch[: rows.stop - rows.start].copy_(flat_w0[rows])
        original = total.clone() if many else total  # what extras are computed from
        if down is not None and up is not None:
            total.addmm_(up[rows], down)
        for weight, one in worn:
            for extra in one.extras:
                total += weight * extra.delta(rows, original)
        flat_target[rows].copy_(total)


def refuse_unfusable(path: str, weight: Tensor) -> None:
    if weight.is_meta or not weight.is_floating_point() or weight.element_size() < 2:
        raise LoraError(
            f"{path} is offloaded, cast to 8 bits or quantised ({weight.dtype}, {weight.device}): such a layer cannot "
            "be fused. Leave the LoRAs live; the picture is the same."
        )


def to_host(tensor: Tensor) -> Tensor:
    host = tensor.to("cpu")
    return host.pin_memory() if torch.cuda.is_available() else host
