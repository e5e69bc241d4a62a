"""How a layer keeps its weight in fewer bits: reading it, writing another, and making such a layer.

    nf4    4 bits and one fp32 scale for 64 weights (QLoRA, arXiv 2305.14314), bitsandbytes' Linear4bit
    int8   8 bits and one scale for a row (LLM.int8(), arXiv 2208.07339), bitsandbytes' Linear8bitLt
    fp8    float8_e4m3fn between calls, diffusers' layerwise casting

bitsandbytes is the optional extra "quant".
"""

from __future__ import annotations

import copy
import functools
import logging
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lora_core.errors import LoraError

BLOCK = 64  # weights to one scale in nf4, as the paper has it
OUTLIER = 6.0  # inputs beyond it are not rounded in int8: LLM.int8()'s own threshold
FP8 = torch.float8_e4m3fn
Undo = Callable[[], None]


@functools.cache
def bitsandbytes() -> Any:
    """The library, or a LoraError that says how to get it."""
    try:
        import bitsandbytes as library  # noqa: PLC0415 - optional, and seconds to load
    except ImportError as problem:
        raise LoraError(
            'nf4 and int8 need bitsandbytes, which is not installed. Install it with `pip install "lora-loom[quant]"`, '
            "or use fp8."
        ) from problem
    # said anew for every call of every layer; that int8 rounds its inputs is in our own docs
    logging.getLogger("bitsandbytes.autograd._functions").addFilter(
        lambda record: not str(record.msg).startswith("MatMul8bitLt: inputs will be cast")
    )
    return library


class Storage(Protocol):
    """One way to keep a layer's weight in fewer bits; recognises its layers itself."""

    name: str

    def holds(self, layer: nn.Module) -> bool: ...

    def dense(self, layer: Any, weight: Tensor) -> Tensor:
        """What the layer computes with, fp32 (out, in[, k, k]). `weight` is the stored tensor."""
        ...

    def put(self, layer: Any, weight: Tensor) -> Undo:
        """Let the layer keep `weight` (out, in[, k, k]), rounded. Nothing is overwritten: the Undo puts back what
        was there, bit for bit."""
        ...

    def same(self, layer: Any, weight: Tensor) -> bool:
        """Whether the layer holds exactly what `weight`, rounded, would be."""
        ...

    def scales(self, layer: Any) -> Tensor | None:
        """What is kept beside the weight's parameter."""
        ...


class Nf4:
    name = "nf4"

    def holds(self, layer: nn.Module) -> bool:
        return hasattr(layer, "quant_state") and isinstance(layer, nn.Linear)

    def dense(self, layer: Any, weight: Tensor) -> Tensor:
        state = copy.copy(_state(layer))
        if getattr(state, "packing_format_for_cpu", False):
            raise LoraError(
                "A layer is packed for this processor's own instructions, from which its weight cannot be read. Open "
                'the model with quantize = "nf4" instead of quantising it elsewhere.'
            )
        state.dtype = torch.float32
        found: Tensor = bitsandbytes().functional.dequantize_4bit(weight.data, state)
        return found

    def put(self, layer: Any, weight: Tensor) -> Undo:
        old, state = layer.weight, _state(layer)
        layer.weight = self._packed(weight, old.device, state)
        layer.weight.module, layer.quant_state = layer, layer.weight.quant_state

        def undo() -> None:
            layer.weight, layer.quant_state = old, state

        return undo

    def same(self, layer: Any, weight: Tensor) -> bool:
        own, state = layer.weight, _state(layer)
        other = self._packed(weight, own.device, state)
        return torch.equal(own.data, other.data) and torch.equal(state.absmax, other.quant_state.absmax)

    def scales(self, layer: Any) -> Tensor | None:
        absmax: Tensor = _state(layer).absmax
        return absmax

    def _packed(self, weight: Tensor, device: torch.device, like: Any) -> Any:
        packed = nf4_packed(
            weight, device, blocksize=like.blocksize, kind=like.quant_type, nested=like.nested
        )
        packed.quant_state.dtype = like.dtype
        return packed


class Int8:
    name = "int8"

    def holds(self, layer: nn.Module) -> bool:
        return hasattr(getattr(layer, "state", None), "SCB") and isinstance(layer, nn.Linear)

    def dense(self, layer: Any, weight: Tensor) -> Tensor:
        found: Tensor = bitsandbytes().functional.int8_vectorwise_dequant(weight.data, self.scales(layer))
        return found

    def put(self, layer: Any, weight: Tensor) -> Undo:
        old, state = layer.weight, layer.state
        before = (old.CB, old.SCB, state.CB, state.SCB)
        layer.weight = int8_packed(weight, old.device)
        state.CB, state.SCB = layer.weight.CB, layer.weight.SCB

        def undo() -> None:
            layer.weight = old
            old.CB, old.SCB, state.CB, state.SCB = before

        return undo

    def same(self, layer: Any, weight: Tensor) -> bool:
        own, scales = layer.weight, self.scales(layer)
        assert scales is not None
        other = int8_packed(weight, own.device)
        return torch.equal(own.data, other.data) and torch.equal(scales, other.SCB)

    def scales(self, layer: Any) -> Tensor | None:
        """bitsandbytes moves them from the parameter to the layer's state at the first call."""
        moved: Tensor | None = layer.state.SCB
        first: Tensor | None = layer.weight.SCB
        return first if moved is None else moved


