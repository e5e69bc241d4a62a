"""How other programs turn the keys of a kohya file into a weight, stated anew from their source, faults included.

A1111   stable-diffusion-webui 1.10, extensions-builtin/Lora: network.py (scale, DoRA), network_lora.py,
        network_hada.py, network_ia3.py, network_lokr.py, network_full.py, network_norm.py, network_glora.py,
        network_oft.py, lyco_helpers.py; which kind a layer is, networks.py
ComfyUI comfy/lora.py and comfy/weight_adapter/{base,lora,loha,lokr,glora,oft,boft}.py of 2025 (the `weight_decompose`
        of 0.3.77)
Invoke  InvokeAI, invokeai/backend/patches/layers/*.py of 2025

Forge's LoRAs go through a copy of ComfyUI's (packages_3rdparty/comfyui_lora_collection).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

State = Mapping[str, Tensor]  # what ends a layer's keys -> tensor


class Refused(Exception):
    """For this layer's keys the program refuses the file."""


class Skipped(Exception):
    """It goes on without this layer."""


class Changed(NamedTuple):
    weight: Tensor  # ΔW of the weight's shape
    bias: Tensor | None = None


Reader = Callable[[State, Tensor], Changed]  # (a layer's keys, its weight)


def product(up: Tensor, down: Tensor) -> Tensor:
    return up.flatten(1) @ down.flatten(1)


