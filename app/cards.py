"""What the Train tab says of the training on view, of the check before one, and of what would be trained: HTML.

Every foreign word is escaped here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from datetime import datetime
from html import escape
from typing import Any
from urllib.parse import quote

from app import teaching
from app.draft import Draft
from app.runs import Past
from app.session import Session
from app.training import TrainView
from lora_core.errors import ConfigError
from trainers import presets
from trainers.events import duration, size
from trainers.story import ALIVE

STATES = {"starting": "getting ready", "stopped": "stopped and saved"}
ORDERS = {"save": "save", "stop": "save and stop", "pause": "pause", "steps": "change the steps"}


def training_card(view: TrainView | None) -> str:
    """The state of the run in words, with what to do next."""
    if view is None:
        return '<div class="empty">Nothing is being trained. Choose pictures, say what they show, and start.</div>'
    state = STATES.get(view.state, view.state)
    report = _link(f"loom/report/{quote(view.name)}", "Report") if view.report else ""
    head = (
        f'<div class="card-head" role="status"><b>{escape(view.name)}</b>'
        f'<span class="pill {view.state}">{escape(state)}</span>{report}</div>'
    )
    lines = [_progress(view), _needs(view.preflight), _waiting(view.waiting)]
    if view.error:
        lines.append(f'<div class="message failed">{escape(view.error)}</div>')
    if view.resume:
        lines.append("“Go on” takes it up where it was saved, bit for bit as if it had never stopped.")
    if view.state == "finished":
        lines.append("“Use it” puts it into the mixer.")
    body = "".join(f'<div class="line">{line}</div>' for line in lines if line)
    return f'<div class="card" data-alive="{view.state in ALIVE}">{head}{body}</div>'


def _progress(view: TrainView) -> str:
    if not view.steps:
        return ""
    label = f"step {view.step} of {view.steps}"
    left = f" · about {duration(view.eta_s)} left" if view.state == "running" and view.step else ""
    bar = f'<progress max="{view.steps}" value="{view.step}" aria-label="{label}"></progress>'
    return f"{bar}<span>{label}{left}</span>"


def _needs(found: dict[str, Any]) -> str:
    """Of a Preflight, in a line."""
    if not found:
        return ""
    return (
        f'<span class="facts">{found["step_s"]:.2g} s a step · {size(found["memory"])} of '
        f"{size(found['memory_total'])} memory · {size(found['disk'])} of {size(found['disk_free'])} disk</span>"
    )


def _waiting(orders: Iterable[str]) -> str:
    counted = Counter(ORDERS.get(name, "a sample") for name in orders)
    if not counted:
        return ""
    return "After this step: " + ", ".join(f"{what} × {n}" if n > 1 else what for what, n in counted.items())


def notes_html(view: TrainView | None) -> str:
    """What speaks against the training is always seen; what else it noted is folded away."""
    if view is None:
        return ""
    warned = list(view.preflight.get("warnings", ())) if view.state != "finished" else []
    noted = [note for note in view.notes if note not in view.preflight.get("warnings", ())]
    lines = "".join(f"<li>{escape(note)}</li>" for note in noted)
    more = (
        f'<details class="notes"><summary>What it noted ({len(noted)})</summary><ul>{lines}</ul></details>'
        if noted
        else ""
    )
    return _warnings(warned) + more


# --- before it ------------------------------------------------------------------------------------------------


def ready_html(session: Session, draft: Draft) -> str:
    """The one line above Check and Start: what is still to be done, or what would be."""
    view = session.training.view()
    if view is not None and view.state in ALIVE:
        return f'<div class="line">{escape(view.name)} is being trained; another can begin when it has ended.</div>'
    pressed, missing = session.said_at.get("start", ""), teaching.missing(session, draft)
    if pressed and missing in ("", pressed):
        return f'<div class="message failed" role="alert">{escape(pressed)}</div>'
    if missing:
        return f'<div class="message">{escape(missing)}</div>'
    plan, count = session.wanted.plan, len(draft.entries())
    pipe = session.pipe
    base = f"{pipe.base_name} ({pipe.family.title})" if pipe else plan.base
    return (
        f'<div class="line">Ready: {count} picture{"s" * (count > 1)}, {plan.steps} steps, rank {plan.rank}, '
        f"on {escape(base)}.</div>"
    )


def check_html(session: Session, draft: Draft) -> str:
    view = session.check.view
    if not view.state:
        return ""
    parts = ["<h3>The check</h3>"]
    if view.of != teaching.state_of_form(session, draft):
        parts.append('<p class="stale">Something was changed since: check again.</p>')
    if view.state == "looking":
        parts.append("<p>Looking at the pictures …</p>")
    if view.look:
        parts.append(_looked(view.look))
    if view.state == "measuring":
        parts.append("<p>Two steps are tried out, to see what they need …</p>")
    if view.preflight:
        parts.append(_tiles(view.preflight) + _warnings(view.preflight["warnings"]))
    if view.problem:
        parts.append(f'<div class="message failed" role="alert">{escape(view.problem)}</div>')
    elif view.state == "done":
        parts.append("<p>Nothing keeps it from coming to its end.</p>")
    return f'<section class="check" aria-live="polite">{"".join(parts)}</section>'


def _looked(facts: dict[str, Any]) -> str:
    shapes = ", ".join("{} × {} ({})".format(*b["bucket"], b["pictures"]) for b in facts["buckets"])
    tokens = max((p["tokens"] for picture in facts["pictures"] for p in picture["prompts"]), default=0)
    cut = max((picture["cut_off"] for picture in facts["pictures"]), default=0.0)
    lines = [
        f"{len(facts['pictures'])} pictures, trained at {shapes}; at most {100 * cut:.0f} % of one is cut off, and its "
        f"longest prompt has {tokens} tokens.",
        *facts["notes"],
    ]
    link = _link("loom/look", "Every picture as it is cut and told")
    odd = _warnings(facts["warnings"]) or "<p>Nothing is odd about the pictures.</p>"
    return "".join(f"<p>{escape(line)}</p>" for line in lines) + f"<p>{link}</p>{odd}"


def _tiles(found: dict[str, Any]) -> str:
    tiles = (
        ("Memory", size(found["memory"]), f"of {size(found['memory_total'])}"),
        ("Time", duration(found["total_s"]), f"{found['step_s']:.2g} s a step"),
        ("Disk", size(found["disk"]), f"of {size(found['disk_free'])} free"),
    )
    inside = "".join(
        f"<div><dt>{what}</dt><dd>{much}<span>{of}</span></dd></div>" for what, much, of in tiles
    )
    return f'<dl class="tiles">{inside}</dl>'


def preset_html(session: Session, draft: Draft) -> str:
    """The effective preset, or why there is none."""
    try:
        config = teaching.config(session, draft.folder)
    except ConfigError as problem:
        return f'<div class="message failed">{escape(str(problem))}</div>'
    name = session.wanted.plan.preset
    chain = " extends ".join([name, *presets.ancestors(name)])
    return (
        f'<p class="facts">{escape(chain)}, with your answers on top. This is what will be trained, whole:</p>'
        f'<pre class="toml" tabindex="0" aria-label="The whole preset">{escape(presets.dump(config))}</pre>'
    )


def runs_data(session: Session) -> list[dict[str, Any]]:
    """For assets/runs.js."""
    current, shown = session.training.current(), session.training.view()
    found = []
    for past in session.runs.all():
        alive = current is not None and current.name == past.name
        found.append(
            {
                "name": past.name,
                "said": "is being trained" if alive else _said(past),
                "report": f"loom/report/{quote(past.name)}" if past.report else "",
                "shown": shown is not None and shown.name == past.name,
                "closed": current is not None,
            }
        )
    return found


def _said(past: Past) -> str:
    when = datetime.fromtimestamp(past.began).strftime("%d %b %Y, %H:%M")
    steps = f"step {past.step} of {past.steps} · " if past.steps else ""
    return f"{STATES.get(past.state, past.state)} · {steps}{when}"


def _warnings(lines: Iterable[str]) -> str:
    return "".join(f'<p class="odd">{escape(line)}</p>' for line in lines)


def _link(address: str, words: str) -> str:
    return f'<a href="{escape(address)}" target="_blank" rel="noopener">{escape(words)}</a>'
