"""What the trainer teaches, beside a plain loop of diffusers + PEFT: likeness and drift at equal steps.

    python -m benchmarks.likeness                               five subjects, three seeds: 45 trainings
    python -m benchmarks.likeness --size tiny --seeds 1         does it run at all
    python -m benchmarks.likeness --kept FOLDER                 stopped, it goes on; several calls may share the folder

presets/demo.toml for subjects that the demo base has never seen: by our trainer, by the loop of the reference script
with the same settings, pictures and class pictures, and by our trainer without any class pictures
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
from pathlib import Path

from benchmarks.likeness_runs import SPACES, SUBJECTS, Figures, Setting, figures
from benchmarks.measure import Row, machine, positive, quiet, table
from trainers.demo_scenes import things
from trainers.presets import load

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
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write all figures there")
    options = parser.parse_args(arguments)

    tiny = options.size == "tiny"
    subjects = tuple(options.subjects or SUBJECTS[: 1 if tiny else None])
    steps = options.steps or (2 if tiny else load("demo").train.steps)
    with tempfile.TemporaryDirectory() as folder, quiet():
        kept = options.kept or Path(folder) / "kept"
        found = figures(Setting(subjects, options.seeds, steps, tiny, Path(folder), kept))
    rows = [*against_reference(found), *without_class(found)]
    facts = {**machine(), "subjects": ", ".join(subjects), "seeds": str(options.seeds), "steps": str(steps)}
    print(f"\n{', '.join(f'{name}: {value}' for name, value in facts.items())}\n\n{table(rows)}")
    if options.json is not None:
        report = {"machine": facts, "rows": [row.as_json() for row in rows], "figures": found}
        options.json.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return rows


def against_reference(found: dict[str, list[Figures]]) -> Iterator[Row]:
    """Likeness and drift no worse than one standard error of the paired difference."""
    for what in MEASURED:
        for space in SPACES:
            ours, peer = ([f[f"{what} {space}"] for f in found[side]] for side in ("ours", "reference"))
            apart, error = difference(ours, peer)
            note = f"{apart:+.4f} ± {error:.4f}"
            if what == "likeness":
                note += f"; the base model alone: {statistics.mean(f[f'base {space}'] for f in found['ours']):.3f}"
            yield _row("reference", what, space, ours, peer, "≤ peer + 1 SE", apart <= error, note)
    yield _obedience("reference", found["ours"], found["reference"])


def without_class(found: dict[str, list[Figures]]) -> Iterator[Row]:
    """At most so much worse than with class pictures."""
    for what in MEASURED:
        for space in SPACES:
            free, given = ([f[f"{what} {space}"] for f in found[side]] for side in ("class-free", "ours"))
            apart, error = difference(free, given)
            note = f"{apart:+.4f} ± {error:.4f}; second figure: ours, with class pictures"
            met = statistics.mean(free) <= (1 + WITHIN) * statistics.mean(given)
            yield _row("class-free", what, space, free, given, f"≤ {1 + WITHIN:g} × with", met, note)
    yield _obedience("class-free", found["class-free"], found["ours"])


def difference(ours: Sequence[float], peer: Sequence[float]) -> tuple[float, float]:
    """Mean of the paired differences, and its standard error; without one where there is one pair."""
    apart = [a - b for a, b in zip(ours, peer, strict=True)]
    return statistics.mean(apart), statistics.stdev(apart) / len(apart) ** 0.5 if len(apart) > 1 else 0.0


def _row(
    name: str,
    what: str,
    space: str,
    ours: Sequence[float],
    peer: Sequence[float],
    goal: str,
    met: bool,
    note: str,
) -> Row:
    what, mine, theirs = f"{what}, {space}s", statistics.mean(ours), statistics.mean(peer)
    return Row(name, what, mine, theirs, goal=goal, met=met, repeats=len(ours), note=note)


def _obedience(name: str, ours: Sequence[Figures], peer: Sequence[Figures]) -> Row:
    mine, theirs = (100 * statistics.mean(f["obedience"] for f in side) for side in (ours, peer))
    return Row(name, "named backgrounds obeyed", mine, theirs, "%", repeats=len(ours))


if __name__ == "__main__":
    main()
