"""How LoRAs come into the mixer: from the library, from a drop onto the page, from a training. Jobs of the worker."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from app.jobs import Job
from app.memory import Row
from lora_core.errors import FileRefused, LoraError, WrongFamily
from lora_core.facts import Coverage
from lora_core.pipeline import LivePipeline
from lora_core.safe_writes import copy_atomic

if TYPE_CHECKING:
    from app.session import Session


def wear(session: Session, names: Sequence[str], job: Job) -> str:
    pipe, said, problems = session.ready(job), [], []
    for name in names:
        try:
            file = session.library.find(name)
            if file.problem:
                raise FileRefused(file.problem)
            coverage = pipe.load(file.path, name=file.name, weight=1.0)
        except WrongFamily as problem:
            problems.append(f"{name}: {problem} It is in the library for when such a model is open.")
        except LoraError as problem:
            problems.append(f"{name}: {problem}")
        else:
            with session.lock:
                session.rows[file.name] = Row(
                    name=file.name, file=str(file.path), facts=facts(coverage), triggers=file.triggers
                )
                session.wanted.fused = False
            said.append(f"{file.name}: {coverage}.")
    session.mix_now()  # where one LoRA sounds alone, a new one is silent too
    session.changed()
    if problems:
        raise LoraError("\n".join([*problems, *said]))
    return "\n".join(said)


def load_rows(
    session: Session, pipe: LivePipeline, names: Sequence[str] | None = None
) -> tuple[list[str], list[str]]:
    """The rows of these names, or all, onto the pipeline -> what was loaded, and what was not and why. Those that do
    not fit stay in the mixer, set aside with the reason."""
    said, problems = [], []
    for name, row in list(session.rows.items()):
        if name in pipe.loaded or (names is not None and name not in names):
            continue
        try:
            coverage = pipe.load(row.file, name=name, weight=row.value)
            changes = {"aside": "", "facts": facts(coverage)}
            said.append(f"{name}: {coverage}.")
        except LoraError as problem:
            changes = {"aside": str(problem)}
            problems.append(f"{name}: {problem}")
        with session.lock:  # its weights may have been moved meanwhile
            session.rows[name] = session.rows[name].changed(**changes)
    session.mix_now()
    return said, problems


def drop(session: Session, files: Sequence[tuple[Path, str]], job: Job) -> str:
    names, problems = [], []
    for path, filename in files:
        try:
            names.append(session.library.import_file(path, filename).name)
        except LoraError as problem:
            said = str(problem)
            problems.append(said if said.startswith(filename) else f"{filename}: {said}")
    try:
        said = wear(session, names, job) if names else ""
    except LoraError as problem:
        problems.append(str(problem))
        said = ""
    if problems:
        raise LoraError("\n".join([*problems, *filter(None, [said])]))
    return said


def use(session: Session, file: Path, job: Job) -> str:
    copy = session.library.root / f".{file.name}.copy"
    copy_atomic(file, copy)
    return wear(session, [session.library.import_file(copy, file.name).name], job)


def facts(coverage: Coverage) -> str:
    return f"{coverage.matched} of {coverage.total} layers" + (
        f", {len(coverage.unused)} keys not used" if coverage.unused else ""
    )
