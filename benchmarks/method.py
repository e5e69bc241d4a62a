"""The method itself beside PEFT, in one process: DoRA's extra, combining by SVD, attaching.

    python -m benchmarks.method                                 SD 1.5's and SDXL's sizes
    python -m benchmarks.method --size tiny --repeats 1         does it run at all
    python -m benchmarks.method --only dora --dtype float32

Every figure is a median of n rounds in which both sides take turns, after a warm-up, with the garbage collector off.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from benchmarks import method_rows, swap_models
from benchmarks.measure import Row, machine, measured, options_of, report
from benchmarks.method_rows import Setting

ROWS: dict[str, Callable[[Setting], Iterator[Row]]] = {
    "dora": method_rows.dora,
    "memory": method_rows.memory,
    "step": method_rows.step,
    "combine": method_rows.combine_by_svd,
    "attach": method_rows.attach_to_unet,
}


def main(arguments: Sequence[str] | None = None) -> list[Row]:
    parser = options_of("method", __doc__, ROWS, sizes=("tiny", "full"))
    parser.add_argument("--dtype", choices=swap_models.DTYPES, default="float32", help="of the base weights")
    options = parser.parse_args(arguments)
    setting = Setting(options.size == "tiny", swap_models.DTYPES[options.dtype], options.repeats)
    rows = measured(ROWS, options.only, setting)
    facts = {**machine(), "dtype": options.dtype}
    report(rows, facts)
    return rows


if __name__ == "__main__":
    main()
