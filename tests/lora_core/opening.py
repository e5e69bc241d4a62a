"""What the tests of opening a base model compare."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lora_core.models import OpenedBase

PARTS = ("unet", "vae", "text_encoder", "text_encoder_2")


def parts_of(pipe: Any) -> dict[str, nn.Module]:
    return {name: getattr(pipe, name) for name in PARTS if getattr(pipe, name, None) is not None}


def assert_same_weights(found: Any, expected: Any) -> None:
    assert sorted(parts_of(found)) == sorted(parts_of(expected))
    for name, model in parts_of(expected).items():
        a, b = getattr(found, name).state_dict(), model.state_dict()
        assert sorted(set(a) ^ set(b)) == []  # names alone: a report on all tensors would take minutes
        assert [k for k in b if a[k].dtype != b[k].dtype or not torch.equal(a[k], b[k])] == []


def picture(pipe: Any) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    pipe.set_progress_bar_config(disable=True)
    out = pipe("a red cat", num_inference_steps=2, height=64, width=64, output_type="pt", generator=generator)
    return out.images  # (1, 3, 64, 64)


def assert_proved(opened: OpenedBase) -> None:
    """Every parameter exactly once in checkpoint_tensors, and each equal to the live one."""
    live = {(c, n): p for c, model in parts_of(opened.pipeline).items() for n, p in model.named_parameters()}
    seen = [
        (c, n) for c, n, t in opened.checkpoint_tensors() if torch.equal(t.to(live[c, n].dtype), live[c, n])
    ]
    assert sorted(seen) == sorted(live)
