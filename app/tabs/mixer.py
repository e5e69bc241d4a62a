"""The mixer: one row per LoRA. The rows are the session's; a slider's every move is one number in it.

Rows and everything in them are keyed, or their values would fall back when a row comes or goes; the values are the
server's, so a second tab shows the same.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import gradio as gr

from app.memory import Row
from app.session import Session
from app.tabs import AT_ONCE, Drawing

EMPTY = (
    '<div class="empty">No LoRA is worn. Drop a <b>.safetensors</b> file anywhere on this page, choose one in the '
    "Library, or train your own.</div>"
)


def create(session: Session, drawing: Drawing, prompt: gr.Textbox) -> dict[str, Any]:
    c: dict[str, Any] = {}
    gr.Markdown("### LoRAs", elem_id="mixer-title")

    @gr.render(**drawing.by)
    def rows(at: int) -> None:
        drawing.drawn(at)
        if not session.rows:
            gr.HTML(EMPTY, key="empty", padding=False)
        for row in list(session.rows.values()):
            _row(session, row, prompt)

    with gr.Row():
        c["fuse"] = gr.Button("Fuse", elem_id="fuse", size="sm", min_width=80)
        c["unfuse"] = gr.Button("Unfuse", elem_id="unfuse", size="sm", min_width=80)
        c["unload"] = gr.Button("Take all off", elem_id="unload", size="sm", min_width=80)
    c["fuse"].click(lambda: _void(session.fuse()), None, None, **AT_ONCE)
    c["unfuse"].click(lambda: _void(session.unfuse()), None, None, **AT_ONCE)
    c["unload"].click(lambda: _void(session.unload()), None, None, **AT_ONCE)
    return c


def _row(session: Session, row: Row, prompt: gr.Textbox) -> None:
    name = row.name
    fresh: dict[str, Any] = {"preserved_by_key": [], "interactive": True}
    with gr.Group(key=f"group-{name}", elem_classes="lora"):
        with gr.Row(key=f"row-{name}", equal_height=False):
            on = gr.Checkbox(
                row.on,
                label=name,
                container=True,
                scale=4,
                min_width=170,
                key=f"on-{name}",
                elem_classes="lora-name",
                **fresh,
            )
            weight = gr.Slider(
                -1,
                2,
                row.weight,
                step=0.05,
                label=f"Weight of {name}",
                scale=5,
                min_width=160,
                key=f"weight-{name}",
                elem_classes="lora-weight",
                **fresh,
            )
            remove = gr.Button(f"Remove {name}", size="sm", key=f"remove-{name}", elem_classes="cross")
        if row.aside:
            gr.Markdown(f"Set aside: {_plain(row.aside)}", key=f"aside-{name}", preserved_by_key=[])
        with gr.Accordion(f"Words of {name}", open=row.text is not None, key=f"more-{name}"):
            _triggers(session, row, prompt)
            text = gr.Slider(
                -1,
                2,
                row.weight if row.text is None else row.text,
                step=0.05,
                label=f"Text weight of {name}",
                info=f"Its own weight in the text encoder; {_plain(row.facts)}",
                key=f"text-{name}",
                **fresh,
            )
            follow = gr.Button("Follow the main weight", size="sm", key=f"follow-{name}")
    live: dict[str, Any] = {"trigger_mode": "always_last", **AT_ONCE}
    on.input(lambda value: session.set_row(name, on=bool(value)), on, None, key=f"on-input-{name}", **live)
    weight.input(
        lambda value: session.set_row(name, weight=float(value)),
        weight,
        None,
        key=f"weight-input-{name}",
        **live,
    )
    text.input(
        lambda value: session.set_row(name, text=float(value)), text, None, key=f"text-input-{name}", **live
    )
    follow.click(partial(session.set_row, name, text=None), None, None, key=f"follow-click-{name}", **live)
    remove.click(lambda: _void(session.remove(name)), None, None, key=f"remove-click-{name}", **AT_ONCE)


def _triggers(session: Session, row: Row, prompt: gr.Textbox) -> None:
    """The words that call the LoRA up; pressed, they go into the prompt."""
    if not row.triggers:
        return
    with gr.Row(key=f"triggers-{row.name}", elem_classes="triggers"):
        for word in row.triggers:
            key = f"{row.name}-{word}"
            button = gr.Button(f"Add “{word}”", size="sm", key=f"trigger-{key}", min_width=80)
            button.click(
                partial(_with_word, session, word), prompt, prompt, key=f"trigger-click-{key}", **AT_ONCE
            )


def _with_word(session: Session, word: str, prompt: str) -> str:
    if word.casefold() not in prompt.casefold():
        prompt = f"{prompt.rstrip(' ,')}, {word}" if prompt.strip() else word
        session.remember(prompt=prompt)
    return prompt


def _plain(text: str) -> str:
    """Foreign text inside Markdown: no character of it means anything."""
    return "".join(f"\\{c}" if c in r"\`*_{}[]<>()#+-.!|~&" else c for c in text)


def _void(_: object) -> None:
    """Events whose result the page finds at its next look."""
