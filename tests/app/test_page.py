"""The page in a real browser: the newcomer's way from a prompt to a trained LoRA and back to the base, bit for bit."""

from __future__ import annotations

import base64
import re
from pathlib import Path
from typing import Literal

import pytest
from axe_playwright_python.sync_playwright import Axe
from PIL import Image
from playwright.sync_api import Browser, Page, expect

from app import mixing
from app.draft import Draft
from app.host import Host
from app.page import create_ui
from app.session import Session
from app.training import Training
from lora_core import LivePipeline, write_adapter
from tests.app.page import Seen, fields_up, unfold, wait
from tests.lora_core.test_pipeline import random_adapter
from tests.small_models import small_pipeline

pytestmark = pytest.mark.browser
PROMPT = "a zxq animal on a blue background"


def opened(chrome: Browser, host: Host, seen: Seen) -> Page:
    page = chrome.new_page(viewport={"width": 1440, "height": 1000})
    seen.watch(page)
    page.goto(host.url)
    expect(page.locator("#generate")).to_be_visible(timeout=60_000)
    fields_up(page)
    return page


def generate(page: Page, session: Session) -> bytes:
    """Press the button, wait for the picture -> its pixels, from the file."""
    before = session.pictures.newest()[:1]
    page.locator("#generate").click()
    wait(lambda: session.pictures.newest()[:1] != before and not session.worker.view.busy, "a picture", 120)
    with Image.open(session.pictures.newest()[0]) as image:
        return image.convert("RGB").tobytes()


def after(session: Session, page: Page, button: str) -> None:
    revision = session.worker.revision
    page.get_by_role("button", name=button, exact=True).click()
    wait(lambda: session.worker.revision > revision and not session.worker.view.busy, button, 120)


def test_the_newcomers_way(chrome: Browser, app: tuple[Session, Host], seen: Seen) -> None:
    """Generate, train, use, slide, generate, fuse, generate, unfuse, take off, generate: first and last are equal."""
    session, host = app
    page = opened(chrome, host, seen)
    page.locator("#prompt textarea").fill(PROMPT)
    first = generate(page, session)
    assert session.last_request is not None
    assert session.last_request.prompt == PROMPT

    page.get_by_role("tab", name="Train").click()
    page.locator("#train-example").click()
    expect(page.locator(".thumb")).to_have_count(5, timeout=30_000)
    page.locator("#train-steps input[type=number]").fill("30")
    page.locator("#train-steps input[type=number]").press("Enter")
    page.locator("#train-class input").uncheck()
    page.locator("#train-start").click()
    wait(
        lambda: (view := session.training.view()) and view.state == "finished", "the training to finish", 300
    )
    view = session.training.view()
    assert view is not None
    assert (view.steps, view.lora is not None) == (30, True)
    expect(page.locator("#train-use")).to_be_enabled(timeout=30_000)
    page.locator("#train-use").click()
    wait(lambda: "my-first-lora" in session.rows and not session.worker.view.busy, "the LoRA in the mixer")

    page.get_by_role("tab", name="Generate").click()
    weight = page.get_by_role("slider", name="Weight of my-first-lora").first
    expect(weight).to_be_visible(timeout=30_000)
    live = generate(page, session)
    weight.focus()
    for _ in range(4):
        weight.press("ArrowRight")
    wait(lambda: abs(session.rows["my-first-lora"].weight - 1.2) < 1e-6, "the slider to arrive")
    stronger = generate(page, session)
    assert session.pipe is not None
    assert session.pipe.weights == {"my-first-lora": pytest.approx(1.2)}
    after(session, page, "Fuse")
    assert session.pipe.fused
    fused = generate(page, session)
    after(session, page, "Unfuse")
    assert not session.pipe.fused
    after(session, page, "Take all off")
    assert session.pipe.loaded == {}
    assert session.seal.startswith("base verified")
    expect(page.locator("#status")).to_contain_text("base verified", timeout=10_000)
    last = generate(page, session)
    assert first == last
    assert len({first, live, stronger}) == 3
    assert fused != first


def test_every_control_reaches_the_request(chrome: Browser, app: tuple[Session, Host], seen: Seen) -> None:
    session, host = app
    page = opened(chrome, host, seen)
    page.locator("#prompt textarea").fill("a dog on a red background")
    unfold(page, "more")
    page.locator("#negative textarea, #negative input").first.fill("blurry")
    numbers = {"steps": "7", "guidance": "3.5", "seed": "11", "count": "2", "width": "72", "height": "80"}
    for name, value in numbers.items():
        field = page.locator(f"#{name} input[type=number]").first
        field.fill(value)
        field.press("Tab")
    page.locator("#sampler input").click()
    page.get_by_role("option", name="Euler a", exact=True).click()
    generate(page, session)
    request = session.last_request
    assert request is not None
    assert (request.prompt, request.negative_prompt) == ("a dog on a red background", "blurry")
    assert (request.steps, request.guidance, request.seed, request.count) == (7, 3.5, 11, 2)
    assert (request.width, request.height, request.sampler) == (72, 80, "Euler a")

    seen.reload(page)
    expect(page.locator("#prompt textarea")).to_have_value("a dog on a red background", timeout=30_000)
    unfold(page, "more")
    expect(page.locator("#steps input[type=number]")).to_have_value("7")


