"""What a training writes, and how long it takes beyond its steps: against what it did, and on disks that are full."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

import launch
from tests.trainers.runs import Recorder, base_folder, config, events_in, pictures
from tests.trainers.test_bad_input import preset_file
from trainers import forecast
from trainers.costs import PictureCost, held
from trainers.dreambooth import rehearse, train
from trainers.events import Preflight
from trainers.preflight import less


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return base_folder(tmp_path_factory.mktemp("forecast") / "base")


@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
def test_disk_is_told_within_a_fifth_and_not_too_little(tmp_path: Path, base: Path, dtype: str) -> None:
    """Before anything is there by the preflight alone, and at the start of the run; both against what it came to."""
    pytest.importorskip("tensorboard")
    pictures(tmp_path / "images", 12, side=128)
    settings = config(
        tmp_path,
        base,
        lora={"rank": 8},
        data={"resolution": 128},
        train={"steps": 6, "batch_size": 1, "ema_decay": 0.5, "text_encoder_stop": 4},
        save={"every": 1, "keep": 2, "dtype": dtype},
        preview={"every": 3, "prompts": ["a cat"], "steps": 2},
        report={"subject_prompts": ["a cat"], "seeds": [0], "steps": 2, "tensorboard": True},
    )
    before = rehearse(settings)
    recorder = Recorder()
    run = train(settings, listeners=[recorder], preflight=True).parent
    (at_start,) = [e for e in recorder.seen if isinstance(e, Preflight)]
    written = sum(path.stat().st_size for path in run.rglob("*") if path.is_file())
    for found in (before, at_start):
        assert written <= found.disk <= 1.2 * written, (written, found.disk_shares)
    for part, name in (("checkpoints", "state"), ("previews", "previews"), ("cache", "latents")):
        told = sum(count for what, count in at_start.disk_shares.items() if name in what)
        there = sum(
            p.stat().st_size for p in (run / part).iterdir() if part != "checkpoints" or "step" in p.name
        )
        assert there <= told, part
    assert list(before.more_s) == [
        "latents",
        "prompts",
        "previews",
        "saving",
        "the report",
    ]
    assert list(at_start.more_s) == ["previews", "saving", "the report"]


def test_counts_by_hand(tmp_path: Path) -> None:
    pictures(tmp_path / "judge", 2, caption="a cat")
    settings = config(
        tmp_path,
        "demo",
        train={"steps": 100},
        save={"every": 30},
        preview={"every": 25, "prompts": ["a", "b"]},
        validation={"every": 40},
        report={
            **{"judge": tmp_path / "judge", "subject_prompts": ["a"], "unrelated_prompts": ["b"]},
            "seeds": [0, 1],
        },
    )
    assert forecast.saves(settings) == 4  # after 30, 60, 90 and 100
    assert forecast.saves(settings, first=60) == 2
    assert forecast.previews(settings) == 8
    assert forecast.previews(settings, first=50) == 4
    # after 40, 80 and 100, at five timesteps: 3 pictures, and one prompt with the LoRA and without
    assert forecast.measured_rows(settings, held_out=3) == 3 * 5 * (3 + 2)
    assert forecast.shown(settings) == 2 * 2 * (2 + 1 + 1)


def test_a_picture_costs_by_its_steps_calls_and_pixels() -> None:
    measured = PictureCost(side=512, guidance=7.5, step_s=1.0, rest_s=3.0)
    assert measured.seconds(512, 20, 7.5) == 23
    assert measured.seconds(1024, 20, 7.5) == 92
    assert measured.seconds(512, 20, 1.0) == 13  # one call of the UNet and not two


def test_a_run_that_goes_on_needs_no_room_for_what_is_there(tmp_path: Path) -> None:
    assert forecast.existing(tmp_path / "a" / "b") == tmp_path
    share = forecast.Share("2 states to resume from", tmp_path, count=200, there=150, besides=100)
    other = forecast.Share("previews", tmp_path, count=10, there=40)
    (disk,) = forecast.disks([share, other])
    assert disk.needed == 50 + 100


@pytest.mark.parametrize(
    ("what", "means"),
    [
        ("2 states to resume from", "Lower save.keep (now 3) or lora.rank (now 4)"),
        ("9 LoRA files", "Raise save.every (now only at the end)"),
        ("previews", "Raise preview.every"),
        ("latents and prompts", "Set train.cache_latents = false"),
        ("class pictures", "Lower data.class_count"),
        ("TensorBoard", "Set report.tensorboard = false"),
    ],
)
def test_the_change_is_that_of_the_largest_part(tmp_path: Path, what: str, means: str) -> None:
    shares = forecast.Share("the report", tmp_path, 10), forecast.Share(what, tmp_path, 1000)
    disk = forecast.Disk(tmp_path, 5, shares)
    assert less(disk, config(tmp_path, "demo")).startswith(means)


# --- real disks -----------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own with 2 MB."""
    place = tmp_path / "disk"
    place.mkdir()
    try:
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(place)], capture_output=True
        )
    except FileNotFoundError:
        pytest.skip("there is no mount here")
    if done.returncode:
        pytest.skip("mounting a small disk needs the right to")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_disk_that_would_be_full_is_refused_before_the_first_step(
    tmp_path: Path, base: Path, small_disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each file system by itself: of the runs, and of class pictures."""
    pictures(tmp_path / "images", 2)
    preset = str(preset_file(tmp_path, base))

    def run(command: str, *changes: str) -> tuple[int, str]:
        words = [word for change in changes for word in ("--set", change)]
        return launch.main([command, preset, *words]), capsys.readouterr().err

    often = (f"output={small_disk}/runs", "save.every=1", "save.keep=6")
    for command in ("--preflight", "--train"):
        code, why = run(command, *often)
        assert code == 2
        assert f"are free in {small_disk}" in why
        assert "6 states to resume from" in why
        assert "Lower save.keep (now 6)" in why
    kinds = [e["event"] for e in events_in(small_disk / "runs" / "small")]
    assert kinds[-1] == "Failed"
    assert "Step" not in kinds
    assert held(small_disk) < 1_000_000  # what was tried is gone
    code, why = run(
        "--preflight",
        f"data.class_images={small_disk}/class",
        "data.class_prompt=a cat",
        "data.class_count=200",
    )
    assert code == 2
    assert f"are free in {small_disk}: class pictures" in why
    assert "Lower data.class_count" in why
    assert run("--preflight", f"output={small_disk}/runs")[0] == 0


def test_a_disk_with_no_room_for_one_save(
    tmp_path: Path, base: Path, small_disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pictures(tmp_path / "images", 1)
    (small_disk / "ballast").write_bytes(b"x" * 1_900_000)
    words = ["--train", str(preset_file(tmp_path, base)), "--set", f"output={small_disk}/runs"]
    assert launch.main(words) == 2
    assert "could not be saved even once" in capsys.readouterr().err
