"""The pictures to learn from: chosen or dropped, looked at, and given their words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr

from app.draft import Draft
from app.live import pictures_data
from app.status import escape_lines
from app.tabs import AT_ONCE, Parts
from trainers import presets
from trainers.images import EXTENSIONS


def create(draft: Draft, parts: Parts) -> dict[str, Any]:
    c: dict[str, Any] = {}
    gr.Markdown("### 1 · Pictures\n4 to 20 of one subject, in different places and lights.")
    with gr.Row():
        c["upload"] = gr.UploadButton(
            "Choose pictures",
            file_count="multiple",
            file_types=[*EXTENSIONS, ".txt"],
            elem_id="train-upload",
            size="md",
            scale=2,
            min_width=120,
        )
        c["example"] = gr.Button(
            "Try the included fox", elem_id="train-example", size="md", scale=2, min_width=120
        )
        c["clear"] = gr.Button("Take all out", elem_id="train-clear", size="md", scale=1, min_width=100)
    c["problems"] = gr.HTML(elem_id="train-problems", padding=False)
    parts.data("pictures", lambda: pictures_data(draft), lambda: draft.revision)

    def add(files: list[str] | None) -> str:
        problems = draft.add([(Path(f), Path(f).name) for f in files or []])
        return escape_lines(problems)

    def example() -> str:
        fox = presets.PRESETS / "demo" / "subjects" / "fox" / "train"
        return escape_lines(draft.add([(p, p.name) for p in sorted(fox.iterdir())]))

    c["upload"].upload(add, c["upload"], c["problems"], **AT_ONCE)
    c["example"].click(example, None, c["problems"], **AT_ONCE)
    c["clear"].click(draft.clear, None, None, **AT_ONCE)
    return c