def lora_file(path: Path, family: str, seed: int) -> Path:
    live = LivePipeline(small_pipeline(family))
    return write_adapter(random_adapter(live, seed, name=path.stem), path, spelling="kohya")


def demo_lora(path: Path, seed: int, **metadata: str) -> Path:
    live = LivePipeline.open("demo", device="cpu")
    adapter = random_adapter(live, seed, name=path.stem)
    return write_adapter(adapter, path, spelling="kohya", metadata=metadata)


DROP = """async ([selector, files]) => {
  const data = new DataTransfer();
  for (const [name, bytes] of files)
    data.items.add(new File([Uint8Array.from(atob(bytes), c => c.charCodeAt(0))], name));
  document.querySelector(selector).dispatchEvent(
    new DragEvent('drop', {bubbles: true, cancelable: true, dataTransfer: data}));
}"""


def drop(page: Page, files: list[Path]) -> None:
    page.evaluate(DROP, ["body", [[f.name, base64.b64encode(f.read_bytes()).decode()] for f in files]])


def test_what_is_dropped_on_train_goes_where_it_belongs_and_a_lora_brings_its_words(
    chrome: Browser, app: tuple[Session, Host], seen: Seen, tmp_path: Path
) -> None:
    session, host = app
    wait(lambda: session.pipe is not None, "the demo model")
    Image.new("RGB", (64, 64), "red").save(tmp_path / "mine.png")
    (tmp_path / "torn.png").write_bytes(b"\x89PNG and then nothing")
    lora = demo_lora(tmp_path / "ink.safetensors", 1, **{"modelspec.trigger_phrase": "zxq animal"})
    page = opened(chrome, host, seen)
    page.get_by_role("tab", name="Train").click()
    expect(page.locator("#train-upload")).to_be_visible()
    drop(page, [tmp_path / "mine.png", lora, tmp_path / "torn.png"])
    expect(page.locator(".thumb")).to_have_count(1, timeout=10_000)
    expect(page.locator(".thumb")).to_contain_text("mine.png")
    expect(page.locator("#train-problems")).to_contain_text("torn.png")
    wait(lambda: set(session.rows) == {"ink"} and not session.worker.view.busy, "the LoRA in the mixer")

    page.get_by_role("tab", name="Generate").click()
    page.get_by_text("More of ink").click()
    page.get_by_role("button", name="zxq animal", exact=True).click()
    expect(page.locator("#prompt textarea")).to_have_value("a cat on a blue background, zxq animal")
    wait(lambda: session.wanted.form.prompt.endswith(", zxq animal"), "the prompt to be kept")


def test_three_dropped_and_one_of_them_bad(
    chrome: Browser, app: tuple[Session, Host], seen: Seen, tmp_path: Path
) -> None:
    session, host = app
    wait(lambda: session.pipe is not None, "the demo model")
    files = [demo_lora(tmp_path / "ink.safetensors", 1), demo_lora(tmp_path / "glow.safetensors", 2)]
    (tmp_path / "broken.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0 not a header")
    files.insert(1, tmp_path / "broken.safetensors")
    page = opened(chrome, host, seen)
    drop(page, files)
    wait(lambda: len(session.rows) == 2 and not session.worker.view.busy, "two LoRAs in the mixer")
    assert set(session.rows) == {"ink", "glow"}
    assert {f.name for f in session.library.loras()} == {"ink", "glow"}
    expect(page.locator("#message")).to_contain_text("broken.safetensors", timeout=10_000)
    expect(page.get_by_role("slider", name="Weight of ink").first).to_be_visible()
    expect(page.get_by_role("slider", name="Weight of glow").first).to_be_visible()
    expect(page.locator("#veil")).to_be_hidden()


def test_what_cannot_be_done_is_said(chrome: Browser, app: tuple[Session, Host], seen: Seen) -> None:
    session, host = app
    page = opened(chrome, host, seen)
    page.wait_for_timeout(1000)
    page.locator("#prompt textarea").fill("")
    page.locator("#generate").click()
    expect(page.locator("#said")).to_contain_text("The prompt is empty", timeout=10_000)
    page.get_by_role("tab", name="Train").click()
    page.locator("#train-start").click()
    expect(page.locator("#ready").get_by_role("alert")).to_contain_text("choose 4 to 20", timeout=10_000)
    assert session.training.view() is None


