"""The newcomer's way without a mouse: Tab, Enter, Space, arrows and the page's own keys, nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image
from playwright.sync_api import Page, expect

from app.session import Session
from tests.app.page import Seen, app_at, browser, wait

pytestmark = pytest.mark.browser

NAME_OF_FOCUS = """() => {
  const e = document.activeElement;
  if (!e || e === document.body) return '';
  return (e.getAttribute('aria-label') || e.labels?.[0]?.innerText || e.textContent || '').trim();
}"""


def tab_to(page: Page, name: str) -> None:
    """Tab until what has the focus is called `name`, or begins so where the name ends in an ellipsis."""
    met: list[str] = []
    for _ in range(120):
        page.keyboard.press("Tab")
        met.append(page.evaluate(NAME_OF_FOCUS).split("\n")[0])
        if met[-1] == name or (name.endswith("…") and met[-1].startswith(name[:-1])):
            outline = page.evaluate(
                "() => { const s = getComputedStyle(document.activeElement);"
                " return s.outlineStyle + s.boxShadow + s.borderColor; }"
            )
            assert outline, name
            return
    raise AssertionError(f"Tab never came to {name}; it came to {list(dict.fromkeys(met))}")


def press(page: Page, name: str) -> None:
    tab_to(page, name)
    page.keyboard.press("Enter")


def picture(page: Page, session: Session) -> bytes:
    before = session.pictures.newest()[:1]
    page.keyboard.press("Control+Enter")
    wait(lambda: session.pictures.newest()[:1] != before and not session.worker.view.busy, "a picture", 120)
    with Image.open(session.pictures.newest()[0]) as image:
        return image.convert("RGB").tobytes()


def test_the_main_path_by_keyboard_alone(tmp_path: Path) -> None:
    seen = Seen()
    with app_at(tmp_path) as (session, host), browser(tmp_path / "chrome") as chrome:
        page = chrome.new_page(viewport={"width": 1440, "height": 1000})
        seen.watch(page)
        page.goto(host.url)
        expect(page.locator("#generate")).to_be_visible(timeout=60_000)
        tab_to(page, "Prompt")
        page.keyboard.press("Control+A")
        page.keyboard.type("a zxq animal on a red background")
        first = picture(page, session)
        assert session.last_request is not None
        assert session.last_request.prompt == "a zxq animal on a red background"

        press(page, "Train")
        press(page, "Try the included fox")
        expect(page.locator(".thumb")).to_have_count(5, timeout=30_000)
        tab_to(page, "Training steps")
        page.keyboard.press("Control+A")
        page.keyboard.type("20")
        tab_to(page, "Keep the class as it was")
        page.keyboard.press("Space")
        press(page, "Start training")
        wait(lambda: (view := session.training.view()) and view.state == "finished", "the training", 300)
        view = session.training.view()
        assert view is not None
        assert view.steps == 20
        press(page, "Use it")
        wait(lambda: "my-first-lora" in session.rows and not session.worker.view.busy, "the LoRA")

        press(page, "Generate")  # the tab: it comes before the button of that name
        tab_to(page, "Weight of my-first-lora")
        for _ in range(4):
            page.keyboard.press("ArrowRight")
        wait(lambda: abs(session.rows["my-first-lora"].weight - 1.2) < 1e-6, "the slider")
        assert picture(page, session) != first
        tab_to(page, "Fuse")
        page.keyboard.press("Enter")
        wait(lambda: session.pipe is not None and session.pipe.fused, "fusing")
        press(page, "Unfuse")
        wait(lambda: session.pipe is not None and not session.pipe.fused, "unfusing")
        press(page, "Take all off")
        wait(lambda: not session.rows and not session.worker.view.busy, "unloading")
        assert picture(page, session) == first
        assert session.seal.startswith("base verified")
    assert seen.foreign == []
    assert seen.errors == []
