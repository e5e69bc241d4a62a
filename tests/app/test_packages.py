"""Versions of packages, and what is asked of them."""

from __future__ import annotations

from importlib.metadata import version as installed

import pytest

from app.packages import fits, requirements, version


@pytest.mark.parametrize(
    ("found", "clauses", "fit"),
    [
        ("2.13.0+cpu", ">=2.10,<2.14", True),
        ("2.9.1", ">=2.10,<2.14", False),
        ("2.14.0.dev20260101", ">=2.10,<2.14", False),
        ("2.10", ">=2.10.0,<2.14", True),
        ("12.3", ">=12", True),
        ("11.9.9", ">=12", False),
        ("1.0", "", True),
    ],
)
def test_versions_are_compared_as_numbers(found: str, clauses: str, fit: bool) -> None:
    assert fits(found, clauses) is fit


def test_what_is_needed_is_what_is_installed_here() -> None:
    wanted = requirements()
    assert {"torch", "diffusers", "gradio", "psutil"} <= set(wanted)
    for name, clauses in wanted.items():
        assert version(name) == installed(name)
        assert fits(version(name), clauses)
    assert version("no-such-package") == ""
