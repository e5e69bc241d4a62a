"""Generate: words in, pictures out. Everything but the prompt and the button is folded away until it is wanted."""

from __future__ import annotations

import math
from functools import partial
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

import gradio as gr

from app.jobs import Job, JobView
from app.memory import Form
from app.session import Session
from app.status import message_html
from app.tabs import AT_ONCE, Parts, mixer
from lora_core.errors import ConfigError, FileRefused
from lora_core.generation import read_png_parameters
from lora_core.parameters import parse_parameters
from lora_core.samplers import SAMPLERS, samplers_of

OWN = "the model's own"
NO_PICTURES = '<div class="empty">Pictures appear here. Describe one, and press Generate (Ctrl+Enter).</div>'


def create(session: Session, parts: Parts) -> dict[str, Any]:
    """-> the tab's components by name; the form's have the names of `memory.Form`."""
    c: dict[str, Any] = {}
    with gr.Row(equal_height=False):
        with gr.Column(scale=5, min_width=320):
            _base_picker(session, c)
            _form(session.wanted.form, c)
            c |= mixer.create(session, parts)
            _sheet(c)
        with gr.Column(scale=6, min_width=320):
            _results(session, parts, c)
    _listen(session, parts, c)
    return c


def _base_picker(session: Session, c: dict[str, Any]) -> None:
    c["base"] = gr.Dropdown(
        session.library.bases(),
        value=session.wanted.base,
        label="Base model",
        elem_id="base",
        allow_custom_value=False,
    )
    with gr.Column(visible=False, elem_id="unclear") as c["unclear"]:
        c["prediction"] = gr.Radio(
            [("noise (most models)", "epsilon"), ("velocity (768-v and other “v” models)", "v_prediction")],
            value="epsilon",
            label="What does this model predict?",
            info="Its file does not say, and trying it out did not tell. Pictures of the wrong choice are only noise.",
            elem_id="prediction",
        )
        c["predict"] = gr.Button("Open it so", elem_id="predict", size="sm")


def _form(form: Form, c: dict[str, Any]) -> None:
    c["prompt"] = gr.Textbox(form.prompt, label="Prompt", lines=2, elem_id="prompt", autofocus=True)
    with gr.Row():
        c["generate"] = gr.Button("Generate", variant="primary", elem_id="generate", scale=3)
        c["stop"] = gr.Button("Stop", elem_id="stop", scale=1, min_width=80)
    with gr.Accordion("More settings", open=False, elem_id="more"):
        c["negative_prompt"] = gr.Textbox(
            form.negative_prompt,
            label="Negative prompt",
            elem_id="negative",
            placeholder="What should not be there",
        )
        with gr.Row():
            c["steps"] = gr.Slider(1, 100, form.steps, step=1, label="Steps", elem_id="steps")
            c["guidance"] = gr.Slider(0, 20, form.guidance, step=0.5, label="Guidance", elem_id="guidance")
        with gr.Row():
            c["seed"] = gr.Number(
                form.seed, label="Seed", precision=0, elem_id="seed", info="-1: a new one each time"
            )
            c["count"] = gr.Slider(1, 8, form.count, step=1, label="Pictures", elem_id="count")
        with gr.Row():
            c["width"] = gr.Number(
                form.width, label="Width", precision=0, elem_id="width", info="0: as the model was made"
            )
            c["height"] = gr.Number(
                form.height, label="Height", precision=0, elem_id="height", info="0: as the model was made"
            )
        c["sampler"] = gr.Dropdown(
            [(OWN, ""), *((s, s) for s in SAMPLERS)], value=form.sampler, label="Sampler", elem_id="sampler"
        )


def _sheet(c: dict[str, Any]) -> None:
    with gr.Accordion("Contact sheet", open=False, elem_id="sheet-more"):
        c["sheet_kind"] = gr.Radio(
            [("A row per LoRA, worn alone", "loras"), ("A row per seed, the whole mix", "seeds")],
            value="loras",
            label="Rows",
            elem_id="sheet-kind",
        )
        c["sheet_weights"] = gr.Textbox(
            "0, 0.5, 1", label="Columns", info="Weights, or factors on the mix", elem_id="sheet-weights"
        )
        c["make_sheet"] = gr.Button("Make the sheet", elem_id="make-sheet", size="sm")


