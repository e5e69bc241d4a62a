"""Train in a real browser: what is asked, checked, said and told, from the first picture to a run gone on with."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from playwright.sync_api import Browser, Page, expect

from app import teaching
from app.host import Host
from app.session import Session
from tests.app.page import Seen, fields_up, unfold, wait
from tests.lora_core.test_prediction import hands_back_its_noise
from tests.small_models import save_ldm_single_file, small_pipeline
from trainers import presets
from trainers.run_folder import RunFolder

pytestmark = pytest.mark.browser


def opened(chrome: Browser, host: Host, seen: Seen, *, width: int = 1440) -> Page:
    page = chrome.new_page(viewport={"width": width, "height": 900})
    seen.watch(page)
    page.goto(host.url)
    expect(page.locator("#generate")).to_be_visible(timeout=60_000)
    page.get_by_role("tab", name="Train").click()
    expect(page.locator("#train-start")).to_be_visible(timeout=30_000)
    fields_up(page)
    return page


def number(page: Page, field: str, value: int) -> None:
    box = page.locator(f"#{field} input[type=number]").first
    box.fill(str(value))
    box.press("Tab")


def choose(page: Page, field: str, option: str) -> None:
    page.locator(f"#{field} input").click()
    page.get_by_role("option", name=option, exact=True).click()


def opened_by(page: Page, seen: Seen, link: str) -> Page:
    """The page that a link opens beside this one."""
    with page.expect_popup() as popup:
        page.get_by_role("link", name=link, exact=True).click()
    seen.watch(popup.value)
    popup.value.wait_for_load_state()
    return popup.value


def earlier_run(runs: Path) -> RunFolder:
    """A training of last week that was stopped, as its folder tells it."""
    config = presets.load("demo", ["name=last_week", f"output={json.dumps(str(runs))}", "train.steps=40"])
    folder = RunFolder.create(config)
    steps = [
        {"event": "Step", "step": n, "steps": 40, "loss": 0.5, "learning_rate": 1, "eta_s": 9} for n in (1, 2)
    ]
    told = [{"event": "TakenUp"}, {"event": "Started", "first_step": 1, "steps": 40}, *steps]
    told += [{"event": "Interrupted", "step": 2, "path": "", "resume": ""}]
    folder.events.write_text("".join(json.dumps(event) + "\n" for event in told), encoding="utf-8")
    return folder


def test_from_a_look_at_the_pictures_to_a_run_gone_on_with(
    chrome: Browser, app: tuple[Session, Host], seen: Seen, tmp_path: Path
) -> None:
    """One training: asked for too soon, checked, begun, told what it cannot do, finished, reported, trained further."""
    session, host = app
    earlier_run(tmp_path / "runs")
    page = opened(chrome, host, seen)
    ready = page.locator("#ready")
    expect(ready).to_contain_text("Next: choose 4 to 20 pictures", timeout=10_000)
    page.locator("#train-example").click()
    expect(page.locator(".thumb")).to_have_count(5, timeout=30_000)
    expect(ready).to_contain_text("Ready: 5 pictures, 450 steps, rank 16, on demo (SD 1.x)", timeout=10_000)

    # what is wrong is said where it is
    unfold(page, "train-every")
    own = page.locator("#train-settings textarea")
    own.fill("train.lerning_rate = 1e-3")
    expect(page.locator("#preset-whole")).to_contain_text("Did you mean train.learning_rate", timeout=10_000)
    expect(ready).to_contain_text("lerning_rate")
    page.locator("#train-start").click()
    expect(ready.get_by_role("alert")).to_contain_text("lerning_rate", timeout=10_000)
    own.fill("train.learning_rate = 1e-3\npreview.steps = 2\nreport.steps = 2\nreport.seeds = [0]")
    expect(page.locator("#preset-whole pre")).to_contain_text("learning_rate = 0.001", timeout=10_000)
    expect(ready).to_contain_text("Ready")

    # the check: a picture twice, and one much too small
    Image.new("RGB", (24, 24), "red").save(tmp_path / "tiny.png")
    again = presets.PRESETS / "demo" / "subjects" / "fox" / "train" / "00.png"
    shutil.copyfile(again, tmp_path / "again.png")
    page.locator('input[data-testid="Choose pictures-upload-button"]').set_input_files(
        [tmp_path / "again.png", tmp_path / "tiny.png"]
    )
    expect(page.locator(".thumb")).to_have_count(7, timeout=30_000)
    number(page, "train-steps", 20)
    page.locator("#train-class input").uncheck()
    page.locator("#train-check").click()
    check = page.locator("#check")
    expect(check).to_contain_text("The same file twice: draft/00.png, draft/again.png", timeout=60_000)
    expect(check).to_contain_text("tiny.png is too small: enlarged 2.7 times")
    look = opened_by(page, seen, "Every picture as it is cut and told")
    expect(look.get_by_role("heading", name="Every picture, as it is cut and told")).to_be_visible()
    assert "sandbox" in look.request.get(look.url).headers["content-security-policy"]
    look.close()
    for tile in ("Memory", "Time", "Disk"):
        expect(check.locator("dt", has_text=tile)).to_be_visible(timeout=300_000)
    expect(check).to_contain_text("Nothing keeps it from coming to its end")
    page.get_by_role("button", name="Take out again.png").click()
    page.get_by_role("button", name="Take out tiny.png").click()
    number(page, "train-steps", 30)
    expect(check).to_contain_text("Something was changed since", timeout=10_000)
    assert not list((tmp_path / "runs").glob("my-first-lora*"))

    # answers outlast the page
    seen.reload(page)
    page.get_by_role("tab", name="Train").click()
    expect(page.locator("#train-steps input[type=number]")).to_have_value("30", timeout=30_000)
    expect(page.locator("#train-class input")).not_to_be_checked()

    page.locator("#train-start").click()
    wait(lambda: (view := session.training.view()) and view.step > 2, "the first steps", 120)
    page.locator("#train-pause").click()
    expect(page.locator("#train-card")).to_contain_text("paused", timeout=30_000)
    expect(page.locator("#train-card")).to_contain_text("s a step")  # of its own preflight
    page.locator("#sample-now").click()
    expect(page.locator("#said-sample")).to_contain_text("no prompt for the sample", timeout=10_000)
    expect(page.locator("#new-steps input")).to_have_value("30")
    number(page, "new-steps", 24)
    page.locator("#change-steps").click()
    wait(lambda: (view := session.training.view()) and view.steps == 24, "the steps to change", 30)
    number(page, "sample-weight", 0)
    page.locator("#sample-prompt input, #sample-prompt textarea").first.fill("a cat")
    page.locator("#sample-now").click()
    expect(page.locator("#said-sample")).not_to_contain_text("no prompt", timeout=10_000)
    wait(lambda: any(p[1] == "a cat" for p in session.training.view().previews), "the sample", 60)
    expect(page.get_by_role("button", name="Look at last_week")).to_be_disabled()
    page.locator("#train-pause").click()
    wait(
        lambda: session.training.view().state == "finished" and not session.training.current(), "the end", 400
    )

    report = opened_by(page, seen, "Report")
    expect(report).to_have_title("my-first-lora – LoRA Loom")
    expect(report.locator("svg").first).to_be_visible()
    report.close()

    # an earlier run, and this one again, with more steps
    page.get_by_role("button", name="Look at last_week").click()
    expect(page.locator("#train-card")).to_contain_text("step 2 of 40", timeout=10_000)
    expect(page.locator("#train-pause")).to_have_text("Go on", timeout=10_000)
    page.get_by_role("button", name="Look at my-first-lora").click()
    expect(page.locator("#train-card")).to_contain_text("step 24 of 24", timeout=10_000)
    page.locator("#train-pause").click()
    expect(page.locator("#said-orders")).to_contain_text("has all of its 24 steps", timeout=10_000)
    expect(page.locator("#new-steps input")).to_have_value("24")
    number(page, "new-steps", 28)
    page.locator("#train-pause").click()
    wait(lambda: session.training.view().step == 28, "four more steps", 300)
    wait(lambda: session.training.view().state == "finished", "the end", 300)
    assert [step for step, _, _ in session.training.view().losses] == list(range(1, 29))


def test_presets_follow_the_base_and_say_what_they_extend(
    chrome: Browser, app: tuple[Session, Host], seen: Seen
) -> None:
    """On a narrow window: the chain, the preset's own numbers, and the buttons in sight wherever one has scrolled."""
    session, host = app
    page = opened(chrome, host, seen, width=390)
    for place in (0, 400):
        page.evaluate(f"scrollTo(0, {place})")
        expect(page.locator("#train-start")).to_be_in_viewport()
    unfold(page, "train-every")
    choose(page, "train-preset", "low_vram")
    expect(page.locator("#preset-whole")).to_contain_text("low_vram extends sd15_subject", timeout=10_000)
    expect(page.locator("#train-rank input[type=number]")).to_have_value("8")
    expect(page.locator("#train-steps input[type=number]")).to_have_value("800")
    page.locator("#train-token input, #train-token textarea").first.fill("sks")
    expect(page.locator("#train-prompt input, #train-prompt textarea").first).to_have_value("a sks animal")
    assert page.evaluate("document.documentElement.scrollWidth") == 390  # nothing is cut off at the side
    teaching.answer(session, noun="dog")
    small_pipeline("sdxl").save_pretrained(session.library.base_folder / "small-xl")
    session.choose_base(str(session.library.base_folder / "small-xl"))
    expect(page.locator("#train-prompt input, #train-prompt textarea").first).to_have_value(
        "a photo of sks dog", timeout=60_000
    )
    expect(page.locator("#train-preset input")).to_have_value("sdxl_subject")
    expect(page.locator("#train-steps input[type=number]")).to_have_value("1000")


