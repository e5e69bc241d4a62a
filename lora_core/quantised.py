"""A base model kept in fewer bits: converting it, and what can be said of it afterwards.

    nf4    linear layers of UNet and text encoders in 4 bits (storages.py)
    int8   the same in 8 bits; inputs are rounded to 8 bits too while they compute
    fp8    the UNet's linear layers and convolutions, but no norm; computing needs no other kernels

One way: what rounding took is in the checkpoint alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lora_core.errors import ConfigError, LoraError, did_you_mean
from lora_core.storages import FP8, Storage, bitsandbytes, int8_layer, nf4_layer, storage_of

MAKERS: dict[str, Callable[[nn.Linear, torch.device], nn.Module]] = {"nf4": nf4_layer, "int8": int8_layer}
KINDS = (*MAKERS, "fp8")


@dataclass(frozen=True)
class Quantised:
    """What became of the models: `layers` of them converted, bytes of all weights before and after."""

    kind: str
    layers: int
    before: int
    after: int

    def __str__(self) -> str:
        return (
            f"{self.layers} layers kept in {self.kind}: the weights take {self.after / 1e6:,.0f} MB instead of "
            f"{self.before / 1e6:,.0f} MB"
        )


def quantise(models: Mapping[str, nn.Module], kind: str, device: torch.device | None = None) -> Quantised:
    """Convert `models` (component -> module) in place; packed layers go to `device`, by default they stay.

    Raises ConfigError for an unknown kind, LoraError without bitsandbytes, for a model that carries hooks (a LoRA, an
    offload: those come after), is quantised already, or holds a weight beyond fp8's range; then nothing is changed.
    """
    refuse_unknown(kind)
    for component, model in models.items():
        _refuse_dressed(component, model)
    before = size_bytes(models)
    layers = _cast(models) if kind == "fp8" else _pack(models, MAKERS[kind], device)
    return Quantised(kind, layers, before, size_bytes(models))


def refuse_unknown(kind: str | None) -> None:
    """ConfigError for a kind there is not, LoraError for one whose library is missing."""
    if kind is not None and kind not in KINDS:
        raise ConfigError(f'quantize = "{kind}" is unknown.{did_you_mean(kind, KINDS)}')
    if kind in MAKERS:
        bitsandbytes()


def _refuse_dressed(component: str, model: nn.Module) -> None:
    for path, module in model.named_modules():
        if storage_of(module) is not None:
            raise LoraError(
                f"{component}.{path} is quantised already. Open the model again to choose another way."
            )
        hooks = module._forward_hooks or module._forward_pre_hooks
        if hasattr(module, "_hf_hook") or (hooks and isinstance(module, nn.Linear | nn.Conv2d)):
            raise LoraError(
                f"{component}.{path} carries a LoRA or an offload hook. Quantise the model first, then load LoRAs."
            )


def _pack(
    models: Mapping[str, nn.Module],
    make: Callable[[nn.Linear, torch.device], nn.Module],
    device: torch.device | None,
) -> int:
    count = 0
    for model in models.values():
        for path, layer in list(model.named_modules()):
            if isinstance(layer, nn.Linear):
                parent, _, leaf = path.rpartition(".")
                setattr(model.get_submodule(parent), leaf, make(layer, device or layer.weight.device))
                count += 1
    return count


@torch.no_grad()
def _cast(models: Mapping[str, nn.Module]) -> int:
    count, limit = 0, torch.finfo(FP8).max
    able: dict[str, Any] = {c: m for c, m in models.items() if hasattr(m, "enable_layerwise_casting")}
    for component, model in able.items():
        for name, parameter in model.named_parameters():
            largest = float(parameter.abs().max())
            if not largest <= limit:
                raise LoraError(
                    f"{component}.{name} holds a value of {largest:.3g}; fp8 reaches to {limit:.0f}. Open the model as "
                    "nf4 or int8, or without quantisation."
                )
    for model in able.values():
        model.enable_layerwise_casting(storage_dtype=FP8, compute_dtype=dtype_of(model))
        count += sum(storage_of(m) is not None for m in model.modules())
    return count


# --- what a model holds --------------------------------------------------------------------------------------


def dtype_of(model: nn.Module) -> torch.dtype:
    """In which the model computes: of its first parameter that is neither packed nor cast."""
    plain = (p.dtype for p in model.parameters() if p.is_floating_point() and p.element_size() > 1)
    return next(plain, torch.float32)


def size_bytes(models: Mapping[str, nn.Module]) -> int:
    """Of all weights, scales included."""
    total = 0
    for model in models.values():
        total += sum(p.numel() * p.element_size() for p in model.parameters())
        total += sum(scales.numel() * scales.element_size() for _, scales in scales_of(model))
    return total


def count_weights(model: nn.Module) -> int:
    """Weights and biases, a packed layer's as they are when unpacked."""
    total = sum(p.numel() for p in model.parameters())
    for layer in model.modules():
        storage = storage_of(layer)
        if storage is not None and isinstance(layer, nn.Linear):
            total += layer.in_features * layer.out_features - layer.weight.numel()
    return total


def as_in_checkpoint(model: nn.Module, name: str, live: Tensor, tensor: Tensor) -> bool:
    """Whether a live parameter is what the checkpoint's `tensor` becomes in this model: rounded to the dtype in
    which the model computes, then packed or cast as its layer is."""
    layer, storage, rounded = _about(model, name, live, tensor)
    if storage is not None and name.endswith("weight"):
        return storage.same(layer, rounded)
    return torch.equal(live.detach().cpu().float(), rounded.to(live.dtype).float())


@torch.no_grad()
def write_as_in_checkpoint(model: nn.Module, name: str, live: Tensor, tensor: Tensor) -> None:
    """Make a live parameter that differs what the checkpoint's `tensor` becomes in this model."""
    if as_in_checkpoint(model, name, live, tensor):
        return
    layer, storage, rounded = _about(model, name, live, tensor)
    if storage is not None and name.endswith("weight"):
        storage.put(layer, rounded)
    else:
        live.copy_(rounded)


def _about(
    model: nn.Module, name: str, live: Tensor, tensor: Tensor
) -> tuple[nn.Module, Storage | None, Tensor]:
    layer = model.get_submodule(name.rpartition(".")[0])
    storage = storage_of(layer)
    return layer, storage, tensor.to(live.dtype if storage is None else dtype_of(model))


def scales_of(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """What packed layers keep beside their parameters, by the layer's path."""
    for path, layer in model.named_modules():
        storage = storage_of(layer)
        scales = storage.scales(layer) if storage else None
        if scales is not None:
            yield f"{path}.scales", scales