def test_a_dropped_picture_brings_its_settings_back(
    chrome: Browser, app: tuple[Session, Host], seen: Seen, tmp_path: Path
) -> None:
    session, host = app
    page = opened(chrome, host, seen)
    page.locator("#prompt textarea").fill("a dog on a red background")
    wait(lambda: session.wanted.form.prompt == "a dog on a red background", "the prompt to be kept")
    session.remember(steps=3, seed=11)
    session.generate(session.wanted.form.request())
    wait(lambda: session.pictures.newest() and not session.worker.view.busy, "a picture", 120)
    made = tmp_path / "found.png"
    made.write_bytes(session.pictures.newest()[0].read_bytes())
    page.locator("#prompt textarea").fill("something else")
    wait(lambda: session.wanted.form.prompt == "something else", "the prompt to be kept")
    session.remember(steps=9, seed=1)
    drop(page, [made])
    expect(page.locator("#prompt textarea")).to_have_value("a dog on a red background", timeout=10_000)
    assert (session.wanted.form.steps, session.wanted.form.seed) == (3, 11)
    Image.new("RGB", (8, 8)).save(tmp_path / "bare.png")
    drop(page, [tmp_path / "bare.png"])
    expect(page.locator("#message")).to_contain_text("carries no generation settings", timeout=10_000)


def test_what_the_mixer_can_do_besides(
    chrome: Browser, app: tuple[Session, Host], seen: Seen, tmp_path: Path
) -> None:
    """Only one, measured, a contact sheet, fused by itself; a weight typed in, and one that is none."""
    session, host = app
    session.drop(
        [
            (demo_lora(tmp_path / f"{n}.safetensors", i), f"{n}.safetensors")
            for i, n in enumerate(("ink", "glow"))
        ]
    )
    session.remember(prompt="a dog", steps=2)
    page = opened(chrome, host, seen)
    wait(lambda: len(session.rows) == 2 and not session.worker.view.busy, "two LoRAs in the mixer")
    assert session.pipe is not None
    pipe = session.pipe
    field = page.get_by_label("Weight of ink, as a number", exact=True)
    field.fill("2.5")
    wait(lambda: pipe.weights["ink"] == 2.5, "the typed weight")
    field.fill("11")  # outside what a weight may be: marked by the browser, and not sent
    page.wait_for_timeout(700)
    assert pipe.weights["ink"] == 2.5
    page.get_by_text("More of glow").click()
    page.get_by_role("button", name="Only glow").click()
    wait(lambda: pipe.weights == {"ink": 0.0, "glow": 1.0}, "glow alone")
    page.get_by_role("button", name="Only glow").click()
    wait(lambda: pipe.weights == {"ink": 2.5, "glow": 1.0}, "both")
    after(session, page, "Measure")
    expect(page.locator("#message")).to_contain_text("Moved furthest", timeout=10_000)
    unfold(page, "sheet-more")
    page.locator("#sheet-weights input, #sheet-weights textarea").first.fill("0; 1")
    page.locator("#make-sheet").click()
    expect(page.locator("#message")).to_contain_text("2 rows of 2", timeout=120_000)
    assert len(session.pictures.newest()) == 5
    page.locator("#auto input").check()
    wait(lambda: pipe.fused, "fusing by itself", 60)
    expect(page.locator("#status")).to_contain_text("fused into the base", timeout=10_000)


def test_the_page_of_a_server_that_went_finds_the_next_one(
    chrome: Browser, app: tuple[Session, Host], seen: Seen, tmp_path: Path
) -> None:
    session, host = app
    page = opened(chrome, host, seen)
    page.locator("#prompt textarea").fill("a dog on a red background")
    wait(lambda: session.wanted.form.prompt == "a dog on a red background", "the prompt to be kept")
    host.stop()
    expect(page.locator("#said")).to_contain_text("does not answer", timeout=30_000)
    draft = Draft(tmp_path / "datasets")
    again = Host(
        lambda: create_ui(session, draft),
        outputs=tmp_path / "outputs",
        temporary=tmp_path / "tmp2",
        port=host.port,
    )
    again.start()
    try:
        expect(page.locator("#said")).to_have_count(0, timeout=30_000)
        expect(page.locator("#prompt textarea")).to_have_value("a dog on a red background", timeout=60_000)
        generate(page, session)
    finally:
        again.stop()
    seen.errors = [e for e in seen.errors if not re.search(r"ERR_|Failed to fetch|errored out|AbortError", e)]