class Fp8:
    name = "fp8"

    def holds(self, layer: nn.Module) -> bool:
        weight = getattr(layer, "weight", None)
        return isinstance(weight, Tensor) and weight.is_floating_point() and weight.element_size() == 1

    def dense(self, layer: Any, weight: Tensor) -> Tensor:
        return weight.detach().float()

    def put(self, layer: Any, weight: Tensor) -> Undo:
        parameter = layer.weight
        old = parameter.data
        parameter.data = weight.to(old.device, old.dtype)

        def undo() -> None:
            parameter.data = old

        return undo

    def same(self, layer: Any, weight: Tensor) -> bool:
        own = layer.weight
        # compared as bytes: not every device compares fp8
        return torch.equal(own.data.view(torch.uint8), weight.to(own.device, own.dtype).view(torch.uint8))

    def scales(self, layer: Any) -> Tensor | None:
        return None


STORAGES: tuple[Storage, ...] = (Nf4(), Int8(), Fp8())


def storage_of(layer: nn.Module) -> Storage | None:
    """How the layer keeps its weight; None: as it is."""
    return next((s for s in STORAGES if s.holds(layer)), None)


def dequantised(layer: nn.Module, weight: Tensor | None = None) -> Tensor:
    """The weight with which a quantised or cast layer computes, fp32 (out, in[, k, k]), on the weight's device.

    `weight`: the stored tensor, where the layer itself has only a meta tensor at the moment.
    """
    storage = storage_of(layer)
    own = layer.weight if weight is None else weight
    assert isinstance(own, Tensor)
    return own.detach().float() if storage is None else storage.dense(layer, own)


def rounded(layer: nn.Module, weight: Tensor) -> Tensor:
    """What a quantised layer would make of `weight` (out, in[, k, k]), fp32; the layer stays as it is."""
    storage = storage_of(layer)
    assert storage is not None
    undo = storage.put(layer, weight)
    try:
        return dequantised(layer)
    finally:
        undo()


def refuse_lost(layer: nn.Module, path: str) -> None:
    """LoraError for a packed layer that has been offloaded by itself: bitsandbytes cannot compute with it then."""
    weight = getattr(layer, "weight", None)
    if isinstance(weight, Tensor) and weight.is_meta and not weight.is_floating_point():
        raise LoraError(
            f"{path} is quantised and offloaded layer by layer, which bitsandbytes cannot do. Offload whole models "
            "(model offload), or open the base as fp8."
        )


def dense_shape(layer: Any) -> tuple[int, ...]:
    """Of the layer's weight, unpacked."""
    packed = storage_of(layer) is not None and isinstance(layer, nn.Linear)
    return (layer.out_features, layer.in_features) if packed else tuple(layer.weight.shape)


def nf4_packed(
    weight: Tensor, device: torch.device, *, blocksize: int = BLOCK, kind: str = "nf4", nested: bool = False
) -> Any:
    """bitsandbytes' Params4bit of a weight (out, in), packed on `device`. Always from fp32, so that the same numbers
    in another dtype give the same bits."""
    parameter = bitsandbytes().nn.Params4bit(
        weight.detach().float().cpu(),
        requires_grad=False,
        quant_type=kind,
        blocksize=blocksize,
        compress_statistics=nested,
    )
    return parameter.to(device)


def int8_packed(weight: Tensor, device: torch.device) -> Any:
    """bitsandbytes' Int8Params of a weight (out, in), packed on `device`."""
    # it packs what comes from the CPU, and takes anything else for packed already
    parameter = bitsandbytes().nn.Int8Params(
        weight.detach().float().cpu(), requires_grad=False, has_fp16_weights=False
    )
    return parameter.to(device)


def nf4_layer(layer: nn.Linear, device: torch.device) -> nn.Module:
    """The same layer with its weight in nf4, on `device`; it computes in the weight's dtype."""
    dtype = layer.weight.dtype
    new = bitsandbytes().nn.Linear4bit(
        layer.in_features, layer.out_features, compute_dtype=dtype, quant_type="nf4", device="meta"
    )
    new.weight = nf4_packed(layer.weight, device)
    new.quant_state = new.weight.quant_state
    new.quant_state.dtype = dtype
    new.weight.module = new  # from where bitsandbytes takes the scales when a move has lost them
    # on some processors it would repack the weight at the first call, with its scales rounded to bf16
    new.support_avx512bf16_for_cpu = False
    return _dressed(new, layer, device)


def int8_layer(layer: nn.Linear, device: torch.device) -> nn.Module:
    """The same layer with its weight in int8, on `device`."""
    new = bitsandbytes().nn.Linear8bitLt(
        layer.in_features, layer.out_features, has_fp16_weights=False, threshold=OUTLIER, device="meta"
    )
    new.weight = int8_packed(layer.weight, device)
    return _dressed(new, layer, device)


def _dressed(new: Any, layer: nn.Linear, device: torch.device) -> nn.Module:
    bias = layer.bias
    new.bias = None if bias is None else nn.Parameter(bias.detach().to(device), requires_grad=False)
    new.train(layer.training)
    assert isinstance(new, nn.Module)
    return new


def _state(layer: Any) -> Any:
    """A move between devices may lose it from the parameter; bitsandbytes keeps it on the layer too."""
    return getattr(layer.weight, "quant_state", None) or layer.quant_state
