"""Bad input gets a sentence and loses nothing. Real child processes, real signals, real files."""

from __future__ import annotations

import fcntl
import json
import os
import resource
import select
import shlex
import shutil
import signal
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest
from PIL import Image

from lora_core import read_adapter
from lora_core.errors import SaveFailed, Stopped
from lora_core.safe_files import read_header, read_tensors
from tests.trainers.runs import Recorder, base_folder, config, events_in, pictures, refusal
from trainers import checkpoints, presets, saving
from trainers.dreambooth import train
from trainers.events import Note, Step, TrainEvent

ROOT = Path(__file__).resolve().parents[2]
PHOTOS = ROOT.parent / "shared" / "data" / "dreambooth" / "dog"


def preset_file(tmp: Path, base: Path, extra: str = "") -> Path:
    settings = config(tmp, base)
    path = tmp / "preset.toml"
    path.write_text(presets.dump(settings) + extra, encoding="utf-8")
    return path


def launch(*words: str, limit: int | None = None) -> subprocess.CompletedProcess[str]:
    """`launch.py` in a child. `limit` is the most bytes it may write into one file: a disk that is full."""
    code = "import resource,signal,sys,launch;"
    if limit is not None:
        code += "signal.signal(signal.SIGXFSZ,signal.SIG_IGN);"
        code += f"resource.setrlimit(resource.RLIMIT_FSIZE,({limit},{limit}));"
    code += "sys.exit(launch.main(sys.argv[1:]))"
    return subprocess.run(
        [sys.executable, "-c", code, *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return base_folder(tmp_path_factory.mktemp("bad") / "base")


def test_empty_folder(tmp_path: Path, base: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "notes.doc").write_text("x")
    said = refusal(config(tmp_path, base))
    assert "holds no pictures" in said
    assert "notes.doc" in said
    assert ".jpg" in said


def test_a_run_that_fails_says_why_once(tmp_path: Path, base: Path) -> None:
    """The run's log has it for the page, the command says it."""
    preset = preset_file(tmp_path, base)
    (tmp_path / "images").mkdir()
    result = launch("--train", str(preset))
    assert result.returncode == 2
    assert (result.stdout + result.stderr).count("holds no pictures") == 1
    assert "holds no pictures" in result.stderr
    (run,) = (tmp_path / "runs").iterdir()
    assert [e["event"] for e in events_in(run)][-1] == "Failed"


def test_misspelt_key(tmp_path: Path, base: Path) -> None:
    preset = preset_file(tmp_path, base)
    preset.write_text(preset.read_text().replace("learning_rate = ", "lerning_rate = ", 1))
    result = launch("--train", str(preset))
    assert result.returncode == 2
    assert "Did you mean train.learning_rate" in result.stderr
    assert not (tmp_path / "runs").exists()
    assert "Traceback" not in result.stderr


def test_corrupt_jpeg_among_good_ones_is_named_and_skipped_or_refused(tmp_path: Path, base: Path) -> None:
    pictures(tmp_path / "images", 3)
    good = tmp_path / "good.jpg"
    Image.open(tmp_path / "images" / "0.png").save(good)
    (tmp_path / "images" / "broken.jpg").write_bytes(good.read_bytes()[:300])
    lora = train(config(tmp_path, base, train={"steps": 1}))
    notes = " ".join(e.get("text", "") for e in events_in(lora.parent))
    assert "broken.jpg" in notes
    assert read_adapter(lora).metadata["ss_num_train_images"] == "3"
    assert "broken.jpg" in refusal(config(tmp_path, base, data={"bad_images": "refuse"}))


def test_another_familys_lora_to_start_from(tmp_path: Path, base: Path) -> None:
    pictures(tmp_path / "sdxl_images", 1, side=128)
    big = base_folder(tmp_path / "sdxl", "sdxl")
    other = config(
        tmp_path,
        big,
        data={"images": tmp_path / "sdxl_images", "resolution": 128},
        train={"steps": 1, "batch_size": 1},
    )
    file = train(other)
    pictures(tmp_path / "images", 1)
    said = refusal(config(tmp_path, base, lora={"start_from": file}))
    assert "only in the file" in said
    result = launch(
        "--generate",
        "--base",
        str(base),
        "--prompt",
        "a cat",
        "--lora",
        str(file),
        "--out",
        str(tmp_path / "out"),
    )
    assert result.returncode == 1
    assert "SDXL" in result.stderr
    assert "SD 1.x" in result.stderr
    assert not (tmp_path / "out").exists()


def test_weights_only_file_is_no_resume(tmp_path: Path, base: Path) -> None:
    pictures(tmp_path / "images", 2)
    settings = config(tmp_path, base, train={"steps": 2})
    lora = train(settings)
    run = lora.parent
    for _, state in checkpoints.saved_steps(run / "checkpoints"):
        shutil.copyfile(lora, state)
    before = lora.read_bytes()
    result = launch("--train", "--resume", str(run))
    assert result.returncode == 1
    assert "weights only" in result.stderr
    assert "start_from" in result.stderr
    assert lora.read_bytes() == before


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:5000])


