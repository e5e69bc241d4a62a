"""The pictures of the page in this folder, made anew: `python -m docs.screenshots [--only SCENE...]`.

The real app, the included model, a real training of the fox in a folder of its own, a real browser. Every scene is
taken at 1440 and at 400 pixels, in light and in dark.
"""

from __future__ import annotations

import argparse
import io
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image
from playwright.sync_api import Browser, Page, expect

from app.host import Host
from app.session import Session
from lora_core import LivePipeline, write_adapter
from tests.app.page import app_at, browser, wait
from tests.lora_core.test_pipeline import random_adapter

HERE = Path(__file__).parent
SIZES = {"wide": (1440, 1100), "narrow": (400, 860)}
SCHEMES = ("light", "dark")
# what sticks to the window's edge would stand in the middle of the whole page
WHOLE = "#train-next, #train-running { position: static !important; max-height: none !important; }"
TALLEST = 2400  # pixels; more of a page nobody looks at


class Camera:
    """Four windows onto one app, in step with each other."""

    def __init__(self, chrome: Browser, host: Host, folder: Path, only: list[str]) -> None:
        self.chrome, self.host, self.folder, self.only = chrome, host, folder, only
        self.pages: dict[str, Page] = {}
        self.open()

    def open(self) -> None:
        for size, (width, height) in SIZES.items():
            for scheme in SCHEMES:
                page = self.chrome.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)
                page.goto(self.host.url)
                expect(page.locator("#generate")).to_be_visible(timeout=60_000)
                self.pages[f"{size}-{scheme}"] = page

    def close(self) -> None:
        """While a training runs: four pages that draw its curve leave it little of two cores."""
        for page in self:
            page.close()

    def __iter__(self) -> Iterator[Page]:
        return iter(self.pages.values())

    def tab(self, name: str) -> None:
        for page in self:
            page.get_by_role("tab", name=name).click()
            page.mouse.move(0, 0)

    def take(self, scene: str) -> None:
        if self.only and scene not in self.only:
            return
        for name, page in self.pages.items():
            page.wait_for_timeout(900)  # for what fades in, and the next look at what is new
            raw = page.screenshot(full_page=True, style=WHOLE)
            with Image.open(io.BytesIO(raw)) as shot:
                kept = shot.convert("RGB").crop((0, 0, shot.width, min(shot.height, TALLEST)))
                kept.save(self.folder / f"{scene}-{name}.webp", quality=88, method=6)
        print(scene, flush=True)


@contextmanager
def quiet_app() -> Iterator[tuple[Session, Host]]:
    with tempfile.TemporaryDirectory(prefix="lora-loom-") as home, app_at(Path(home)) as found:
        yield found


def lora(folder: Path, name: str, seed: int) -> Path:
    live = LivePipeline.open("demo", device="cpu")
    return write_adapter(
        random_adapter(live, seed, name=name), folder / f"{name}.safetensors", spelling="kohya"
    )


def idle(session: Session) -> None:
    wait(lambda: not session.worker.view.busy, "the job", 300)


def state_is(session: Session, *states: str) -> Callable[[], object]:
    return lambda: (view := session.training.view()) and view.state in states


def shoot(camera: Camera, session: Session, scratch: Path) -> None:
    wait(lambda: session.pipe is not None, "the model")
    idle(session)
    camera.take("first-run")
    camera.tab("Library")
    camera.take("library-empty")
    camera.tab("Train")
    camera.take("train-empty")
    first = next(iter(camera))
    first.locator("#train-example").click()
    for page in camera:
        expect(page.locator(".thumb")).to_have_count(5, timeout=30_000)
    camera.take("train-pictures")
    first.locator("#train-check").click()
    wait(lambda: not session.check.view.busy and session.check.view.state, "the check", 300)
    camera.take("train-checked")
    first.locator("#train-start").click()
    wait(lambda: session.training.view(), "the start", 300)
    camera.close()
    wait(lambda: (v := session.training.view()) and v.step > 200 and len(v.previews) > 2, "previews", 900)
    session.training.commands().pause()
    wait(state_is(session, "paused"), "the pause")
    camera.open()
    camera.tab("Train")
    camera.take("train-running")
    camera.close()
    session.training.commands().unpause()
    wait(lambda: (v := session.training.view()) and v.state == "finished" and v.sheet, "the end", 900)
    wait(lambda: session.training.current() is None, "the report", 600)
    camera.open()
    camera.tab("Train")
    camera.take("train-finished")
    session.use_trained()
    idle(session)
    bad = scratch / "half-a-download.safetensors"
    bad.write_bytes(lora(scratch, "spare", 9).read_bytes()[:20_000])
    session.drop([(lora(scratch, n, s), f"{n}.safetensors") for s, n in enumerate(("ink", "soft-light"))])
    idle(session)
    session.set_row("ink", weight=0.4)
    session.set_row("soft-light", weight=-0.25)
    camera.tab("Generate")
    colours = ("blue", "green", "red", "yellow", "gray", "purple")
    for seed, colour in enumerate(colours):
        session.remember(prompt=f"a zxq animal on a {colour} background", seed=seed)
        session.generate(session.wanted.form.request())
        idle(session)
    for page in camera:
        page.reload()
        expect(page.locator("#generate")).to_be_visible(timeout=60_000)
    camera.take("generate")
    first = next(iter(camera))
    first.locator("#mixes-more > button").click()
    for name in ("ink and light", "ink alone"):
        first.get_by_label("Name of this mix").fill(name)
        first.get_by_role("button", name="Save this mix", exact=True).click()
        expect(first.get_by_role("button", name=f"Wear {name}", exact=True)).to_have_text(
            "Worn", timeout=10_000
        )
        session.set_row("soft-light", weight=0.0)
    for page in camera:
        if page != first:
            page.locator("#mixes-more > button").click()
        page.locator("summary", has_text="More of ink").click()
    camera.take("mixer")
    for page in camera:
        page.reload()
        expect(page.locator("#generate")).to_be_visible(timeout=60_000)
    session.remember(steps=100, count=8)
    session.generate(session.wanted.form.request())
    wait(lambda: session.worker.view.step > 5, "steps")
    camera.take("generate-running")
    session.worker.stop()
    idle(session)
    session.drop([(bad, bad.name)])
    idle(session)
    camera.take("refused")
    camera.tab("Library")
    camera.take("library")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", default=[], help="scenes to keep; all are gone through")
    parser.add_argument("--out", type=Path, default=HERE / "screens")
    asked = parser.parse_args()
    asked.out.mkdir(parents=True, exist_ok=True)
    with (
        quiet_app() as (session, host),
        tempfile.TemporaryDirectory() as scratch,
        browser(Path(scratch)) as chrome,
    ):
        shoot(Camera(chrome, host, asked.out, asked.only), session, Path(scratch))


if __name__ == "__main__":
    main()
