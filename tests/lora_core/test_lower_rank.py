"""The shortcuts for large matrices against the whole decomposition."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lora_core.errors import ConfigError
from lora_core.lower_rank import LARGE, best_factors, check_rank, rank_of, svd


def with_spectrum(m: int, n: int, values: Tensor) -> Tensor:
    """A matrix of these singular values, in directions at random."""
    g = torch.Generator().manual_seed(m + n)
    left = torch.linalg.qr(torch.randn(m, len(values), generator=g, dtype=torch.float64)).Q
    right = torch.linalg.qr(torch.randn(n, len(values), generator=g, dtype=torch.float64)).Q
    return ((left * values.double()) @ right.T).float()


SIDE = LARGE + 64
SPECTRA = {
    "low rank": torch.cat([torch.linspace(3, 1, 5), torch.zeros(SIDE - 5)]),
    "decaying": 1 / torch.arange(1, SIDE + 1).float(),
    "flat": torch.linspace(1, 0.5, SIDE),  # nothing to be found: the worst for a search
}


@pytest.mark.parametrize("shape", [(SIDE, 2 * SIDE), (2 * SIDE, SIDE)])
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_the_search_loses_what_the_whole_svd_loses(spectrum: str, shape: tuple[int, int]) -> None:
    values, rank = SPECTRA[spectrum], 12
    dense = with_spectrum(*shape, values)
    down, up = best_factors(dense, rank=rank)
    assert (down.shape, up.shape) == ((rank, shape[1]), (shape[0], rank))
    best = float(values[rank:].square().sum().sqrt())
    error = float((dense - up @ down).norm())
    assert error <= 1.005 * best + 1e-5 * float(dense.norm())


@pytest.mark.parametrize("shape", [(SIDE, 2 * SIDE), (2 * SIDE, SIDE)])
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_by_energy_the_rank_and_the_error_are_those_of_the_whole_svd(
    spectrum: str, shape: tuple[int, int]
) -> None:
    dense = with_spectrum(*shape, SPECTRA[spectrum])
    down, up = best_factors(dense, energy=0.8)
    vh, us, values = svd(dense)
    rank = rank_of(values, 0.8)
    assert len(down) == rank
    assert torch.allclose(up @ down, us[:, :rank] @ vh[:rank], atol=2e-5)


def test_small_matrices_are_decomposed_as_a_whole_and_no_rank_exceeds_theirs() -> None:
    dense = torch.randn(20, 30, generator=torch.Generator().manual_seed(0))
    down, up = best_factors(dense, rank=64)
    assert len(down) == 20
    assert torch.allclose(up @ down, dense, atol=1e-5)


def test_the_same_matrix_gives_the_same_factors_every_time() -> None:
    dense = with_spectrum(SIDE, SIDE, SPECTRA["decaying"])
    before = torch.random.get_rng_state()
    first, second = best_factors(dense, rank=4), best_factors(dense, rank=4)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ((None, None), "rank or energy"),
        ((4, 0.5), "rank or energy"),
        ((0, None), "rank = 0"),
        ((None, 1.5), "energy = 1.5"),
        ((4, None, 0.0), "clamp = 0.0"),
    ],
)
def test_what_makes_no_sense_is_named(given: tuple, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        check_rank(*given)
