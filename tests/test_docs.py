"""docs/method.md tells the truth: every line of its tables runs, one after the other, and leaves the base as it was."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

PAGE = (Path(__file__).resolve().parents[1] / "docs" / "method.md").read_text(encoding="utf-8")
LINES = re.findall(r"^\| (?!row )([^|]+) \|.*\| `([^`]+)` \|$", PAGE, re.MULTILINE)


@pytest.fixture(scope="module")
def names() -> Iterator[dict[str, Any]]:
    """What the beginning of the page defines."""
    (beginning,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    found: dict[str, Any] = {}
    exec(beginning, found)
    yield found
    assert found["pipe"].verify_base()
    shutil.rmtree(found["folder"])


def test_every_row_of_the_page_has_its_line() -> None:
    rows = [line for line in PAGE.splitlines() if line.startswith("| ") and not line.startswith("| row ")]
    assert len(LINES) == len(rows) > 30


def test_every_line_runs(names: dict[str, Any]) -> None:
    """Downwards, as the page is read: a line may wear what an earlier one has loaded."""
    for row, line in LINES:
        try:
            exec(line, names)
        except Exception as problem:
            problem.add_note(f"in the row: {row}")
            raise
