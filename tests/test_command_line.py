"""The command line: what may be said, what is refused, and what a command that is stopped leaves behind."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import launch
from app.command_line import APP, COMMANDS, parse, parser_of
from lora_core import Adapter, read_adapter, write_adapter
from lora_core.combination import METHODS
from lora_core.deltas.full import Full
from lora_core.formats.cautions import cautions
from lora_core.looking import look
from lora_core.progress import watched
from tests.lora_core.adapters_on_disk import adapter
from tests.small_models import save_folder, small_pipeline

ROOT = Path(__file__).resolve().parents[1]
HELP = "`python launch.py"


def child(*words: object, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "launch.py"), *map(str, words)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300, check=False)


@pytest.fixture
def ink(tmp_path: Path) -> Path:
    return write_adapter(adapter(), tmp_path / "ink.safetensors")


# --- what may be said ----------------------------------------------------------------------------------------


def test_help_lists_every_command_and_exit_code_and_each_has_its_own(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit, match="0"):
        launch.main(["--help"])
    whole = capsys.readouterr().out
    for code in ("0 done", "1 failed", "2 wrong", "3 another", "130 interrupted"):
        assert code in whole
    for command in COMMANDS:
        assert f"{command.flag} {command.words}".strip() in whole
        assert command.does in whole
        with pytest.raises(SystemExit, match="0"):
            launch.main([command.flag, "-h"])
        own = capsys.readouterr().out
        options = {option for action in parser_of(command)._actions for option in action.option_strings}
        assert (
            set(re.findall(r"(?<![\w-])--?[a-z][\w-]*", own.split("options:")[1].split("examples:")[0]))
            >= options
        )
        assert all(f"python launch.py {example}" in own for example in command.examples)
        assert bool(command.examples) or command.flag == "--list-presets"
    for option in (option for action in parser_of(APP)._actions for option in action.option_strings):
        assert option in whole


def test_the_examples_of_help_are_understood() -> None:
    for command in COMMANDS:
        for example in command.examples:
            args, unknown = parser_of(command).parse_known_args(shlex.split(example))
            assert not unknown
            assert args


def test_help_names_every_method(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        launch.main(["--combine", "--help"])
    said = capsys.readouterr().out
    assert set(METHODS) <= set(re.findall(r"\w+", said))


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--resise", "x"], '--resise is no option of the app. Did you mean "--resize"?'),
        (
            ["--rank", "4"],
            "--rank is no option of the app, but of --convert, --combine, --resize, --extract.",
        ),
        (
            ["--resize", "x", "--rnak", "4", "--out", "y"],
            '--rnak is no option of --resize. Did you mean "--rank"?',
        ),
        (
            ["--resize", "x", "--density=1", "--out", "y"],
            "--density is no option of --resize, but of --combine.",
        ),
        (["--list-presets", "--prompt", "x"], "--prompt is no option of --list-presets, but of --generate."),
        (["--resize", "my", "ink", "--rank", "4", "--out", "y"], '"ink" is a word too many for --resize.'),
        (["my.toml"], '"my.toml" is a word too many for the app.'),
        (["--resize"], f"expected one argument. {HELP} --resize --help`"),
        (["--resize", "x", "--rank", "4"], "required: --out"),
        (["--resize", "x", "--rank", "many", "--out", "y"], "invalid int value: 'many'"),
        (["--resize", "x", "--out", "y"], "Give either rank or energy"),
        (["--resize", "x", "--rank", "0", "--out", "y"], "rank = 0"),
        (["--resize", "x", "--energy", "2", "--out", "y"], "energy = 2.0"),
        (["--resize", "x", "--rank", "2", "--clamp", "2", "--out", "y"], "clamp = 2.0"),
        (
            ["--extract", "x", "y", "--rank", "2", "--energy", "0.5", "--out", "z"],
            "Give either rank or energy",
        ),
        (["--extract", "x", "y", "--rank", "2", "--others", "keep", "--out", "z"], "Known: name, store."),
        (
            ["--convert", "x", "y", "--to", "kohia"],
            'argument --to: "kohia" is unknown. Did you mean "kohya"? `',
        ),
        (
            ["--convert", "x", "y", "--to", "peft", "--dtype", "fp8"],
            '"fp8" is unknown. Known: bf16, fp16, fp32.',
        ),
        (["--convert", "x", "y", "--to", "peft", "--rank", "4"], "rank has no effect without bake"),
        (
            ["--convert", "x", "y", "--to", "peft", "--bake", "--rank", "4", "--energy", "1"],
            "either rank or energy",
        ),
        (["--combine", "x", "--method", "tie", "--out", "y"], 'Did you mean "ties"?'),
        (["--combine", "x", "--density", "0.5", "--out", "y"], "density has no effect with cat"),
        (["--combine", "x", "--bake", "y", "--out", "z"], "Choose one of --combine and --bake."),
        (["--bake", "x", "--out", "y"], "required: --base"),
        (["--resize", "x", "--rank", "2", "--out", "no/where.safetensors"], "There is no folder"),
        (["--bake", "x", "--base", "demo", "--out", "no/where"], "There is no folder"),
    ],
)
def test_wrong_usage_is_a_sentence_and_code_2(
    words: list[str],
    says: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert launch.main(words) == 2
    said = capsys.readouterr()
    assert says in said.err
    assert said.out == ""
    assert said.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_child_says_the_same_and_leaves_with_the_code(ink: Path, tmp_path: Path) -> None:
    done = child("--convert", ink, tmp_path / "out", "--to", "diffusers", "--dtype", "fp16", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[1].startswith(
        "wrote out.safetensors: 9 layers of LoRA, ranks 2 to 4, float16"
    )
    wrong = child("--resize", ink, "--density", "2")
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert wrong.stderr.startswith("--density is no option of --resize")
    absent = child("--convert", "nowhere.safetensors", tmp_path / "x", "--to", "kohya")
    assert absent.returncode == 1
    assert "nowhere.safetensors" in absent.stderr
    assert "Traceback" not in absent.stderr


def test_who_reads_it_otherwise_is_said(
    ink: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = read_adapter(ink)
    dora = write_adapter(adapter(dora=True), tmp_path / "dora.safetensors")
    for source, out, spelling in ((ink, "a", "kohya"), (dora, "b", "kohya"), (ink, "c", "diffusers")):
        assert launch.main(["--convert", str(source), str(tmp_path / out), "--to", spelling]) == 0
        said = [
            line for line in capsys.readouterr().out.splitlines() if line.startswith("in other programs: ")
        ]
        own = cautions(plain if source == ink else read_adapter(dora), spelling)
        assert said == [f"in other programs: {caution}" for caution in own]
        assert any("DoRA along outputs" in line for line in said) is (source == dora)
    assert any("InvokeAI" in line for line in said)


# --- what is written, and what is not ------------------------------------------------------------------------


def test_nothing_is_overwritten_unless_it_is_said(
    ink: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    taken, folder, plain = tmp_path / "taken.safetensors", tmp_path / "folder", tmp_path / "plain"
    taken.write_bytes(b"mine")
    folder.mkdir()
    plain.write_bytes(b"mine")
    commands = {
        "convert": ["--convert", ink, taken, "--to", "kohya"],
        "combine": ["--combine", ink, "--out", taken],
        "resize": ["--resize", ink, "--rank", 2, "--out", taken],
        "extract": ["--extract", "demo", "demo", "--rank", 2, "--out", taken],
        "bake": ["--bake", ink, "--base", "demo", "--out", taken],
    }
    for words in commands.values():
        assert launch.main([str(w) for w in words]) == 2
        assert (
            "taken.safetensors exists already. Choose another name, or add --overwrite"
            in capsys.readouterr().err
        )
    never = {
        "exists already. Choose another name.\n": [
            ["--convert", ink, folder, "--to", "peft"],
            ["--convert", ink, plain, "--to", "peft"],
            ["--bake", ink, "--base", "demo", "--out", folder],
            ["--bake", ink, "--base", "demo", "--out", plain],
        ],
        "is a folder. Give the name": [["--convert", ink, folder, "--to", "kohya"]],
    }
    for says, lines in never.items():
        for words in lines:
            assert launch.main([*(str(w) for w in words), "--overwrite"]) == 2
            assert says in capsys.readouterr().err
    assert taken.read_bytes() == plain.read_bytes() == b"mine"
    assert list(folder.iterdir()) == []
    assert launch.main([*map(str, commands["convert"]), "--overwrite"]) == 0
    assert set(read_adapter(taken).deltas) == set(adapter().deltas)


def test_a_base_is_not_replaced_by_itself(
    tmp_path: Path, ink: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = shutil.copy(ink, tmp_path / "base.safetensors")
    assert launch.main(["--bake", str(ink), "--base", str(base), "--out", str(base), "--overwrite"]) == 2
    assert "is the base model itself" in capsys.readouterr().err


@pytest.mark.parametrize("spelling", ["kohya", "peft"])
def test_ctrl_c_while_it_writes_leaves_nothing(
    spelling: str,
    ink: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """At the moment the bytes of a file (with PEFT the second of three) are on the disk and its name is not."""
    flushes = 0

    def interrupted(path: Path) -> None:
        nonlocal flushes
        flushes += 1
        if flushes == (1 if spelling == "kohya" else 8):
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr("lora_core.safe_writes._flush", interrupted)
    assert launch.main(["--convert", str(ink), str(tmp_path / "out"), "--to", spelling]) == 130
    assert capsys.readouterr().err == "Interrupted. No file was left half-written.\n"
    assert flushes > 0
    assert [p.name for p in tmp_path.iterdir()] == ["ink.safetensors"]


def test_ctrl_c_in_the_middle_of_a_bake_leaves_nothing(tmp_path: Path) -> None:
    base, out = save_folder(small_pipeline("sd1"), tmp_path / "base"), tmp_path / "new"

    def listener(done: int, total: int, what: str) -> None:
        if (what, done) == ("tensors", 300):
            signal.raise_signal(signal.SIGINT)

    path = "unet.mid_block.resnets.0.conv1"
    lora = write_adapter(Adapter({path: Full(torch.ones(64, 64, 3, 3))}), tmp_path / "x.safetensors")
    with watched(listener):
        assert launch.main(["--bake", str(lora), "--base", str(base), "--out", str(out)]) == 130
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "x.safetensors"]


@pytest.mark.skipif(os.name == "nt", reason="a signal to a child")
def test_a_child_shows_how_far_it_is_and_can_be_stopped(tmp_path: Path) -> None:
    g = torch.Generator().manual_seed(0)
    path = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_"
    large = {f"{path}{letter}": Full(torch.randn(1280, 1280, generator=g)) for letter in "qkv"}
    lora = write_adapter(Adapter(dict(large)), tmp_path / "large.safetensors")
    words = ["--resize", lora, "--energy", "0.99", "--out", tmp_path / "small.safetensors", "--progress"]
    command = [sys.executable, str(ROOT / "launch.py"), *map(str, words)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT) as process:
        assert process.stderr is not None
        said = b""
        while b"layers:" not in said:
            said += process.stderr.read(1)
        process.send_signal(signal.SIGINT)
        said += process.stderr.read()
        assert process.wait(60) == 130
    assert b"0/3" in said
    assert said.endswith(b"Interrupted. No file was left half-written.\n")
    assert [p.name for p in tmp_path.iterdir()] == ["large.safetensors"]


# --- inspect -------------------------------------------------------------------------------------------------


@pytest.fixture
def shelf(tmp_path: Path) -> Path:
    """One LoRA twice, with other metadata and in another folder; PEFT's folder of one; rubbish, and other files."""
    write_adapter(adapter(), tmp_path / "a.safetensors")
    (tmp_path / "sub").mkdir()
    write_adapter(adapter(), tmp_path / "sub/b.safetensors", metadata={"modelspec.title": "Another"})
    write_adapter(adapter(dora=True), tmp_path / "sub/peft", spelling="peft")
    (tmp_path / "old.ckpt").write_bytes(b"\x80\x02")
    (tmp_path / ".hidden.safetensors").write_bytes(b"x")
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "sub/cut.safetensors").write_bytes((tmp_path / "a.safetensors").read_bytes()[:-9])
    (tmp_path / "sub/round").symlink_to(tmp_path)
    return tmp_path


