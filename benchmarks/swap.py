"""LoRAs loaded, weighed, fused and undone: LivePipeline beside diffusers + PEFT, in one process.

    python -m benchmarks.swap                                   SD 1.5's size
    python -m benchmarks.swap --size sdxl --only load third     a few rows of SDXL's size (7 GB of weights)
    python -m benchmarks.swap --size tiny --repeats 1           does it run at all

Both sides get the same files and the same base in memory: full topology, random weights, bf16, on the CPU.
Every figure is a median of n runs after a warm-up, with the garbage collector off.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from benchmarks import swap_layers, swap_models, swap_rows
from benchmarks.measure import Row, machine, measured, options_of, positive, report
from benchmarks.swap_rows import Setting

ROWS: dict[str, Callable[[Setting], Iterator[Row]]] = {
    "load": swap_rows.load,
    "third": swap_rows.third,
    "weights": swap_rows.weights,
    "unload": swap_rows.unload,
    "fuse": swap_rows.fuse,
    "forward": swap_rows.forward,
    "operations": swap_layers.operation_counts,
    "overhead": swap_layers.overhead,
    "recompilations": swap_layers.recompilations,
    "swaps": swap_layers.swaps,
    "sheet": swap_rows.sheet,
}


def main(arguments: Sequence[str] | None = None) -> list[Row]:
    parser = options_of("swap", __doc__, ROWS, sizes=swap_models.SIZES)
    parser.add_argument("--dtype", choices=swap_models.DTYPES, default="bfloat16", help="of the models")
    parser.add_argument(
        "--swaps", type=positive, default=500, metavar="N", help="of the row of that name (500)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures there")
    options = parser.parse_args(arguments)

    with tempfile.TemporaryDirectory() as folder:
        dtype = swap_models.DTYPES[options.dtype]
        setting = Setting(options.size, dtype, options.repeats, options.swaps, Path(folder))
        rows = measured(ROWS, options.only, setting)
    facts = {**machine(), "size": options.size, "dtype": options.dtype}
    report(rows, facts)
    if options.json is not None:
        figures = {"machine": facts, "rows": [row.as_json() for row in rows]}
        options.json.write_text(json.dumps(figures, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return rows


if __name__ == "__main__":
    main()
