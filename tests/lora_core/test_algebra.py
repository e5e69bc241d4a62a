"""The formulas against loops and dense matrices."""

import pytest
import torch
from torch.nn import functional as F

from lora_core import algebra


def factors(
    out: int, inn: int, rank: int, kernel: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(out * 7 + inn * 3 + rank + kernel)
    tail, ones = ((kernel, kernel), (1, 1)) if kernel else ((), ())
    weight = torch.randn(out, inn, *tail, generator=g)
    return weight, torch.randn(rank, inn, *tail, generator=g), torch.randn(out, rank, *ones, generator=g)


def test_low_rank_equals_loops() -> None:
    _, down, up = factors(5, 4, 2)
    got = algebra.low_rank(down, up, scale=1.5)
    for o in range(5):
        for i in range(4):
            assert got[o, i].item() == pytest.approx(
                1.5 * sum(float(up[o, r] * down[r, i]) for r in range(2)), rel=1e-5
            )


def test_convolution_delta_equals_two_convolutions() -> None:
    weight, down, up = factors(6, 4, 3, kernel=3)
    x = torch.randn(2, 4, 9, 9)
    dense = F.conv2d(x, algebra.low_rank(down, up, scale=0.7), padding=1, stride=2)
    twice = 0.7 * F.conv2d(F.conv2d(x, down, padding=1, stride=2), up)
    torch.testing.assert_close(dense, twice, rtol=1e-5, atol=1e-5)
    assert dense.shape[1] == weight.shape[0]


def test_tucker_core_composes_exactly() -> None:
    down, mid, up = torch.randn(3, 4, 1, 1), torch.randn(3, 3, 3, 3), torch.randn(6, 3, 1, 1)
    x = torch.randn(2, 4, 8, 8)
    three = F.conv2d(F.conv2d(F.conv2d(x, down), mid, padding=1), up)
    composed = F.conv2d(x, algebra.low_rank(down, up, mid, scale=1.0), padding=1)
    torch.testing.assert_close(composed, three, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kernel", [0, 3])
def test_factored_row_norms_equal_dense(kernel: int) -> None:
    weight, down, up = factors(40, 24, 4, kernel)
    dense = (weight + algebra.low_rank(down, up, scale=0.3)).flatten(1).double().norm(dim=1)
    got = algebra.row_norms(weight, down, up, scale=0.3)
    torch.testing.assert_close(got.double(), dense, rtol=1e-5, atol=0)


@pytest.mark.parametrize("on_gpu", [False, True])
def test_row_norms_where_the_terms_cancel(on_gpu: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """V = W + s B A with B A = -0.999 W/s in some rows: the factored sum alone is wrong there by percents."""
    if on_gpu:  # as it is computed there: without asking whether any row cancels, the nearest 8 densely
        monkeypatch.setattr(algebra, "_with_dense", lambda *given: algebra._with_nearest_dense(*given[:3]))
    torch.manual_seed(0)
    down = torch.randn(4, 64)
    rows = torch.randn(32, 4)
    weight = rows @ down + 1e-3 * torch.randn(32, 64)
    up = torch.zeros(32, 4)
    up[::4] = -rows[::4] * 0.9999
    dense = (weight.double() + up.double() @ down.double()).norm(dim=1)
    got = algebra.row_norms(weight, down, up, scale=1.0)
    torch.testing.assert_close(got.double(), dense, rtol=1e-3, atol=0)


@pytest.mark.parametrize("shape", [(8,), (8, 1), (8, 1, 1, 1), (1, 8, 1, 1), (1, 6), (1, 6, 1, 1)])
@pytest.mark.parametrize("kernel", [(), (1, 1), (3, 3)])
def test_dora_magnitude_of_the_weight_itself_changes_nothing(
    shape: tuple[int, ...], kernel: tuple[int, ...]
) -> None:
    """Whether a magnitude was written beside a matrix or a convolution."""
    weight = torch.randn(8, 6, *kernel)
    along = 1 if shape[:2] == (1, 6) else 0
    over = [d for d in range(weight.dim()) if d != along]
    magnitude = torch.linalg.vector_norm(weight, dim=over).reshape(shape)
    assert algebra.dora_delta(weight, torch.zeros_like(weight), magnitude).abs().max() < 1e-6


def test_magnitude_that_fits_no_axis_is_an_error() -> None:
    for shape in ((5,), (), (6,), (2, 4), (4, 2), (1, 1, 8), (6, 1)):
        with pytest.raises(ValueError, match="fits neither"):
            algebra.magnitude_axis(torch.ones(shape), torch.Size((8, 6)))
    # on a square layer what stands first decides
    assert algebra.magnitude_axis(torch.ones(8, 1, 1, 1), torch.Size((8, 8))) == 0
    assert algebra.magnitude_axis(torch.ones(1, 8, 1, 1), torch.Size((8, 8))) == 1


@pytest.mark.parametrize("kernel", [0, 3])
def test_gram_inner_equals_dense(kernel: int) -> None:
    _, down1, up1 = factors(40, 24, 4, kernel)
    _, down2, up2 = factors(40, 24, 7, kernel)
    one, other = algebra.low_rank(down1, up1, scale=1.0), algebra.low_rank(down2, up2, scale=1.0)
    got = algebra.gram_inner(down1, up1, down2, up2)
    assert got.dtype == torch.float32
    assert got.item() == pytest.approx(float((one.double() * other.double()).sum()), rel=1e-5)
    norm = algebra.gram_inner(down1, up1, down1, up1)
    assert norm.item() == pytest.approx(float(one.double().square().sum()), rel=1e-5)


def test_gram_inner_where_the_loras_cancel() -> None:
    _, down, up = factors(320, 320, 8)
    whole = algebra.gram_inner(down, up, down, up).item()
    stacked = torch.cat([down, down, down]), torch.cat([0.7 * up, 0.3 * up, -up], dim=1)
    assert abs(algebra.gram_inner(*stacked, *stacked).item()) < 1e-12 * whole
