"""Class pictures for prior preservation: what the base model itself draws for the class prompt (arXiv 2208.12242)."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

from lora_core.errors import ConfigError
from lora_core.generation import GenerationRequest, save_png
from lora_core.pipeline import LivePipeline
from trainers.config import PreviewSettings
from trainers.config_data import FolderSettings
from trainers.control import StopRequest
from trainers.events import Emit, Note
from trainers.folders import picture_files

AT_ONCE = 8


def class_folder(settings: FolderSettings, output: Path, base: Path) -> Path | None:
    """The folder of the preset, or one shared by all runs with this base (where it lies: two may have one name), prompt
    and resolution; None without."""
    if not settings.has_class:
        return None
    if settings.class_images is not None:
        return settings.class_images
    prompt = settings.class_prompt or ""
    key = hashlib.sha256(f"{base.resolve()}\n{prompt}\n{settings.resolution}".encode()).hexdigest()[:8]
    slug = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:40]
    return output / "class" / f"{slug}-{key}"


def base_path(live: LivePipeline) -> Path:
    assert live.opened is not None  # a training opens its base from files
    return live.opened.path


def fill(
    folder: Path,
    settings: FolderSettings,
    look: PreviewSettings,
    pipe: LivePipeline,
    stop: StopRequest,
    emit: Emit,
) -> None:
    """Generate what the folder lacks of `class_count`. Picture i has seed i, so an interrupted filling goes on."""
    missing = settings.class_count - len(picture_files(folder))
    if missing <= 0:
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        raise ConfigError(
            f"data.class_images must be a folder to keep class pictures in, and {folder} cannot be made: "
            f"{problem.strerror}. Choose another."
        ) from problem
    emit(
        Note(
            text=f"Making {missing} class pictures of {settings.class_prompt!r} with the base model, in {folder}"
        )
    )
    seeds = [i for i in range(settings.class_count) if not (folder / f"class-{i:05d}.png").exists()][:missing]
    while seeds:
        stop.check()
        # generate() gives consecutive seeds: take as many as follow one another
        run = 1
        while run < min(AT_ONCE, len(seeds)) and seeds[run] == seeds[0] + run:
            run += 1
        request = GenerationRequest(
            prompt=settings.class_prompt or "",
            seed=seeds[0],
            steps=look.steps,
            guidance=look.guidance,
            count=run,
            width=settings.resolution,
            height=settings.resolution,
        )
        for image in pipe.generate(request, on_step=lambda *_: not stop.asked):
            save_png(image, folder / f"class-{image.seed:05d}.png")
        seeds = seeds[run:]
