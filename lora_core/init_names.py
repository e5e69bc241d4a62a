"""Names of the beginnings that are taken from the base's weights: known to configs, which load no torch."""

from __future__ import annotations

import re

FROM_BASE = ("pissa", "pissa_niter_4", "pissa_niter_16", "olora", "loftq")
_PISSA = re.compile(r"pissa_niter_(\d+)")


def is_from_base(init: str) -> bool:
    """Whether an `init` of LoraConfig is one of these; pissa_niter_k for any k."""
    return init in FROM_BASE or pissa_iterations(init) is not None


def pissa_iterations(init: str) -> int | None:
    """The k of "pissa_niter_k"; None for any other."""
    found = _PISSA.fullmatch(init)
    return int(found[1]) if found else None
