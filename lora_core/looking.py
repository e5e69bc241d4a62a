"""look: what lies in a LoRA file, from its header, in milliseconds for files of any size.

What is no LoRA, or cannot be read, is looked at all the same: `Look.problem` is the sentence that refuses it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from lora_core.adapter import COMPONENTS, is_finite
from lora_core.base_files import weight_files
from lora_core.errors import FileRefused, LoraError
from lora_core.facts import Facts, counted
from lora_core.families import FAMILIES, Told, family_of_layers, family_of_whole_unet
from lora_core.formats.assembly import is_number
from lora_core.formats.files import describe_adapter, headers_of, read_adapter, spelling_of
from lora_core.formats.keys import unet_layers
from lora_core.formats.metadata import FAMILY_KEYS, family_of_metadata
from lora_core.formats.said import THUMBNAIL, commonest_tags, facts_said, trigger_words
from lora_core.memo import Memo, Same
from lora_core.plain_text import plain
from lora_core.safe_files import Hashes, Header, hashes_of, read_raw, read_tensors
from lora_core.safe_header import DTYPES, TensorInfo
from lora_core.tensor_listing import LISTINGS

_BASE = "model.diffusion_model."  # of checkpoints in one file; a UNet alone has its layers' names and no more
NOTHING_TELLS = Told()


@dataclass(frozen=True)
class Look:
    """What a file says of itself.

    problem     why it is no LoRA that can be used, in one sentence; "" where it is one
    facts       of a LoRA; None with a problem
    base        the family of what is a base model, or a part of one
    unused      keys that say nothing we know
    hashes      of the whole file, and of the tensors alone; None unless asked for
    """

    path: Path
    size_bytes: int
    problem: str = ""
    spelling: str = ""
    facts: Facts | None = None
    base: Told = NOTHING_TELLS
    unused: tuple[str, ...] = ()
    metadata: Mapping[str, str] = field(default_factory=dict, repr=False)
    headers: tuple[Header, ...] = field(default=(), repr=False)
    hashes: Hashes | None = None

    @property
    def family(self) -> Told:
        """Of the LoRA, or of the base model that it is."""
        return Told(self.facts.family, self.facts.told_by) if self.facts else self.base

    @property
    def is_base(self) -> bool:
        """No LoRA, but a base model of ours, or the UNet of one: nothing is wrong with it."""
        return self.facts is None and self.base.key is not None

    @property
    def claimed(self) -> str | None:
        """The family that the metadata claims, which need not be the one it has."""
        return family_of_metadata(self.metadata).key

    def as_json(self) -> dict[str, Any]:
        """Everything, with the file's own metadata but its thumbnail, as json.dumps takes it."""
        facts = self.facts.as_json() if self.facts else {}
        return {
            "file": str(self.path),
            "size_bytes": self.size_bytes,
            "problem": self.problem,
            "base_model": self.is_base,
            "spelling": self.spelling,
            "family": self.family.key,
            "family_told_by": self.family.by,
            "family_claimed": self.claimed,
            **{name: value for name, value in facts.items() if name not in ("family", "told_by")},
            "unused": list(self.unused),
            "trigger_words": list(trigger_words(self.metadata)),
            "tags": commonest_tags(self.metadata),
            "said": facts_said(self.metadata),
            "thumbnail": bool(self.metadata.get(THUMBNAIL)),
            "metadata": {k: v for k, v in self.metadata.items() if k != THUMBNAIL},
            "hashes": self.hashes
            and {
                "autov2": self.hashes.autov2,
                "autov3": self.hashes.autov3,
                "sha256": self.hashes.file,
                "tensors_sha256": self.hashes.tensors,
            },
        }

    def __str__(self) -> str:
        """A few lines for a terminal: no character of the file's reaches it that it would obey."""
        head = f"{plain(self.path, 300)}  {self.size_bytes / 1e6:,.1f} MB"
        rows = {name: plain(text, 500) for name, text in self._rows().items() if text}
        width = max(map(len, rows), default=0)
        return "\n".join([head, *(f"  {name:{width}}  {text}" for name, text in rows.items())])

    def _rows(self) -> dict[str, str]:
        key, by = self.family
        told = f"{FAMILIES[key].title}, told by {by}" if key in FAMILIES else ""
        wrong = self.claimed if self.claimed not in (None, key) and key else None
        rows = {
            "no LoRA" if self.is_base else "problem": self.problem,
            "family": told or ("unknown: neither layers nor metadata tell it" if self.facts else ""),
            "claimed": f"{FAMILIES[wrong].title}, by its metadata, which is wrong" if wrong else "",
            "spelling": self.spelling,
        }
        if self.facts:
            rows |= _facts_rows(self.facts)
            rows["not used"] = f"{len(self.unused)} keys: {', '.join(self.unused)}" if self.unused else ""
        rows["trigger words"] = ", ".join(trigger_words(self.metadata))
        rows["tags"] = _counts(commonest_tags(self.metadata, 10))
        rows |= {name.replace("_", " "): text for name, text in facts_said(self.metadata).items()}
        rows["thumbnail"] = "yes" if self.metadata.get(THUMBNAIL) else ""
        if self.hashes:
            rows |= {
                "AutoV2": self.hashes.autov2 or "",
                "AutoV3": self.hashes.autov3,
                "SHA-256": self.hashes.file or "",
            }
        return rows


