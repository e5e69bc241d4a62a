"""What the Train tab does, as functions of the session: the answers kept, the check, the start, orders to what runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from app.draft import Draft
from app.plan import Plan, slug
from app.session import Session
from lora_core.errors import ConfigError, LoraError
from trainers.config import TrainConfig


def answer(session: Session, **changes: Any) -> None:
    """One or more answers of the form, at once and for the next time the page is opened."""
    with session.lock:
        session.wanted.plan = session.wanted.plan.changed(**changes)
    session.said_at.pop("start", None)  # of what was wanted before
    session.save()


def try_at(session: Session, place: str, act: Callable[[], object]) -> None:
    """`act`; what keeps it from being done is said at that place of the page, beside what asked for it."""
    try:
        act()
    except LoraError as problem:
        session.said_at[place] = str(problem)
    else:
        session.said_at.pop(place, None)


def config(session: Session, pictures: Path) -> TrainConfig:
    """What would be trained, whole. Raises ConfigError."""
    whole = _plan(session).config(pictures)
    return whole.model_copy(update={"output": session.training.runs})


def missing(session: Session, draft: Draft) -> str:
    """What stands between the form and a start, in a sentence; empty: nothing."""
    if not draft.entries():
        return "Next: choose 4 to 20 pictures of one subject, or try the included fox."
    try:
        config(session, draft.folder)
    except ConfigError as problem:
        return str(problem)
    return ""


def state_of_form(session: Session, draft: Draft) -> object:
    """What differs when a check is no longer of what would be trained."""
    return session.wanted.plan, draft.revision


def check(session: Session, draft: Draft) -> None:
    _refuse_beside(session)
    if problem := missing(session, draft):
        raise ConfigError(problem)
    session.check.start(config(session, draft.folder), state_of_form(session, draft))


def start(session: Session, draft: Draft) -> Path:
    """On the draft's pictures as they are now -> the run folder."""
    _refuse_beside(session)
    if problem := missing(session, draft):
        raise ConfigError(problem)
    plan = _plan(session)
    pictures = draft.freeze(slug(plan.name))
    session.check.stop()
    return session.training.start(plan.preset, plan.overrides(pictures))


def of_view(session: Session, steps: float | None, run: str) -> float | None:
    """Steps in all that the page has of `run`; None where another run has come on view since it was drawn."""
    view = session.training.view()
    return steps if view is not None and str(view.run) == run else None


def pause_or_go_on(session: Session, steps: float | None) -> None:
    """Whatever is on view: a training that runs pauses, one that is paused or has ended goes on."""
    view = session.training.view()
    if view is None:
        raise LoraError("There is no training to go on with. Start one.")
    if view.state == "paused":
        session.training.commands().unpause()
    elif view.state == "running":
        session.training.commands().pause()
    else:
        resume(session, steps)


def resume(session: Session, steps: float | None) -> None:
    """The run on view, from where it was last saved; a finished one only with more steps than it has."""
    view = session.training.view()
    assert view is not None
    wanted = None if steps is None or int(steps) == view.steps else int(steps)
    if view.state == "finished" and (wanted is None or wanted <= view.step):
        raise ConfigError(
            f"{view.name} has all of its {view.step} steps. Say a larger number under “Steps in all”, then go on."
        )
    if wanted is not None and wanted < view.step:
        raise ConfigError(f"{view.name} has done {view.step} steps already: “Steps in all” counts those too.")
    session.check.stop()
    session.training.resume(view.run, wanted)


def sample(session: Session, prompt: str, weight: float | None) -> None:
    session.training.commands().sample(prompt, weight=1.0 if weight is None else float(weight))


def change_steps(session: Session, steps: float | None) -> None:
    if steps is None:
        raise ConfigError("Say how many steps the training is to have in all; those that are done count.")
    session.training.commands().steps(int(steps))


def _plan(session: Session) -> Plan:
    """With what the user has said of its base."""
    plan = session.wanted.plan
    return plan.changed(prediction=session.wanted.predictions.get(plan.base, "auto"))


def _refuse_beside(session: Session) -> None:
    if session.training.current() is not None:
        raise LoraError("A training is running. Wait for it, or stop and save it first.")