def one_bit(path: Path) -> None:
    """The least of a weight: finite, of the right shape, and another run."""
    data, header = bytearray(path.read_bytes()), read_header(path)
    name = next(name for name in header.tensors if name.startswith("lora."))
    data[header.data_start + header.tensors[name].start] ^= 1
    path.write_bytes(data)


def other_facts(path: Path) -> None:
    data = path.read_bytes()
    assert data.count(b'\\"step\\": 4,') == 1
    path.write_bytes(data.replace(b'\\"step\\": 4,', b'\\"step\\": 3,'))


@pytest.mark.parametrize("damage", [cut_short, one_bit, other_facts])
def test_damaged_newest_checkpoint_is_passed_over(
    tmp_path: Path, base: Path, damage: Callable[[Path], None]
) -> None:
    pictures(tmp_path / "images", 2)
    settings = config(tmp_path, base, train={"steps": 4}, save={"every": 2})
    lora = train(settings)
    straight = lora.read_bytes()
    newest = checkpoints.saved_steps(lora.parent / "checkpoints")[-1][1]
    damage(newest)
    resumed = train(settings, resume=lora.parent)
    assert resumed.read_bytes()[-5000:] == straight[-5000:]
    said = next(e["text"] for e in events_in(lora.parent) if "damaged" in e.get("text", ""))
    assert ("its checksum differs" in said) == (damage is not cut_short)


def test_a_disk_that_is_full_from_the_beginning(tmp_path: Path, base: Path) -> None:
    """Nothing is trained that could not be saved; the preset is whole, and no half file stays."""
    pictures(tmp_path / "images", 2)
    preset = preset_file(tmp_path, base)
    result = launch("--train", str(preset), "--set", "save.every=2", limit=60_000)
    run = tmp_path / "runs" / "small"
    assert result.returncode == 2
    assert "could not be saved even once" in result.stderr
    assert "Traceback" not in result.stderr
    assert "Step" not in [e["event"] for e in events_in(run)]
    assert not [path for path in run.rglob("*") if path.suffix == ".partial" or path.name == "trial"]
    assert presets.load(run / "preset.toml") == presets.load(preset, ["save.every=2"])


