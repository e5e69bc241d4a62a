"""The status line: what is free is said, and a disk that is nearly full stands out."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import psutil
import pytest

from app import status


def test_what_is_free_is_what_the_machine_says(tmp_path: Path) -> None:
    found = re.findall(r"(\d+) GB", status.room_html(tmp_path))
    assert int(found[1]) == pytest.approx(shutil.disk_usage(tmp_path).free / 1e9, abs=1)
    assert 0 <= int(found[0]) <= psutil.virtual_memory().total / 1e9 or "GPU" in status.room_html(tmp_path)


@pytest.mark.parametrize(("free", "tight"), [(4_000_000_000, True), (6_000_000_000, False)])
def test_a_disk_nearly_full_stands_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: int, tight: bool
) -> None:
    monkeypatch.setattr(status.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**12, 0, free))
    assert ('class="tight"' in status.room_html(tmp_path)) is tight
