"""The kinds of change a layer can have in a file: each tells itself by its factors, is read and is stored.

alpha, a magnitude and the change of a bias may stand beside factors: they are the reader's (assembly), and each kind
says which of them mean something to it.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from lora_core.deltas import Delta
from lora_core.formats.factor_kinds import LoHa, LoKr, LoRA
from lora_core.formats.layer import Kind, Readable
from lora_core.formats.other_kinds import IA3, OFT, GLoRA, Itself, Whole

KINDS: tuple[Kind, ...] = (LoRA(), LoHa(), LoKr(), GLoRA(), OFT(), Whole(), IA3(), Itself())


def kind_of_roles(roles: Collection[str], kinds: Sequence[Readable] = KINDS) -> Readable | None:
    return next((kind for kind in kinds if kind.recognises(roles)), None)


def kind_of_delta(delta: Delta | None) -> Kind | None:
    """`delta` without its magnitude and its bias."""
    return next((kind for kind in KINDS if isinstance(delta, kind.delta)), None)
