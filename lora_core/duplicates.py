"""Files that are one LoRA, whatever they are called and whatever they say of themselves."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from lora_core.formats.files import describe_adapter
from lora_core.formats.writing import ranks_and_alphas
from lora_core.looking import Look
from lora_core.safe_files import hashes_of

Digest = Callable[[Look], str]


def likeness(found: Look) -> object:
    """Of a LoRA, equal for all that may be the same one: the headers list the same tensors, the alphas are as many."""
    assert found.facts is not None
    layout = tuple(tuple(header.tensors.items()) for header in found.headers)
    return layout, tuple(found.facts.alphas.items())


def digest_of(found: Look) -> str:
    """SHA-256 of the tensors."""
    return (found.hashes or hashes_of(found.headers)).tensors


def duplicates(looks: Iterable[Look], digest: Digest = digest_of) -> list[tuple[Look, ...]]:
    """Those of these files that are one LoRA: groups of two or more. What is none is in no group.

    Only files alike by their headers are read, by `digest`. Alphas may stand in metadata or beside a file: they count.
    """
    groups = _shared((likeness(found), found) for found in looks if found.facts)
    for key in (digest, _alphas):
        groups = [same for group in groups for same in _shared((key(found), found) for found in group)]
    return [tuple(group) for group in groups]


def _alphas(found: Look) -> object:
    """Which layer has which."""
    return tuple(sorted(ranks_and_alphas(describe_adapter(found.path, found.headers).deltas)[1].items()))


def _shared(pairs: Iterable[tuple[object, Look]]) -> list[list[Look]]:
    groups: dict[object, list[Look]] = {}
    for key, found in pairs:
        groups.setdefault(key, []).append(found)
    return [group for group in groups.values() if len(group) > 1]
