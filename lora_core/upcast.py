"""VAEs that overflow in fp16: SDXL's does, and its configuration says so (`force_upcast`)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


@contextmanager
def upcast(vae: Any) -> Iterator[Any]:
    """A VAE that overflows is in fp32 for as long. There and back is exact: every fp16 is an fp32."""
    with same_dtype(vae):
        if overflows(vae):
            to_fp32(vae)
        yield vae


@contextmanager
def same_dtype(vae: Any) -> Iterator[None]:
    """Whatever happens to the VAE's dtype inside is undone, an error notwithstanding."""
    before = vae.dtype
    try:
        yield
    finally:
        if vae.dtype != before:
            nn.Module.to(vae, before)


def overflows(vae: Any) -> bool:
    return vae.dtype == torch.float16 and bool(getattr(vae.config, "force_upcast", False))


def to_fp32(vae: Any) -> None:
    nn.Module.to(vae, torch.float32)  # diffusers' own `to` says at length what it thinks of dtypes
