"""Pairs of factors as LyCORIS stores them, with or without a Tucker core: what LoHa and LoKr are made of."""

from __future__ import annotations

from torch import Tensor


def product_shape(a: Tensor, b: Tensor, core: Tensor | None = None) -> tuple[int, ...]:
    """The shape of what a and b make (see algebra.down_and_up): (out, in[, k, k])."""
    out, spatial = (a.shape[0], b.shape[2:]) if core is None else (a.shape[1], core.shape[2:])
    return (int(out), int(b.shape[1]), *(int(k) for k in spatial))


def check_product(a: Tensor, b: Tensor, core: Tensor | None = None) -> None:
    """ValueError, less its subject, for factors that cannot be multiplied."""
    shapes = " and ".join(str(tuple(t.shape)) for t in (a, b, core) if t is not None)
    rank = b.shape[0] if b.dim() else 0
    if core is None:
        fits, expected = (
            a.dim() == 2 and b.dim() in (2, 4) and a.shape[1] == rank,
            "(out, r) and (r, in[, k, k])",
        )
    else:
        fits = (
            a.dim() == b.dim() == 2
            and a.shape[0] == rank
            and core.dim() == 4
            and core.shape[:2] == (rank, rank)
        )
        expected = "(r, out), (r, in) and (r, r, k, k)"
    if not fits or rank == 0:
        raise ValueError(f"factors of shape {shapes} were found where {expected} were expected")
