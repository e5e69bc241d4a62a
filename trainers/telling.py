"""What a run says of itself before its first step and after its last."""

from __future__ import annotations

from pathlib import Path

import torch

from lora_core.errors import LoraError, Stopped
from lora_core.quantised import count_weights
from trainers import events
from trainers.bench import Bench, precision
from trainers.control import StopRequest
from trainers.finish import write_report
from trainers.resting import awake
from trainers.validation import figures


def announce(bench: Bench, first: int) -> None:
    dataset, live = bench.feeder.dataset, bench.live
    bench.emit(
        events.Started(
            run=str(bench.folder.root),
            base=live.base_name,
            family=live.family.title,
            device=str(bench.device),
            dtype=precision(bench.config),
            trainable=sum(p.numel() for p in bench.form.parameters()),
            total=sum(count_weights(m) for m in (*live.models.values(), live.pipeline.vae)),
            layers=len(bench.form.paths),
            images=len(dataset.instances),
            class_images=len(dataset.classes),
            steps=bench.config.train.steps,
            first_step=first + 1,
        )
    )


def report_or_say(bench: Bench, lora: Path, stop: StopRequest) -> None:
    try:
        with awake(bench):
            write_report(
                bench.config,
                bench.folder,
                bench.live,
                lora,
                stop,
                bench.emit,
                measured=figures(bench.measured),
            )
    except Stopped:
        bench.emit(events.Note(text="Stopped while the report was made. The LoRA is finished."))
        raise
    except (LoraError, torch.OutOfMemoryError) as problem:
        bench.emit(
            events.Note(
                text=f"Before and after could not be shown; the LoRA is finished and whole. {problem}"
            )
        )
