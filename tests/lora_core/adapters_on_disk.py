"""Small adapters and files for the tests of spellings, ours and LyCORIS' own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lora_core.adapter import Adapter
from lora_core.deltas import Delta
from lora_core.deltas.low_rank import LowRank
from lora_core.deltas.magnitude import WithMagnitude
from lora_core.formats import read_adapter
from lora_core.safe_files import save_tensors


def low_rank(shape: tuple[int, ...], rank: int, alpha: float, g: torch.Generator) -> LowRank:
    down = torch.randn(rank, *shape[1:], generator=g)
    up = torch.randn(shape[0], rank, *[1] * (len(shape) - 2), generator=g)
    return LowRank(down, up, alpha)


LAYERS = {
    "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q": (24, 24),
    "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k": (24, 2048),
    "unet.mid_block.attentions.0.transformer_blocks.9.attn2.to_out.0": (32, 32),
    "unet.up_blocks.0.attentions.2.transformer_blocks.1.ff.net.0.proj": (64, 16),
    "unet.up_blocks.1.upsamplers.0.conv": (16, 16, 3, 3),
    "unet.down_blocks.2.resnets.1.conv2": (8, 4, 3, 3),
    "unet.down_blocks.1.attentions.1.proj_in": (16, 16, 1, 1),
    "text_encoder.text_model.encoder.layers.11.self_attn.q_proj": (12, 12),
    "text_encoder_2.text_model.encoder.layers.3.mlp.fc1": (40, 10),
}


def adapter(
    dora: bool = False, dtype: torch.dtype = torch.float32, layers: dict[str, Any] = LAYERS
) -> Adapter:
    g = torch.Generator().manual_seed(7)
    deltas: dict[str, Delta] = {}
    for i, (path, shape) in enumerate(layers.items()):
        low = low_rank(shape, 2 + i % 3, alpha=1.5 if i % 2 else 3.0, g=g)
        column = torch.rand(shape[0], *[1] * (len(shape) - 1), generator=g) + 0.5
        deltas[path] = (WithMagnitude(low, column) if dora else low).to(dtype=dtype)
    return Adapter(deltas, family="sdxl", name="cat")


def assert_same(a: Adapter, b: Adapter) -> None:
    assert set(a.deltas) == set(b.deltas)
    for path, delta in a.deltas.items():
        theirs = b.deltas[path].tensors()
        for name, tensor in delta.tensors().items():
            assert torch.equal(tensor, theirs[name]), (path, name)
            assert tensor.dtype == theirs[name].dtype


Q = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
QPATH = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
PAIR = {f"{Q}.lora_down.weight": torch.randn(4, 8), f"{Q}.lora_up.weight": torch.randn(8, 4)}


def saved(tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str] | None = None) -> Path:
    save_tensors(path / "lora.safetensors", tensors, metadata)
    return path / "lora.safetensors"


# ---------------------------------------------------------------- LoHa and LoKr as LyCORIS writes them

# which -> kohya's name and our path
LYCORIS_LAYERS: dict[str, tuple[str, str]] = {
    "linear": (
        "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q",
        "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q",
    ),
    "conv": ("lora_unet_mid_block_resnets_0_conv1", "unet.mid_block.resnets.0.conv1"),
    "conv 1x1": ("lora_unet_mid_block_attentions_0_proj_in", "unet.mid_block.attentions.0.proj_in"),
}
# case -> LyCORIS' algorithm and options; rank 4 and alpha 2.5 unless said
LYCORIS_CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "loha": ("loha", {}),
    "loha tucker": ("loha", {"use_tucker": True}),
    "loha rs": ("loha", {"rs_lora": True}),
    "loha scalar": ("loha", {"use_scalar": True}),
    "lokr w2 split": ("lokr", {"lora_dim": 2, "factor": 4}),
    "lokr tucker": ("lokr", {"lora_dim": 2, "factor": 4, "use_tucker": True}),
    "lokr both split": ("lokr", {"lora_dim": 1, "factor": 4, "decompose_both": True}),
    "lokr both split, tucker": (
        "lokr",
        {"lora_dim": 1, "factor": 4, "decompose_both": True, "use_tucker": True},
    ),
    "lokr w1 split": ("lokr", {"lora_dim": 3, "decompose_both": True, "unbalanced_factorization": True}),
    "lokr rs": ("lokr", {"lora_dim": 2, "factor": 4, "rs_lora": True}),
    "lokr scalar": ("lokr", {"lora_dim": 2, "factor": 4, "use_scalar": True}),
    "lokr whole": ("lokr", {"full_matrix": True, "factor": 4}),
}


def layer_of(which: str) -> nn.Linear | nn.Conv2d:
    if which == "linear":
        return nn.Linear(24, 40)
    return nn.Conv2d(24, 40, 3, padding=1) if which == "conv" else nn.Conv2d(24, 40, 1)


def theirs(case: str, which: str, **options: Any) -> tuple[Any, nn.Linear | nn.Conv2d, dict[str, Tensor]]:
    """LyCORIS' module with random factors, its layer, and what LyCORIS saves of it."""
    for needed in ("einops", "toml"):  # half an import of LyCORIS would succeed at the second try
        pytest.importorskip(needed, reason=f"LyCORIS cannot be imported without {needed}")
    algo, own = LYCORIS_CASES[case]
    modules = pytest.importorskip(f"lycoris.modules.{algo}")
    torch.manual_seed(len(case) + len(which))
    layer = layer_of(which)
    arguments = {"lora_dim": 4, "alpha": 2.5} | own | options
    make = modules.LohaModule if algo == "loha" else modules.LokrModule
    module = make(LYCORIS_LAYERS[which][0], layer, **arguments)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.4 * torch.randn_like(parameter)
    state = {
        f"{LYCORIS_LAYERS[which][0]}.{k}": v.detach().clone().contiguous()
        for k, v in module.custom_state_dict().items()
    }
    return module, layer, state


def read_one(path: Path, which: str) -> Delta:
    read = read_adapter(path)
    assert (list(read.deltas), read.unused) == ([LYCORIS_LAYERS[which][1]], ())
    return read.deltas[LYCORIS_LAYERS[which][1]]
