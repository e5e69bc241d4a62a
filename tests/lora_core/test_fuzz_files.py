"""A thousand spoiled files of every spelling and kind; `python -m tests.fuzz_files --count 20000` is the long form."""

from __future__ import annotations

from pathlib import Path

import pytest

from lora_core.errors import FileRefused, NotFinite
from tests.fuzz_files import Fuzzer, Wrong, sentence


def test_spoiled_files_are_refused_in_a_sentence_or_read_right(tmp_path: Path) -> None:
    report = Fuzzer(tmp_path).run(0, 1000)
    assert not report.problems, "\n".join(report.problems[:3])
    for source in ("base", "cloneofsimo", "diffusers", "kohya", "peft", "tucker", "word"):
        assert report.outcomes[f"{source}: refused"], source
        assert report.outcomes[f"{source}: read"], source


def test_a_case_is_its_number(tmp_path: Path) -> None:
    fuzzer = Fuzzer(tmp_path)
    found = []
    for number in (7, 8, 7):
        draft, path, _ = fuzzer.case(number)
        file = path if path.is_file() else next(path.glob("*.safetensors"))
        found.append((draft.source, draft.changes, file.read_bytes()))
    assert found[0] == found[2] != found[1]


def test_what_files_say_cannot_steer_a_terminal() -> None:
    for kind in (FileRefused, NotFinite):
        text = str(kind("x\x1b[2J\u202e  y\n" + "z" * 5000))
        sentence(text)
        assert text.startswith("x [2J   y z")
    with pytest.raises(Wrong):
        sentence("two\nlines")
