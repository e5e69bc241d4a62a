"""Whole mixes and the finer weights of a row, on the real demo base: what the page asks for is what the model wears."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from app import mixing
from app.mixing import mixes_data
from app.session import Session
from lora_core import LivePipeline, write_adapter
from lora_core.burn import LIMIT
from lora_core.errors import ConfigError, LoraError
from lora_core.mix import AdapterWeight
from lora_core.named_mixes import read_mix
from lora_core.parameters import parse_parameters
from tests.app.test_session import done, drop, until
from tests.lora_core.test_pipeline import random_adapter

CURVE = ((0.0, 1.0), (0.5, 0.25), (1.0, 0.0))
FINE = {
    "unet": 0.8,
    "text_encoder": 0.5,
    "text_encoder_2": 0.5,
    "blocks": {"down.1": 0.3, r"attn2\.to_k": 0.0},
} | {
    "curve": [list(point) for point in CURVE],
    "half": "conditional",
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("loras")
    demo = LivePipeline.open("demo", device="cpu")
    for seed, name in enumerate(("ink", "glow")):
        write_adapter(random_adapter(demo, seed, name=name), folder / f"{name}.safetensors", spelling="kohya")
    return folder


@pytest.fixture
def session(tmp_path: Path) -> Iterator[Session]:
    session = Session(tmp_path / "models", tmp_path / "outputs", tmp_path / "runs", open_now=False)
    yield session
    session.close()


@pytest.fixture
def pipe(session: Session, files: Path, tmp_path: Path) -> LivePipeline:
    """With ink and glow in the mixer."""
    done(drop(session, files, tmp_path, "ink", "glow"))
    assert session.pipe is not None
    return session.pipe


def idle(session: Session) -> None:
    until(lambda: not session.worker.view.busy)


def set_fine(session: Session) -> None:
    session.set_row("ink", weight=0.8)
    mixing.change(session, "ink", lambda row: mixing.with_text(row, 0.5))
    mixing.change(session, "ink", lambda row: mixing.with_block(row, "down.1", 0.3))
    mixing.change(session, "ink", lambda row: mixing.with_block(row, r"attn2\.to_k", 0.0))
    mixing.change(session, "ink", lambda row: row.changed(curve=CURVE, half="conditional"))


# --- one row ------------------------------------------------------------------------------------------------


def test_blocks_curve_and_half_are_worn_written_into_the_picture_and_kept(
    session: Session, pipe: LivePipeline, tmp_path: Path
) -> None:
    set_fine(session)
    assert pipe.weights == {"ink": FINE, "glow": 1.0}
    session.remember(prompt="a dog", steps=4)
    done(session.generate(session.wanted.form.request()))
    read = parse_parameters(session.pictures.settings(0))
    assert (read["prompt"], read["loras"]) == ("a dog", {"ink": FINE, "glow": 1.0})
    session.close()
    again = Session(tmp_path / "models", tmp_path / "outputs", tmp_path / "runs", open_now=False)
    try:
        done(again.generate(again.wanted.form.request()))
        assert again.pipe is not None
        assert again.pipe.weights == {"ink": FINE, "glow": 1.0}
        mixing.change(again, "ink", lambda row: mixing.with_block(row, "down.1", None))
        assert again.pipe.weights["ink"]["blocks"] == {r"attn2\.to_k": 0.0}  # type: ignore[index]
        mixing.change(again, "ink", mixing.plainly)
        assert again.pipe.weights == {"ink": 0.8, "glow": 1.0}
    finally:
        again.close()


def test_a_block_the_model_does_not_have_is_refused_and_changes_nothing(
    session: Session, pipe: LivePipeline
) -> None:
    before = session.rows["ink"]
    with pytest.raises(ConfigError, match=r'Did you mean "down\.1"'):
        mixing.change(session, "ink", lambda row: mixing.with_block(row, "dwon.1", 0.5))
    with pytest.raises(ConfigError, match="must increase"):
        mixing.change(session, "ink", lambda row: row.changed(curve=((0.5, 1.0), (0.5, 0.0))))
    assert session.rows["ink"] == before
    assert pipe.weights == {"ink": 1.0, "glow": 1.0}


def test_what_kept_a_lora_out_can_be_taken_back(session: Session, files: Path, tmp_path: Path) -> None:
    """A block that was set for another model: the LoRA is set aside with the reason, and worn once that is reset."""
    shutil.copy(files / "ink.safetensors", session.library.lora_folder)
    mixing.put_on(session, {"ink": AdapterWeight(blocks=(("down.9", 0.5),))})
    until(lambda: session.pipe is not None and not session.worker.view.busy)
    assert "down.9" in session.rows["ink"].aside
    assert session.pipe is not None
    assert session.pipe.loaded == {}
    mixing.change(session, "ink", mixing.plainly)
    idle(session)
    assert session.rows["ink"].aside == ""
    assert session.pipe.weights == {"ink": 1.0}


# --- whole mixes --------------------------------------------------------------------------------------------


def test_a_mix_saved_is_a_mix_worn(session: Session, pipe: LivePipeline) -> None:
    set_fine(session)
    session.set_row("glow", on=False)
    mixing.save(session, "soft")
    assert read_mix(session.mixes.folder / "soft.toml") == (
        {"ink": AdapterWeight.parse("ink", FINE)},
        {"ink": "ink.safetensors"},  # below the LoRA folder: the models may be moved
    )
    mixing.change(session, "ink", mixing.plainly)
    session.set_row("glow", on=True, weight=0.25)
    session.play_alone("glow")
    data = mixes_data(session)
    assert [(saved["name"], saved["worn"]) for saved in data["saved"]] == [("soft", False)]
    mixing.wear(session, "soft")
    assert pipe.weights == {"ink": FINE, "glow": 0.0}
    assert (session.rows["glow"].on, session.wanted.solo) == (False, "")
    assert session.rows["glow"].weight == 0.25
    data = mixes_data(session)
    assert [(saved["name"], saved["worn"]) for saved in data["saved"]] == [("soft", True)]
    assert data["before"] == "glow 0.25"
    mixing.wear_before(session)
    assert pipe.weights == {"ink": 0.0, "glow": 0.25}
    assert mixes_data(session)["before"] == ""


def test_a_mix_brings_its_loras_from_the_library_and_names_what_is_missing(
    session: Session, pipe: LivePipeline
) -> None:
    set_fine(session)
    mixing.save(session, "both")
    done(session.unload())
    (session.library.lora_folder / "glow.safetensors").unlink()
    with pytest.raises(LoraError, match=r'Not all of "both" can be worn. "glow" is not in the library'):
        mixing.wear(session, "both")
    idle(session)
    assert pipe.weights == {"ink": FINE}
    assert session.rows["ink"].facts.endswith("layers")
    (session.mixes.folder / "by hand.toml").write_text(
        '[weights]\n"my ink" = 0.5\n"glow" = 1\n'
        '[files]\n"my ink" = "ink.safetensors"\n"glow" = "../../ink.safetensors"\n'
    )
    with pytest.raises(LoraError, match='"glow" is not in the library'):
        mixing.wear(session, "by hand")
    assert pipe.weights == {"ink": 0.5}


def test_a_mix_for_another_model_is_worn_as_far_as_it_goes(session: Session, pipe: LivePipeline) -> None:
    (session.mixes.folder / "tall.toml").write_text(
        '[weights]\n"ink" = {"blocks" = {"down.9" = 0.5}}\n"glow" = 0.5\n'
    )
    with pytest.raises(LoraError, match=r'"down.9" names no layer'):
        mixing.wear(session, "tall")
    assert pipe.weights == {"ink": 0.0, "glow": 0.5}


def test_names_are_proposed_and_nothing_is_no_mix(session: Session, pipe: LivePipeline) -> None:
    mixing.save(session, " ")
    assert [saved.name for saved in session.mixes.all()] == ["ink + glow"]
    assert mixes_data(session)["proposed"] == "ink + glow 2"
    session.play_alone("glow")
    mixing.save(session, "")
    assert session.mixes.find("glow").mix == {"glow": AdapterWeight()}
    done(session.unload())
    with pytest.raises(LoraError, match="no LoRA in this mix to save"):
        mixing.save(session, "nothing")


# --- crossfade ----------------------------------------------------------------------------------------------


def test_a_crossfade_acts_in_the_picture_being_made(session: Session, pipe: LivePipeline) -> None:
    session.set_row("glow", on=False)
    mixing.save(session, "a")
    session.set_row("glow", on=True, weight=0.5)
    session.set_row("ink", weight=0.2)
    mixing.save(session, "b")
    mixing.fade(session, "a", "b", 0.0)
    assert pipe.weights == {"ink": 1.0, "glow": 0.0}
    session.remember(prompt="a dog", steps=60)
    job = session.generate(session.wanted.form.request())
    while job.view.step < 2:
        assert not job.done.wait(0.01)
    mixing.fade(session, "a", "b", 0.25)
    assert not job.done.is_set()
    done(job)
    history = json.loads(parse_parameters(session.pictures.settings(0))["fields"]["Lora steps"])
    assert [weights for _, weights in history] == [
        {"ink": 1.0, "glow": 0.0},
        {"ink": pytest.approx(0.8), "glow": 0.125},
    ]
    assert history[1][0] > 2
    mixing.fade(session, "a", "b", 1)
    assert pipe.weights == {"ink": 0.2, "glow": 0.5}
    assert mixes_data(session)["fade"] == {"names": ["a", "b"], "a": "a", "b": "b", "at": 1.0}


def test_a_crossfade_brings_what_is_not_loaded_and_says_once_what_is_missing(
    session: Session, pipe: LivePipeline
) -> None:
    mixing.save(session, "both")
    session.set_row("glow", on=False)
    mixing.save(session, "ink alone")
    done(session.unload())
    (session.library.lora_folder / "glow.safetensors").unlink()
    with pytest.raises(LoraError, match='"glow" is not in the library'):
        mixing.fade(session, "both", "ink alone", 0.1)
    mixing.fade(session, "both", "ink alone", 0.2)
    idle(session)
    assert pipe.weights == {"ink": 1.0}


def test_mixes_that_cannot_be_faded_are_refused_and_nothing_moves(
    session: Session, pipe: LivePipeline
) -> None:
    mixing.save(session, "both")
    mixing.change(session, "ink", lambda row: row.changed(half="conditional"))
    mixing.save(session, "half")
    session.set_row("ink", weight=0.1)
    before = pipe.weights
    for at in (0, 0.5):
        with pytest.raises(ConfigError, match="Give it the same half"):
            mixing.fade(session, "both", "half", at)
    with pytest.raises(LoraError, match="Did you mean"):
        mixing.fade(session, "both", "hall", 0.5)
    assert pipe.weights == before


# --- normalise ----------------------------------------------------------------------------------------------


def test_normalising_brings_the_strongest_block_to_the_limit_and_the_rows_show_it(
    session: Session, pipe: LivePipeline
) -> None:
    for name in ("ink", "glow"):
        session.set_row(name, weight=0.001)
    assert "nothing was changed" in done(session.normalise())
    assert pipe.weights == {"ink": 0.001, "glow": 0.001}
    session.set_row("ink", weight=3.0)
    session.set_row("glow", weight=2.0, on=False)
    before = pipe.strengths()
    assert max(before.values()) > LIMIT
    assert "Brought down to 15%" in done(session.normalise())
    assert max(pipe.strengths().values()) == pytest.approx(LIMIT, rel=1e-3)
    assert pipe.weights["ink"] == session.rows["ink"].worn.plain
    assert session.rows["ink"].weight == 3.0
    assert session.rows["ink"].blocks
    assert (session.rows["glow"].weight, session.rows["glow"].on) == (2.0, False)
    assert session.rows["ink"].text_2 is None  # the demo has one text encoder
    assert mixes_data(session)["before"] == "ink 3"
    mixing.wear_before(session)
    assert pipe.weights == {"ink": 3.0, "glow": 0.0}
    done(session.fuse())
    assert "Brought down to 15%" in done(session.normalise())  # fused, it is measured all the same
    assert not pipe.fused
    done(session.unload())
    assert "no LoRA to bring down" in done(session.normalise(), "failed")
