"""The mixer in a real browser: mixes kept by name, the crossfade, and the finer weights of a row."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from typing import Any

import pytest
from playwright.sync_api import Page, expect

from app import live
from app.session import Session
from lora_core import LivePipeline
from lora_core.mix import AdapterWeight
from lora_core.named_mixes import read_mix
from lora_core.parameters import parse_parameters
from tests.app.page import Seen, app_at, browser, unfold, wait
from tests.app.test_page import demo_lora

pytestmark = pytest.mark.browser


class Mixer:
    """The page with ink and glow in the mixer."""

    def __init__(self, session: Session, page: Page, seen: Seen) -> None:
        self.session, self.page, self.seen = session, page, seen

    @property
    def pipe(self) -> LivePipeline:
        assert self.session.pipe is not None
        return self.session.pipe

    def weigh(self, label: str, weight: float) -> None:
        self.page.get_by_label(f"{label}, as a number", exact=True).fill(str(weight))

    def becomes(self, weights: dict[str, object]) -> None:
        with suppress(AssertionError):  # below it says what there is by then
            wait(lambda: self.pipe.weights == weights, "the weights", 20)
        assert self.pipe.weights == weights

    def press(self, name: str) -> None:
        self.page.get_by_role("button", name=name, exact=True).click()

    def open_mixes(self) -> None:
        unfold(self.page, "mixes-more")

    def save(self, name: str) -> None:
        self.page.get_by_label("Name of this mix").fill(name)
        self.press("Save this mix")
        expect(self.page.get_by_role("button", name=f"Wear {name}", exact=True)).to_have_text(
            "Worn", timeout=10_000
        )


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mixer]:
    folder, seen = tmp_path_factory.mktemp("page"), Seen()
    loras = [
        (demo_lora(folder / f"{n}.safetensors", i), f"{n}.safetensors") for i, n in enumerate(("ink", "glow"))
    ]
    with app_at(folder) as (session, host), browser(folder / "chrome") as chrome:
        session.drop(loras)
        wait(lambda: len(session.rows) == 2 and not session.worker.view.busy, "two LoRAs in the mixer")
        page = chrome.new_page(viewport={"width": 1440, "height": 1000})
        seen.watch(page)
        page.goto(host.url)
        expect(page.get_by_role("slider", name="Weight of glow").first).to_be_visible(timeout=60_000)
        yield Mixer(session, page, seen)
    assert seen.foreign == []
    assert seen.errors == []


@pytest.fixture
def mixer(served: Mixer) -> Mixer:
    """As it was at first: both LoRAs at 1, no mix saved, everything folded away."""
    session = served.session
    for name, row in list(session.rows.items()):
        session.rows[name] = row.wearing(AdapterWeight())
    session.wanted.solo = ""
    session.put, session.before = {}, {}
    for saved in session.mixes.all():
        saved.path.unlink()
    session.mix_now()
    session.changed()
    served.seen.reload(served.page)
    expect(served.page.get_by_role("slider", name="Weight of glow").first).to_be_visible(timeout=60_000)
    return served


def test_a_mix_is_saved_and_worn_again_after_a_reload(mixer: Mixer) -> None:
    session, page = mixer.session, mixer.page
    mixer.weigh("Weight of ink", 0.33)  # between two steps of the slider
    page.get_by_label("glow", exact=True).get_by_role("checkbox").first.uncheck()
    mixer.becomes({"ink": 0.33, "glow": 0.0})
    mixer.open_mixes()
    expect(page.locator(".saved")).to_contain_text("No mix is saved yet")
    mixer.save("soft ink")
    assert read_mix(session.mixes.folder / "soft ink.toml")[0] == {"ink": AdapterWeight.parse("ink", 0.33)}
    mixer.weigh("Weight of ink", 2)
    mixer.becomes({"ink": 2.0, "glow": 0.0})
    expect(page.get_by_role("button", name="Wear soft ink")).to_have_text("Wear", timeout=10_000)

    mixer.seen.reload(page)
    mixer.open_mixes()
    session.unload()
    wait(lambda: not session.rows and not session.worker.view.busy, "an empty mixer")
    mixer.press("Wear soft ink")  # from the library
    mixer.becomes({"ink": 0.33})
    expect(page.get_by_label("Weight of ink, as a number", exact=True)).to_have_value("0.33", timeout=10_000)
    expect(page.get_by_role("button", name="Wear soft ink")).to_have_text("Worn", timeout=10_000)

    mixer.press("Delete the mix soft ink")
    expect(page.locator(".mix")).to_have_count(0, timeout=10_000)
    assert session.mixes.all() == []
    mixer.press("Bring it back")
    expect(page.locator(".mix")).to_have_count(1, timeout=10_000)
    for lora in list(session.library.lora_folder.glob("ink*")):
        kept = lora.rename(lora.with_suffix(".gone"))
    session.unload()
    wait(lambda: not session.rows and not session.worker.view.busy, "an empty mixer")
    mixer.press("Wear soft ink")
    expect(page.locator("#said")).to_contain_text('"ink" is not in the library', timeout=10_000)
    kept.rename(lora)
    session.wear(["ink", "glow"])
    wait(lambda: len(session.rows) == 2 and not session.worker.view.busy, "both again")
    mixer.seen.errors = [e for e in mixer.seen.errors if "400 (Bad Request)" not in e]


def test_what_was_just_said_outlives_the_page(mixer: Mixer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also what the browser has not sent yet as the page is left, because its six connections are busy."""
    plain = live.change_row

    def slowly(session: Session, said: dict[str, Any]) -> None:
        time.sleep(1.5)
        plain(session, said)

    monkeypatch.setattr(live, "change_row", slowly)
    mixer.page.evaluate(
        """for (let i = 0; i < 6; i++) loom.send('row', `glow ${i}`, { name: 'glow', weight: 0.5 });
        loom.send('row', 'ink', { name: 'ink', weight: 0.4 });
        location.reload();"""
    )
    mixer.becomes({"ink": 0.4, "glow": 0.5})
    expect(mixer.page.get_by_label("Weight of ink, as a number", exact=True)).to_have_value(
        "0.4", timeout=30_000
    )


