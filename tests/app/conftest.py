"""One Chromium for a file's tests, and for each of them the real app and what the page asked for."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser

from app.host import Host
from app.session import Session
from tests.app.page import Seen, app_at, browser


@pytest.fixture(scope="module")
def chrome(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser(tmp_path_factory.mktemp("chrome")) as found:
        yield found


@pytest.fixture
def app(tmp_path: Path) -> Iterator[tuple[Session, Host]]:
    with app_at(tmp_path) as found:
        yield found


@pytest.fixture
def seen() -> Iterator[Seen]:
    """Whatever a test does, the page asks nobody else for anything and no script of it fails."""
    found = Seen()
    yield found
    assert found.foreign == []
    assert found.errors == []
