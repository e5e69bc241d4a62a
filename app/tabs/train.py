"""Train: pictures, subject, start. While it runs the same place shows it learning, and takes its orders.

The training is `launch.py --train` in a process of its own: a closed page, or a stopped server, does not end it.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import gradio as gr
import pandas as pd

from app.draft import Draft
from app.plan import Plan, subject_prompt
from app.session import Session
from app.status import training_card
from app.tabs import AT_ONCE, Parts, gather
from app.training import TrainView
from lora_core.errors import ConfigError, LoraError
from trainers import presets

NEWEST = "the newest"


def create(session: Session, draft: Draft, parts: Parts) -> dict[str, Any]:
    c: dict[str, Any] = {}
    with gr.Row(equal_height=False):
        with gr.Column(scale=5, min_width=320):
            gather.create(draft, parts)
            _subject(session, c)
        with gr.Column(scale=6, min_width=320):
            _running(session, parts, c)
    _listen(session, draft, parts, c)
    return c


def _subject(session: Session, c: dict[str, Any]) -> None:
    gr.Markdown("### 2 · Subject")
    with gr.Row():
        c["token"] = gr.Textbox(
            "zxq",
            label="Its own word",
            info="Rare and meaningless, so that it can mean this",
            elem_id="train-token",
        )
        c["noun"] = gr.Textbox(
            "animal", label="What it is", info="One plain word: dog, woman, car", elem_id="train-noun"
        )
    c["prompt"] = gr.Textbox(
        subject_prompt("zxq", "animal", session.wanted.base),
        label="Prompt of pictures without a caption",
        elem_id="train-prompt",
    )
    gr.Markdown("### 3 · Training")
    names = [name for name, _, _ in presets.list_presets()]
    c["preset"] = gr.Dropdown(
        names, value="demo", label="Preset", info=_about("demo"), elem_id="train-preset"
    )
    c["name"] = gr.Textbox("my-first-lora", label="Name of the LoRA", elem_id="train-name")
    with gr.Row():
        c["steps"] = gr.Slider(10, 5000, value=450, step=10, label="Training steps", elem_id="train-steps")
        c["rank"] = gr.Slider(1, 128, value=16, step=1, label="Rank", elem_id="train-rank")
    c["keep_class"] = gr.Checkbox(
        True,
        label="Keep the class as it was",
        info="Also trains on pictures of the class that the model makes itself",
        elem_id="train-class",
    )
    c["start"] = gr.Button("Start training", variant="primary", elem_id="train-start")


def _about(preset: str) -> str:
    """What the preset says of itself; a line below the list, where it is not cut off."""
    return next(text for name, _, text in presets.list_presets() if name == preset)


def _running(session: Session, parts: Parts, c: dict[str, Any]) -> None:
    parts.html("train-card", lambda: training_card(session.training.view()))
    with gr.Column(visible=False) as c["during"]:  # nothing to press before there is a training
        _orders(c)


def _orders(c: dict[str, Any]) -> None:
    with gr.Row():
        c["pause"] = gr.Button("Pause", elem_id="train-pause", size="sm", interactive=False, min_width=90)
        c["save"] = gr.Button("Save now", elem_id="save-now", size="sm", interactive=False, min_width=90)
        c["end"] = gr.Button(
            "Stop and save", elem_id="train-stop", size="sm", interactive=False, min_width=110
        )
        c["use"] = gr.Button(
            "Use it", elem_id="train-use", variant="primary", size="sm", interactive=False, min_width=90
        )
    c["step"] = gr.Dropdown(
        [NEWEST], value=NEWEST, label="What “Use it” takes", elem_id="train-step", visible=False
    )
    c["plot"] = gr.LinePlot(
        x="step",
        y="loss",
        color="curve",
        label="Loss",
        height=280,  # less cuts the legend off
        elem_id="train-plot",
        visible=False,
        tooltip="none",
    )
    with gr.Row():
        c["sample_prompt"] = gr.Textbox(
            label="Sample prompt",
            elem_id="sample-prompt",
            placeholder="Any prompt, with the LoRA as it is now",
            scale=4,
        )
        c["sample_weight"] = gr.Number(
            1.0, label="At weight", step=0.1, elem_id="sample-weight", scale=1, min_width=90
        )
        c["sample"] = gr.Button(
            "Sample now", elem_id="sample-now", size="sm", interactive=False, scale=1, min_width=110
        )
    with gr.Row():
        c["new_steps"] = gr.Number(
            label="Steps in all",
            info="More or fewer, while it runs",
            precision=0,
            minimum=1,
            elem_id="new-steps",
            scale=4,
        )
        c["change_steps"] = gr.Button(
            "Change steps", elem_id="change-steps", size="sm", interactive=False, scale=1, min_width=110
        )
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


def _listen(session: Session, draft: Draft, parts: Parts, c: dict[str, Any]) -> None:
    def words(token: str, noun: str) -> str:
        return subject_prompt(token, noun, session.wanted.base)

    for field in (c["token"], c["noun"]):
        field.change(  # Textbox.input hears keys alone, not what is dropped or filled in
            words, [c["token"], c["noun"]], c["prompt"], trigger_mode="always_last", **AT_ONCE
        )

    filled = gr.State("demo")

    def of_preset(name: str, before: str) -> Any:
        """The list says `input` also when the focus leaves it: numbers typed since must not be written over."""
        if name == before:
            return [gr.skip()] * 5
        config = presets.load(name, ['data.images="."'])
        return name, gr.update(info=_about(name)), config.train.steps, config.lora.rank, config.data.has_class

    of = [filled, c["preset"], c["steps"], c["rank"], c["keep_class"]]
    c["preset"].input(of_preset, [c["preset"], filled], of, **AT_ONCE)

    answers = [c[n] for n in ("preset", "name", "noun", "prompt", "steps", "rank", "keep_class")]

    def start(
        preset: str, name: str, noun: str, prompt: str, steps: int, rank: int, keep_class: bool
    ) -> None:
        plan = Plan(preset, name, noun, prompt, session.wanted.base, int(steps), int(rank), keep_class)
        _said(session, lambda: session.train(plan, draft))

    c["start"].click(start, answers, None, **AT_ONCE)
    orders = session.training
    c["pause"].click(lambda: _said(session, lambda: pause_or_go_on(session)), None, None, **AT_ONCE)
    c["save"].click(lambda: _said(session, lambda: orders.commands().save()), None, None, **AT_ONCE)
    c["end"].click(lambda: _said(session, lambda: orders.commands().stop()), None, None, **AT_ONCE)
    c["sample"].click(
        lambda prompt, weight: _said(session, lambda: sample(session, prompt, weight)),
        [c["sample_prompt"], c["sample_weight"]],
        None,
        **AT_ONCE,
    )
    c["change_steps"].click(
        lambda steps: _said(session, lambda: change_steps(session, steps)), c["new_steps"], None, **AT_ONCE
    )
    c["use"].click(
        lambda chosen: _said(session, lambda: session.use_trained(_step(chosen))), c["step"], None, **AT_ONCE
    )

    names = (
        "during",
        "pause",
        "save",
        "end",
        "use",
        "step",
        "sample",
        "change_steps",
        "start",
        "plot",
        "previews",
        "sheet",
    )
    parts.drawn(
        "train", lambda: _mark(session.training.view()), partial(_look, session), [c[n] for n in names]
    )


def _look(session: Session) -> list[Any]:
    view = session.training.view()
    alive = view is not None and view.state in ("starting", "running", "paused")
    stepping = view is not None and view.state in ("running", "paused")
    paused = view is not None and view.state == "paused"
    points = view.losses if view else []
    return [
        gr.update(visible=view is not None),
        gr.update(value="Go on" if paused else "Pause", interactive=stepping),
        gr.update(interactive=stepping),
        gr.update(interactive=stepping),
        gr.update(interactive=view is not None and view.lora is not None),
        _steps(view),
        gr.update(interactive=stepping),
        gr.update(interactive=stepping),
        gr.update(interactive=not alive),
        gr.update(value=curves(points), visible=bool(points)),
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
        len(view.notes),
        str(view.lora),
        str(view.sheet),
    ]


def curves(points: Any) -> pd.DataFrame:
    rows = [(step, raw, "raw") for step, raw, _ in points] + [
        (step, smooth, "smoothed") for step, _, smooth in points
    ]
    return pd.DataFrame(rows, columns=["step", "loss", "curve"])


def pause_or_go_on(session: Session) -> None:
    view, commands = session.training.view(), session.training.commands()
    if view is not None and view.state == "paused":
        commands.unpause()
    else:
        commands.pause()


def sample(session: Session, prompt: str, weight: float | None) -> None:
    session.training.commands().sample(prompt, weight=1.0 if weight is None else float(weight))


def change_steps(session: Session, steps: float | None) -> None:
    if steps is None:
        raise ConfigError("Say how many steps the training is to have in all; those that are done count.")
    session.training.commands().steps(int(steps))


def _said(session: Session, act: Any) -> None:
    """An error is one sentence on the page. (Gradio's own `gr.Error` is not shown outside its queue.)"""
    try:
        act()
    except LoraError as problem:
        session.say(problem)
