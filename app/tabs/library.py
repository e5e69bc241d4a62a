"""A first Library: what is in the LoRA folder, searchable, with the facts of each file's header."""

from __future__ import annotations

from typing import Any

import gradio as gr

from app.library import LoraFile
from app.session import Session
from app.tabs import AT_ONCE

SHOWN = 100


def create(session: Session) -> dict[str, Any]:
    c: dict[str, Any] = {}
    with gr.Row():
        c["search"] = gr.Textbox(
            label="Search",
            elem_id="library-search",
            placeholder="Part of a name, a model or a trigger word",
            scale=4,
        )
        c["refresh"] = gr.Button("Look again", elem_id="library-refresh", size="md", scale=1, min_width=100)
    c["count"] = gr.Markdown(elem_id="library-count")
    c["chosen"] = gr.CheckboxGroup([], label="LoRAs", elem_id="library-list")
    c["wear"] = gr.Button("Wear the chosen ones", variant="primary", elem_id="library-wear")

    def look(words: str) -> Any:
        files = [f for f in session.library.loras() if matches(f, words)]
        more = f" The first {SHOWN} are shown; search for the others." if len(files) > SHOWN else ""
        folder = "models/Lora" if not files and not words else ""
        said = (
            f"{len(files)} found.{more}"
            if files
            else f"Nothing here{' yet: drop .safetensors files anywhere on the page' if folder else ' by that name'}."
        )
        return gr.update(choices=[(line(f), f.name) for f in files[:SHOWN]], value=[]), said

    outputs = [c["chosen"], c["count"]]
    c["search"].change(look, c["search"], outputs, trigger_mode="always_last", **AT_ONCE)
    c["refresh"].click(look, c["search"], outputs, **AT_ONCE)
    c["look"], c["outputs"] = look, outputs
    c["wear"].click(lambda names: session.wear(names) and None, c["chosen"], None, **AT_ONCE)
    return c


def matches(file: LoraFile, words: str) -> bool:
    text = " ".join([file.name, file.family_title, file.base_model, *file.triggers]).lower()
    return all(word in text for word in words.lower().split())


def line(file: LoraFile) -> str:
    """cat · SD 1.x · rank 16 · 3.2 MB · zxq"""
    if file.problem:
        return f"{file.name} · cannot be used: {file.problem}"
    ranks = (
        f"rank {'-'.join(str(r) for r in sorted({min(file.ranks), max(file.ranks)}))}" if file.ranks else ""
    )
    size = f"{file.size_bytes / 1e6:.1f} MB"
    return " · ".join(filter(None, [file.name, file.family_title, ranks, size, ", ".join(file.triggers[:3])]))
