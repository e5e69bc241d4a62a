"""Opening LoRA files and looking at them, beside the safetensors library, in one process.

    python -m benchmarks.files                                  a 17 MB LoRA of SD 1.5; a thousand files of 600 tensors
    python -m benchmarks.files --size tiny --repeats 1          does it run at all
    python -m benchmarks.files --only look

Figures are processor time on one thread, the least of n rounds in which both sides take turns: the files lie in the
system's cache, so what a disk would add is not in them, and both sides would wait for it. Loading reads every byte; a
look reads the header and the alphas. A thousand files are a few with a thousand turns: each with metadata of its own.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

from benchmarks.measure import Row, compared, fastest, machine, measured, options_of, report
from lora_core.adapter import Adapter, file_path
from lora_core.deltas import Delta
from lora_core.deltas.low_rank import LowRank
from lora_core.formats import read_adapter, write_adapter
from lora_core.looking import Look, forget, look
from lora_core.safe_files import read_header

RANKS = (4, 8, 16, 32, 64)
FILES, TENSORS = 1000, 600
OPENING, LOOKING = 3.0, 1 / 20  # goals, as shares of the peer's time


@dataclass(frozen=True)
class Setting:
    tiny: bool
    repeats: int
    folder: Path


def opening(setting: Setting) -> Iterator[Row]:
    """A rank-16 LoRA of all attention and feed-forward layers of SD 1.5 and its text encoder."""
    path = a_file(setting, 16, seed=0)
    seconds = fastest({"ours": lambda: read_adapter(path), "peer": lambda: load_file(path)}, setting.repeats)
    size = path.stat().st_size / 1e6
    yield compared(
        "open",
        f"opening {size:.0f} MB, {len(read_header(path).tensors)} tensors, into an Adapter",
        seconds["ours"],
        seconds["peer"],
        repeats=setting.repeats,
        at_most=OPENING,
        note="peer: load_file, a dict of tensors",
    )


def looking(setting: Setting) -> Iterator[Row]:
    count, most = (4, 6) if setting.tiny else (FILES, TENSORS)
    ranks = RANKS[:2] if setting.tiny else RANKS
    paths = [a_file(setting, rank, seed, most // 3) for rank in ranks for seed in range(2)]
    turns = [paths[i % len(paths)] for i in range(count)]
    # Looking takes so little that a round of it is all turns; loading costs the same each time it is done
    seconds = fastest(
        {
            "look": lambda: [look(path) for path in turns],
            "first": lambda: [first_look(path) for path in paths],
            "read": lambda: [read_adapter(path) for path in paths],
            "peer": lambda: [load_file(path) for path in paths],
        },
        setting.repeats,
    )
    ours, first = seconds["look"] / len(turns), seconds["first"] / len(paths)
    read, peer = seconds["read"] / len(paths), seconds["peer"] / len(paths)
    what = f"one of {count} files, {most} tensors, ranks {ranks[0]} to {ranks[-1]}"
    for name, took, beside, goal, note in (
        ("look", ours, read, LOOKING, "peer: loading it, read_adapter"),
        ("look", ours, peer, None, "peer: load_file"),
        ("look first", first, read, None, "the first of its layout; peer: read_adapter"),
    ):
        title = f"a look at {what}"
        yield compared(name, title, took, beside, repeats=setting.repeats, at_most=goal, note=note)


def first_look(path: Path) -> Look:
    forget()
    return look(path)


ROWS: dict[str, Callable[[Setting], Iterator[Row]]] = {"open": opening, "look": looking}


def a_file(setting: Setting, rank: int, seed: int, layers: int | None = None) -> Path:
    path = setting.folder / f"rank{rank}-{seed}-{layers}.safetensors"
    if path.exists():
        return path
    g = torch.Generator().manual_seed(seed)
    shapes = list(layer_shapes())[: 2 if setting.tiny else layers]
    deltas: dict[str, Delta] = {
        name: LowRank(
            torch.randn(rank, *shape[1:], generator=g).half(),
            torch.randn(shape[0], rank, *[1] * (len(shape) - 2), generator=g).half(),
            alpha=rank / 2,
        )
        for name, shape in shapes
    }
    facts = {"ss_output_name": f"{rank}-{seed}", "ss_tag_frequency": f'{{"10_x": {{"word {seed}": 12}}}}'}
    return write_adapter(Adapter(deltas, family="sd1"), path, metadata=facts)


def layer_shapes() -> Iterator[tuple[str, tuple[int, ...]]]:
    """The layers that kohya's trainer takes in SD 1.5: diffusers' and transformers' defaults are its measures."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(cross_attention_dim=768)
        text = CLIPTextModel(CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_attention_heads=12))
    for component, model in (("unet", unet), ("text_encoder", text)):
        for path, layer in model.named_modules():
            inside = "attentions." in path or component != "unet"
            if inside and isinstance(layer, nn.Linear | nn.Conv2d):
                yield file_path(component, path), tuple(layer.weight.shape)


def main(arguments: Sequence[str] | None = None) -> list[Row]:
    parser = options_of("files", __doc__, ROWS, sizes=("tiny", "full"), repeats=7)
    options = parser.parse_args(arguments)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with tempfile.TemporaryDirectory() as folder:
            rows = measured(
                ROWS, options.only, Setting(options.size == "tiny", options.repeats, Path(folder))
            )
    finally:
        torch.set_num_threads(threads)
    report(rows, machine(), peer="the library")
    return rows


if __name__ == "__main__":
    main()
