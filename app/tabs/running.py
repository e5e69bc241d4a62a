"""The training on view: how it goes, its curves and pictures, and what it can be told; and every earlier one."""

from __future__ import annotations

from functools import partial
from typing import Any

import gradio as gr
import pandas as pd

from app import teaching
from app.cards import notes_html, runs_data, training_card
from app.session import Session
from app.status import escape_lines
from app.tabs import AT_ONCE, Parts
from app.training import TrainView
from trainers.story import ALIVE

NEWEST = "the newest"


def create(session: Session, parts: Parts) -> None:
    c: dict[str, Any] = {}
    parts.html("train-card", lambda: training_card(session.training.view()))
    with gr.Column(visible=False) as c["during"]:  # nothing to press before there is a training
        _orders(session, parts, c)
    parts.data(
        "runs",
        lambda: runs_data(session),
        lambda: (session.runs.mark(session.training.current()), _name(session.training.view())),
    )
    _listen(session, parts, c)


def _name(view: TrainView | None) -> str:
    return view.name if view else ""


def _orders(session: Session, parts: Parts, c: dict[str, Any]) -> None:
    with gr.Row(elem_id="train-orders"):
        c["pause"] = gr.Button("Pause", elem_id="train-pause", size="sm", interactive=False, min_width=70)
        c["save"] = gr.Button("Save now", elem_id="save-now", size="sm", interactive=False, min_width=70)
        c["end"] = gr.Button(
            "Stop and save", elem_id="train-stop", size="sm", interactive=False, min_width=100
        )
        c["use"] = gr.Button(
            "Use it", elem_id="train-use", variant="primary", size="sm", interactive=False, min_width=70
        )
    _said_at(session, parts, "orders")
    c["step"] = gr.Dropdown(
        [NEWEST], value=NEWEST, label="What “Use it” takes", elem_id="train-step", visible=False
    )
    parts.html("train-notes", lambda: notes_html(session.training.view()))
    c["plot"] = gr.LinePlot(
        x="step",
        y="loss",
        color="curve",
        label="Loss",
        height=280,
        elem_id="train-plot",
        visible=False,
        tooltip="none",
    )
    with gr.Row(elem_classes="with-button"):
        c["sample_prompt"] = gr.Textbox(
            label="Sample prompt",
            elem_id="sample-prompt",
            placeholder="Any prompt, with the LoRA as it is now",
            scale=4,
            min_width=180,
        )
        c["sample_weight"] = gr.Number(
            1.0, label="At weight", step=0.1, elem_id="sample-weight", scale=1, min_width=90
        )
        c["sample"] = gr.Button(
            "Sample now", elem_id="sample-now", size="sm", interactive=False, scale=1, min_width=110
        )
    _said_at(session, parts, "sample")
    with gr.Row(elem_classes="with-button"):
        c["new_steps"] = gr.Number(
            label="Steps in all",
            info="More or fewer: while it runs, or to go on with a run that has ended",
            precision=0,
            minimum=1,
            elem_id="new-steps",
            scale=4,
            min_width=180,
        )
        c["steps_of"] = gr.Textbox(visible="hidden", elem_id="steps-of")  # the run that the number is about
        c["change_steps"] = gr.Button(
            "Change steps", elem_id="change-steps", size="sm", interactive=False, scale=1, min_width=110
        )
    _said_at(session, parts, "steps")
    c["previews"] = gr.Gallery(
        label="Previews by step",
        columns=4,
        object_fit="contain",
        height="auto",
        elem_id="train-previews",
        interactive=False,
        buttons=["fullscreen"],
        visible=False,  # until there is one: Gradio's empty gallery has no name for a screen reader
    )
    c["sheet"] = gr.Image(
        label="Before and after",
        elem_id="train-sheet",
        interactive=False,
        visible=False,
        buttons=["download", "fullscreen"],
    )


def _said_at(session: Session, parts: Parts, place: str) -> None:
    """Where an order that could not be given says why, below its button."""

    def content() -> str:
        return escape_lines([said] if (said := session.said_at.get(place)) else [])

    parts.html(f"said-{place}", content)


def _listen(session: Session, parts: Parts, c: dict[str, Any]) -> None:
    orders, at = session.training, partial(teaching.try_at, session)
    c["pause"].click(
        lambda steps, of: at(
            "orders", lambda: teaching.pause_or_go_on(session, teaching.of_view(session, steps, of))
        ),
        [c["new_steps"], c["steps_of"]],
        None,
        **AT_ONCE,
    )
    c["save"].click(lambda: at("orders", lambda: orders.commands().save()), None, None, **AT_ONCE)
    c["end"].click(lambda: at("orders", lambda: orders.commands().stop()), None, None, **AT_ONCE)
    c["use"].click(
        lambda chosen: at("orders", lambda: session.use_trained(_step(chosen))), c["step"], None, **AT_ONCE
    )
    gr.on(
        [c["sample"].click, c["sample_prompt"].submit],
        lambda prompt, weight: at("sample", lambda: teaching.sample(session, prompt, weight)),
        [c["sample_prompt"], c["sample_weight"]],
        None,
        **AT_ONCE,
    )
    c["change_steps"].click(
        lambda steps, of: at(
            "steps", lambda: teaching.change_steps(session, teaching.of_view(session, steps, of))
        ),
        [c["new_steps"], c["steps_of"]],
        None,
        **AT_ONCE,
    )

    def total() -> Any:
        view = session.training.view()
        return None if view is None else (str(view.run), view.steps)

    def steps() -> Any:  # alone: a number half typed is not written over while nothing changes
        view = session.training.view()
        return [view.steps if view and view.steps else None, str(view.run) if view else ""]

    parts.drawn("steps-in-all", total, steps, [c["new_steps"], c["steps_of"]])
    names = (
        "during",
        "pause",
        "save",
        "end",
        "use",
        "step",
        "sample",
        "change_steps",
        "plot",
        "previews",
        "sheet",
    )
    parts.drawn(
        "train", lambda: _mark(session.training.view()), partial(_look, session), [c[n] for n in names]
    )


def _look(session: Session) -> list[Any]:
    view = session.training.view()
    stepping = view is not None and view.state in ("running", "paused")
    goes_on = view is not None and view.state not in ("starting", "running")
    ended = view is not None and view.state not in ALIVE
    points = view.losses if view else ()
    return [
        gr.update(visible=view is not None),
        gr.update(value="Go on" if goes_on else "Pause", interactive=stepping or ended),
        gr.update(interactive=stepping),
        gr.update(interactive=stepping),
        gr.update(interactive=view is not None and view.lora is not None),
        _steps(view),
        gr.update(interactive=stepping),
        gr.update(interactive=stepping),
        gr.update(value=curves(view) if view else None, visible=bool(points)),
        gr.update(value=_previews(view), visible=bool(view and view.previews)),
        gr.update(value=str(view.sheet) if view and view.sheet else None, visible=bool(view and view.sheet)),
    ]


def _steps(view: TrainView | None) -> Any:
    """The steps whose LoRA is on disk; one that the user has chosen stays chosen."""
    choices = [NEWEST, *(f"step {step}" for step, _ in reversed(view.saved))] if view else [NEWEST]
    return gr.update(choices=choices, visible=len(choices) > 2)


def _step(chosen: str) -> int | None:
    return None if chosen == NEWEST else int(chosen.removeprefix("step "))


def _previews(view: TrainView | None) -> list[tuple[str, str]]:
    return [(str(path), f"step {step}: {prompt}") for step, prompt, path in (view.previews if view else ())]


def _mark(view: TrainView | None) -> Any:
    """What must differ for Gradio to draw; the curve grows in tens of steps, the card above tells each."""
    if view is None:
        return "none"
    return [
        view.state,
        str(view.run),
        view.step // 10,
        len(view.previews),
        len(view.saved),
        len(view.held_out),
        str(view.lora),
        str(view.sheet),
    ]


def curves(view: TrainView) -> pd.DataFrame:
    rows = [
        *((step, raw, "each step") for step, raw, _ in view.losses),
        *((step, smooth, "smoothed") for step, _, smooth in view.losses),
        *((step, loss, "held-out pictures") for step, loss in view.held_out),
    ]
    return pd.DataFrame(rows, columns=["step", "loss", "curve"])