FORM = ("prompt", "negative_prompt", "seed", "steps", "guidance", "width", "height", "count", "sampler")


def _results(session: Session, parts: Parts, c: dict[str, Any]) -> None:
    worker = session.worker
    parts.html("message", lambda: message_html(worker.view))
    parts.html(
        "preview", lambda: _stage_html(worker.view, session.pictures.newest()[:1]), lambda: worker.revision
    )
    # Gradio's own picture of an empty gallery is an unlabelled image to a screen reader: ours is a sentence
    c["gallery"] = gr.Gallery(
        [str(path) for path in session.pictures.newest()],
        visible=bool(session.pictures.newest()),
        label="Pictures",
        columns=4,
        object_fit="contain",
        elem_id="gallery",
        interactive=False,
        height="auto",
        buttons=["download", "fullscreen"],
    )
    c["settings"] = gr.Textbox(
        label="Settings of the chosen picture", lines=4, interactive=False, elem_id="settings", visible=False
    )
    c["reuse"] = gr.Button("Use these settings", elem_id="reuse", visible=False)


def _listen(session: Session, parts: Parts, c: dict[str, Any]) -> None:
    fields = [c[name] for name in FORM]

    for name, field in zip(FORM, fields, strict=True):
        # each its own value: a late event of one field must not bring back what another had before
        remember = partial(_remember, session, name)
        # Gradio's Textbox.input hears keys alone: what is pasted by an input method, dropped or filled in is a change
        heard = field.change if isinstance(field, gr.Textbox) else field.input
        heard(remember, field, None, trigger_mode="always_last", **AT_ONCE)

    def generate(*values: Any) -> None:
        named = _form_values(values)
        try:
            session.generate(session.wanted.form.changed(**named).request())
        except ConfigError as problem:
            session.say(problem)
        session.remember(**named)

    gr.on([c["generate"].click, c["prompt"].submit], generate, fields, None, **AT_ONCE)

    def make_sheet(kind: str, weights: str, *values: Any) -> None:
        try:
            numbers = _numbers(weights)
            request = session.wanted.form.changed(**_form_values(values)).request()
        except ConfigError as problem:
            session.say(problem)
            return
        session.contact_sheet(request, kind, numbers)

    given = [c["sheet_kind"], c["sheet_weights"], *fields]
    c["make_sheet"].click(make_sheet, given, None, **AT_ONCE)
    c["stop"].click(session.worker.stop, None, None, **AT_ONCE)
    c["predict"].click(
        lambda said: _void(session.tell_prediction(session.unclear, said)), c["prediction"], None, **AT_ONCE
    )
    c["base"].input(lambda source: _void(session.choose_base(source)), c["base"], None, **AT_ONCE)

    def samplers() -> list[str]:
        return samplers_of(session.pipe.pipeline.scheduler) if session.pipe else list(SAMPLERS)

    def look() -> list[Any]:
        pictures = [str(path) for path in session.pictures.newest()]
        return [
            gr.update(value=pictures, visible=bool(pictures)),
            gr.update(choices=session.library.bases(), value=session.wanted.base),
            gr.update(choices=[(OWN, ""), *((s, s) for s in samplers())]),
            gr.update(visible=bool(session.unclear)),
            gr.update(label=f"What does {Path(session.unclear).name} predict?"),
        ]

    worker = session.worker

    def mark() -> Any:
        return [
            *map(str, session.pictures.newest()[:1]),
            session.wanted.base,
            samplers(),
            session.unclear,
            worker.view.busy,
        ]

    drawn = [c["gallery"], c["base"], c["sampler"], c["unclear"], c["prediction"]]
    parts.drawn("generate", mark, look, drawn)
    built = session.wanted.form

    def restore() -> list[Any]:
        """Only what has changed since the page was put together: a quick user's first words are not written over."""
        form = session.wanted.form
        pairs = [(getattr(form, name), getattr(built, name)) for name in FORM]
        return [gr.skip() if now == then else now for now, then in pairs]

    c["restore"] = restore
    c["fields"] = fields

    chosen = gr.State(-1)

    def choose(event: gr.SelectData) -> Any:
        text = session.pictures.settings(int(event.index))
        return int(event.index), gr.update(value=text, visible=True), gr.update(visible=True)

    c["gallery"].select(choose, None, [chosen, c["settings"], c["reuse"]], **AT_ONCE)

    def reuse(index: int) -> Any:
        session.remember(**settings_of(session.pictures.settings(index)))
        return [getattr(session.wanted.form, name) for name in FORM]

    c["reuse"].click(reuse, chosen, fields, **AT_ONCE)


