"""The tabs of the page, how every event on it is wired, and the parts that change by themselves.

Gradio's own ways are too dear for these. Its queue closes and opens an event stream as it likes, and an answer that
falls between is lost for good; and each event of a `gr.Timer` makes the browser walk all components for every output
any event ever had: an idle page cost a third of a core. So assets/live.js asks `app.live` what is new, some words
twice a second, and only what has changed is drawn: sentences, rows and pictures by live.js itself, what Gradio draws
(gallery, plot, which buttons may be pressed) by pressing a hidden button.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

import gradio as gr

from app.live import Part

# Every handler answers at once: what lasts is the worker's or the training child's.
AT_ONCE: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}


@dataclass
class Parts:
    """The parts of the page that change by themselves, by name."""

    known: dict[str, Part] = field(default_factory=dict)
    _drawings: dict[str, tuple[Callable[..., Any], Sequence[Any]]] = field(default_factory=dict)

    def html(self, name: str, content: Callable[[], str], mark: Callable[[], Any] | None = None) -> None:
        """A place for HTML of ours, filled at once and again whenever it differs."""
        self.known[name] = Part(content, mark)
        gr.HTML(f'<div data-live="{escape(name)}">{content()}</div>', elem_id=name, padding=False)

    def data(self, name: str, content: Callable[[], Any], mark: Callable[[], Any] | None = None) -> None:
        """A place that live.js fills from JSON, by the function of that name."""
        self.known[name] = Part(content, mark)
        gr.HTML(f'<div data-live="{escape(name)}"></div>', elem_id=name, padding=False)

    def drawn(
        self, name: str, mark: Callable[[], Any], draw: Callable[[], Any], outputs: Sequence[Any]
    ) -> None:
        """Gradio's components `outputs`, set by `draw`."""
        self.known[name] = Part(mark=mark)
        self._drawings[name] = (draw, outputs)

    def finish(self) -> None:
        """Once, outside the tabs: what is in a tab comes onto the page when the tab is first opened."""
        for name, (draw, outputs) in self._drawings.items():
            button = gr.Button(f"Draw {name}", visible="hidden", elem_id=f"draw-{name}")
            button.click(draw, None, list(outputs), trigger_mode="always_last", **AT_ONCE)
