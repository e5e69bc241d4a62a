"""Class pictures for prior preservation: what the base model itself draws for the class prompt (arXiv 2208.12242)."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

from lora_core.generation import GenerationRequest, save_png
from lora_core.pipeline import LivePipeline
from trainers.config import TrainConfig
from trainers.control import StopRequest
from trainers.dataset import picture_files
from trainers.events import Emit, Note

AT_ONCE = 8


def class_folder(config: TrainConfig, base_name: str) -> Path | None:
    """The folder of the preset, or one shared by all runs with this base, prompt and resolution; None without."""
    if not config.data.has_class:
        return None
    if config.data.class_images is not None:
        return config.data.class_images
    prompt = config.data.class_prompt or ""
    key = hashlib.sha256(f"{base_name}\n{prompt}\n{config.data.resolution}".encode()).hexdigest()[:8]
    slug = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:40]
    return config.output / "class" / f"{slug}-{key}"


def fill(folder: Path, config: TrainConfig, pipe: LivePipeline, stop: StopRequest, emit: Emit) -> None:
    """Generate what the folder lacks of `class_count`. Picture i has seed i, so an interrupted filling goes on."""
    folder.mkdir(parents=True, exist_ok=True)
    missing = config.data.class_count - len(picture_files(folder))
    if missing <= 0:
        return
    emit(
        Note(
            text=f"Making {missing} class pictures of {config.data.class_prompt!r} with the base model, in {folder}"
        )
    )
    seeds = [i for i in range(config.data.class_count) if not (folder / f"class-{i:05d}.png").exists()][
        :missing
    ]
    while seeds:
        stop.check()
        # generate() gives consecutive seeds: take as many as follow one another
        run = 1
        while run < min(AT_ONCE, len(seeds)) and seeds[run] == seeds[0] + run:
            run += 1
        request = GenerationRequest(
            prompt=config.data.class_prompt or "",
            seed=seeds[0],
            steps=config.preview.steps,
            guidance=config.preview.guidance,
            count=run,
            width=config.data.resolution,
            height=config.data.resolution,
        )
        for image in pipe.generate(request):
            save_png(image, folder / f"class-{image.seed:05d}.png")
        seeds = seeds[run:]