def settings_from(session: Session, pictures: list[Path]) -> list[Any]:
    """The form as the picture's text has it; unchanged where there is no picture."""
    if not pictures:
        return [gr.skip()] * len(FORM)
    try:
        text = read_png_parameters(pictures[0])
    except FileRefused as problem:
        session.worker.submit(f"Reading {pictures[0].name}", partial(_refuse, problem))
        return [gr.skip()] * len(FORM)
    session.remember(**settings_of(text))
    return [getattr(session.wanted.form, name) for name in FORM]


def _refuse(problem: FileRefused, _: Job) -> str:
    """Said where every job says how it ended."""
    raise problem


def settings_of(text: str) -> dict[str, Any]:
    """The form's fields that a picture's text tells; LoRAs stay as they are in the mixer."""
    read = parse_parameters(text)
    facts = read["fields"]
    width, _, height = facts.get("Size", "").partition("x")
    numbers = {"steps": facts.get("Steps"), "seed": facts.get("Seed"), "width": width, "height": height}
    values: dict[str, Any] = {
        "prompt": read["prompt"],
        "negative_prompt": read["negative_prompt"],
        "count": 1,
    }
    values |= {name: int(n) for name, n in numbers.items() if n and n.lstrip("-").isdigit()}
    guidance = facts.get("CFG scale", "")
    if guidance.replace(".", "", 1).isdigit():
        values["guidance"] = float(guidance)
    if facts.get("Sampler") in SAMPLERS:
        values["sampler"] = facts["Sampler"]
    return values


def _numbers(text: str) -> list[float]:
    """ "0, 0.5, 1" -> its numbers. Raises ConfigError."""
    try:
        numbers = [float(part) for part in text.replace(";", ",").split(",") if part.strip()]
    except ValueError:
        numbers = []
    if not numbers or not all(map(math.isfinite, numbers)):
        raise ConfigError(f"“{text}” are no weights. Write numbers with commas between them: 0, 0.5, 1")
    return numbers


def _remember(session: Session, name: str, value: Any) -> None:
    session.remember(**_typed({name: value}))


def _form_values(values: tuple[Any, ...]) -> dict[str, Any]:
    return _typed(dict(zip(FORM, values, strict=True)))


def _typed(named: dict[str, Any]) -> dict[str, Any]:
    """A cleared number field is None: the page then keeps what was there."""
    whole = ("seed", "steps", "width", "height", "count")
    return {n: int(v) if n in whole else v for n, v in named.items() if v is not None}


def _stage_html(job: JobView, newest: list[Path]) -> str:
    """One place, of one height: the picture in the making, else the newest one. Nothing below it ever jumps."""
    if job.preview:
        return f'<img alt="preview, step {job.step} of {job.steps}" src="{job.preview}">'
    if newest:
        address = f"gradio_api/file={quote(str(newest[0]))}"
        return f'<img alt="the newest picture" src="{escape(address)}">'
    return NO_PICTURES


def _void(_: object) -> None:
    """Events whose result the page finds at its next look."""
