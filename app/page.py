"""The page, put together: a status line, tabs, and what listens everywhere. Nothing is decided here.

Gradio is imported with this module and those it shows, so only `main` imports it, when the page is asked for.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr

from app.draft import Draft
from app.host import Page
from app.live import Part, routes
from app.session import Session
from app.status import status_html
from app.tabs import AT_ONCE, Parts, generate, library, train
from app.theme import CSS, HEAD, THEME, VEIL


def create_ui(session: Session, draft: Draft) -> Page:
    """For `app.host` to serve. A tab is a function of the session."""
    with gr.Blocks(title="LoRA Loom", fill_width=True, analytics_enabled=False) as page:
        parts = Parts()
        gr.HTML(VEIL, elem_id="veil-holder")
        gr.Markdown("# LoRA Loom", elem_id="title")
        parts.html("status", lambda: status_html(session))
        drop = gr.UploadButton(
            "Add LoRA files", file_count="multiple", elem_id="drop", size="sm"
        )  # outside the tabs: what is in a tab that was never opened is not on the page
        with gr.Tabs(elem_id="tabs"):
            with gr.Tab("Generate", id="generate-tab"):
                making = generate.create(session, parts)
            with gr.Tab("Train", id="train-tab"):
                train.create(session, draft, parts)
            with gr.Tab("Library", id="library-tab") as shelf:
                found = library.create(session)
        shelf.select(found["look"], found["search"], found["outputs"], **AT_ONCE)

        def dropped(files: list[str] | None) -> list[Any]:
            """LoRAs into the mixer; a picture brings back the settings it was made with."""
            paths = [Path(f) for f in files or []]
            pictures = [path for path in paths if path.suffix.lower() == ".png"]
            if len(pictures) < len(paths):
                session.drop([(path, path.name) for path in paths if path not in pictures])
            return generate.settings_from(session, pictures[-1:])

        drop.upload(dropped, drop, making["fields"], **AT_ONCE)
        parts.known["said"] = Part(lambda: session.said[1], lambda: session.said[0])
        parts.finish()
        page.load(making["restore"], None, making["fields"], **AT_ONCE)
    return Page(page, THEME, CSS, HEAD, routes(session, draft, parts.known))
