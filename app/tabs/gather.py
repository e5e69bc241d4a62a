"""The pictures to learn from: chosen or dropped, looked at, and given their words."""

from __future__ import annotations

from functools import lru_cache, partial
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from app.draft import Draft, Entry
from app.pictures import data_uri
from app.status import escape_lines
from app.tabs import AT_ONCE, Drawing
from trainers import presets
from trainers.images import EXTENSIONS, open_image

CAPTIONS_SHOWN = 40


def create(draft: Draft, drawing: Drawing) -> dict[str, Any]:
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

    @gr.render(**drawing.by)
    def thumbnails(at: int) -> None:
        drawing.drawn(at)
        entries = draft.entries()
        if not entries:
            gr.HTML('<div class="empty">No pictures yet.</div>', key="no-pictures", padding=False)
        for entry in entries[:CAPTIONS_SHOWN]:
            _thumbnail(draft, entry)
        if len(entries) > CAPTIONS_SHOWN:
            rest = len(entries) - CAPTIONS_SHOWN
            gr.Markdown(f"{rest} more pictures are in the set; all of them are trained on.", key="rest")

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


def _thumbnail(draft: Draft, entry: Entry) -> None:
    name = entry.path.name
    with gr.Row(key=f"row-{name}", elem_classes="thumb"):
        gr.HTML(
            f'<img class="thumb-image" alt="{escape(name)}" src="{_small(entry.path, entry.path.stat().st_mtime_ns)}">',
            key=f"image-{name}",
            elem_classes="thumb-cell",
        )
        caption = gr.Textbox(
            entry.caption,
            label=f"Caption of {name}",
            placeholder="empty: the prompt below",
            key=f"caption-{name}",
            preserved_by_key=[],
            interactive=True,
            scale=6,
            min_width=120,
        )
        out = gr.Button(f"Take out {name}", size="sm", key=f"out-{name}", elem_classes="cross")
    caption.change(  # Textbox.input hears keys alone, not what is dropped or filled in
        partial(draft.caption, name),
        caption,
        None,
        trigger_mode="always_last",
        key=f"say-{name}",
        **AT_ONCE,
    )
    out.click(partial(draft.remove, name), None, None, key=f"remove-{name}", **AT_ONCE)


@lru_cache(maxsize=256)
def _small(path: Path, mtime_ns: int) -> str:
    """A photograph is decoded once, however often the rows are drawn anew."""
    return data_uri(open_image(path), 144)
