"""The mixer: one row per LoRA (drawn by assets/mixer.js), what is done to all of them, and mixes kept by name."""

from __future__ import annotations

from typing import Any

import gradio as gr

from app.live import rows_data
from app.mixing import mixes_data
from app.session import Session
from app.tabs import AT_ONCE, Parts


def create(session: Session, parts: Parts) -> dict[str, Any]:
    c: dict[str, Any] = {}
    gr.Markdown("### LoRAs", elem_id="mixer-title")
    parts.data("rows", lambda: rows_data(session))
    with gr.Row():
        c["fuse"] = gr.Button("Fuse", elem_id="fuse", size="sm", min_width=80)
        c["unfuse"] = gr.Button("Unfuse", elem_id="unfuse", size="sm", min_width=80)
        c["unload"] = gr.Button("Take all off", elem_id="unload", size="sm", min_width=80)
        c["measure"] = gr.Button("Measure", elem_id="measure", size="sm", min_width=80)
        c["normalise"] = gr.Button("Normalise", elem_id="normalise", size="sm", min_width=80)
    c["auto"] = gr.Checkbox(
        session.wanted.auto,
        label="Fuse by itself once the mix has stood still",
        elem_id="auto",
        container=False,
    )
    with gr.Accordion("Saved mixes and crossfade", open=False, elem_id="mixes-more"):
        parts.data("mixes", lambda: mixes_data(session))
    c["auto"].input(session.set_auto, c["auto"], None, **AT_ONCE)
    c["measure"].click(lambda: _void(session.measure()), None, None, **AT_ONCE)
    c["normalise"].click(lambda: _void(session.normalise()), None, None, **AT_ONCE)
    c["fuse"].click(lambda: _void(session.fuse()), None, None, **AT_ONCE)
    c["unfuse"].click(lambda: _void(session.unfuse()), None, None, **AT_ONCE)
    c["unload"].click(lambda: _void(session.unload()), None, None, **AT_ONCE)
    return c


def _void(_: object) -> None:
    """Events whose result the page finds at its next look."""
