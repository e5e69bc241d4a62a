"""What PEFT's methods other than LoRA store of a layer, read as the kinds they are.

hada_w1_a, …           LoHa: as LyCORIS has it
lokr_w1, …             LoKr: the same keys, but alpha/r scales it where both factors are whole too
ia3_l                  (IA)³: l = 1 + v, (out, 1) or (1, in), of a convolution (1, n, 1, 1); with the outputs l scales
                       the layer's bias as well
oft_R.weight           OFT: (k, b (b - 1) / 2), what stands above the diagonals of Q; R turns the inputs, W' = W Rᵀ
boft_R, boft_s         BOFT: (m, k, b, b) and s (out, 1), of a convolution (1, out); W' = s ∘ W Rᵀ

R is found while reading, as PEFT computes it (0.21), and kept as blocks: a butterfly of m stages of b is block-diagonal
in blocks of 2^(m-1) b.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lora_core.adapter import is_finite
from lora_core.deltas import Delta
from lora_core.deltas.bias import WithBias
from lora_core.deltas.ia3 import Scaling
from lora_core.deltas.kronecker import Kronecker
from lora_core.deltas.oft import Rotation
from lora_core.errors import FileRefused, NotFinite
from lora_core.formats.factor_kinds import LoHa, LoKr, LoRA
from lora_core.formats.keys import kernel_of
from lora_core.formats.layer import Layer, Readable
from lora_core.formats.other_kinds import Itself
from lora_core.formats.peft_config import ByPattern, in_config, number, plain_paths

Config = Mapping[str, Any]
_WIDEST = 5120  # inputs of SDXL's ff.net.2
_LARGEST_BUTTERFLY = (
    512  # few stages of small blocks make fewer; many would be a dense matrix out of a small file
)
_MOST_TERMS = 64  # of a series whose terms shrink


class _LoKr(LoKr):
    def __init__(self, config: Config, where: str) -> None:
        self._alphas = ByPattern.alphas(config, where)
        self._ranks = ByPattern(config.get("r", 8), config.get("rank_pattern"), "r", where)

    def read(self, layer: Layer) -> Delta:
        delta = super().read(layer)
        if not isinstance(delta, Kronecker) or len(delta.w1) + len(delta.w2) > 2:
            return delta
        path = in_config(layer.path.partition(".")[2])
        scale = self._alphas.of(path) / self._ranks.of(path)
        return replace(delta, w1=(delta.w1[0].float() * scale,))


class _IA3:
    name = "(IA)³"
    roles: Mapping[str, str] = {"ia3_l": "ia3_l"}
    beside = frozenset[str]()

    def __init__(self, config: Config, where: str) -> None:
        self._feedforward = plain_paths(config.get("feedforward_modules") or [], where, "feedforward_modules")

    def recognises(self, roles: Collection[str]) -> bool:
        return "ia3_l" in roles

    def read(self, layer: Layer) -> Delta:
        scale = layer.factor("ia3_l").float()
        path = f".{in_config(layer.path.partition('.')[2])}"
        on_input = any(path.endswith(f".{name}") for name in self._feedforward)
        vector = scale - 1 if scale.dim() == 4 else scale.reshape(-1) - 1
        try:
            change = Scaling(vector, on_input)
        except ValueError as problem:
            raise layer.refused("ia3_l", problem) from problem
        return change if on_input else WithBias(change, vector.reshape(-1), "factor")


class _OFT:
    name = "OFT"
    roles: Mapping[str, str] = {"oft_R.weight": "oft_R"}
    beside = frozenset[str]()

    def __init__(self, config: Config, where: str) -> None:
        neumann = config.get("use_cayley_neumann") is True
        if neumann and _version(config) < (0, 18):
            raise FileRefused(
                f"{where} has use_cayley_neumann of a PEFT before 0.18, which turned otherwise than PEFT does today. "
                "Train it anew, or merge it with that PEFT."
            )
        if config.get("block_share") is True:
            raise FileRefused(
                f"{where} has block_share: one block for all of a layer, which this version cannot read. Merge it with "
                "PEFT and extract a LoRA."
            )
        terms = number(config.get("num_cayley_neumann_terms", 5), "num_cayley_neumann_terms", where)
        self._terms = max(1, min(int(terms), _MOST_TERMS)) if neumann else 0
        eps = number(config.get("eps", 6e-5), "eps", where)
        self._limit = eps if config.get("coft") is True else 0.0

    def recognises(self, roles: Collection[str]) -> bool:
        return "oft_R" in roles

    def read(self, layer: Layer) -> Delta:
        above = _finite(layer, "oft_R")
        b = (1 + math.isqrt(1 + 8 * max((0, *above.shape[1:])))) // 2
        if above.dim() != 2 or 0 in above.shape or b * (b - 1) // 2 != above.shape[1]:
            raise layer.refused(
                "oft_R",
                f"a tensor of shape {tuple(above.shape)} was found where (k, b (b - 1) / 2) was expected",
            )
        if kernel_of(layer.path) > 1:
            raise layer.refused(
                "oft_R",
                "PEFT's OFT of a 3x3 convolution changes what the layer does otherwise than a weight could",
            )
        if b > _WIDEST:
            raise layer.refused(
                "oft_R", f"blocks of {b:,} were found where no layer has more than {_WIDEST:,} inputs"
            )
        q = torch.zeros(len(above), b, b, device=above.device)
        rows, columns = torch.triu_indices(b, b, 1)
        q[:, rows, columns] = above
        q = q - q.transpose(1, 2)
        if self._limit:
            size = torch.linalg.matrix_norm(q).clamp(min=1e-30)
            q = q * (self._limit / len(q) ** 0.5 / size).clamp(max=1)[:, None, None]
        turns = _neumann(q, self._terms) if self._terms else _cayley(q)
        return Rotation(turns.transpose(1, 2).contiguous(), skew=False, on_input=True)


class _BOFT:
    name = "BOFT"
    roles: Mapping[str, str] = {"boft_R": "boft_R", "boft_s": "boft_s"}
    beside = frozenset[str]()

    def recognises(self, roles: Collection[str]) -> bool:
        return not set(self.roles.values()).isdisjoint(roles)

    def read(self, layer: Layer) -> Delta:
        layer.require("boft_R", "boft_s")
        data, rescale = _finite(layer, "boft_R"), layer.factor("boft_s").float()
        shape = tuple(data.shape)
        group = 2 ** (shape[0] - 1) if shape and shape[0] < 16 else 0
        if len(shape) != 4 or 0 in shape or shape[2] != shape[3] or not group or shape[1] % group:
            raise layer.refused(
                "boft_R",
                f"a tensor of shape {shape} was found where m stages of blocks (m, k, b, b) were expected",
            )
        if group > 1 and shape[3] % 2:
            raise layer.refused("boft_R", f"blocks of {shape[3]} were found where a butterfly has even ones")
        if shape[3] > _WIDEST or (group > 1 and group * shape[3] > _LARGEST_BUTTERFLY):
            raise layer.refused(
                "boft_R",
                f"blocks of {group * shape[3]:,} were found where at most {_LARGEST_BUTTERFLY:,} are read",
            )
        turns = _cayley((data - data.transpose(2, 3)) / 2)
        if group > 1:
            turns = _butterfly(turns)[None]
        return Rotation(
            turns[0].transpose(1, 2).contiguous(), rescale=rescale.reshape(-1, 1), skew=False, on_input=True
        )


def kinds_of(config: Config, where: str) -> Sequence[Readable]:
    """The kinds that a method's files hold, beside modules that are saved whole. Raises FileRefused for a method that
    this version does not read."""
    method = str(config.get("peft_type", "LORA"))
    if method not in METHODS:
        raise FileRefused(
            f"{where} says {method[:40]}: not supported by this version, which reads {', '.join(METHODS)} adapters of "
            "PEFT. Merge it with PEFT and extract a LoRA."
        )
    return (METHODS[method](config, where), Itself())


METHODS: dict[str, Callable[[Config, str], Readable]] = {
    "LORA": lambda config, where: LoRA(),
    "LOHA": lambda config, where: LoHa(),
    "LOKR": _LoKr,
    "IA3": _IA3,
    "OFT": _OFT,
    "BOFT": lambda config, where: _BOFT(),
}
OWN_ROLES = {ending: role for kind in (_IA3, _OFT, _BOFT) for ending, role in kind.roles.items()}


def _finite(layer: Layer, role: str) -> Tensor:
    """fp32. NotFinite here and not later: what is computed from it would raise, or hide it."""
    tensor = layer.factor(role).float()
    if not tensor.is_meta and not is_finite(tensor):
        raise NotFinite(
            f"{layer.file}, {layer.keys[role]}: values that are NaN or infinite. A LoRA must be finite: this one was "
            "damaged in training. Use an earlier checkpoint of it."
        )
    return tensor


def _cayley(q: Tensor) -> Tensor:
    """(I - Q) (I + Q)^-1, of each block."""
    eye = torch.eye(q.shape[-1], device=q.device).expand(q.shape)
    # I + Q has an inverse for every skew Q, but not for numbers beyond fp32's digits: that R is not finite, and said so
    found: Tensor = torch.linalg.solve_ex(eye + q, eye - q, left=False)[0]
    return found


def _neumann(q: Tensor, terms: int) -> Tensor:
    """(I + Q) (I - Q)^-1 as a series, 1 + 2 Q + 2 Q² + ..., whose last power counts once; of 3 terms PEFT makes 4."""
    power = torch.eye(q.shape[-1], device=q.device).expand(q.shape)
    total, last = power, terms - 1 if terms != 3 else 3
    for n in range(1, last + 1):
        power = power @ q
        total = total + power * (1 if n == last and terms > 2 else 2)
    return total


def _butterfly(stages: Tensor) -> Tensor:
    """(m, k, b, b) -> its product as blocks (k / 2^(m-1), 2^(m-1) b, ...). Stage i stands between two permutations that
    part the evens and the odds of what lies in its groups of 2^i b."""
    m, k, b, _ = stages.shape
    size = 2 ** (m - 1) * b
    total = torch.eye(size, device=stages.device)
    for i, blocks in enumerate(stages):
        wide = _block_diagonal(blocks.reshape(k * b // size, size // b, b, b))
        order = _parted(size, 2**i * b, b // 2).to(stages.device)
        total = wide[:, order[:, None], order[None, :]] @ total
    return total


def _block_diagonal(blocks: Tensor) -> Tensor:
    """(n, c, b, b) -> (n, c b, c b)."""
    n, c, b, _ = blocks.shape
    wide = torch.zeros(n, c, b, c, b, device=blocks.device)
    for i in range(c):
        wide[:, i, :, i, :] = blocks[:, i]
    return wide.reshape(n, c * b, c * b)


def _parted(size: int, group: int, step: int) -> Tensor:
    """Of `size` numbers in groups, each group's runs of `step` numbers with the even runs first."""
    runs = torch.arange(size).reshape(size // group, group // step, step)
    return torch.cat((runs[:, 0::2], runs[:, 1::2]), dim=1).reshape(-1)


def _version(config: Config) -> tuple[int, int]:
    first, second, *_ = [*str(config.get("peft_version", "0.0")).partition("@")[0].split("."), "0", "0"]
    return (int(first) if first.isdigit() else 0, int(second) if second.isdigit() else 0)
