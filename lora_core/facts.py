"""What is known of a LoRA: of itself (Facts), and of it on a model (Coverage).

Both are the same whether the LoRA was read, described by a header (formats.describe_adapter) or made in memory.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from torch import nn

from lora_core.adapter import COMPONENTS, Adapter
from lora_core.deltas import Delta
from lora_core.deltas.bias import WithBias
from lora_core.deltas.magnitude import WithMagnitude
from lora_core.errors import LoraError
from lora_core.families import Family, Told, check_belongs, family_of_adapter
from lora_core.formats.files import headers_of
from lora_core.formats.kinds import kind_of_delta
from lora_core.formats.writing import ranks_and_alphas
from lora_core.plain_text import plain
from lora_core.replication import Stacks, all_standing
from lora_core.safe_files import Hashes, hashes_of
from lora_core.unet_blocks import block_of


@dataclass(frozen=True)
class Facts:
    """What a LoRA is made of. Every table counts layers but `dtypes`, which counts tensors; the commonest goes first.

    told_by      what shows the family
    blocks       by names as weights have them, behind the component: unet.down.1; what lies in no block counts under
                 its component
    kinds        LoRA, DoRA (a LoRA with a magnitude), LoHa, ...
    ranks        of the layers that have one
    words        new word -> its number of vectors
    not_finite   the tensors that hold NaN or Inf; None where nobody has looked
    """

    family: str | None
    told_by: str
    layers: int
    components: dict[str, int]
    blocks: dict[str, int]
    kinds: dict[str, int]
    ranks: dict[int, int]
    alphas: dict[float, int]
    dtypes: dict[str, int]
    words: dict[str, int] = field(default_factory=dict)
    not_finite: tuple[str, ...] | None = None

    @classmethod
    def of(cls, adapter: Adapter, *, not_finite: tuple[str, ...] | None = None) -> Facts:
        told = Told(adapter.family, adapter.told_by) if adapter.told_by else family_of_adapter(adapter)
        ranks, alphas = ranks_and_alphas(adapter.deltas)
        # what has no dimension is a setting, which no file has to store
        tensors = [t for delta in adapter.deltas.values() for t in delta.tensors().values() if t.dim()]
        tensors += [rows for parts in adapter.embeddings.values() for rows in parts.values()]
        return cls(
            *told,
            layers=len(adapter.deltas),
            components=_sorted(map(component_of, adapter.deltas)),
            blocks=_sorted(map(place_of, adapter.deltas)),
            kinds=counted(map(kind_name, adapter.deltas.values())),
            ranks=counted(ranks.values()),
            alphas=counted(alphas.values()),
            dtypes=counted(str(tensor.dtype).removeprefix("torch.") for tensor in tensors),
            words={word: max(map(len, parts.values())) for word, parts in adapter.embeddings.items()},
            not_finite=not_finite,
        )

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Coverage:
    """What became of a LoRA's layers on a model. `matched == total` and no `unused` means: all of it is in use.

    by_component, by_block    (matched, total); blocks as in Facts
    unused                    keys that say nothing we know, and layers that the model has not
    words                     new ones, that prompts may use
    """

    matched: int
    total: int
    unused: tuple[str, ...]
    family: str | None
    by_component: dict[str, tuple[int, int]]
    words: tuple[str, ...]
    by_block: dict[str, tuple[int, int]]
    facts: Facts
    file: Path | None = None

    @classmethod
    def of(
        cls,
        adapter: Adapter,
        layers: Container[str],
        *,
        file: Path | None = None,
        not_finite: tuple[str, ...] | None = None,
    ) -> Coverage:
        """`layers`: the adapter's paths that exist on the model. `file`: what it was read from."""
        facts = Facts.of(adapter, not_finite=not_finite)
        present = [path for path in adapter.deltas if path in layers]
        absent = tuple(path for path in adapter.deltas if path not in layers)
        components, blocks = Counter(map(component_of, present)), Counter(map(place_of, present))
        return cls(
            matched=len(present),
            total=len(adapter.deltas),
            unused=(*adapter.unused, *absent),
            family=facts.family,
            by_component={name: (components[name], total) for name, total in facts.components.items()},
            words=tuple(adapter.embeddings),
            by_block={name: (blocks[name], total) for name, total in facts.blocks.items()},
            facts=facts,
            file=file,
        )

    def hashes(self) -> Hashes:
        """Of the file as it lies there now, read for it. Raises LoraError for a LoRA that came from no file."""
        if self.file is None:
            raise LoraError("This LoRA was made in memory and has no file to be hashed. Save it first.")
        return hashes_of(headers_of(self.file))

    def as_json(self) -> dict[str, Any]:
        return asdict(self) | {"file": self.file and str(self.file), "facts": self.facts.as_json()}

    def __str__(self) -> str:
        parts = ", ".join(f"{c} {m} of {n}" for c, (m, n) in self.by_component.items())
        tail = f"; not used: {', '.join(plain(key, 200) for key in self.unused)}" if self.unused else ""
        words = f"new words: {', '.join(self.words)}" if self.words else ""
        layers = f"{self.matched} of {self.total} layers ({parts})" if self.total else ""
        return "; ".join(filter(None, (layers, words))) + tail


def coverage_on(adapter: Adapter, models: Mapping[str, nn.Module], family: Family) -> Coverage:
    """What models of these components (on any device, meta too) would use of `adapter`, which may be described by its
    header alone. Nothing is loaded. Raises WrongFamily as loading does."""
    stacks = Stacks(models).wanted(adapter.name, adapter.metadata, list(adapter.deltas))
    with all_standing(stacks):
        return Coverage.of(adapter, check_belongs(adapter, models, family))


def kind_name(delta: Delta) -> str:
    """A kind's name with what stands around it: LoRA, DoRA, LoHa + DoRA, LoRA + bias, bias."""
    change, bias = (delta.inner, ["bias"]) if isinstance(delta, WithBias) else (delta, [])
    inner, dora = (change.inner, ["DoRA"]) if isinstance(change, WithMagnitude) else (change, [])
    if inner is None:
        return "bias"
    kind = kind_of_delta(inner)
    name = type(inner).__name__ if kind is None else kind.name
    return " + ".join([*([] if dora and name == "LoRA" else [name]), *dora, *bias])


def component_of(path: str) -> str:
    return path.partition(".")[0]


@lru_cache(maxsize=2**14)  # of a thousand files most have the same layers
def place_of(path: str) -> str:
    """unet.down_blocks.1.attentions.0.proj_in -> unet.down.1; the component alone for what lies in no block."""
    component, _, inside = path.partition(".")
    block = block_of(inside) if component == "unet" else ""
    return f"{component}.{block}" if block else component


def counted(things: Iterable[Any]) -> dict[Any, int]:
    return dict(Counter(things).most_common())


def _sorted(places: Iterable[str]) -> dict[str, int]:
    counts = Counter(places)
    return {place: counts[place] for place in sorted(counts, key=_from_input)}


def _from_input(place: str) -> tuple[int, int, int]:
    """A picture's way through the UNet: down, mid, up; what is in no block first."""
    component, _, block = place.partition(".")
    side, _, number = block.partition(".")
    order = (*COMPONENTS, component).index(component)
    return order, ("", "down", "mid", "up").index(side), int(number or 0)
