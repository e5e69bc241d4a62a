"""How much memory a piece of work takes at its height, and how much there is."""

from __future__ import annotations

import sys
from pathlib import Path

import psutil
import torch

CLEAR, STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")
CGROUPS, MEMBER_OF = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


class Peak:
    """Bytes at their height since this was made: of a card, or of this process.

    `exact` is False where the system's record of a process cannot be begun anew, as Linux' can (proc(5), clear_refs):
    then it is the height since the process began, and the opening of the base is in it. Never too little.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.exact = device, True
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            return
        try:
            CLEAR.write_text("5", encoding="ascii")
        except OSError:
            self.exact = False

    def bytes(self) -> int:
        if self.device.type == "cuda":
            return int(torch.cuda.max_memory_reserved(self.device))
        return process_peak()

    def total(self) -> int:
        """Of the card; 0 without one."""
        return int(torch.cuda.mem_get_info(self.device)[1]) if self.device.type == "cuda" else 0

    def used(self) -> int:
        """Of the card, by every program; ours at its peak. 0 without one."""
        if self.device.type != "cuda":
            return 0
        free, total = torch.cuda.mem_get_info(self.device)
        now, peak = torch.cuda.memory_reserved(self.device), torch.cuda.max_memory_reserved(self.device)
        return int(total - free - now + peak)


def process_peak() -> int:
    """The largest resident set of this process, in bytes, as the system remembers it."""
    if STATUS.exists():
        (line,) = (line for line in STATUS.read_text(encoding="ascii").splitlines() if line[:6] == "VmHWM:")
        return int(line.split()[1]) * 1024
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    import resource  # noqa: PLC0415 - Windows has none

    unit = 1 if sys.platform == "darwin" else 1024  # kilobytes, but for macOS
    return int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) * unit


def memory_total() -> int:
    """Main memory this process may use, in bytes: the machine's, or what its container or service is given of it."""
    return min([int(psutil.virtual_memory().total), *_granted()])


def _granted() -> list[int]:
    """The limits of every control group this process is in (cgroups(7), versions 1 and 2)."""
    try:
        lines = MEMBER_OF.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        top, name = (
            (CGROUPS, "memory.max") if not controllers else (CGROUPS / "memory", "memory.limit_in_bytes")
        )
        own = Path(path.lstrip("/"))
        for folder in (top / own, *(top / parent for parent in own.parents)):
            try:
                found.append(int((folder / name).read_text(encoding="ascii")))
            except (OSError, ValueError):  # none here, or "max"
                continue
    return found
