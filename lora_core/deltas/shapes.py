"""Whether a change and a weight are of one size."""

from __future__ import annotations

import math
from collections.abc import Iterable


def compatible(found: Iterable[int], expected: Iterable[int]) -> bool:
    """Whether a change of shape `found` fits a weight of shape `expected`. A linear layer and a 1x1
    convolution of the same width are the same matrix."""
    return _matrix(found) == _matrix(expected)


def same_size(found: Iterable[int], expected: Iterable[int]) -> bool:
    """`compatible`, or (out, in*k*k) for (out, in, k, k): all that the factors of a LoHa or LoKr convolution may
    tell."""
    found, expected = tuple(found), tuple(expected)
    return compatible(found, expected) or found == (*expected[:1], math.prod(expected[1:]))


def _matrix(shape: Iterable[int]) -> tuple[int, ...]:
    shape = tuple(shape)
    return shape[:2] if len(shape) == 4 and shape[2:] == (1, 1) else shape
