"""Pristine base weights: fuse from them, restore to them, prove it.

W_f = round(fp32(W0) + sum w ΔW), always from the untouched W0, in place, one rounding; unfuse copies W0 back.
(Adding and subtracting drifts: after 200 cycles 88 % of bf16 elements differ.)
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lora_core import algebra
from lora_core.adapter import weight_of
from lora_core.deltas import Delta
from lora_core.errors import LoraError


@dataclass(frozen=True)
class BaseReport:
    """`equal` of `total` tensors are bit-identical to the reference; `changed` names the others."""

    equal: int
    total: int
    changed: tuple[str, ...]
    against: str  # "the checkpoint" or "the model as it was given"

    def __bool__(self) -> bool:
        return self.equal == self.total and self.total > 0

    def __str__(self) -> str:
        verdict = "base verified" if self else f"base CHANGED ({', '.join(self.changed[:3])}...)"
        return f"{verdict}: {self.equal}/{self.total} tensors equal {self.against}"


Reference = Callable[[], Iterator[tuple[str, str, Tensor]]]  # component, parameter name, tensor


class BaseWeights:
    """Keeps W0 of fused layers; everything else of the base is never written to."""

    def __init__(self, models: Mapping[str, nn.Module], checkpoint: Reference | None = None) -> None:
        self.models = dict(models)
        self.originals: dict[str, Tensor] = {}  # adapter path -> W0
        self._layers: dict[str, nn.Module] = {}
        self._checkpoint = checkpoint
        # a model that came from no file is compared with what it was when it was given
        self._digests = {} if checkpoint else {f"{c}.{n}": digest(t) for c, n, t in self._live()}

    @property
    def fused(self) -> bool:
        return bool(self.originals)

    @torch.no_grad()
    def fuse(
        self, layers: Mapping[str, nn.Module], changes: Mapping[str, Iterable[tuple[float, Delta]]]
    ) -> None:
        """Write W0 + sum w ΔW into each layer of `changes`. On any error every layer is restored first."""
        try:
            for path, weighted in changes.items():
                layer = layers[path]
                weight = weight_of(layer)
                if weight.is_meta or not weight.is_floating_point() or weight.element_size() < 2:
                    raise LoraError(
                        f"{path} is offloaded or quantised ({weight.dtype}, {weight.device}): such a layer cannot be "
                        "fused. Leave the LoRAs live; the picture is the same."
                    )
                if path not in self.originals:
                    self.originals[path] = weight.detach().clone()
                    self._layers[path] = layer
                w0 = self.originals[path]
                terms = [(w, delta.to(device=w0.device).delta(w0)) for w, delta in weighted if w != 0]
                weight.copy_(algebra.fused(w0, terms))
        except BaseException:
            self.restore()
            raise

    @torch.no_grad()
    def restore(self) -> None:
        """Copy every W0 back, into the same storage."""
        for path in list(self.originals):
            weight_of(self._layers[path]).copy_(self.originals[path])
            del self.originals[path], self._layers[path]

    def verify(self) -> BaseReport:
        """Compare every parameter with the checkpoint (read again from disk), or with its digest at the start."""
        live = {f"{c}.{n}": t for c, n, t in self._live()}
        changed: list[str] = []
        if self._checkpoint is None:
            changed = [n for n, d in self._digests.items() if n not in live or digest(live[n]) != d]
            return BaseReport(
                len(self._digests) - len(changed),
                len(self._digests),
                tuple(changed),
                "the model as it was given",
            )
        total = 0
        for component, name, tensor in self._checkpoint():
            if component not in self.models:
                continue
            total, here = total + 1, live.pop(f"{component}.{name}", None)
            if here is None or not torch.equal(here.detach().cpu(), tensor.to(here.dtype)):
                changed.append(f"{component}.{name}")
        changed += live  # a parameter the checkpoint does not know cannot be proved
        return BaseReport(
            total - len(changed) + len(live), total + len(live), tuple(changed), "the checkpoint"
        )

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