@pytest.mark.parametrize("room", [True, False])
def test_a_disk_that_fills_up_before_the_first_save(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch, room: bool
) -> None:
    """Every save fails: the training goes on, and at its end waits for room rather than lose what was learnt. Then it
    finishes; or it is told to leave, and says what to do. No half file stays."""
    monkeypatch.setattr(saving, "AGAIN_S", 0.1)
    pictures(tmp_path / "images", 2)
    limit, before = resource.RLIMIT_FSIZE, resource.getrlimit(resource.RLIMIT_FSIZE)
    recorder, run = Recorder(), tmp_path / "runs" / "small"

    def disk(event: TrainEvent) -> None:
        if isinstance(event, Step):
            resource.setrlimit(limit, (60_000, before[1]))
        if isinstance(event, Note) and saving.WAITING in event.text:
            assert not list((run / "checkpoints").iterdir())
            if room:
                resource.setrlimit(limit, before)
            else:
                recorder.stop.ask()

    refused = pytest.raises(SaveFailed, match=r"step-000006\.safetensors could not be saved")
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        with nullcontext() if room else refused:
            settings = config(tmp_path, base, save={"every": 2})
            train(settings, stop=recorder.stop, listeners=[recorder, disk], preflight=True)
    finally:
        resource.setrlimit(limit, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert sorted(recorder.losses) == [1, 2, 3, 4, 5, 6]
    assert [
        e for e in recorder.seen if isinstance(e, Note) and "was not saved; the training goes on" in e.text
    ]
    assert not list(run.rglob("*.partial"))
    assert (run / "small.safetensors").exists() == room
    assert [step for step, _ in checkpoints.saved_steps(run / "checkpoints")] == ([6] if room else [])


def test_a_run_that_is_stopped_waits_for_room_too(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was learnt since the last save is not thrown away because the disk is full when Ctrl-C comes."""
    monkeypatch.setattr(saving, "AGAIN_S", 0.1)
    pictures(tmp_path / "images", 2)
    limit, before = resource.RLIMIT_FSIZE, resource.getrlimit(resource.RLIMIT_FSIZE)
    recorder = Recorder(stop_at=2)

    def disk(event: TrainEvent) -> None:
        if isinstance(event, Step):
            resource.setrlimit(limit, (60_000, before[1]))
        if isinstance(event, Note) and saving.WAITING in event.text:
            resource.setrlimit(limit, before)

    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        with pytest.raises(Stopped, match="Stopped at step 2 of 6; saved"):
            train(config(tmp_path, base), stop=recorder.stop, listeners=[recorder, disk])
    finally:
        resource.setrlimit(limit, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert len([e for e in recorder.seen if isinstance(e, Note) and saving.WAITING in e.text]) == 1
    assert [step for step, _ in checkpoints.saved_steps(tmp_path / "runs/small/checkpoints")] == [2]


def test_a_disk_full_for_a_while_costs_only_the_saves_of_that_while(tmp_path: Path, base: Path) -> None:
    """No file may grow beyond 60 kB from step 3 to step 4: the state of step 2 stays whole, that of step 6 is saved."""
    pictures(tmp_path / "images", 2)
    limit, before = resource.RLIMIT_FSIZE, resource.getrlimit(resource.RLIMIT_FSIZE)
    recorder = Recorder()
    folder = tmp_path / "runs" / "small" / "checkpoints"
    seen: dict[int, list[int]] = {}

    def disk(event: TrainEvent) -> None:
        if isinstance(event, Step):
            seen[event.step] = [step for step, _ in checkpoints.saved_steps(folder)]
            if event.step in (3, 5):
                resource.setrlimit(limit, (60_000 if event.step == 3 else before[0], before[1]))

    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        lora = train(config(tmp_path, base, save={"every": 2}), listeners=[recorder, disk])
    finally:
        resource.setrlimit(limit, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert seen[5] == [2]
    assert [step for step, _ in checkpoints.saved_steps(folder)] == [2, 6]
    for _, path in checkpoints.saved_steps(folder):
        assert read_tensors(path)
    notes = [e.text for e in recorder.seen if isinstance(e, Note)]
    assert any("Step 4 was not saved; the training goes on" in note for note in notes)
    assert not list(folder.glob(".*"))
    assert sorted(recorder.losses) == [1, 2, 3, 4, 5, 6]
    assert read_adapter(lora).deltas


def test_non_finite_loss_names_step_and_picture_and_saves_nothing_broken(tmp_path: Path, base: Path) -> None:
    pictures(tmp_path / "images", 1)
    said = refusal(config(tmp_path, base, train={"learning_rate": 1e30, "steps": 9, "batch_size": 1}))
    assert "step " in said
    assert "0.png" in said
    assert "learning_rate" in said
    assert not (tmp_path / "runs" / "small" / "small.safetensors").exists()  # it is not finished
    for lora in (tmp_path / "runs").rglob("small*.safetensors"):
        read_adapter(lora)  # refuses what is not finite: what is saved is the last good step


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signal_saves_and_resume_finishes(tmp_path: Path, base: Path, number: signal.Signals) -> None:
    pictures(tmp_path / "images", 3)
    preset = preset_file(tmp_path, base)
    run = tmp_path / "runs" / "small"
    child = subprocess.Popen(
        [sys.executable, "launch.py", "--train", str(preset), "--set", "train.steps=5000"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    wait_for(lambda: '"event": "Step"' in read(run / "events.jsonl"), child)
    second = launch("--train", "--resume", str(run))
    assert second.returncode == 3  # the run is held by the first process
    assert "Another process" in second.stderr
    child.send_signal(number)
    out, _ = child.communicate(timeout=120)
    assert child.returncode == 130
    assert "--resume" in out
    stopped = next(e for e in events_in(run) if e["event"] == "Interrupted")
    assert Path(stopped["path"]).exists()
    result = launch("--train", "--resume", str(run), "--set", f"train.steps={stopped['step'] + 2}")
    assert result.returncode == 0, result.stderr
    assert read_adapter(run / "small.safetensors").deltas
    steps = [e["step"] for e in events_in(run) if e["event"] == "Step"]
    assert steps == list(range(1, stopped["step"] + 3))


@pytest.mark.parametrize("shell", [False, True])
def test_a_closed_terminal_saves(tmp_path: Path, base: Path, shell: bool) -> None:
    """A real one, whose window is closed over the training and its shell: every later word to it is an error."""
    pictures(tmp_path / "images", 3)
    run, words = tmp_path / "runs" / "small", [sys.executable, "launch.py", "--train"]
    words += [str(preset_file(tmp_path, base)), "--set", "train.steps=5000"]
    window, terminal = os.openpty()
    child = subprocess.Popen(
        ["bash", "-ic", f"{shlex.join(words)}; true"] if shell else words,
        cwd=ROOT,
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # as a window does it for its shell
    )
    os.close(terminal)
    closed = threading.Event()
    reader = threading.Thread(target=shown, args=(window, closed), daemon=True)
    reader.start()
    wait_for(lambda: '"event": "Step"' in read(run / "events.jsonl"), child)
    closed.set()
    end = time.monotonic() + 120
    while events_in(run)[-1]["event"] != "Interrupted":
        assert time.monotonic() < end, events_in(run)[-3:]
        time.sleep(0.1)
    child.wait(timeout=60)
    if not shell:
        assert child.returncode == 130
    assert checkpoints.newest_whole(run / "checkpoints") == (Path(events_in(run)[-1]["path"]), [])


def shown(window: int, closed: threading.Event) -> None:
    """What is said to it is taken, until it is closed: a window that took nothing would hold the training up."""
    while not closed.is_set():
        if select.select([window], [], [], 0.1)[0]:
            os.read(window, 4096)
    os.close(window)


def wait_for(condition: object, child: subprocess.Popen[str], seconds: float = 240) -> None:
    assert callable(condition)
    end = time.monotonic() + seconds
    while not condition():
        assert child.poll() is None, "the child ended early"
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.1)


def read(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.exists() else ""


@pytest.mark.skipif(not PHOTOS.is_dir(), reason="the photographs are not part of the repository")
@pytest.mark.parametrize("which", ["small", "demo"])
def test_real_photographs_go_through_the_whole_trainer(tmp_path: Path, base: Path, which: str) -> None:
    """Five photographs: one turned by EXIF, one with its own caption; class pictures made by the base."""
    folder = tmp_path / "dog"
    shutil.copytree(PHOTOS, folder)
    for file in folder.iterdir():
        file.chmod(0o644)
    (folder / "00.txt").write_text("a zxq dog lying down\n", encoding="utf-8")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.open(folder / "01.jpg").save(folder / "01.jpg", exif=exif)
    settings = config(
        tmp_path,
        base if which == "small" else "demo",
        data={"images": folder, "prompt": "a zxq dog", "class_prompt": "a dog", "class_count": 2},
        train={"steps": 2, "batch_size": 1},
        preview={"steps": 2, "every": 2, "prompts": ["a zxq dog"]},
    )
    lora = train(settings)
    metadata = read_adapter(lora).metadata
    assert metadata["ss_num_train_images"] == "5"
    assert metadata["ss_num_reg_images"] == "2"
    words = json.loads(metadata["ss_tag_frequency"])["dog"]
    assert words == {"a zxq dog lying down": 1, "a zxq dog": 4}
    made = sorted((tmp_path / "runs" / "class").rglob("*.png"))
    assert [p.name for p in made] == ["class-00000.png", "class-00001.png"]
    again = train(settings)  # the class pictures are there; the run gets a folder of its own
    assert again.parent.name == "small-2"
    assert len(list((tmp_path / "runs" / "class").rglob("*.png"))) == 2


def test_a_refused_start_leaves_its_folder_to_the_next(tmp_path: Path, base: Path) -> None:
    (tmp_path / "images").mkdir()
    settings = config(tmp_path, base, train={"steps": 1})
    refusal(settings)
    refusal(settings)
    pictures(tmp_path / "images", 1)
    assert train(settings).parent.name == "small"
    assert train(settings).parent.name == "small-2"  # what has trained is never written over