def test_the_crossfade_slider_leads_from_one_mix_to_the_other(mixer: Mixer) -> None:
    session, page = mixer.session, mixer.page
    mixer.open_mixes()
    expect(page.locator(".fade")).to_be_hidden()
    mixer.save("both")
    expect(page.locator(".hint")).to_be_visible()
    mixer.weigh("Weight of ink", 0.5)
    page.get_by_label("glow", exact=True).get_by_role("checkbox").first.uncheck()
    mixer.becomes({"ink": 0.5, "glow": 0.0})
    mixer.save("ink alone")
    slider = page.get_by_role("slider", name="Crossfade from both to ink alone")
    session.generate(replace(session.wanted.form.request(), steps=200))
    wait(lambda: session.worker.view.step > 2, "the first steps")
    slider.fill("0.5")
    mixer.becomes({"ink": 0.75, "glow": 0.5})
    assert session.worker.view.busy  # it acts in the picture that is being made
    expect(page.get_by_label("Weight of glow, as a number", exact=True)).to_have_value("0.5", timeout=10_000)
    slider.press("ArrowRight")
    slider.press("Home")
    mixer.becomes({"ink": 1.0, "glow": 1.0})
    wait(lambda: not session.worker.view.busy, "the picture", 120)
    history = json.loads(parse_parameters(session.pictures.settings(0))["fields"]["Lora steps"])
    assert [weights for _, weights in history][:2] == [{"ink": 0.5, "glow": 0.0}, {"ink": 0.75, "glow": 0.5}]
    assert history[-1][1] == {"ink": 1.0, "glow": 1.0}

    page.get_by_label("Crossfade to", exact=True).select_option("both")
    expect(page.locator(".fade")).to_be_disabled()  # from one mix to itself nothing leads
    page.get_by_label("Crossfade from", exact=True).select_option("ink alone")
    wait(lambda: session.wanted.fade.a == "ink alone", "the choice")
    mixer.seen.reload(page)
    mixer.open_mixes()
    page.get_by_role("slider", name="Crossfade from ink alone to both").fill("0")
    mixer.becomes({"ink": 0.5, "glow": 0.0})


