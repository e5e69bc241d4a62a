"""No folder of a user's disk leaves the machine in a file's metadata: paths of every system, in every kind of value."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lora_core.adapter import Adapter
from lora_core.deltas.low_rank import LowRank
from lora_core.formats import write_adapter
from lora_core.formats.metadata import without_paths
from lora_core.safe_files import read_header

SECRET = "anna-k"  # the user's name, which may stand nowhere in the result
FOLDERS = (
    st.text(alphabet="abcXYZ0129 _-.()&+é猫", min_size=1, max_size=8)
    .map(str.strip)
    .filter(lambda name: name.strip(". "))
)
ROOTS = st.sampled_from(
    (
        ("/home/", "/"),
        ("/Users/", "/"),
        ("/media/", "/"),
        ("C:\\Users\\", "\\"),
        ("D:/Users/", "/"),
        ("\\\\nas\\", "\\"),
        ("\\\\?\\C:\\Users\\", "\\"),
        ("//nas/", "/"),
        ("~/", "/"),
        ("~", "/"),
        ("file:///home/", "/"),
        ("file:///C:/Users/", "/"),
        ("../../", "/"),
        ("..\\", "\\"),
    )
)


@st.composite
def paths(draw: st.DrawFn, *, spaces: bool = True) -> tuple[str, str]:
    """-> a path with SECRET as one of its folders, and its last name."""
    root, slash = draw(ROOTS)
    folders = FOLDERS if spaces else FOLDERS.map(lambda name: name.replace(" ", "_").strip("()"))
    last = draw(folders.filter(bool))
    return slash.join((root + SECRET, *draw(st.lists(folders.filter(bool), max_size=2)), last)), last


@st.composite
def values(draw: st.DrawFn) -> str:
    path, _ = draw(paths())
    plain, _ = draw(paths(spaces=False))
    escaped = json.dumps(path, ensure_ascii=draw(st.booleans()))
    return draw(
        st.sampled_from(
            (
                path,
                f"  {path}\n",
                escaped,
                json.dumps({path: {"n_repeats": 1, "dir": [path, 3]}}),
                f'[data]\nimages = {escaped}\nprompt = "a cat"\n',
                f"images = '{path}'",
                json.dumps({"args": f"--out={plain} --seed=3"}),
                f"trained on {plain}, seed 3",
                f"({plain})",
                f"out={plain};in={plain}",
                f"a\n{plain}\nb",
                f"<{plain}>",
            )
        )
    )


@settings(max_examples=300, deadline=None)
@given(values())
@example("/home/anna-k")
@example('{"dir": "C:\\\\\\\\Users\\\\\\\\anna-k\\\\\\\\x"}')  # JSON inside JSON
def test_no_folder_of_the_user_is_left(value: str) -> None:
    assert SECRET not in without_paths(value)


@pytest.mark.parametrize(
    "text",
    [
        "a cat and/or a dog, 1/2, w/ hat",
        "https://example.org/a/b?c=d, http://x.org/~y",
        "1girl, :/, :d, x/y, (a:1.2), <lora:cat:0.8>, D:",
        "stable-diffusion-v1/lora",
        "runwayml/stable-diffusion-v1-5",
        '{"1girl": 3, "w/ hat": 2, "/": 1, "\\\\": 4}',
        "512x512",
        "~",
        "data:image/jpeg;base64,/9j/4AAQ+/x==",
    ],
)
def test_what_is_no_path_stays(text: str) -> None:
    assert without_paths(text) == text


@settings(max_examples=15, deadline=None)
@given(
    path=paths(),
    key=st.sampled_from(("ss_output_name", "ss_dataset_dirs", "modelspec.title", "loom.preset", "x")),
)
def test_no_file_holds_one(path: tuple[str, str], key: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        adapter = Adapter(
            {"unet.conv_in": LowRank(torch.ones(1, 2, 3, 3), torch.ones(2, 1, 1, 1), 1.0)},
            {key: path[0]},
            name=path[0],
        )
        for spelling in ("kohya", "diffusers", "peft"):
            written = write_adapter(
                adapter, Path(folder) / f"{spelling}-x", spelling=spelling, metadata={"y": path[0]}
            )
            for file in [written] if written.is_file() else written.rglob("*"):
                assert not file.is_file() or SECRET.encode() not in file.read_bytes()
                if file.suffix == ".safetensors":
                    assert SECRET not in json.dumps(read_header(file).metadata)