def test_a_base_that_does_not_tell_what_it_predicts_is_asked_about(
    chrome: Browser, app: tuple[Session, Host], seen: Seen
) -> None:
    """The answer opens it, is kept, and goes into the training's preset."""
    session, host = app
    pipe = hands_back_its_noise(small_pipeline("sd2", clip_vocabulary=True))
    with torch.no_grad():  # the noise, and as much again that is not: a correlation of 0.6
        pipe.unet.conv_out.bias.copy_(torch.tensor([1.3, -1.3, 1.3, -1.3]))
    file = save_ldm_single_file(pipe, session.library.base_folder / "silent.safetensors")
    page = opened(chrome, host, seen)
    page.get_by_role("tab", name="Generate").click()
    expect(page.locator("#unclear")).to_be_hidden()
    choose(page, "base", "silent")
    asked = page.get_by_role("radiogroup").or_(page.locator("#prediction"))
    expect(asked.first).to_contain_text("What does silent.safetensors predict?", timeout=60_000)
    expect(page.locator("#message")).to_contain_text("does not say", timeout=60_000)
    page.get_by_label(re.compile("velocity")).check()
    page.locator("#predict").click()
    wait(lambda: session.wanted.base == str(file) and not session.worker.view.busy, "the base", 60)
    assert session.pipe is not None
    assert session.pipe.pipeline.scheduler.config.prediction_type == "v_prediction"
    expect(page.locator("#unclear")).to_be_hidden(timeout=10_000)
    assert teaching.config(session, file.parent).prediction == "v_prediction"
    assert json.loads((session.library.root / "session.json").read_text())["predictions"] == {
        str(file): "v_prediction"
    }