def test_blocks_curve_and_half_reach_the_picture(mixer: Mixer) -> None:
    session, page = mixer.session, mixer.page
    page.get_by_text("More of ink").click()
    slider = page.get_by_role("slider", name="Block up of ink")
    slider.focus()
    for _ in range(4):
        slider.press("ArrowLeft")
    field = page.get_by_label("Another block of ink")
    field.fill("dwon.1")
    field.press("Enter")
    expect(page.locator("#said")).to_contain_text('Did you mean "down.1"?', timeout=10_000)
    field.fill("down.1")
    field.press("Enter")
    mixer.weigh("Block down.1 of ink", 0.3)
    curve = page.get_by_label("Curve of ink over the steps")
    curve.fill("0:1, 0.5")
    curve.press("Enter")
    expect(page.locator("#said")).to_contain_text("no colon", timeout=10_000)
    curve.fill("0:1, 0.5:0.2")
    curve.press("Enter")
    page.get_by_role("region", name="ink").get_by_text("Act on the prompt alone").click()
    mixer.weigh("Text weight of ink", 0.6)
    worn = {"unet": 1.0, "text_encoder": 0.6, "text_encoder_2": 0.6, "blocks": {"up": 0.8, "down.1": 0.3}}
    worn |= {"curve": [[0.0, 1.0], [0.5, 0.2]], "half": "conditional"}
    mixer.becomes({"ink": worn, "glow": 1.0})
    expect(page.locator(".set").first).to_have_text(
        "text 0.6 · up 0.8 · down.1 0.3 · curve 0:1, 0.5:0.2 · prompt alone", timeout=10_000
    )
    before = len(session.pictures.newest())
    page.locator("#generate").click()
    wait(lambda: len(session.pictures.newest()) > before and not session.worker.view.busy, "a picture", 120)
    assert parse_parameters(session.pictures.settings(0))["loras"] == {"ink": worn, "glow": 1.0}

    page.get_by_role("button", name="ink follows its main weight in up").press("Enter")
    expect(slider).to_be_focused()
    mixer.press("Take block down.1 of ink out")
    expect(page.get_by_role("slider", name="Block down.1 of ink")).to_have_count(0, timeout=10_000)
    mixer.press("Fade out: curve of ink")
    expect(curve).to_have_value("0:1, 0.5:1, 1:0", timeout=10_000)
    mixer.press("Reset ink")
    mixer.becomes({"ink": 1.0, "glow": 1.0})
    expect(page.get_by_role("button", name="Reset ink")).to_be_disabled(timeout=10_000)
    mixer.seen.errors = [e for e in mixer.seen.errors if "400 (Bad Request)" not in e]


def test_what_is_too_strong_is_brought_down(mixer: Mixer) -> None:
    page = mixer.page
    mixer.weigh("Weight of ink", 4)
    mixer.becomes({"ink": 4.0, "glow": 1.0})
    mixer.press("Normalise")
    expect(page.locator("#message")).to_contain_text("Brought down to 15%", timeout=30_000)
    expect(page.locator(".set").first).not_to_be_empty(timeout=10_000)
    assert max(mixer.pipe.strengths().values()) == pytest.approx(0.15, rel=1e-3)
    page.get_by_text("More of ink").click()
    expect(page.get_by_role("slider", name=re.compile("Block .* of ink"))).not_to_have_count(3)
    mixer.open_mixes()
    mixer.press("Back to it")
    mixer.becomes({"ink": 4.0, "glow": 1.0})
