"""What became of every file in a folder of pictures, by name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from trainers.buckets import CropPlan, Size
from trainers.captions import ENDINGS
from trainers.images import UNREAD, is_mask

MUCH = 0.1  # of a picture cut off is worth a word


@dataclass
class ScanReport:
    """File names, without the folder.

    Every entry of the folder is in `used`, `bad` or `other`, or is the caption or mask of a picture in the first two.
    """

    folder: Path
    used: list[str] = field(default_factory=list)
    bad: dict[str, str] = field(default_factory=dict)
    """Pictures that cannot be used -> the reason."""
    other: list[str] = field(default_factory=list)
    """Other formats, captions and masks without a picture, folders (with a slash)."""
    uncaptioned: list[str] = field(default_factory=list)
    """Pictures without words of their own: they have the prompt."""
    captions: dict[str, str] = field(default_factory=dict)
    """Caption files with something odd about them -> a sentence."""
    unreadable: list[str] = field(default_factory=list)
    """Of these, those that are no text we read."""
    shared: dict[str, list[str]] = field(default_factory=dict)
    """Caption files that are those of several pictures, whose names differ by their ending alone."""
    animated: list[str] = field(default_factory=list)
    """Of these only the first frame is used."""
    colours: dict[str, str] = field(default_factory=dict)
    """Pictures whose colour profile is not used -> the reason."""
    unmasked: list[str] = field(default_factory=list)
    """With masked loss: pictures without a mask, which are learnt whole."""
    enlarged: list[str] = field(default_factory=list)
    """Smaller than their bucket, so blurred by enlarging."""
    buckets: dict[Size, list[str]] = field(default_factory=dict)
    """Every shape trained in, width and height -> the pictures in it."""
    cut: dict[str, float] = field(default_factory=dict)
    """Pictures of which a crop leaves something out -> the largest share left out."""

    def take(self, name: str, *, animated: bool, masked: bool | None) -> None:
        """A picture that is used; `masked` None where no masks are asked for."""
        self.used.append(name)
        if animated:
            self.animated.append(name)
        if masked is False:
            self.unmasked.append(name)

    def place(self, name: str, size: Size, plan: CropPlan) -> None:
        """A picture in one of its buckets."""
        self.buckets.setdefault(plan.bucket, []).append(name)
        if plan.resized[0] > size[0] and name not in self.enlarged:
            self.enlarged.append(name)
        if plan.lost > 0:
            self.cut[name] = max(plan.lost, self.cut.get(name, 0.0))

    @property
    def orphans(self) -> list[str]:
        """Caption files that belong to no picture."""
        return [name for name in self.other if name.lower().endswith(ENDINGS)]

    @property
    def masks(self) -> list[str]:
        """Masks that nothing asked for, or of no picture."""
        return [name for name in self.other if is_mask(Path(name))]

    def lines(self) -> list[str]:
        """The report in sentences, one thing each."""
        said = [f"{len(self.used)} pictures used."]
        said += [f"Not used: {name}: {reason}." for name, reason in self.bad.items()]
        if self.uncaptioned:
            said.append(f"Without a caption of their own, so with the prompt: {listed(self.uncaptioned)}.")
        said += [f"{note}." for note in self.captions.values()]
        said += [f"{name} is the caption of {' and '.join(users)}." for name, users in self.shared.items()]
        if self.animated:
            said.append(f"First frame only: {listed(self.animated)}.")
        said += [unmanaged(name, reason) for name, reason in self.colours.items()]
        if len(self.buckets) > 1:
            shapes = sorted(self.buckets.items(), key=lambda item: (-len(item[1]), item[0]))
            said.append("Buckets: " + ", ".join(f"{w} x {h}: {len(names)}" for (w, h), names in shapes) + ".")
        if much := [f"{name} ({share:.0%})" for name, share in self.cut.items() if share > MUCH]:
            said.append(f"Cut off at the edges: {listed(much)}.")
        if self.enlarged:
            said.append(f"Smaller than the resolution, so enlarged and soft: {listed(self.enlarged)}.")
        if self.unmasked:
            said.append(f"Without a mask, so learnt whole: {listed(self.unmasked)}.")
        if self.orphans:
            said.append(f"Captions without a picture: {listed(self.orphans)}.")
        if self.masks:
            said.append(f"Masks that are not used: {listed(self.masks)}.")
        if unread := [name for name in self.other if name.lower().endswith(UNREAD)]:
            said.append(f"Pictures of a kind that is not read, to be saved as PNG or JPEG: {listed(unread)}.")
        known = {*self.orphans, *self.masks, *unread}
        if strangers := [name for name in self.other if name not in known]:
            said.append(f"Not read: {listed(strangers)}.")
        return said

    def __str__(self) -> str:
        return "\n".join(self.lines())


def unmanaged(name: str, reason: str) -> str:
    return (
        f"The colour profile of {name} is not used, its colours are read as sRGB: {reason}. If they look wrong, save "
        "the picture as sRGB."
    )


def listed(names: Sequence[str], most: int = 20) -> str:
    """Names in a row; beyond `most` they are counted."""
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest
