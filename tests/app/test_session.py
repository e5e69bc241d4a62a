"""The session behind the page, on the real demo base: what is wanted, what is done, and the way back."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from PIL import Image

from app.jobs import Job
from app.session import Session
from app.status import status_html
from lora_core import LivePipeline, write_adapter
from lora_core.base_sources import DEMO
from lora_core.parameters import parse_parameters
from tests.lora_core.test_pipeline import random_adapter
from tests.small_models import small_pipeline


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ink and glow fit the demo base, tall is an SDXL LoRA, broken is none."""
    folder = tmp_path_factory.mktemp("loras")
    demo = LivePipeline.open("demo", device="cpu")
    for seed, name in enumerate(("ink", "glow")):
        write_adapter(random_adapter(demo, seed, name=name), folder / f"{name}.safetensors", spelling="kohya")
    tall = random_adapter(LivePipeline(small_pipeline("sdxl")), 3, name="tall")
    write_adapter(tall, folder / "tall.safetensors", spelling="kohya")
    (folder / "broken.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0 not a header")
    return folder


@pytest.fixture
def session(tmp_path: Path) -> Iterator[Session]:
    session = Session(tmp_path / "models", tmp_path / "outputs", tmp_path / "runs", open_now=False)
    yield session
    session.close()


def done(job: Job, state: str = "done") -> str:
    assert job.done.wait(120)
    assert job.view.state == state, job.view.message
    return job.view.message


def until(true: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def drop(session: Session, files: Path, tmp_path: Path, *names: str) -> Job:
    uploads = tmp_path / "uploads"
    uploads.mkdir(exist_ok=True)
    copies = [(Path(shutil.copy(files / f"{n}.safetensors", uploads)), f"{n}.safetensors") for n in names]
    return session.drop(copies)


def picture(session: Session) -> bytes:
    session.remember(prompt="a dog on a red background", steps=4)
    done(session.generate(session.wanted.form.request()))
    with Image.open(session.pictures.newest()[0]) as image:
        return image.tobytes()


def test_there_and_back_is_the_same_picture(session: Session, files: Path, tmp_path: Path) -> None:
    first = picture(session)
    assert session.seal.startswith("base verified")
    done(drop(session, files, tmp_path, "ink", "glow"))
    assert session.pipe is not None
    both = picture(session)
    session.set_row("ink", weight=0.3, text=0.0)
    session.set_row("glow", on=False)
    less = picture(session)
    assert session.pipe.weights["glow"] == 0
    assert session.pipe.weights["ink"] == {"unet": 0.3, "text_encoder": 0.0, "text_encoder_2": 0.0}
    done(session.fuse())
    assert session.pipe.fused
    assert session.seal == ""
    fused = picture(session)
    assert session.pipe.fused
    session.set_row(
        "ink", weight=0.4
    )  # fused weights cannot follow a slider: live again with the next picture
    picture(session)
    assert not session.pipe.fused
    message = done(session.unload())
    assert "base verified" in message
    assert (session.rows, session.pipe.loaded) == ({}, {})
    assert picture(session) == first
    assert len({first, both, less}) == 3
    assert fused != first


def test_a_slider_acts_at_once_and_in_the_picture_being_made(
    session: Session, files: Path, tmp_path: Path
) -> None:
    done(drop(session, files, tmp_path, "ink", "glow"))
    pipe = session.pipe
    assert pipe is not None
    session.set_row("ink", weight=0.3)
    assert pipe.weights["ink"] == 0.3
    session.remember(prompt="a dog", steps=60)
    job = session.generate(session.wanted.form.request())
    while job.view.step < 2:
        assert not job.done.wait(0.01)
    session.set_row("ink", weight=0.7)
    assert not job.done.is_set()  # the page does not wait for the picture
    done(job)
    history = json.loads(parse_parameters(session.pictures.settings(0))["fields"]["Lora steps"])
    assert [weights["ink"] for _, weights in history] == [0.3, 0.7]
    assert history[1][0] > 2


def test_one_alone_and_all_again(session: Session, files: Path, tmp_path: Path) -> None:
    done(drop(session, files, tmp_path, "ink", "glow"))
    assert session.pipe is not None
    session.set_row("glow", weight=0.4)
    session.play_alone("ink")
    assert session.pipe.weights == {"ink": 1.0, "glow": 0.0}
    assert session.rows["glow"].weight == 0.4
    session.play_alone("glow")
    assert session.pipe.weights == {"ink": 0.0, "glow": 0.4}
    session.play_alone("glow")
    assert session.pipe.weights == {"ink": 1.0, "glow": 0.4}
    session.play_alone("ink")
    done(session.wear(["glow"]))  # worn anew, at weight 1: still silent beside the one
    assert session.pipe.weights == {"ink": 1.0, "glow": 0.0}
    session.set_row("glow", weight=0.4)
    done(session.remove("ink"))
    picture(session)
    assert session.pipe.weights == {"glow": 0.4}


def test_a_lora_of_the_library_named_in_the_prompt_is_worn_for_that_picture(
    session: Session, files: Path, tmp_path: Path
) -> None:
    plain = picture(session)
    done(drop(session, files, tmp_path, "ink"))
    worn = picture(session)
    done(session.remove("ink"))
    assert session.pipe is not None
    session.remember(prompt="a dog on a red background <lora:ink:1>", steps=4)
    done(session.generate(session.wanted.form.request()))
    with Image.open(session.pictures.newest()[0]) as image:
        assert image.tobytes() == worn
    assert session.pipe.loaded == {}
    session.remember(prompt="a dog <lora:inc:1>")
    assert "ink" in done(session.generate(session.wanted.form.request()), "failed")
    assert picture(session) == plain


def test_a_contact_sheet_and_what_the_mix_does(session: Session, files: Path, tmp_path: Path) -> None:
    session.remember(prompt="a dog", steps=2)
    request = session.wanted.form.request()
    assert "needs a LoRA" in done(session.contact_sheet(request, "loras", [0, 1]), "failed")
    done(drop(session, files, tmp_path, "ink", "glow"))
    done(session.fuse())
    before = len(session.pictures.newest())
    assert "2 rows of 2" in done(session.contact_sheet(request, "loras", [0, 1]))
    assert len(session.pictures.newest()) == before + 5
    with Image.open(session.pictures.newest()[0]) as page, Image.open(session.pictures.newest()[1]) as cell:
        assert page.width > 2 * cell.width
    assert "3 rows of 1" in done(session.contact_sheet(request, "seeds", [0.5]))
    said = done(session.measure())
    assert "Moved furthest" in said
    assert "ink and glow overlap by" in said


def test_auto_fuses_by_itself_and_a_slider_takes_it_back(
    session: Session, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lora_core.live_mix.STILL_S", 0.05)
    done(drop(session, files, tmp_path, "ink"))
    pipe = session.pipe
    assert pipe is not None
    session.set_auto(True)
    until(lambda: pipe.fused)
    fused = picture(session)
    assert "fused into the base" in status_html(session)
    session.set_auto(False)
    assert not pipe.fused
    assert fused
    assert "1 LoRA live" in status_html(session)


def test_the_bad_files_are_named_and_the_good_ones_worn(
    session: Session, files: Path, tmp_path: Path
) -> None:
    message = done(drop(session, files, tmp_path, "ink", "broken", "tall"), "failed")
    assert set(session.rows) == {"ink"}
    assert "broken.safetensors" in message
    assert "tall" in message
    assert "SDXL" in message
    assert {f.name for f in session.library.loras()} == {"ink", "tall"}  # tall is kept for its own model


def test_another_base_sets_aside_what_does_not_fit(session: Session, files: Path, tmp_path: Path) -> None:
    done(drop(session, files, tmp_path, "ink"))
    small_pipeline("sdxl").save_pretrained(session.library.base_folder / "small-xl")
    sources = dict(session.library.bases())
    message = done(session.choose_base(sources["small-xl"]))
    assert "Set aside" in message
    assert session.rows["ink"].aside
    assert session.pipe is not None
    assert session.pipe.loaded == {}
    done(session.choose_base("demo"))
    assert session.rows["ink"].aside == ""
    assert set(session.pipe.loaded) == {"ink"}


def test_a_base_that_cannot_be_opened_leaves_the_one_that_is(session: Session) -> None:
    first = picture(session)
    (session.library.base_folder / "odd.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0 not a header")
    message = done(session.choose_base(str(session.library.base_folder / "odd.safetensors")), "failed")
    assert "odd.safetensors" in message
    assert session.wanted.base == "demo"
    assert picture(session) == first


def test_only_what_the_library_offers_is_opened(session: Session) -> None:
    message = done(session.choose_base(str(DEMO.parent / "subjects")), "failed")
    assert "is not among the base models" in message


def test_the_next_session_goes_on_where_this_one_was(session: Session, files: Path, tmp_path: Path) -> None:
    done(drop(session, files, tmp_path, "ink"))
    session.set_row("ink", weight=0.25)
    session.remember(prompt="a cat", seed=5)
    session.close()
    again = Session(tmp_path / "models", tmp_path / "outputs", tmp_path / "runs", open_now=False)
    try:
        assert (again.wanted.form.prompt, again.wanted.form.seed) == ("a cat", 5)
        picture(again)
        assert again.pipe is not None
        assert again.pipe.weights == {"ink": 0.25}
    finally:
        again.close()


def test_stop_ends_a_picture_between_two_steps(session: Session) -> None:
    picture(session)
    session.remember(steps=1000)
    job = session.generate(session.wanted.form.request())
    while job.view.step < 2:
        assert not job.done.wait(0.01)
    assert job.view.preview.startswith("data:image/png")
    session.worker.stop()
    done(job, "stopped")
    assert len(session.pictures.newest()) == 1