@pytest.mark.parametrize("hashed", [False, True])
def test_inspect_walks_folders_and_its_json_is_what_look_sees(
    hashed: bool, shelf: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert launch.main(["--inspect", str(shelf), "--json", *(["--hash"] if hashed else [])]) == 1
    said = capsys.readouterr()
    rows = json.loads(said.out)
    files = ["a.safetensors", "old.ckpt", "sub/b.safetensors", "sub/cut.safetensors", "sub/peft"]
    assert [row["file"] for row in rows] == [str(shelf / file) for file in files]
    twins = {str(shelf / files[0]): [str(shelf / files[2])], str(shelf / files[2]): [str(shelf / files[0])]}
    for row, file in zip(rows, files, strict=True):
        assert row.pop("duplicates") == twins.get(str(shelf / file), [])
        assert row == json.loads(json.dumps(look(shelf / file, hashes=hashed).as_json()))
        assert bool(row["problem"]) is (file in ("old.ckpt", "sub/cut.safetensors"))
    first, *reasons = said.err.splitlines()
    assert first == "2 of 5 files cannot be used as a LoRA:"
    assert reasons == [f"{row['file']}: {row['problem']}" for row in rows if row["problem"]]


def test_the_page_names_every_key_of_the_json_and_every_command(
    shelf: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    launch.main(["--inspect", str(shelf / "a.safetensors"), "--json", "--hash"])
    (row,) = json.loads(capsys.readouterr().out)
    page = (ROOT / "docs/files.md").read_text(encoding="utf-8")
    rows = "".join(re.findall(r"^\| (`[^|]+) \|", page.split("## The JSON")[1], re.MULTILINE))
    assert set(re.findall(r"`(\w+)`", rows)) == set(row)
    assert set(row["hashes"]) <= set(re.findall(r"`(\w+)`", page))
    commands = {command.flag for command in COMMANDS if command.home}
    assert set(re.findall(r"^\| `(--\w+) ", page, re.MULTILINE)) == commands


def test_the_commands_of_the_readme_are_understood() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8").replace("\\\n", " ")
    lines = re.findall(r"^python launch\.py(.*)$", text, re.MULTILINE)
    assert len(lines) > 8
    found = {parse(shlex.split(line))[0].flag for line in lines}
    assert found >= {command.flag for command in COMMANDS if command.home}


def test_inspect_in_words(shelf: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = [str(shelf / name) for name in ("a.safetensors", "sub/b.safetensors", "a.safetensors")]
    assert launch.main(["--inspect", *names]) == 0
    said = capsys.readouterr()
    assert said.err == ""
    one, other, same = said.out.rstrip().split("\n\n")
    assert (one, other) == (str(look(names[0])), str(look(names[1])))
    assert same == f"the same LoRA 2 times: {names[0]}, {names[1]}"
    empty = shelf / "empty"
    empty.mkdir()
    assert launch.main(["--inspect", str(empty)]) == 1
    assert "No model lies in" in capsys.readouterr().err


def test_base_models_in_a_folder_are_named_and_no_failure(
    shelf: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whole ones: one with a part that was cut off is one."""
    for rubbish in ("old.ckpt", "sub/cut.safetensors"):
        (shelf / rubbish).unlink()
    save_file(
        {
            "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": torch.zeros(
                320, 768
            )
        },
        shelf / "sd15.safetensors",
    )
    shutil.copytree(ROOT / "presets/demo/base", shelf / "demo")
    assert launch.main(["--inspect", str(shelf), "--json"]) == 0
    said = capsys.readouterr()
    assert said.err == ""
    rows = {Path(row["file"]).name: row for row in json.loads(said.out)}
    assert {name for name, row in rows.items() if row["base_model"]} == {"sd15.safetensors", "demo"}
    assert (rows["demo"]["family"], rows["demo"].get("layers", 0)) == ("sd1", 0)
    held = sum(f.stat().st_size for f in (shelf / "demo").rglob("*.safetensors"))
    assert rows["demo"]["size_bytes"] == held
    assert launch.main(["--inspect", str(shelf)]) == 0
    assert "no LoRA" in capsys.readouterr().out
    (vae,) = (shelf / "demo/vae").glob("*.safetensors")
    vae.write_bytes(vae.read_bytes()[:-9])
    assert launch.main(["--inspect", str(shelf)]) == 1
    first, reason = capsys.readouterr().err.splitlines()
    assert first == "1 of 5 files cannot be used as a LoRA:"
    assert vae.name in reason


def test_who_reads_the_first_line_alone_is_no_error(shelf: Path) -> None:
    copies = [shutil.copy(shelf / "a.safetensors", shelf / f"{i}.safetensors") for i in range(40)]
    command = [sys.executable, str(ROOT / "launch.py"), "--inspect", *copies]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b""
