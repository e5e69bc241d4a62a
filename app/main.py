"""`launch.py` without a command: the session, and the page in front of it."""

from __future__ import annotations

import contextlib
from pathlib import Path

from app.draft import Draft
from app.host import Page, serve
from app.session import Session
from lora_core.errors import LoraError


def run(models: Path, *, host: str, port: int, token: str, open_browser: bool) -> int:
    """Serve until a signal -> the exit code. `models` holds Lora and Stable-diffusion; pictures, runs and what is
    being gathered for a training lie beside it."""
    home = models.absolute().parent
    session = Session(models.absolute(), home / "outputs", home / "runs")
    draft = Draft(home / "datasets")

    def page() -> Page:
        from app.page import create_ui  # noqa: PLC0415 - gradio takes seconds, and its environment is set by then

        return create_ui(session, draft)

    return serve(
        page,
        host=host,
        port=port,
        token=token,
        open_browser=open_browser,
        outputs=session.pictures.folder,
        temporary=models.absolute() / ".uploads",
        on_stop=lambda: leave(session),
    )


def leave(session: Session) -> None:
    """The session is kept; a running training is asked to save, and goes on in its own process."""
    session.close()
    run = session.training.current()
    if run is None:
        return
    with contextlib.suppress(LoraError):  # still starting, or just over: there is nothing to save
        session.training.commands().save()
    print(
        f"The training in {run} goes on in a process of its own and was asked to save now. Start LoRA Loom again "
        "to watch it or to stop it."
    )
