"""Preflight: says what a training needs, refuses what would not come to its end, and leaves no trace in the run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import launch
from lora_core.errors import ConfigError, Stopped
from lora_core.safe_files import read_tensors
from tests.small_models import small_pipeline
from tests.trainers.runs import Recorder, base_folder, config, events_in, pictures
from tests.trainers.test_bad_input import preset_file
from trainers import advice, dreambooth, preflight, presets
from trainers.config import TrainConfig
from trainers.dreambooth import gradients, rehearse, train
from trainers.events import Preflight, TrainEvent
from trainers.room import out_of_memory
from trainers.scan import scan


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("preflight")
    return {family: base_folder(folder / family, family) for family in ("sd1", "sdxl")}


@pytest.fixture
def base(bases: dict[str, Path]) -> Path:
    return bases["sd1"]


def same_files(a: Path, b: Path) -> bool:
    ours, theirs = read_tensors(a), read_tensors(b)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


CHANCY: dict[str, Any] = {
    "lora": {"dropout": 0.2},
    "train": {"gradient_accumulation": 2, "schedule": "cosine"},
}


@pytest.mark.parametrize(
    "changes",
    [
        CHANCY,
        {
            "lora": {"variant": "dora", "dropout": 0.1},
            "data": {"flip": True, "caption_dropout": 0.3, "trigger": "zxq", "prompt": "a {red|blue} cat"},
        },
        {
            "lora": {"new_tokens": {"<cat>": "cat"}},
            "data": {"prompt": "a <cat>"},
            "train": {"ema_decay": 0.9},
        },
        {
            "train": {"text_encoder_learning_rate": 0.0, "input_perturbation": 0.1, "cache_latents": False},
            "data": {"crop": "random"},
        },
    ],
)
def test_a_run_is_bit_for_bit_the_run_without_it(tmp_path: Path, base: Path, changes: dict[str, Any]) -> None:
    pictures(tmp_path / "images", 3)
    settings = config(tmp_path, base, **changes)
    with_it, without = Recorder(), Recorder()
    file = train(settings, listeners=[without])
    again = train(settings, listeners=[with_it], preflight=True)
    assert with_it.losses == without.losses
    assert same_files(file, again)
    assert [type(e).__name__ for e in with_it.seen].count("Preflight") == 1


def test_a_resumed_run_too(tmp_path: Path, base: Path) -> None:
    pictures(tmp_path / "images", 3)
    settings = config(tmp_path, base, **CHANCY)
    straight, first, second = Recorder(), Recorder(stop_at=3), Recorder()
    file = train(settings, listeners=[straight])
    with pytest.raises(Stopped):
        train(settings, stop=first.stop, listeners=[first], preflight=True)
    again = train(settings, resume=tmp_path / "runs" / "small-2", listeners=[second], preflight=True)
    assert {**first.losses, **second.losses} == straight.losses
    assert same_files(file, again)


def test_it_costs_two_steps_of_the_largest_batch(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pictures(tmp_path / "images", 3)
    Image.new("RGB", (2 * 64, 64)).save(tmp_path / "images" / "wide.png")
    pictures(tmp_path / "class", 2)
    asked = []

    def counted(bench: Any, turns: Any) -> Any:
        asked.append([tuple(batch.z.shape) for turn in turns for batch in turn])
        return gradients(bench, turns)

    monkeypatch.setattr(dreambooth, "gradients", counted)
    data = {"class_images": tmp_path / "class", "class_prompt": "a dog"}
    found = rehearse(config(tmp_path, base, data=data, train={"gradient_accumulation": 3}))
    assert len(asked) == 2
    sizes = [n * h * w for n, _, h, w in asked[0]]
    assert sum(n for n, *_ in asked[0]) == found.pictures == 4
    assert max(sizes) >= 2 * 8 * 8
    assert found.total_s == pytest.approx(6 * found.step_s, abs=0.051)  # said to a tenth
    assert found.memory > 0
    assert found.memory_total > found.memory


@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
def test_disk_is_told_within_a_fifth(tmp_path: Path, base: Path, dtype: str) -> None:
    """Before anything is there by the preflight alone, and at the start of the run; both against what it came to."""
    pictures(tmp_path / "images", 12, side=128)
    settings = config(
        tmp_path,
        base,
        lora={"rank": 8},
        data={"resolution": 128},
        train={"steps": 6, "batch_size": 1, "ema_decay": 0.5},
        save={"every": 1, "keep": 2, "dtype": dtype},
    )
    before = rehearse(settings)
    recorder = Recorder()
    run = train(settings, listeners=[recorder], preflight=True).parent
    (at_start,) = [e for e in recorder.seen if isinstance(e, Preflight)]
    kept = [
        *run.glob("*.safetensors"),
        *(p for f in ("checkpoints", "cache", "previews") for p in (run / f).iterdir()),
    ]
    written = sum(path.stat().st_size for path in kept)
    assert at_start.disk == pytest.approx(written, rel=0.2)
    assert before.disk == pytest.approx(written, rel=0.2)


def facts(**changes: Any) -> Preflight:
    usual: dict[str, Any] = {
        **{
            "largest": "512 x 512",
            "pictures": 2,
            "pieces": 1,
            "memory": 5 * 10**9,
            "memory_total": 8 * 10**9,
        },
        **{"step_s": 1.0, "total_s": 500.0, "disk": 10**9, "disk_free": 10**10, "warnings": ()},
    }
    return Preflight(**{**usual, **changes})


def room(**changes: int) -> preflight.Room:
    usual = {"device": 8 * 10**9, "used": 6 * 10**9, "swapped": 0, "memory": 32 * 10**9, "disk": 10**10}
    return preflight.Room(**{**usual, **changes})


@pytest.mark.parametrize(
    ("changes", "space", "says"),
    [
        ({"disk": 2 * 10**10}, {}, ["20.0 GB", "10.0 GB", "save.every", "save.keep", "output"]),
        (
            {},
            {"used": 79 * 10**8},
            ["7.9 GB", "8.0 GB", "spill", "checkpointing", "accumulation = 6"],
        ),
        ({}, {"device": 0, "swapped": 2 * 10**9}, ["main memory", "2.0 GB", "swap", "data.resolution"]),
    ],
)
def test_what_would_not_come_to_its_end_is_refused_with_the_change(
    tmp_path: Path, changes: dict[str, Any], space: dict[str, int], says: list[str]
) -> None:
    settings = config(tmp_path, "demo", train={"gradient_accumulation": 3})
    preflight.refuse(facts(), room(), settings)
    preflight.refuse(facts(), room(device=0), settings)
    with pytest.raises(ConfigError) as problem:
        preflight.refuse(facts(**changes), room(**space), settings)
    assert [word for word in says if word not in str(problem.value)] == []
    frugal = config(tmp_path, "demo", train={"gradient_checkpointing": True, "batch_size": 1})
    assert "gradient_checkpointing" not in preflight.remedy(frugal)
    assert "batch_size" not in preflight.remedy(frugal)


def test_a_full_disk_is_refused_before_the_first_step(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pictures(tmp_path / "images", 1)
    preset = str(preset_file(tmp_path, base))
    assert launch.main(["--preflight", preset]) == 0
    said = capsys.readouterr().out
    assert "Preflight: 2 pictures of 64 x 64 take" in said
    assert "Warning: There is one picture alone" in said
    assert not (tmp_path / "runs").exists()
    monkeypatch.setattr(preflight, "free_disk", lambda folder: 1000)
    assert launch.main(["--preflight", preset]) == 2
    assert "1 kB are free" in capsys.readouterr().err
    assert launch.main(["--train", preset]) == 2
    assert "1 kB are free" in capsys.readouterr().err
    kinds = [e["event"] for e in events_in(tmp_path / "runs" / "small")]
    assert kinds[-1] == "Failed"
    assert "Step" not in kinds


def test_memory_that_does_not_do_even_in_the_smallest_pieces(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pictures(tmp_path / "images", 1)

    def short(bench: Any, turns: Any) -> Any:
        raise out_of_memory("CUDA out of memory")

    monkeypatch.setattr(dreambooth, "gradients", short)
    with pytest.raises(ConfigError, match=r"does not fit into memory.*gradient_checkpointing"):
        rehearse(config(tmp_path, base))


# --- warnings -------------------------------------------------------------------------------------------------


def about(settings: TrainConfig) -> list[str]:
    dataset = scan(settings.data, 64, datasets=settings.datasets)
    pipe = small_pipeline("sd1")
    return [
        *advice.about_settings(settings),
        *advice.about_pictures(settings, dataset),
        *advice.about_words(settings, dataset, pipe),
    ]


GOOD: dict[str, Any] = {
    "train": {"steps": 300, "learning_rate": 1e-4},
    "data": {"prompt": "a photo of a cat"},
}


@pytest.mark.parametrize(
    ("table", "setting", "value", "says"),
    [
        ("lora", "alpha", 1.0, None),  # at rank 4
        ("lora", "rank", 128, "lora.alpha = 1 at lora.rank = 128"),
        ("train", "learning_rate", 1.0, "train.learning_rate = 1 is far above"),
        ("train", "learning_rate", 1e-8, "train.learning_rate = 1e-08 is far below"),
        ("train", "text_encoder_learning_rate", 0.1, "train.text_encoder_learning_rate = 0.1 is far above"),
        ("train", "steps", 6, "too seldom"),
        ("train", "steps", 90_000, "by heart"),
        ("data", "captions", False, "data.captions = false"),
        ("data", "class_prompt", "a photo of a cat", "opposite ways"),
    ],
)
def test_what_makes_a_lora_useless_is_said(
    tmp_path: Path, table: str, setting: str, value: Any, says: str | None
) -> None:
    pictures(tmp_path / "images", 4)
    (tmp_path / "images" / "3.txt").write_text("another cat\n")
    changes = {name: dict(values) for name, values in GOOD.items()}
    if setting == "rank":
        changes["lora"] = {"alpha": 1.0}
    if setting == "class_prompt":
        pictures(tmp_path / "class", 1)
        changes["data"]["class_images"] = tmp_path / "class"
    assert about(config(tmp_path, "demo", **GOOD)) == []
    changes.setdefault(table, {})[setting] = value
    found = about(config(tmp_path, "demo", **changes))
    assert len(found) == (says is not None)
    assert says is None or says in found[0]


def test_a_word_that_a_frozen_encoder_does_not_know(tmp_path: Path) -> None:
    pictures(tmp_path / "images", 4)
    frozen = {"train": {**GOOD["train"], "text_encoder_learning_rate": 0.0}}
    (said,) = about(config(tmp_path, "demo", **frozen, data={"prompt": "a zxqwv cat"}))
    assert '"zxqwv" is in every caption' in said
    assert "lora.new_tokens" in said
    assert about(config(tmp_path, "demo", **GOOD, **{"lora": {}})) == []
    assert about(config(tmp_path, "demo", train=GOOD["train"], data={"prompt": "a zxqwv cat"})) == []


def test_a_picture_alone_in_its_bucket_or_in_the_folder(tmp_path: Path) -> None:
    pictures(tmp_path / "images", 3)
    Image.new("RGB", (128, 64)).save(tmp_path / "images" / "wide.png")
    (said,) = about(config(tmp_path, "demo", **GOOD))
    assert "wide.png is the only picture of its shape" in said
    pictures(tmp_path / "one" / "images", 1)
    (said,) = about(config(tmp_path / "one", "demo", **GOOD))
    assert "one picture alone" in said


def test_sdxls_vae_in_half_precision() -> None:
    vae = small_pipeline("sdxl").vae
    assert not list(advice.about_vae("sdxl", vae))
    vae.to(torch.float16)
    assert not list(advice.about_vae("sdxl", vae))  # asks for fp32 itself, and gets it
    vae.register_to_config(force_upcast=False)
    (said,) = advice.about_vae("sdxl", vae)
    assert "bf16" in said
    assert not list(advice.about_vae("sd1", vae))


@pytest.mark.parametrize("name", [name for name, _, _ in presets.list_presets()])
def test_shipped_presets_pass_preflight(tmp_path: Path, bases: dict[str, Path], name: str) -> None:
    """On random models with every layer of the real ones, or on the demo base itself."""
    pictures(tmp_path / "images", 5, side=128)
    changes = [f"output={tmp_path}/runs"]
    if "demo" not in name:
        family = "sdxl" if "sdxl" in name else "sd1"
        changes += [f"base={bases[family]}", f"data.images={tmp_path}/images", "data.resolution=128"]
        changes += ["train.base_dtype=fp32"]  # fp16 needs a card, and bf16 is slow without one
    settings = presets.load(name, changes)
    seen: list[TrainEvent] = []
    found = rehearse(settings, listeners=[seen.append])
    assert seen[-1] == found
    assert found.largest == ("64 x 64" if "demo" in name else "128 x 128")
    assert found.total_s > 0
    assert not list(advice.about_settings(settings))
    assert found.warnings == () or all("in every caption" in warning for warning in found.warnings)
    assert not (tmp_path / "runs").exists()
