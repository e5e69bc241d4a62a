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

from lora_core import quantised
from lora_core.adapter import weight_of
from lora_core.deltas import Delta
from lora_core.deltas.bias import WithBias
from lora_core.errors import LoraError
from lora_core.folding import fold, fold_bias
from lora_core.storages import storage_of
from lora_core.worn import wear


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
        self._written: list[tuple[nn.Module, str]] = []  # layer, and its "weight" or "bias"
        self._originals: list[
            Tensor
        ] = []  # as they were, in the same order, unless the checkpoint alone has them
        self._room: dict[
            tuple[nn.Module, str], Tensor
        ] = {}  # where originals were, for those of the next fuse
        self._checkpoint = checkpoint
        # a model that came from no file is compared with what it was when it was given
        self._digests = {} if checkpoint else self._digests_now()

    @torch.no_grad()
    def fuse(
        self, layers: Mapping[str, nn.Module], changes: Mapping[str, Sequence[tuple[float, Delta]]]
    ) -> str:
        """Write W0 + sum w ΔW into each layer of `changes`, and the changes of biases into these -> a sentence about
        it. What was fused is restored first.

        Raises LoraError, before anything is written, for a layer that cannot be fused. On any later error every
        layer is restored.
        """
        self.restore()
        written = {path: _written(path, layers[path], weighted) for path, weighted in changes.items()}
        flat = [tensor for own in written.values() for tensor in own.values()]
        self.kept = self._place(flat)
        if self.kept != "device":
            self.release()
        try:
            for path, own in written.items():
                before = {name: self._copy_of(tensor, (layers[path], name)) for name, tensor in own.items()}
                if self.kept != "checkpoint":
                    self._originals += [t if self.kept == "device" else to_host(t) for t in before.values()]
                self._written += [(layers[path], name) for name in own]
                worn = [
                    (w, wear("", delta, layers[path], path, before.get("weight")))
                    for w, delta in changes[path]
                    if w != 0
                ]
                if "weight" in own:
                    fold(own["weight"], before["weight"], worn, begun=True)
                if "bias" in own:
                    biases = [(w, one.bias) for w, one in worn if one.bias is not None]
                    fold_bias(own["bias"], before["bias"], biases)
        except BaseException:
            self.restore()
            raise
        self.fused = bool(changes)
        size = sum(t.numel() * t.element_size() for t in flat)
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
        written: list[Tensor] = [getattr(layer, name) for layer, name in self._written]
        if self.kept == "checkpoint":
            self._restore_from_checkpoint({id(tensor) for tensor in written})
        else:
            # an error may have come between a copy and the note of what it is a copy of
            for tensor, before in zip(written, self._originals, strict=False):
                tensor.copy_(before)
        if self.kept == "device" and written and _leaves_a_quarter(written[0].device, 0):
            self._room = dict(zip(self._written, self._originals, strict=False))
        self._written, self._originals, self.kept, self.fused = [], [], None, False

    def _copy_of(self, tensor: Tensor, key: tuple[nn.Module, str]) -> Tensor:
        """Into the memory of an earlier fuse, where it fits: fresh memory costs more than the copying does."""
        room = self._room.pop(key, None)
        if room is None or (room.shape, room.dtype, room.device) != (
            tensor.shape,
            tensor.dtype,
            tensor.device,
        ):
            return tensor.detach().clone()
        return room.copy_(tensor)

    def release(self) -> None:
        """Nothing more will be fused for a while: the memory that waits for the next fuse is given back."""
        self._room = {}

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
        if device.type == "cuda" and _leaves_a_quarter(device, need):
            return "device"
        if _leaves_a_quarter(torch.device("cpu"), need) or self._checkpoint is None:
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


def _leaves_a_quarter(device: torch.device, need: int) -> bool:
    """Whether a quarter of the device's memory is free after `need` bytes more."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
    else:
        memory = psutil.virtual_memory()
        free, total = memory.available, memory.total
    return bool(free - need > total / 4)


def _written(path: str, layer: nn.Module, weighted: Sequence[tuple[float, Delta]]) -> dict[str, Tensor]:
    """The layer's "weight", "bias" or both: what these changes write to. LoraError where that cannot be."""
    acting = [delta for w, delta in weighted if w != 0]
    own: dict[str, Tensor] = {}
    if any(not isinstance(delta, WithBias) or delta.inner is not None for delta in acting):
        own["weight"] = weight_of(layer)
    if any(isinstance(delta, WithBias) and delta.acts(has_bias=layer.bias is not None) for delta in acting):
        own["bias"] = bias_of(layer, path)
    for tensor in own.values():
        refuse_unfusable(path, tensor)
    return own


def bias_of(layer: nn.Module, path: str) -> Tensor:
    """What a change of the bias is folded into. LoraError for a layer that has none."""
    bias = layer.bias
    if bias is None:  # one made for it would be a parameter that the model did not have
        raise LoraError(
            f"A LoRA changes the bias of {path}, which has none in this model: such a layer cannot be fused. Leave the "
            "LoRAs live; the picture is the same."
        )
    assert isinstance(bias, Tensor)
    return bias


def refuse_unfusable(path: str, weight: Tensor) -> None:
    if weight.is_meta or not weight.is_floating_point() or weight.element_size() < 2:
        raise LoraError(
            f"{path} is offloaded, cast to 8 bits or quantised ({weight.dtype}, {weight.device}): such a layer cannot "
            "be fused. Leave the LoRAs live; the picture is the same."
        )


def to_host(tensor: Tensor) -> Tensor:
    host = tensor.to("cpu")
    return host.pin_memory() if torch.cuda.is_available() else host
