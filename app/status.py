"""The one line above the tabs, as HTML. Every foreign word is escaped here."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from html import escape
from pathlib import Path

import psutil
import torch

from app.jobs import JobView
from app.session import Session
from app.training import TrainView
from trainers.events import duration

TIGHT_DISK_BYTES = 5e9  # a full-size checkpoint or a night's training states fill that


def status_html(session: Session) -> str:
    """What is open, whether it is proved untouched, what is being done, and how the last thing ended."""
    pipe, job = session.pipe, session.worker.view
    parts = [
        f"<span>{escape(pipe.base_name)} · {escape(pipe.family.title)}</span>"
        if pipe
        else "<span>No model is open yet</span>"
    ]
    if session.wanted.fused or (pipe is not None and pipe.fused):
        parts.append('<span class="fused">LoRAs fused into the base</span>')
    elif pipe is not None and pipe.loaded:
        note = f' title="{escape(pipe.fusing_note)}"' if session.wanted.auto and pipe.fusing_note else ""
        parts.append(
            f'<span class="live"{note}>{len(pipe.loaded)} LoRA{"s" * (len(pipe.loaded) > 1)} live</span>'
        )
    if session.seal and not (pipe is not None and pipe.fused):
        broken = "" if session.seal.startswith("base verified") else " broken"
        short = escape(session.seal.split(" tensors equal")[0])
        parts.append(f'<span class="seal{broken}" title="{escape(session.seal)}, bit for bit">{short}</span>')
    parts += [job_html(job), training_html(session.training.view()), room_html(session.pictures.folder)]
    return f'<div class="status" role="status">{"".join(filter(None, parts))}</div>'


def job_html(job: JobView) -> str:
    if not job.busy:
        return ""
    count = f" {job.step} of {job.steps}" if job.steps else ""
    label = escape(f"{job.title}{count}")
    bar = (
        f'<progress max="{job.steps}" value="{job.step}" aria-label="{label}"></progress>'
        if job.steps
        else ""
    )
    return f"<span>{label} {bar}</span>"


def training_html(view: TrainView | None) -> str:
    if view is None or view.state not in ("starting", "running", "paused"):
        return ""
    left = f", {duration(view.eta_s)} left" if view.state == "running" and view.step else ""
    return f"<span>Training {escape(view.name)}: {view.state}, step {view.step} of {view.steps}{left}</span>"


def room_html(folder: Path) -> str:
    """What is free, in whole GB so that the line changes seldom: of the card where there is one, and of the disk."""
    if torch.cuda.is_available():
        memory, where = torch.cuda.mem_get_info()[0], "GPU memory"
    else:
        memory, where = psutil.virtual_memory().available, "memory"
    disk = shutil.disk_usage(folder).free
    tight = ' class="tight"' if disk < TIGHT_DISK_BYTES else ""
    return (
        f'<span class="room">{memory / 1e9:.0f} GB {where} free · '
        f"<span{tight}>{disk / 1e9:.0f} GB disk free</span></span>"
    )


def message_html(job: JobView) -> str:
    """How the last job ended; while one is at work, what it does."""
    if job.busy:
        return f'<div class="message">{escape(job.title)} …</div>'
    return (
        f'<div class="message {escape(job.state)}" role="status">{escape(job.message)}</div>'
        if job.message
        else ""
    )


def escape_lines(lines: Sequence[str]) -> str:
    return "".join(f'<div class="message failed">{escape(line)}</div>' for line in lines)