def test_reload_in_the_middle_of_a_picture(chrome: Browser, app: tuple[Session, Host], seen: Seen) -> None:
    session, host = app
    page = opened(chrome, host, seen)
    session.remember(prompt="a cat on a red background", steps=100, count=4)
    session.generate(session.wanted.form.request())
    wait(lambda: session.worker.view.step > 2, "the first steps", 120)
    seen.reload(page)
    expect(page.locator("#status")).to_contain_text("of 100", timeout=30_000)
    expect(page.locator("#preview img")).to_be_visible(timeout=30_000)
    page.locator("#stop").click()
    wait(lambda: session.worker.view.state == "stopped", "the stop", 30)
    expect(page.locator("#message")).to_contain_text("Stopped", timeout=10_000)


def test_a_training_is_found_again_after_a_reload_and_by_another_server(
    chrome: Browser, app: tuple[Session, Host], seen: Seen, tmp_path: Path
) -> None:
    """Paused, reloaded, looked at from a second tab, gone on with, sampled, stopped and saved."""
    session, host = app
    page = opened(chrome, host, seen)
    page.get_by_role("tab", name="Train").click()
    page.locator("#train-example").click()
    expect(page.locator(".thumb")).to_have_count(5, timeout=30_000)
    page.locator("#train-class input").uncheck()
    page.locator("#train-steps input[type=number]").fill("5000")
    page.locator("#train-steps input[type=number]").press("Enter")
    page.locator("#train-start").click()
    wait(lambda: (view := session.training.view()) and view.step > 5, "the first steps", 120)
    page.locator("#save-now").click()
    wait(lambda: session.training.view().saved, "what was saved", 30)
    page.locator("#train-pause").click()
    wait(lambda: (view := session.training.view()) and view.state == "paused", "the pause", 30)

    seen.reload(page)
    expect(page.locator("#status")).to_contain_text("paused", timeout=30_000)
    second = opened(chrome, host, seen)
    second.get_by_role("tab", name="Train").click()
    expect(second.locator("#train-pause")).to_have_text("Go on", timeout=30_000)
    found = Training(tmp_path / "runs").view()  # as a restarted server sees it
    assert found is not None
    assert found.state == "paused"

    second.locator("#sample-prompt textarea, #sample-prompt input").first.fill(
        "a zxq animal on a red background"
    )
    second.locator("#sample-now").click()
    wait(lambda: any("red" in p[1] for p in session.training.view().previews), "the sample", 60)
    second.locator("#train-pause").click()
    wait(lambda: (view := session.training.view()) and view.state == "running", "going on", 30)
    picture = generate(page, session)  # the training makes room for it, and goes on by itself
    assert picture
    wait(
        lambda: (view := session.training.view()) and view.state == "running",
        "going on after the picture",
        30,
    )
    second.locator("#train-stop").click()
    wait(lambda: (view := session.training.view()) and view.state == "stopped", "the save", 60)
    view = session.training.view()
    assert view is not None
    assert view.resume
    saved = dict(view.saved)
    assert len(saved) > 1
    first = min(saved)
    second.locator("#train-step input").click()
    second.get_by_role("option", name=re.compile(rf"step {first}\b")).click()
    second.locator("#train-use").click()
    wait(lambda: session.rows and not session.worker.view.busy, "the LoRA of the first step saved", 60)
    (row,) = session.rows.values()
    assert Path(row.file).read_bytes() == saved[first].read_bytes()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_keeps_anybody_out(
    chrome: Browser, app: tuple[Session, Host], seen: Seen, tmp_path: Path, scheme: Literal["light", "dark"]
) -> None:
    """axe, WCAG 2 A and AA, on every tab, with a LoRA and its finer weights, two mixes, and pictures: no violation."""
    session, host = app
    session.drop([(demo_lora(tmp_path / "ink.safetensors", 1), "ink.safetensors")])
    page = chrome.new_page(viewport={"width": 1440, "height": 1000}, color_scheme=scheme)
    seen.watch(page)
    page.goto(host.url)
    expect(page.get_by_role("slider", name="Weight of ink").first).to_be_visible(timeout=60_000)
    unfold(page, "more")
    page.get_by_text("More of ink").click()
    for name in ("soft", "softer"):
        mixing.save(session, name)
    unfold(page, "mixes-more")
    expect(page.get_by_role("slider", name="Crossfade from soft to softer")).to_be_visible(timeout=10_000)
    for tab in ("Generate", "Train", "Library"):
        page.get_by_role("tab", name=tab).click()
        if tab == "Train":
            page.locator("#train-example").click()
            expect(page.locator(".thumb")).to_have_count(5, timeout=30_000)
        page.wait_for_timeout(700)  # for what fades in
        found = Axe().run(page, options={"runOnly": ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa"]})
        said = [f"{v['id']}: {[n['target'] for n in v['nodes']]}" for v in found.response["violations"]]
        assert said == [], f"{tab} in {scheme}"