def tucker(core: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """(r, r, k, k), (r, out), (r, in) -> (out, in, k, k)."""
    return torch.einsum("qrkl,qo,ri->oikl", core, a, b)


def kron(w1: Tensor, w2: Tensor) -> Tensor:
    return torch.kron(w1[..., None, None] if w2.dim() == 4 else w1, w2.contiguous())


def column_norms(weight: Tensor) -> Tensor:
    """(1, in[, 1, 1]): of everything that belongs to an input."""
    return weight.transpose(0, 1).flatten(1).norm(dim=1).reshape(1, -1, *[1] * (weight.dim() - 2))


def row_norms(weight: Tensor) -> Tensor:
    return weight.flatten(1).norm(dim=1).reshape(-1, *[1] * (weight.dim() - 1))


def low_rank(state: State) -> Tensor:
    up, down = state["lora_up.weight"], state["lora_down.weight"]
    if "lora_mid.weight" not in state:
        return product(up, down)
    return tucker(state["lora_mid.weight"], up.flatten(1).T, down.flatten(1))


def hada(state: State) -> Tensor:
    halves = []
    for i in "12":
        a, b, core = state[f"hada_w{i}_a"], state[f"hada_w{i}_b"], state.get(f"hada_t{i}")
        halves.append(product(a, b) if core is None else tucker(core, a, b))
    return halves[0] * halves[1]


def lokr(state: State) -> Tensor:
    w1 = state["lokr_w1"] if "lokr_w1" in state else state["lokr_w1_a"] @ state["lokr_w1_b"]
    if "lokr_w2" in state:
        return kron(w1, state["lokr_w2"])
    a, b, core = state["lokr_w2_a"], state["lokr_w2_b"], state.get("lokr_t2")
    return kron(w1, a @ b if core is None else tucker(core, a, b))


def rank_of_lokr(state: State) -> int | None:
    return next((len(state[k]) for k in ("lokr_w2_b", "lokr_w1_b") if k in state), None)


def skew(blocks: Tensor, limit: float) -> Tensor:
    q = blocks - blocks.mT
    norm = q.norm()
    return q * (limit / norm) if limit > 0 and norm > limit else q


def cayley(q: Tensor) -> Tensor:
    eye = torch.eye(q.shape[-1])
    return (eye + q) @ torch.linalg.inv(eye - q)


def turned_by_blocks(turns: Tensor, weight: Tensor) -> Tensor:
    """Each run of rows by the transpose of its block."""
    rows = weight.reshape(len(turns), turns.shape[-1], -1)
    return torch.einsum("knm,kni->kmi", turns, rows).reshape(weight.shape)


def turned_by_butterfly(stages: Tensor, weight: Tensor) -> Tensor:
    """Stage i turns together rows that lie 2^i b/2 apart."""
    out, b = len(weight), stages.shape[-1]
    rows = weight.reshape(out, -1)
    for i, turns in enumerate(stages):
        reach = 2**i * b // 2
        order = torch.arange(out).reshape(-1, 2, reach).transpose(1, 2).flatten()
        moved = torch.einsum("dij,djk->dik", turns, rows[order].reshape(-1, b, rows.shape[1]))
        rows = torch.empty_like(rows).index_copy(0, order, moved.reshape(out, -1))
    return rows.reshape(weight.shape)


# ---------------------------------------------------------------- A1111


def a1111(state: State, weight: Tensor) -> Changed:
    """The first kind that finds its keys has the layer; a layer that none wants fails the whole file."""
    if {"lora_up.weight", "lora_down.weight"} <= state.keys():
        return _a1111(state, weight, low_rank(state), len(state["lora_down.weight"]))
    if {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"} <= state.keys():
        return _a1111(state, weight, hada(state), len(state["hada_w1_b"]))
    if "weight" in state:
        return _a1111_ia3(state, weight)
    if any(key.startswith("lokr_w1") for key in state):
        return _a1111(state, weight, lokr(state), rank_of_lokr(state))
    if "diff" in state:
        return _a1111(state, weight, state["diff"], None)._replace(bias=state.get("diff_b"))
    if {"w_norm", "b_norm"} <= state.keys():  # one alone is no norm there
        return _a1111(state, weight, state["w_norm"], None)._replace(bias=state["b_norm"])
    if {"a1.weight", "a2.weight", "b1.weight", "b2.weight", "alpha"} <= state.keys():
        return _a1111_glora(state, weight)
    if not {"oft_blocks", "oft_diag"}.isdisjoint(state):
        return _a1111_oft(state, weight)
    raise Refused(f"no kind of A1111 wants {sorted(state)}: it refuses the file")


def _a1111(state: State, weight: Tensor, change: Tensor, rank: int | None) -> Changed:
    """alpha/rank where both are known; a magnitude always by input."""
    change = change.reshape(weight.shape)
    if "alpha" in state and rank is not None:
        change = change * (float(state["alpha"]) / rank)
    if "dora_scale" in state:
        merged = weight + change
        change = merged * (state["dora_scale"] / column_norms(merged)) - weight
    return Changed(change)


def _a1111_ia3(state: State, weight: Tensor) -> Changed:
    """Outputs of a convolution are scaled along its kernel: an error that is counted, no more."""
    vector = state["weight"]
    spread = vector if bool(state["on_input"]) else vector.reshape(-1, 1)
    try:
        return Changed((weight * spread).reshape(weight.shape))
    except RuntimeError as problem:
        raise Skipped("a vector along the wrong side") from problem


def _a1111_glora(state: State, weight: Tensor) -> Changed:
    """The factors' names of 2023, and no alpha."""
    a1, a2, b1, b2 = (state[f"{name}.weight"] for name in ("a1", "a2", "b1", "b2"))
    try:
        return Changed(((b2 @ b1) + (weight @ a2) @ a1).reshape(weight.shape))
    except RuntimeError as problem:
        raise Skipped("factors under the names of today") from problem


def _a1111_oft(state: State, weight: Tensor) -> Changed:
    if "oft_blocks" in state:
        limit = float(state.get("alpha", torch.tensor(0.0))) * len(weight)
        turns = cayley(skew(state["oft_blocks"], limit))
    else:
        turns = state["oft_diag"]
    turned = (turned_by_butterfly if turns.dim() == 4 else turned_by_blocks)(turns, weight)
    if "rescale" in state:
        turned = turned * state["rescale"].reshape(-1, *[1] * (weight.dim() - 1))
    return Changed(turned - weight)


# ---------------------------------------------------------------- ComfyUI


def comfyui(state: State, weight: Tensor) -> Changed:
    """Every kind looks for its keys, and the last one found has the layer; a key that none wants is logged."""
    change = bias = None
    for kind in (_comfy_low_rank, _comfy_hada, _comfy_lokr, _comfy_glora, _comfy_oft, _comfy_boft):
        found = kind(state, weight)
        change = change if found is None else found
    if "w_norm" in state:
        change, bias = state["w_norm"], state.get("b_norm")
    change, bias = state.get("diff", change), state.get("diff_b", bias)
    if change is None and bias is None:
        raise Skipped(f"no kind of ComfyUI wants {sorted(state)}: they are logged as not loaded")
    return Changed(torch.zeros_like(weight) if change is None else change.reshape(weight.shape), bias)


def _comfy(state: State, weight: Tensor, change: Tensor, rank: int | None) -> Tensor:
    """A magnitude whose first side is the outputs': divided by |W|, not |W + ΔW|. Of one that is (1, n), by input."""
    change = change.reshape(weight.shape)
    if "alpha" in state and rank is not None:
        change = change * (float(state["alpha"]) / rank)
    if "dora_scale" not in state:
        return change
    magnitude, merged = state["dora_scale"], weight + change
    norms = row_norms(weight) if len(magnitude) == len(weight) else column_norms(merged)
    return merged * (magnitude / (norms + torch.finfo(weight.dtype).eps)) - weight


def _comfy_low_rank(state: State, weight: Tensor) -> Tensor | None:
    if "lora_up.weight" not in state:
        return None
    return _comfy(state, weight, low_rank(state), len(state["lora_down.weight"]))


def _comfy_hada(state: State, weight: Tensor) -> Tensor | None:
    return _comfy(state, weight, hada(state), len(state["hada_w1_b"])) if "hada_w1_a" in state else None


def _comfy_lokr(state: State, weight: Tensor) -> Tensor | None:
    if not any(key.startswith("lokr_") for key in state):
        return None
    return _comfy(state, weight, lokr(state), rank_of_lokr(state))


def _comfy_glora(state: State, weight: Tensor) -> Tensor | None:
    """Today's names (those of 2023 are told by shape; no file of ours has them)."""
    if "a1.weight" not in state:
        return None
    a1, a2, b1, b2 = (state[f"{name}.weight"].flatten(1) for name in ("a1", "a2", "b1", "b2"))
    acted = torch.einsum("oi...,ij->oj...", weight, a1 @ a2)
    return _comfy(state, weight, acted + (b1 @ b2).reshape(weight.shape), len(a2))


def _comfy_oft(state: State, weight: Tensor) -> Tensor | None:
    """|Q| is held within alpha, where its writers mean alpha times the outputs; a rescale is read and not used."""
    if "oft_blocks" not in state or state["oft_blocks"].dim() != 3:
        return None
    turns = cayley(skew(state["oft_blocks"], float(state.get("alpha", torch.tensor(0.0)))))
    return turned_by_blocks(turns - torch.eye(turns.shape[-1]), weight)


def _comfy_boft(state: State, weight: Tensor) -> Tensor | None:
    if "oft_blocks" not in state or state["oft_blocks"].dim() != 4:
        return None
    turned = turned_by_butterfly(cayley(skew(state["oft_blocks"], float(state["alpha"]))), weight)
    return turned * state.get("rescale", torch.tensor(1.0)) - weight


# ---------------------------------------------------------------- InvokeAI


def invokeai(state: State, weight: Tensor) -> Changed:
    """One kind by its keys, a magnitude first; a layer of none of them fails the file. A bias is that of a whole
    difference alone, and a norm's."""
    if "dora_scale" in state:
        if "lora_up.weight" not in state:
            raise Refused("a magnitude is looked for around a plain LoRA alone")
        rank = len(state["lora_down.weight"])
        return Changed(_a1111(state, weight, low_rank(state), rank).weight)  # by input, whatever its shape
    for key, change, rank in (
        ("lora_up.weight", low_rank, lambda: len(state["lora_down.weight"])),
        ("hada_w1_a", hada, lambda: len(state["hada_w1_b"])),
        ("lokr_w1", lokr, lambda: rank_of_lokr(state)),
        ("lokr_w1_a", lokr, lambda: rank_of_lokr(state)),
    ):
        if key in state:
            return _a1111(state, weight, change(state), rank())
    if "diff" in state:
        return Changed(state["diff"].reshape(weight.shape), state.get("diff_b"))
    if "on_input" in state:
        try:
            return _a1111_ia3(state, weight)
        except Skipped as problem:  # nothing catches the error there
            raise Refused(str(problem)) from problem
    if "w_norm" in state:
        return Changed(state["w_norm"], state.get("b_norm"))
    raise Refused(f"no kind of InvokeAI wants {sorted(state)}: it refuses the file")


READERS: dict[str, Reader] = {"A1111": a1111, "ComfyUI": comfyui, "InvokeAI": invokeai}
