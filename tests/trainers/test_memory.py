"""Memory at its height, against memory taken on purpose; and the limits of control groups as the kernel writes them."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest
import torch

from trainers import memory

MB = 1_000_000


def take(megabytes: int) -> None:
    """Every page of it, and give it back."""
    torch.ones(megabytes * MB, dtype=torch.uint8)


def test_a_peak_is_that_since_it_was_made() -> None:
    peak = memory.Peak(torch.device("cpu"))
    if not peak.exact:
        pytest.skip("this system tells the height since the process began alone")
    take(600)
    assert peak.bytes() > psutil.Process().memory_info().rss + 500 * MB
    later = memory.Peak(torch.device("cpu"))
    before = later.bytes()
    take(200)
    assert 150 * MB < later.bytes() - before < 350 * MB
    assert (later.total(), later.used()) == (0, 0)


def test_where_the_record_cannot_be_begun_anew_it_is_never_too_little(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    take(300)
    monkeypatch.setattr(memory, "CLEAR", tmp_path / "nowhere" / "clear_refs")
    peak = memory.Peak(torch.device("cpu"))
    assert not peak.exact
    told = peak.bytes()
    monkeypatch.setattr(memory, "STATUS", tmp_path / "nowhere")
    for found in (told, memory.process_peak()):
        assert found >= psutil.Process().memory_info().rss


@pytest.mark.parametrize(
    ("member_of", "limits", "least"),
    [
        ("0::/\n", {"memory.max": "max\n"}, None),
        ("0::/\n", {"memory.max": "1048576\n"}, 1048576),  # a container
        ("0::/a/b\n", {"a/memory.max": "4096\n", "a/b/memory.max": "max\n"}, 4096),  # a service's parent
        ("4:memory:/x\n1:cpu:/x\n", {"memory/x/memory.limit_in_bytes": "8192\n"}, 8192),  # version 1
        ("4:memory:/x\n", {"memory/memory.limit_in_bytes": "9223372036854771712\n"}, None),  # none
        (None, {}, None),
    ],
)
def test_a_container_has_the_memory_it_is_given(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    member_of: str | None,
    limits: dict[str, str],
    least: int | None,
) -> None:
    monkeypatch.setattr(memory, "CGROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(memory, "MEMBER_OF", tmp_path / "self")
    if member_of is not None:
        (tmp_path / "self").write_text(member_of)
    for name, text in limits.items():
        (tmp_path / "cgroup" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "cgroup" / name).write_text(text)
    assert memory.memory_total() == (least or psutil.virtual_memory().total)
