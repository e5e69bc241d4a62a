"""LyCORIS' own modules of the kinds that are no product of two factors: randomised, and as it saves them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.lora_core.adapters_on_disk import LYCORIS_LAYERS

NORMS: dict[str, tuple[str, str]] = {
    "layer norm": (
        "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_norm2",
        "unet.down_blocks.0.attentions.0.transformer_blocks.0.norm2",
    ),
    "group norm": ("lora_unet_mid_block_resnets_0_norm1", "unet.mid_block.resnets.0.norm1"),
}
NAMES = {**LYCORIS_LAYERS, **NORMS}
# case -> module of LyCORIS, its class, its options
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "ia3 outputs": ("ia3", "IA3Module", {}),
    "ia3 inputs": ("ia3", "IA3Module", {"train_on_input": True}),
    "glora": ("glora", "GLoRAModule", {"lora_dim": 3, "alpha": 2.5}),
    "glora scalar": ("glora", "GLoRAModule", {"lora_dim": 3, "alpha": 2.5, "use_scalar": True}),
    "oft": ("diag_oft", "DiagOFTModule", {"lora_dim": 4}),
    "oft limited": ("diag_oft", "DiagOFTModule", {"lora_dim": 4, "constraint": 0.02}),
    "oft rescaled": ("diag_oft", "DiagOFTModule", {"lora_dim": 8, "rescaled": True}),
    "boft": ("boft", "ButterflyOFTModule", {"lora_dim": 10}),
    "boft limited": ("boft", "ButterflyOFTModule", {"lora_dim": 20, "constraint": 0.02}),
    "boft rescaled": ("boft", "ButterflyOFTModule", {"lora_dim": 10, "rescaled": True}),
    "full": ("full", "FullModule", {}),
}
PAIRS = [
    *((case, which) for case in CASES for which in LYCORIS_LAYERS),
    *(("norm", which) for which in NORMS),
]


def layer_of(which: str) -> Any:
    torch.manual_seed(len(which))
    made: dict[str, Any] = {
        "linear": lambda: nn.Linear(24, 40),
        "conv": lambda: nn.Conv2d(24, 40, 3, padding=1, stride=2),
        "conv 1x1": lambda: nn.Conv2d(24, 40, 1),
        "layer norm": lambda: nn.LayerNorm(40),
        "group norm": lambda: nn.GroupNorm(4, 40),
    }
    layer = made[which]()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return layer.requires_grad_(False)


def input_of(which: str) -> Tensor:
    if which in ("linear", "layer norm"):
        return torch.randn(3, 24 if which == "linear" else 40)
    return torch.randn(2, 40 if which == "group norm" else 24, 6, 5)


def theirs(case: str, which: str) -> tuple[Any, Any, Tensor, Tensor, dict[str, Tensor]]:
    """-> a layer, an input, the base's answer, LyCORIS' answer, and what LyCORIS saves, as in a file."""
    for needed in ("einops", "toml"):  # half an import of LyCORIS would succeed at the second try
        pytest.importorskip(needed, reason=f"LyCORIS cannot be imported without {needed}")
    file, name, options = CASES.get(case, ("norms", "NormModule", {}))
    modules = pytest.importorskip(f"lycoris.modules.{file}")
    layer, x = layer_of(which), input_of(which)
    module = getattr(modules, name)(NAMES[which][0], layer, **options)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
        plain, answer = layer(x), module(x)
        original = {k: v.clone() for k, v in layer.state_dict().items()}
        if case == "full":  # what it stores is a difference only once it stands in the layer's place
            module.apply_to()
        state = module.state_dict()
        if case == "full":
            module.restore()
            layer.load_state_dict(original)
    return layer, x, plain, answer, {f"{NAMES[which][0]}.{k}": v.detach().clone() for k, v in state.items()}
