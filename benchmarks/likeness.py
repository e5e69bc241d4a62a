"""What the trainer teaches, beside a plain loop of diffusers + PEFT: likeness and drift at equal steps.

    python -m benchmarks.likeness                               five subjects, three seeds: 45 trainings
    python -m benchmarks.likeness --size tiny --seeds 1         does it run at all
    python -m benchmarks.likeness --kept FOLDER                 stopped, it goes on; several calls may share the folder
    python -m benchmarks.likeness --kept FOLDER --so-far        the table of what is there

presets/demo.toml for subjects that the demo base has never seen: by our trainer, by the loop of the reference script
with the same beginning, settings, pictures and class pictures, and by our trainer without any class pictures
(data.class_from = "model"). Each finished file is loaded into one pipeline and judged as the trainer's report does it:
likeness is the distance to seven views that were not trained on, drift how far pictures of other prompts have moved, in
thumbnails and in the VAE's latents, both the smaller the better. The differences are taken within a subject and seed;
their mean has the standard error s / sqrt(n).
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks.likeness_runs import SPACES, SUBJECTS, Figures, Setting, figures, make
from benchmarks.measure import Row, machine, positive, quiet, table
from trainers.demo_scenes import things
from trainers.presets import load

Found = dict[str, dict[str, Figures]]  # by side and training
MEASURED = ("likeness", "drift", "class drift")
WITHIN = 0.05  # of the figure with class pictures


def main(arguments: Sequence[str] | None = None) -> list[Row]:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.likeness", description=(__doc__ or "").split("\n")[0]
    )
    held_out = [name for name, thing in things().items() if thing.held_out]
    parser.add_argument("--size", choices=("tiny", "full"), default="full", help="tiny: 2 steps, 1 subject")
    parser.add_argument("--subjects", nargs="+", choices=held_out, metavar="NAME", help=", ".join(held_out))
    parser.add_argument(
        "--seeds", "--repeats", type=positive, default=3, metavar="N", help="of each subject (default: 3)"
    )
    parser.add_argument("--steps", type=positive, metavar="N", help="of each training (the preset's)")
    parser.add_argument(
        "--kept", type=Path, metavar="FOLDER", help="keep files and figures of all trainings there"
    )
    parser.add_argument("--so-far", action="store_true", help="train nothing: the table of what --kept has")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write all figures there")
    options = parser.parse_args(arguments)

    tiny = options.size == "tiny"
    subjects = tuple(options.subjects or SUBJECTS[: 1 if tiny else None])
    steps = options.steps or (2 if tiny else load("demo").train.steps)
    with tempfile.TemporaryDirectory() as folder, quiet():
        kept = options.kept or Path(folder) / "kept"
        setting = Setting(subjects, options.seeds, steps, tiny, Path(folder), kept)
        if not options.so_far:
            make(setting)
        found = figures(setting)
    rows = [*against_reference(found), *without_class(found)]
    facts = {**machine(), "subjects": ", ".join(subjects), "seeds": str(options.seeds), "steps": str(steps)}
    print(f"\n{', '.join(f'{name}: {value}' for name, value in facts.items())}\n\n{table(rows)}")
    if options.json is not None:
        report = {"machine": facts, "rows": [row.as_json() for row in rows], "figures": found}
        options.json.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return rows


def against_reference(found: Found) -> Iterator[Row]:
    """Likeness and drift no worse than one standard error of the paired difference."""
    for row, ours, peer in _measured(found, "reference", "ours", "reference"):
        apart, error = difference(ours, peer)
        yield replace(row, goal="≤ peer + 1 SE", met=apart <= error)
    yield from _obedience(found, "reference", "ours", "reference")


def without_class(found: Found) -> Iterator[Row]:
    """At most so much worse than with class pictures."""
    for row, free, given in _measured(found, "class-free", "class-free", "ours"):
        met = statistics.mean(free) <= (1 + WITHIN) * statistics.mean(given)
        note = f"{row.note}; second figure: ours, with class pictures"
        yield replace(row, goal=f"≤ {1 + WITHIN:g} × with", met=met, note=note)
    yield from _obedience(found, "class-free", "class-free", "ours")


def _measured(
    found: Found, name: str, side: str, other: str
) -> Iterator[tuple[Row, list[float], list[float]]]:
    """Of the trainings that both sides have."""
    both = _both(found, side, other)
    for what in MEASURED if both else ():
        for space in SPACES:
            ours, peer = ([found[s][key][f"{what} {space}"] for key in both] for s in (side, other))
            note = "{:+.4f} ± {:.4f}".format(*difference(ours, peer))
            if what == "likeness":
                base = statistics.mean(found[side][key][f"base {space}"] for key in both)
                note += f", base model {base:.3f}"
            mine, theirs = statistics.mean(ours), statistics.mean(peer)
            yield Row(name, f"{what}, {space}s", mine, theirs, repeats=len(both), note=note), ours, peer


def _obedience(found: Found, name: str, side: str, other: str) -> Iterator[Row]:
    if both := _both(found, side, other):
        obeyed = [100 * statistics.mean(found[s][key]["obedience"] for key in both) for s in (side, other)]
        yield Row(name, "named backgrounds obeyed", obeyed[0], obeyed[1], "%", repeats=len(both))


def _both(found: Found, side: str, other: str) -> list[str]:
    return [key for key in found[side] if key in found[other]]


def difference(ours: Sequence[float], peer: Sequence[float]) -> tuple[float, float]:
    """Mean of the paired differences, and its standard error; without one where there is one pair."""
    apart = [a - b for a, b in zip(ours, peer, strict=True)]
    return statistics.mean(apart), statistics.stdev(apart) / len(apart) ** 0.5 if len(apart) > 1 else 0.0


if __name__ == "__main__":
    main()