def look(path: Path | str, *, hashes: bool = False) -> Look:
    """Look at a LoRA, or whatever the file is. `hashes`: read all of it too, for both hashes and to find NaN and Inf.

    Raises nothing for what a file can be: it says it in `problem`.
    """
    path = Path(path)
    try:
        headers = headers_of(path)
    except FileRefused as problem:
        return _no_lora(path, problem)
    metadata = {key: text for header in headers for key, text in header.metadata.items()}
    found = Look(path, _size(h.path for h in headers), metadata=metadata, headers=tuple(headers))
    try:
        found = replace(found, **_made_of(path, headers)._asdict())
    except LoraError as problem:
        found = replace(found, problem=str(problem), base=_family_of_base(headers))
    try:
        return _read_through(found) if hashes else found
    except FileRefused as problem:  # it was there a moment ago
        return replace(found, problem=str(problem), facts=None)


def forget() -> None:
    """What was made of files so far: the next look at each is a first one. For measuring."""
    for memo in (LISTINGS, _LAYOUTS, _MADE):
        memo.clear()


class _Made(NamedTuple):
    """What is made of the headers of a LoRA, in a Look's names."""

    facts: Facts
    unused: tuple[str, ...]
    spelling: str


class _Layout(NamedTuple):
    """What the keys of a file alone say: its spelling, and which tensors are settings."""

    spelling: str
    numbers: tuple[TensorInfo, ...]

    @classmethod
    def of(cls, header: Header) -> _Layout:
        numbers = (info for name, info in header.tensors.items() if is_number(name, info))
        return cls(spelling_of([header]), tuple(numbers))


# A trainer's files of one rank differ in metadata and contents alone. What was made of one is kept for the next, which
# is then looked at in a tenth of the time.
_LAYOUTS: Memo[_Layout] = Memo(64)
_MADE: Memo[_Made] = Memo(64)
_WHOLE = (
    "kohya",
    "diffusers",
    "cloneofsimo",
)  # spellings whose files need neither their name nor a file beside them
_ASIDE = ("ss_", "sshs_", "modelspec.", "loom.")  # metadata for people


def _made_of(path: Path, headers: Sequence[Header]) -> _Made:
    """Raises what `describe_adapter` raises."""
    header = headers[0]
    layout = _LAYOUTS.get(Same(header.tensors), lambda: _Layout.of(header))
    if len(headers) > 1 or layout.spelling not in _WHOLE:
        return _described(path, headers)
    rest = {k: v for k, v in header.metadata.items() if k in FAMILY_KEYS or not k.startswith(_ASIDE)}
    bare = replace(header, metadata=rest)  # nothing is made of what is not in the key
    key = (Same(header.tensors), read_raw(header, layout.numbers), tuple(sorted(rest.items())))
    return _MADE.get(key, lambda: _described(path, [bare]))


def _described(path: Path, headers: Sequence[Header]) -> _Made:
    adapter = describe_adapter(path, headers)
    facts = replace(Facts.of(adapter), dtypes=_dtypes(headers))
    return _Made(facts, adapter.unused, spelling_of(headers))


def _read_through(found: Look) -> Look:
    digests = hashes_of(found.headers)
    if found.facts is None:
        return replace(found, hashes=digests)
    bad = tuple(
        key
        for header in found.headers
        for key in header.tensors
        if not is_finite(read_tensors(header, [key])[key])
    )
    facts = replace(found.facts, not_finite=bad)
    try:
        read_adapter(found.path)  # factors that are finite can have a product that is not
    except LoraError as problem:
        return replace(found, hashes=digests, facts=facts, problem=str(problem))
    return replace(found, hashes=digests, facts=facts)


def _family_of_base(headers: Sequence[Header]) -> Told:
    """Of a checkpoint or a UNet: as what it is built of shows, or of a part of one, as a LoRA's layers do."""
    shapes = {key.removeprefix(_BASE): info.shape for h in headers for key, info in h.tensors.items()}
    layers = unet_layers(shapes)
    told = family_of_whole_unet(layers) if "unet.conv_in" in layers else NOTHING_TELLS
    return told if told.key else family_of_layers(layers)


def _no_lora(path: Path, problem: FileRefused) -> Look:
    """A base model in diffusers' layout, if all of its parts can be read; whatever else it is, with its problem."""
    is_base = (path / "model_index.json").is_file()
    parts = [folder for name in (*COMPONENTS, "vae") if is_base and (folder := path / name).is_dir()]
    try:
        headers = {folder.name: weight_files(folder) for folder in parts}
    except FileRefused as broken:
        return Look(path, _size([path]), str(broken))
    files = [header.path for part in headers.values() for header in part]
    base = _family_of_base(headers.get("unet", ()))
    return Look(path, _size(files or [path]), str(problem), base=base)


def _dtypes(headers: Sequence[Header]) -> dict[str, int]:
    return counted(
        str(DTYPES[info.dtype]).removeprefix("torch.") for h in headers for info in h.tensors.values()
    )


def _size(paths: Iterable[Path]) -> int:
    total = 0
    for path in paths:
        try:
            total += path.stat().st_size
        except (OSError, ValueError):
            continue
    return total


def _facts_rows(facts: Facts) -> dict[str, str]:
    return {
        "layers": f"{facts.layers}: {_counts(facts.components)}" if facts.layers else "",
        "blocks": _counts(facts.blocks) if facts.layers else "",
        "kind": few(facts.kinds),
        "rank": few(facts.ranks),
        "alpha": few(facts.alphas),
        "numbers": few(facts.dtypes),
        "new words": ", ".join(f"{word} ({n} vectors)" if n > 1 else word for word, n in facts.words.items()),
        "not finite": ", ".join(facts.not_finite or ()),
    }


def few(counts: Mapping[Any, int]) -> str:
    """Of a table of counts: one thing alone, or each with how many there are."""
    named = {f"{k:g}" if isinstance(k, float) else str(k): n for k, n in counts.items()}
    return next(iter(named)) if len(named) == 1 else _counts(named)


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {n}" for name, n in counts.items())
