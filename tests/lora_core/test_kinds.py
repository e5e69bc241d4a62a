"""LoHa and LoKr against LyCORIS, whose forward pass is the truth, and the laws of their forms.

LyCORIS' own merges apply alpha/rank twice, so they are no oracle: its modules' output is. alpha is never the rank,
and no side of a layer is as long as another, so that a factor taken the wrong way round cannot fit.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_core import algebra
from lora_core.deltas import Delta
from lora_core.deltas.hadamard import Hadamard
from lora_core.deltas.kronecker import Kronecker
from lora_core.deltas.low_rank import LowRank
from lora_core.deltas.magnitude import WithMagnitude
from tests.lora_core.adapters_on_disk import LYCORIS_CASES, LYCORIS_LAYERS, read_one, saved, theirs

KEYS = {
    ("loha", "linear"): {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"},
    ("loha tucker", "conv"): {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"},
    ("lokr w2 split", "linear"): {"lokr_w1", "lokr_w2_a", "lokr_w2_b"},
    ("lokr tucker", "conv"): {"lokr_w1", "lokr_w2_a", "lokr_w2_b", "lokr_t2"},
    ("lokr both split", "conv"): {"lokr_w1_a", "lokr_w1_b", "lokr_w2_a", "lokr_w2_b"},
    ("lokr w1 split", "linear"): {"lokr_w1_a", "lokr_w1_b", "lokr_w2"},
    ("lokr whole", "conv"): {"lokr_w1", "lokr_w2"},
}


def output(layer: nn.Linear | nn.Conv2d, x: Tensor, delta: Tensor) -> Tensor:
    weight = layer.weight.detach() + delta
    if isinstance(layer, nn.Linear):
        return F.linear(x, weight, layer.bias)
    return F.conv2d(x, weight, layer.bias, padding=layer.padding)


# ---------------------------------------------------------------- against LyCORIS


@pytest.mark.parametrize("dora", [None, "output", "input"])
@pytest.mark.parametrize("which", LYCORIS_LAYERS)
@pytest.mark.parametrize("case", LYCORIS_CASES)
def test_what_lycoris_saves_is_what_it_computes(
    case: str, which: str, dora: str | None, tmp_path: Path
) -> None:
    options = {} if dora is None else {"weight_decompose": True, "wd_on_out": dora == "output"}
    module, layer, state = theirs(case, which, **options)
    extra = {"alpha"} | ({"dora_scale"} if dora else set())
    if (case, which) in KEYS:  # the case is the one it is called by
        assert {key.partition(".")[2] for key in state} == KEYS[case, which] | extra
    delta = read_one(saved(state, tmp_path), which)
    assert isinstance(delta, WithMagnitude) is (dora is not None)
    x = torch.randn(3, 24) if which == "linear" else torch.randn(2, 24, 5, 6)
    expected = module(x).detach()
    ours = output(layer, x, delta.delta(layer.weight.detach())).detach()
    torch.testing.assert_close(ours, expected, atol=2e-5, rtol=1e-4)
    plain = layer(x).detach()
    assert (expected - plain).abs().max() > 0.05
    if which != "conv 1x1":  # there a matrix is all that most factors tell
        assert delta.shape() == tuple(layer.weight.shape)


@pytest.mark.parametrize("which", ["linear", "conv"])
@pytest.mark.parametrize("case", LYCORIS_CASES)
def test_delta_is_lycoris_functional_one(case: str, which: str, tmp_path: Path) -> None:
    """A second oracle: the functions of its interface, with the scale stated by us: alpha / rank."""
    module, layer, state = theirs(case, which)
    name, functional = (
        LYCORIS_LAYERS[which][0],
        pytest.importorskip(f"lycoris.functional.{LYCORIS_CASES[case][0]}"),
    )
    part = {key.removeprefix(f"{name}."): value for key, value in state.items()}
    scale = float(part["alpha"]) / module.lora_dim
    if case.startswith("loha"):
        names = ["hada_w1_b", "hada_w1_a", "hada_w2_b", "hada_w2_a", "hada_t1", "hada_t2"]
        expected = functional.diff_weight(*(part.get(n) for n in names), gamma=scale)
    else:
        # not its diff_weight, which divides by a rank that it reads from the wrong side of a Tucker factor
        names = [f"lokr_{n}" for n in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")]
        scale = 1.0 if {"lokr_w1", "lokr_w2"} <= set(part) else scale
        expected = functional.kron_weight(*(part.get(n) for n in names), scale=scale)
    expected = expected.reshape(layer.weight.shape)
    delta = read_one(saved(state, tmp_path), which)
    torch.testing.assert_close(delta.delta(layer.weight.detach()), expected, atol=1e-5, rtol=1e-5)


def test_scale_of_a_whole_lokr_is_one_whatever_alpha_says() -> None:
    w1, w2 = torch.randn(2, 3), torch.randn(5, 7)
    for alpha in (0.25, 1.0, 1e6):
        torch.testing.assert_close(
            Kronecker((w1,), (w2,), alpha).delta(torch.zeros(10, 21)), torch.kron(w1, w2)
        )
    split = Kronecker((w1,), (torch.eye(5), w2), alpha=10.0)
    torch.testing.assert_close(split.delta(torch.zeros(10, 21)), 2 * torch.kron(w1, w2))


# ---------------------------------------------------------------- the forms


def hadamard(
    rank: tuple[int, int], *inner: int, tucker: bool = False, dtype: Any = torch.float32
) -> Hadamard:
    g = torch.Generator().manual_seed(sum(inner) + sum(rank))

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g).to(dtype)

    (r1, r2), (out, inn, *k) = rank, inner
    if tucker:
        a, b = [random(r, out) for r in rank], [random(r, inn) for r in rank]
        return Hadamard(a[0], b[0], a[1], b[1], 3.0, random(r1, r1, *k), random(r2, r2, *k))
    return Hadamard(random(out, r1), random(r1, inn, *k), random(out, r2), random(r2, inn, *k), 3.0)


def dense64(delta: Hadamard) -> Tensor:
    """The definition, in fp64, one output at a time."""
    halves = []
    for a, b, t in ((delta.w1_a, delta.w1_b, delta.t1), (delta.w2_a, delta.w2_b, delta.t2)):
        if t is None:
            halves.append(
                torch.stack(
                    [sum(a[o, r].double() * b[r].double() for r in range(len(b))) for o in range(len(a))]
                )
            )
        else:
            halves.append(torch.einsum("pqkl,po,qi->oikl", t.double(), a.double(), b.double()))
    return delta.alpha / len(delta.w1_b) * halves[0] * halves[1]


def assert_relative(ours: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    assert (ours.double() - expected).norm() <= tolerance * expected.norm()
    assert expected.norm() > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "delta",
    [
        hadamard((2, 2), 30, 17),
        hadamard((3, 2), 30, 17),
        hadamard((2, 3), 12, 10, 3, 3),
        hadamard((2, 3), 12, 10, 3, 3, tucker=True),
    ],
    ids=["matrix", "unequal ranks", "kernel", "tucker"],
)
def test_loha_is_a_lora_of_the_product_of_its_ranks(delta: Hadamard, dtype: torch.dtype) -> None:
    delta = delta.to(dtype=dtype)
    expected = dense64(delta)
    assert_relative(delta.delta(torch.zeros(delta.shape())), expected)
    form = delta.low_rank_form()
    assert form is not None
    down, up = form
    assert {down.dtype, up.dtype} == {torch.float32}
    rank = delta.w1_b.shape[0] * delta.w2_b.shape[0]
    assert tuple(down.shape) == (rank, *delta.shape()[1:])
    assert tuple(up.shape) == (delta.shape()[0], rank)
    assert_relative((up @ down.flatten(1)).reshape(expected.shape), expected)


@pytest.mark.parametrize(("rank", "shape", "smaller"), [((3, 3), (20, 20), True), ((2, 5), (20, 20), False)])
def test_no_form_that_is_no_smaller_than_the_weight(
    rank: tuple[int, int], shape: tuple[int, int], smaller: bool
) -> None:
    """20·20/(20+20) = 10: rank 9 is smaller than the weight, rank 10 is as large."""
    form = hadamard(rank, *shape).low_rank_form()
    assert (form is not None) is smaller
    if form is not None:
        assert sum(t.numel() for t in form) < 20 * 20


@pytest.mark.parametrize("kernel", [(), (3, 3)])
def test_low_rank_form_of_a_lora_is_itself(kernel: tuple[int, ...]) -> None:
    low = LowRank(torch.randn(4, 6, *kernel).half(), torch.randn(9, 4, *[1] * len(kernel)).half(), 3.0)
    down, up = low.low_rank_form()
    assert (tuple(down.shape), tuple(up.shape), up.dtype) == ((4, 6, *kernel), (9, 4), torch.float32)
    product = (up.double() @ down.double().flatten(1)).reshape(9, 6, *kernel)
    assert_relative(low.delta(product), product)
    assert WithMagnitude(low, torch.ones(9, 1)).low_rank_form() is None


def kronecker(which: str, kernel: tuple[int, ...] = ()) -> Kronecker:
    torch.manual_seed(5)
    w1 = (torch.randn(4, 2), torch.randn(2, 3)) if "w1 split" in which else (torch.randn(4, 3),)
    if "tucker" in which:
        return Kronecker(w1, (torch.randn(2, 5), torch.randn(2, 7), torch.randn(2, 2, *kernel)), 3.0)
    if "w2 split" in which:
        return Kronecker(w1, (torch.randn(5, 2), torch.randn(2, 7, *kernel)), 3.0)
    return Kronecker(w1, (torch.randn(5, 7, *kernel),), 3.0)


@pytest.mark.parametrize(
    ("which", "kernel"),
    [
        *((which, ()) for which in ("whole", "w1 split", "w2 split", "w1 split, w2 split")),
        *((which, (3, 3)) for which in ("whole", "w2 split", "w1 split, w2 split", "w1 split, tucker")),
    ],
)
def test_kron_form_is_the_weight_and_applies_by_reshape(which: str, kernel: tuple[int, ...]) -> None:
    delta = kronecker(which, kernel)
    left, right = delta.kron_form()
    assert {left.dtype, right.dtype} == {torch.float32}
    assert (tuple(left.shape), tuple(right.shape)) == ((4, 3), (5, 7, *kernel))
    # the definition by blocks, in fp64: block (i, j) of the weight is left[i, j] · right
    blocks = [torch.cat([c * right.double() for c in row], dim=1) for row in left.double()]
    expected = torch.cat(blocks)
    assert delta.shape() == tuple(expected.shape)
    assert_relative(delta.delta(expected), expected)
    assert delta.low_rank_form() is None
    if kernel:
        x = torch.randn(2, 21, 6, 6, dtype=torch.float64)
        each = F.conv2d(x.reshape(2 * 3, 7, 6, 6), right.double()).reshape(2, 3, 5, 4, 4)
        ours = torch.einsum("oi,niphw->nophw", left.double(), each).reshape(2, 20, 4, 4)
        assert_relative(ours, F.conv2d(x, expected))
    else:
        x = torch.randn(6, 21, dtype=torch.float64)
        ours = (left.double() @ (x.reshape(6, 3, 7) @ right.double().T)).reshape(6, 20)
        assert_relative(ours, x @ expected.T)


def test_a_flattened_kernel_is_the_same_weight() -> None:
    """What other programs store, without a name that tells the layer is a convolution."""
    for delta in (kronecker("w2 split", (3, 3)), hadamard((2, 2), 12, 10, 3, 3)):
        b = {n: t.flatten(1) if n in ("w1_b", "w2_b") else t for n, t in delta.tensors().items()}
        like = torch.zeros(delta.shape())
        flat = type(delta).from_tensors(b)
        assert flat.shape() == (like.shape[0], like[0].numel())
        torch.testing.assert_close(flat.delta(like), delta.delta(like))


def test_magnitude_around_any_kind() -> None:
    weight, inner = torch.randn(20, 21), kronecker("whole")
    magnitude = torch.rand(20, 1) + 0.5
    v = weight + torch.kron(*inner.kron_form())
    expected = magnitude * v / v.norm(dim=1, keepdim=True) - weight
    worn = WithMagnitude(inner, magnitude)
    torch.testing.assert_close(worn.delta(weight), expected)
    assert (worn.shape(), worn.alpha) == ((20, 21), 3.0)
    assert worn.rank == 1
    assert isinstance(worn, Delta)


def test_tensors_and_back_and_dtype() -> None:
    for delta in (
        hadamard((2, 2), 6, 5, 3, 3, tucker=True),
        kronecker("w1 split, tucker", (3, 3)),
        kronecker("whole"),
    ):
        assert isinstance(delta, Delta)
        like = torch.zeros(delta.shape())
        again = type(delta).from_tensors(delta.tensors())
        assert torch.equal(again.delta(like), delta.delta(like))
        half = delta.to(dtype=torch.float16)
        assert {t.dtype for n, t in half.tensors().items() if n != "alpha"} == {torch.float16}
        assert half.delta(like).dtype == torch.float32
        torch.testing.assert_close(half.delta(like), delta.delta(like), atol=0.05, rtol=0.01)


def test_algebra_takes_what_files_have() -> None:
    g = torch.Generator().manual_seed(0)
    a, b, c, d = (torch.randn(*s, generator=g) for s in ((6, 2), (2, 5), (6, 3), (3, 5)))
    torch.testing.assert_close(algebra.hadamard(a, b, c, d, scale=0.5), 0.5 * (a @ b) * (c @ d))
    torch.testing.assert_close(algebra.kronecker(a, d, scale=0.5), 0.5 * torch.kron(a, d))
    assert algebra.kronecker(a.half(), d.half(), scale=1.0).dtype == torch.float32
