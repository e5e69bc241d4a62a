"""The trainer beside a plain loop of diffusers + PEFT that does the same work: time, memory, losses.

    python -m benchmarks.train                                  SD 1.5's size, 256 px, batch 1, base in bf16
    python -m benchmarks.train --size tiny --repeats 1          does it run at all
    python -m benchmarks.train --only memory dora

The loop is the reference of the DreamBooth script: the VAE encodes the picture and the text encoder its prompt in every
step, PEFT's LoRA in fp32, autocast, AdamW. Both sides take their steps in turns in one process, from the same files,
the same first LoRA, the same pictures, noise and timesteps; memory is that of a process of each side's own.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from benchmarks import swap_models, train_rows
from benchmarks.measure import Row, machine, measured, options_of, positive, quiet, report
from benchmarks.train_rows import Setting

ROWS: dict[str, Callable[[Setting], Iterator[Row]]] = {
    "step": train_rows.step,
    "memory": train_rows.memory,
    "losses": train_rows.losses,
    "dora": train_rows.dora,
}


def main(arguments: Sequence[str] | None = None) -> list[Row]:
    parser = options_of("train", __doc__, ROWS, sizes=("tiny", "sd15"))
    parser.add_argument("--dtype", choices=swap_models.DTYPES, default="bfloat16", help="of the base weights")
    parser.add_argument("--side", type=positive, help="of the picture, in pixels (256; tiny: 64)")
    parser.add_argument("--alone", nargs=2, metavar=("SIDE", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.alone:  # the child of the row "memory"
        side, folder = options.alone
        with quiet():
            train_rows.peak_alone(side, Path(folder))
        return []
    with tempfile.TemporaryDirectory() as folder, quiet():
        tiny = options.size == "tiny"
        side = options.side or (64 if tiny else 256)
        setting = Setting(tiny, options.dtype, options.repeats, side, Path(folder))
        train_rows.write_base(setting)
        rows = measured(ROWS, options.only, setting)
    facts = {**machine(), "size": options.size, "side": str(side), "dtype": options.dtype}
    report(rows, facts)
    return rows


if __name__ == "__main__":
    main()
