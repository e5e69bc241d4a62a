"""The tabs of the page, and how every event on it is wired."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gradio as gr

# Every handler answers at once (what lasts is the worker's or the training child's), so none needs Gradio's queue. Its
# event stream closes and opens with every tick of the clock, and an answer that falls between is lost for good.
AT_ONCE: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}


def watched(revision: Callable[[], int], timer: gr.Timer) -> gr.Number:
    """A number that follows `revision()`, for `gr.render` to draw anew by; to be made outside the tabs.

    Not a `gr.State`: that one lies on the server, draws nothing unless its event was queued, and believes that what
    was lost on the way has been seen. Outside, for what is in a tab comes onto the page when the tab is first opened,
    and a number that changes while it is being put there tells nobody."""
    seen = gr.Number(-1, precision=0, visible="hidden")
    timer.tick(lambda at: gr.skip() if at == revision() else revision(), seen, seen, **AT_ONCE)
    return seen
