"""A real page for tests: the real app on a real port, real Chromium, and everything it asked for written down."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from playwright.sync_api import Browser, Page, expect, sync_playwright

from app.draft import Draft
from app.host import Host
from app.page import create_ui
from app.session import Session
from lora_core.errors import LoraError

CHROMIUM = "/usr/bin/chromium"
QUIET_BROWSER = (
    "--no-sandbox",
    "--headless=new",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
)


@dataclass
class Seen:
    """What a page did that no page of ours may do."""

    foreign: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    def watch(self, page: Page) -> None:
        page.on("request", lambda r: self._request(r.url))
        page.on("pageerror", lambda e: self.errors.append(str(e)))
        page.on("console", lambda m: self.errors.append(m.text) if m.type == "error" else None)

    def reload(self, page: Page) -> None:
        """As a user would. Of what the leaving page complains about, its own cut-off connections do not count."""
        page.reload()
        page.wait_for_selector("#generate", timeout=60_000)
        self.errors = [e for e in self.errors if not re.search(r"AbortError|errored out|Failed to fetch", e)]

    def _request(self, url: str) -> None:
        if not url.startswith(("http://127.0.0.1:", "data:", "blob:")):
            self.foreign.append(url)


@contextmanager
def app_at(folder: Path) -> Iterator[tuple[Session, Host]]:
    """The app with its folders in `folder`; what is running when the test ends is stopped."""
    session = Session(folder / "models", folder / "outputs", folder / "runs")
    draft = Draft(folder / "datasets")
    host = Host(
        lambda: create_ui(session, draft), outputs=folder / "outputs", temporary=folder / "tmp", port=0
    )
    host.start()
    try:
        yield session, host
    finally:
        if session.training.current() is not None:
            with suppress(LoraError):  # it was ending already
                session.training.commands().stop()
            wait(lambda: session.training.current() is None, "the training to stop", 60)
        host.stop()
        session.close()


@contextmanager
def browser(folder: Path) -> Iterator[Browser]:
    with sync_playwright() as playwright:
        chrome = playwright.chromium.launch(executable_path=CHROMIUM, args=list(QUIET_BROWSER))
        try:
            yield chrome
        finally:
            chrome.close()


def wait(true: Callable[[], object], what: str, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, f"waited {seconds:.0f} s for {what}"
        time.sleep(0.05)


def unfold(page: Page, accordion: str) -> None:
    page.locator(f"#{accordion} > button").click()
    expect(page.locator(f"#{accordion} :is(textarea, input)").first).to_be_visible(timeout=30_000)
    fields_up(page)


def fields_up(page: Page) -> None:
    """Gradio writes its first values into fields that have come into sight once more, in the next frame: what a
    script has typed by then is gone. Nobody's fingers are so fast."""
    page.evaluate(
        "new Promise(up => requestAnimationFrame(() => requestAnimationFrame(() => setTimeout(up))))"
    )
