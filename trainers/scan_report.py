"""What became of every file in a folder of pictures, by name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class ScanReport:
    """File names, without the folder.

    Every entry of the folder is in `used`, `bad` or `other`, or is the caption of a picture in the first two.
    """

    folder: Path
    used: list[str] = field(default_factory=list)
    bad: dict[str, str] = field(default_factory=dict)
    """Pictures that cannot be used -> the reason."""
    other: list[str] = field(default_factory=list)
    """Other formats, captions without a picture, folders (with a slash)."""
    uncaptioned: list[str] = field(default_factory=list)
    """Pictures without words of their own: they have the prompt."""
    captions: dict[str, str] = field(default_factory=dict)
    """Caption files with something odd about them -> a sentence."""
    animated: list[str] = field(default_factory=list)
    """Of these only the first frame is used."""
    enlarged: list[str] = field(default_factory=list)
    """Smaller than the resolution, so blurred by enlarging."""

    @property
    def orphans(self) -> list[str]:
        """Caption files that belong to no picture."""
        return [name for name in self.other if name.lower().endswith(".txt")]

    def lines(self) -> list[str]:
        """The report in sentences, one thing each."""
        said = [f"{len(self.used)} pictures used."]
        said += [f"Not used: {name}: {reason}." for name, reason in self.bad.items()]
        if self.uncaptioned:
            said.append(f"Without a caption of their own, so with the prompt: {listed(self.uncaptioned)}.")
        said += [f"{note}." for note in self.captions.values()]
        if self.animated:
            said.append(f"First frame only: {listed(self.animated)}.")
        if self.enlarged:
            said.append(f"Smaller than the resolution, so enlarged and soft: {listed(self.enlarged)}.")
        if self.orphans:
            said.append(f"Captions without a picture: {listed(self.orphans)}.")
        if strangers := [name for name in self.other if name not in self.orphans]:
            said.append(f"Not read: {listed(strangers)}.")
        return said

    def __str__(self) -> str:
        return "\n".join(self.lines())


def listed(names: Sequence[str], most: int = 20) -> str:
    """Names in a row; beyond `most` they are counted."""
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest
