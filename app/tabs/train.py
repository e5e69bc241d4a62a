"""Train: pictures, subject, training, start. What runs is shown beside it (running.py).

The training is `launch.py --train` in a process of its own: a closed page, or a stopped server, does not end it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import gradio as gr

from app import teaching
from app.cards import check_html, preset_html, ready_html
from app.draft import Draft
from app.plan import Plan
from app.session import Session
from app.tabs import AT_ONCE, Parts, gather, running
from trainers import presets
from trainers.story import ALIVE

ANSWERS = ("token", "noun", "prompt", "preset", "name", "steps", "rank", "keep_class", "settings")


def create(session: Session, draft: Draft, parts: Parts) -> dict[str, Any]:
    c: dict[str, Any] = {}
    with gr.Row(equal_height=False, elem_id="train-columns"):
        with gr.Column(scale=5, min_width=320):
            gather.create(draft, parts)
            _subject(session.wanted.plan, c)
            _training(session, draft, parts, c)
            _start(session, draft, parts, c)
        with gr.Column(scale=6, min_width=320, elem_id="train-running"):
            parts.html(
                "check",
                lambda: check_html(session, draft),
                lambda: (session.check.view, _state(session, draft)),
            )
            running.create(session, parts)
    _listen(session, draft, parts, c)
    return c


def _state(session: Session, draft: Draft) -> object:
    return teaching.state_of_form(session, draft)


def _subject(plan: Plan, c: dict[str, Any]) -> None:
    gr.Markdown("### 2 · Subject")
    with gr.Row():
        c["token"] = gr.Textbox(
            plan.token,
            label="Its own word",
            info="Rare and meaningless, so that it can mean this",
            elem_id="train-token",
            min_width=170,
        )
        c["noun"] = gr.Textbox(
            plan.noun,
            label="What it is",
            info="One plain word: dog, woman, car",
            elem_id="train-noun",
            min_width=170,
        )
    c["prompt"] = gr.Textbox(
        plan.prompt, label="Prompt of pictures without a caption", elem_id="train-prompt"
    )


def _training(session: Session, draft: Draft, parts: Parts, c: dict[str, Any]) -> None:
    plan = session.wanted.plan
    gr.Markdown("### 3 · Training")
    names = [name for name, _, _ in presets.list_presets()]
    c["preset"] = gr.Dropdown(
        names, value=plan.preset, label="Preset", info=_about(plan.preset), elem_id="train-preset"
    )
    c["name"] = gr.Textbox(plan.name, label="Name of the LoRA", elem_id="train-name")
    with gr.Row():
        # not sliders: a number typed beyond a slider's end is refused without a word
        c["steps"] = _count(plan.steps, "Training steps", "400 to 2000 for one subject", "train-steps")
        c["rank"] = _count(plan.rank, "Rank", "How much it can learn; 4 to 64 are usual", "train-rank")
    c["keep_class"] = gr.Checkbox(
        plan.keep_class,
        label="Keep the class as it was",
        info="Also trains on pictures of the class that the model makes itself",
        elem_id="train-class",
    )
    with gr.Accordion("Every setting", open=False, elem_id="train-every"):
        c["settings"] = gr.Textbox(
            plan.settings,
            label="Settings of your own",
            info="One a line, as in a preset; they go before everything above",
            placeholder="train.learning_rate = 5e-5\ntrain.gradient_checkpointing = true",
            lines=3,
            elem_id="train-settings",
        )
        parts.html(
            "preset-whole",
            lambda: preset_html(session, draft),
            lambda: (session.wanted.plan, session.wanted.predictions),
        )


def _count(value: int, label: str, info: str, elem_id: str) -> gr.Number:
    return gr.Number(value, label=label, info=info, precision=0, minimum=1, elem_id=elem_id, min_width=170)


def _start(session: Session, draft: Draft, parts: Parts, c: dict[str, Any]) -> None:
    """At the bottom of the window for as long as the form is in it: the next step is always in sight."""
    with gr.Column(elem_id="train-next"):
        parts.html("ready", lambda: ready_html(session, draft), lambda: _readiness(session, draft))
        with gr.Row():
            c["check"] = gr.Button("Check first", elem_id="train-check", min_width=100, scale=1)
            c["start"] = gr.Button(
                "Start training", variant="primary", elem_id="train-start", min_width=140, scale=2
            )


def _readiness(session: Session, draft: Draft) -> object:
    view, pipe = session.training.view(), session.pipe
    alive = view is not None and view.state in ALIVE
    return _state(session, draft), alive, session.said_at.get("start"), pipe and pipe.base_name


def _about(preset: str) -> str:
    """What the preset says of itself; a line below the list, where it is not cut off."""
    return next(text for name, _, text in presets.list_presets() if name == preset)


def _listen(session: Session, draft: Draft, parts: Parts, c: dict[str, Any]) -> None:
    fields = [c[name] for name in ANSWERS]

    def words(name: str, value: str) -> str:
        teaching.answer(session, **{name: value})
        return session.wanted.plan.prompt

    for name in ("token", "noun"):  # Textbox.input hears keys alone, not what is dropped or filled in
        c[name].change(partial(words, name), c[name], c["prompt"], trigger_mode="always_last", **AT_ONCE)
    # not `change`: what `words` has put there would come back late, as if somebody had worded it
    gr.on([c["prompt"].input, c["prompt"].blur], _keep(session, "prompt"), c["prompt"], None, **AT_ONCE)
    for name in ("name", "steps", "rank", "keep_class", "settings"):
        c[name].change(_keep(session, name), c[name], None, trigger_mode="always_last", **AT_ONCE)

    def of_preset(name: str) -> Any:
        """The list says `input` also when the focus leaves it: numbers typed since must not be written over."""
        if name == session.wanted.plan.preset:
            return [gr.skip()] * 4
        teaching.answer(session, preset=name)
        plan = session.wanted.plan
        return gr.update(info=_about(name)), plan.steps, plan.rank, plan.keep_class

    of = [c["preset"], c["steps"], c["rank"], c["keep_class"]]
    c["preset"].input(of_preset, c["preset"], of, **AT_ONCE)

    built = session.wanted.plan

    def refill() -> list[Any]:
        """What differs from the page as it was put together: with another base, and when it is opened again."""
        plan = session.wanted.plan
        values = [
            gr.skip() if getattr(plan, name) == getattr(built, name) else getattr(plan, name)
            for name in ANSWERS
            if name != "preset"
        ]
        return [*values, gr.update(value=plan.preset, info=_about(plan.preset))]

    in_order = [*(c[name] for name in ANSWERS if name != "preset"), c["preset"]]
    parts.drawn("answers", lambda: session.wanted.plan.base, refill, in_order)

    def told(act: Callable[[Session, Draft], object], *values: Any) -> None:
        """What stands on the page counts, also what no event has told of yet."""
        named = {n: v for n, v in zip(ANSWERS, values, strict=True) if v is not None}
        named |= {n: int(named[n]) for n in ("steps", "rank") if n in named}
        with session.lock:
            session.wanted.plan = session.wanted.plan.changed(preset=named.pop("preset")).changed(**named)
        session.save()
        teaching.try_at(session, "start", lambda: act(session, draft))

    c["check"].click(partial(told, teaching.check), fields, None, **AT_ONCE)
    c["start"].click(partial(told, teaching.start), fields, None, **AT_ONCE)

    def pressable() -> bool:
        view = session.training.view()
        return view is None or view.state not in ALIVE

    parts.drawn(
        "start",
        pressable,
        lambda: [gr.update(interactive=pressable())] * 2,
        [c["check"], c["start"]],
    )


def _keep(session: Session, name: str) -> Callable[[Any], None]:
    def keep(value: Any) -> None:
        if value is not None:  # a cleared number field: the page keeps what was there
            teaching.answer(session, **{name: int(value) if name in ("steps", "rank") else value})

    return keep
