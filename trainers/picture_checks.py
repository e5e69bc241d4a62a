"""What is wrong with single pictures and between them: twins, near twins, blur."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image

NEAR = 3  # bits of 64: a resized or recompressed copy differs in 0 to 3, photographs of one subject in 13 and more
MARGIN = 2  # grey levels: noise on an even background is no edge
BLURRED = (
    20.0  # photographs have 110 to 1500; blurred by 3 pixels they have 1 to 4, enlarged fourfold 3 to 18
)


def perceptual_hash(image: Image.Image) -> int:
    """64 bits that stay much the same when a picture is resized, recompressed or made lighter (dHash): in 9 x 8 grey
    pixels, where the right neighbour is the lighter one. (pHash was tried: where a picture is symmetric its odd cosines
    are rounding noise, and ten bits of a recompressed copy were others.)"""
    grey = np.asarray(image.convert("L").resize((9, 8), Image.Resampling.LANCZOS), np.int64)
    bits = (grey[:, 1:] > grey[:, :-1] + MARGIN).flatten()
    return int(sum(1 << i for i, bit in enumerate(bits) if bit))


def alike(hashes: Sequence[int], near: int = NEAR) -> list[list[int]]:
    """Groups of two and more whose hashes differ in at most `near` bits, by index; a chain is one group."""
    codes = np.array(hashes, np.uint64)
    group = list(range(len(hashes)))

    def root(i: int) -> int:
        while group[i] != i:
            i = group[i]
        return i

    for i, code in enumerate(codes):
        for j in np.flatnonzero(np.bitwise_count(codes[:i] ^ code) <= near):
            group[root(i)] = root(int(j))
    found: dict[int, list[int]] = {}
    for i in range(len(hashes)):
        found.setdefault(root(i), []).append(i)
    return [members for members in found.values() if len(members) > 1]


def sharpness(image: Image.Image) -> float:
    """Variance of the Laplacian of its grey values, 0 to 255, at about 512 x 512 pixels if there are as many: what is
    blurred has few edges."""
    scale = min(1.0, 512 / (image.width * image.height) ** 0.5)
    size = max(3, round(image.width * scale)), max(3, round(image.height * scale))
    grey = np.asarray(image.convert("L").resize(size, Image.Resampling.LANCZOS), np.float64)
    middle = grey[1:-1, 1:-1]
    laplacian = grey[:-2, 1:-1] + grey[2:, 1:-1] + grey[1:-1, :-2] + grey[1:-1, 2:] - 4 * middle
    return float(laplacian.var())
