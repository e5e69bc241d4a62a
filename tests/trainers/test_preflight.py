"""Preflight: says what a training needs, refuses what would not come to its end, and leaves no trace in the run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import launch
from lora_core.errors import ConfigError, Stopped
from lora_core.safe_files import read_tensors
from tests.small_models import small_pipeline
from tests.trainers.runs import Recorder, base_folder, config, pictures
from tests.trainers.test_bad_input import preset_file
from trainers import advice, dreambooth, preflight, presets, trial
from trainers.batches import Batch
from trainers.dreambooth import gradients, rehearse, train
from trainers.events import Preflight, TrainEvent
from trainers.room import out_of_memory


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


def counted(monkeypatch: pytest.MonkeyPatch) -> list[list[Batch]]:
    """-> the batches of every step that the training's own gradients are asked for."""
    asked: list[list[Batch]] = []

    def noted(bench: Any, turns: Any) -> Any:
        asked.append([batch for turn in turns for batch in turn])
        return gradients(bench, turns)

    monkeypatch.setattr(dreambooth, "gradients", noted)
    return asked


def test_it_costs_two_steps_of_the_largest_batch(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pictures(tmp_path / "images", 4)
    pictures(tmp_path / "class", 2)
    asked = counted(monkeypatch)
    data = {"class_images": tmp_path / "class", "class_prompt": "a dog"}
    found = rehearse(config(tmp_path, base, data=data, train={"gradient_accumulation": 3}))
    assert [[tuple(b.z.shape) for b in batches] for batches in asked] == 2 * [[(4, 4, 8, 8)]]
    assert (found.pictures, found.largest) == (4, "64 x 64")
    assert found.steps_s == pytest.approx(6 * found.step_s, abs=0.051)  # said to a tenth
    assert found.total_s == pytest.approx(found.steps_s + sum(found.more_s.values()), abs=0.11)
    assert 0 < found.memory <= found.memory_total


def test_class_pictures_that_are_not_made_yet_are_in_the_step_and_in_the_forecast(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pictures(tmp_path / "images", 4)
    pictures(tmp_path / "class", 1)
    asked = counted(monkeypatch)
    data = {"class_images": tmp_path / "class", "class_prompt": "a dog", "class_count": 5}
    found = rehearse(config(tmp_path, base, data=data, preview={"steps": 2}))
    (batch,) = asked[0]
    assert batch.captions == ["a zxq cat"] * 2 + ["a dog"] * 2
    assert list(found.more_s) == ["class pictures", "latents", "measuring", "saving"]
    assert 4 * 3 * 64 * 64 < found.disk_shares["class pictures"] < 4 * 2 * 3 * 64 * 64
    assert len(list((tmp_path / "class").iterdir())) == 1


def test_a_class_without_pictures_is_in_the_step_with_its_prompt(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pictures(tmp_path / "images", 4)
    asked = counted(monkeypatch)
    found = rehearse(config(tmp_path, base, data={"class_from": "model", "class_prompt": "a dog"}))
    (batch,) = asked[0]
    assert batch.captions == ["a zxq cat"] * 2 + ["a dog"] * 2
    assert batch.from_base == [False, False, True, True]
    assert found.pictures == 4


def test_drawn_captions_are_others_in_each_step(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each is encoded when it comes, as in the training: said once, both steps would find it in memory."""
    pictures(tmp_path / "images", 4)
    asked = counted(monkeypatch)
    data = {"prompt": "a, b, c, d, e, f, g", "shuffle_tags": True}
    rehearse(config(tmp_path, base, data=data, train={"text_encoder_learning_rate": 0.0}))
    said = [caption for batches in asked for batch in batches for caption in batch.captions]
    assert len(set(said)) == len(said) == 4


def test_a_rehearsal_hears_of_every_caption(tmp_path: Path, base: Path) -> None:
    """A new word, and a prompt that is cut, may be those of pictures that are not encoded."""
    pictures(tmp_path / "images", 6)
    for i, words in enumerate(["a cat", "a <new> cat", "far " * 90, "a cat", "a cat", "a cat"]):
        (tmp_path / "images" / f"{i}.txt").write_text(words, encoding="utf-8")
    notes: list[TrainEvent] = []
    lora = {"new_tokens": {"<new>": "cat"}}
    rehearse(config(tmp_path, base, lora=lora, train={"batch_size": 1}), listeners=[notes.append])
    assert [e for e in notes if "reads 77 tokens" in str(e)]


def test_a_base_that_makes_no_numbers_is_refused(tmp_path: Path) -> None:
    pipe = small_pipeline("sd1")
    pipe.unet.conv_out.weight.data.fill_(float("inf"))
    pipe.save_pretrained(tmp_path / "base")
    pictures(tmp_path / "images", 1)
    with pytest.raises(ConfigError, match=r"The loss of 0\.png is nan before anything is learnt.*base_dtype"):
        rehearse(config(tmp_path, tmp_path / "base"))


def room(**changes: int) -> trial.Room:
    return trial.Room(
        **{"device": 8 * 10**9, "used": 6 * 10**9, "swapped": 0, "memory": 32 * 10**9, **changes}
    )


@pytest.mark.parametrize(
    ("space", "says"),
    [
        (
            {"used": 79 * 10**8},
            [
                "7.9 GB",
                "8.0 GB",
                "spill",
                "checkpointing",
                "accumulation = 6",
                "text_encoder_learning_rate = 0",
            ],
        ),
        ({"device": 0, "swapped": 2 * 10**9}, ["main memory", "2.0 GB", "swap", "data.resolution"]),
    ],
)
def test_memory_that_would_spill_is_refused_with_the_change(
    tmp_path: Path, space: dict[str, int], says: list[str]
) -> None:
    def bench(**train: Any) -> Any:
        return SimpleNamespace(config=config(tmp_path, "demo", train=train), prompts=None)

    usual = bench(gradient_accumulation=3)
    preflight.refuse(room(), [], usual)
    preflight.refuse(room(device=0), [], usual)
    with pytest.raises(ConfigError) as problem:
        preflight.refuse(room(**space), [], usual)
    assert [word for word in says if word not in str(problem.value)] == []
    frugal = preflight.remedy(
        bench(gradient_checkpointing=True, batch_size=1, text_encoder_learning_rate=0.0)
    )
    assert [
        w for w in ("gradient_checkpointing", "batch_size", "text_encoder_learning_rate") if w in frugal
    ] == []
    assert "data.shuffle_tags = false" in frugal


LIMITED = """
import resource, sys
import psutil, torch
import launch, trainers.dreambooth, diffusers.loaders, transformers.models.clip.modeling_clip
torch.set_num_threads(1)
limit = psutil.Process().memory_info().vms + int(sys.argv[1])
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
sys.exit(launch.main(["--preflight", *sys.argv[2:]]))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="limits of a process are Unix'")
@pytest.mark.parametrize(
    ("batch", "limit", "code", "says"),
    [
        (256, 900_000_000, 0, "Warning: The device has no memory for a whole batch"),
        (1, 350_000_000, 2, "This training does not fit into memory. The device is out of memory. Set"),
    ],
)
def test_a_real_limit_of_memory(
    tmp_path: Path, base: Path, batch: int, limit: int, code: int, says: str
) -> None:
    """Where a batch is too much it is computed in pieces; where a picture is, the training is refused."""
    pictures(tmp_path / "images", 1)
    side = 128 if batch > 1 else 1024
    done = subprocess.run(
        [
            *(sys.executable, "-c", LIMITED, str(limit), str(preset_file(tmp_path, base))),
            *("--set", f"train.batch_size={batch}", "--set", f"data.resolution={side}"),
        ],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(launch.__file__).parent,
        # the limit is of addresses: what is freed must leave them free
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "MALLOC_ARENA_MAX": "1",
            "MALLOC_MMAP_THRESHOLD_": "65536",
        },
    )
    assert (done.returncode, says in done.stdout + done.stderr) == (code, True), done.stdout + done.stderr


def test_a_short_preflight_names_no_parts_of_a_second() -> None:
    more = {"latents": 0.2, "previews": 30.0}
    usual: dict[str, Any] = {
        **{
            "largest": "512 x 512",
            "pictures": 2,
            "pieces": 1,
            "memory": 5 * 10**9,
            "memory_pictures": 6 * 10**9,
        },
        **{"memory_total": 8 * 10**9, "step_s": 1.0, "steps_s": 500.0, "more_s": more, "total_s": 530.2},
        **{"disk": 10**9, "disk_shares": {"previews": 10**9}, "disk_free": 10**10, "warnings": ("Mind it.",)},
    }
    assert str(Preflight(**usual)).splitlines() == [
        "Preflight: the largest step, 2 pictures of 512 x 512, takes 1 s and 5.0 GB of 8.0 GB memory, 6.0 GB while "
        "pictures are made.",
        "Time: about 9 min (steps 8 min, previews 30 s).",
        "Disk: at most 1.0 GB of 10.0 GB that are free (previews 1.0 GB).",
        "Warning: Mind it.",
    ]


def test_what_is_said(tmp_path: Path, base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pictures(tmp_path / "images", 1)
    assert launch.main(["--preflight", str(preset_file(tmp_path, base))]) == 0
    said = capsys.readouterr().out
    assert "Preflight: the largest step, 2 pictures of 64 x 64, takes" in said
    assert "Time: about" in said
    assert "1 state to resume from" in said
    assert "Warning: There is one picture alone" in said
    assert not (tmp_path / "runs").exists()


def test_memory_that_does_not_do_even_in_the_smallest_pieces(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pictures(tmp_path / "images", 1)

    def short(bench: Any, turns: Any) -> Any:
        raise out_of_memory("CUDA out of memory")

    monkeypatch.setattr(dreambooth, "gradients", short)
    with pytest.raises(ConfigError, match=r"does not fit into memory.*gradient_checkpointing"):
        rehearse(config(tmp_path, base))


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
