"""The tabs of the page, and how every event on it is wired."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import gradio as gr

# Every handler answers at once (what lasts is the worker's or the training child's), so none needs Gradio's queue. Its
# event stream closes and opens with every tick of the clock, and an answer that falls between is lost for good.
AT_ONCE: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}


@dataclass(frozen=True)
class Drawing:
    """A part of the page that `gr.render` draws anew whenever a number on the server changes.

        drawing = Drawing.of("rows", lambda: session.mixer_revision, timer)     outside the tabs
        @gr.render(**drawing.by)
        def rows(at: int) -> None:
            drawing.drawn(at)

    The number is a component and not a `gr.State`: that one lies on the server, draws nothing unless its event was
    queued, and believes that what was lost on the way has been seen. And `gr.render` has to go through the queue, whose
    answers can be lost: so what is drawn carries its number, and page.js asks again where the two differ for long.
    """

    name: str
    wanted: gr.Number
    again: gr.Button

    @classmethod
    def of(cls, name: str, revision: Callable[[], int], timer: gr.Timer) -> Drawing:
        """Outside the tabs: what is in a tab comes onto the page when the tab is first opened."""
        wanted = gr.Number(-1, precision=0, visible="hidden", elem_id=f"{name}-wanted")
        again = gr.Button("Draw again", visible="hidden", elem_id=f"{name}-again")
        timer.tick(lambda at: gr.skip() if at == revision() else revision(), wanted, wanted, **AT_ONCE)
        return cls(name, wanted, again)

    @property
    def by(self) -> dict[str, Any]:
        """`multiple`: a drawing whose answer was lost would keep all later ones waiting."""
        return {
            "inputs": self.wanted,
            "triggers": [self.wanted.change, self.again.click],
            "trigger_mode": "multiple",
            "show_progress": "hidden",
        }

    def drawn(self, at: int) -> None:
        gr.HTML(
            f'<span id="{self.name}-drawn" data-revision="{at}"></span>',
            key=f"{self.name}-drawn",
            padding=False,
        )
