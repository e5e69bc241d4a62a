"""What leaves a run: the LoRA file, and the report of before and after made from that very file."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from PIL import Image

from lora_core import thumbnail
from lora_core.adapter import Adapter
from lora_core.dtypes import DTYPES
from lora_core.errors import NotFinite, SaveFailed
from lora_core.formats import read_adapter, retell, write_adapter
from lora_core.formats.cautions import cautions
from lora_core.models import OpenedBase
from lora_core.pipeline import LivePipeline
from lora_core.train_form import LoraForm, collect
from trainers import report
from trainers.config import TrainConfig
from trainers.control import StopRequest
from trainers.dataset import Dataset
from trainers.events import Emit, Note, Reported
from trainers.images import open_image
from trainers.run_folder import RunFolder
from trainers.training_facts import Ran, facts


def write_lora(
    config: TrainConfig, path: Path, form: LoraForm, opened: OpenedBase, ran: Ran, dataset: Dataset
) -> Path:
    """Atomically, with the metadata other programs show; then read back and compared with what was trained.

    Raises NotFinite instead of writing NaN, SaveFailed when the file does not say what was trained.
    """
    adapter = collect(form, family=opened.family.key, name=path.stem)
    adapter.check_finite()
    dtype = DTYPES[config.save.dtype]
    trained = [*(d.tensors() for d in adapter.deltas.values()), *adapter.embeddings.values()]
    largest = max(float(t.abs().max()) for tensors in trained for t in tensors.values())
    if largest > torch.finfo(dtype).max:
        raise NotFinite(
            f'The LoRA holds values up to {largest:.3g}, too large for {config.save.dtype}. Set save.dtype = "bf16".'
        )
    if config.save.spelling == "peft":
        path = path.with_suffix("")  # PEFT's spelling is a folder
    metadata = facts(config, opened, ran, dataset)
    written = write_adapter(adapter, path, spelling=config.save.spelling, dtype=dtype, metadata=metadata)
    compare(read_adapter(written), adapter, dtype, written)
    return written


def try_spelling(config: TrainConfig, form: LoraForm, opened: OpenedBase, emit: Emit) -> None:
    """Before a step is taken: says which programs will read the file otherwise than it is meant, and raises ConfigError
    where its spelling has no words for a layer that is trained (diffusers' has none for embeddings)."""
    adapter = collect(form, family=opened.family.key)
    if config.save.spelling != "kohya":  # that has words for everything that trains
        with tempfile.TemporaryDirectory() as folder:
            write_adapter(adapter, Path(folder) / "trial", spelling=config.save.spelling)
    for caution in cautions(adapter, config.save.spelling):
        emit(Note(text=f"Of the finished file: {caution}"))


def compare(found: Adapter, meant: Adapter, dtype: torch.dtype, path: Path) -> None:
    """The file's ΔW factors are the trained ones, rounded to `dtype`."""
    same = found.deltas.keys() == meant.deltas.keys() and not found.unused
    for key in meant.deltas if same else ():
        ours, theirs = meant.deltas[key].tensors(), found.deltas[key].tensors()
        same = same and ours.keys() == theirs.keys()
        same = same and all(
            torch.equal(ours[n].to(dtype).float().flatten(), theirs[n].float().flatten())
            for n in ours
            if n != "alpha"
        )
    same = same and found.embeddings.keys() == meant.embeddings.keys()
    for word, rows in meant.embeddings.items() if same else ():
        same = same and all(torch.equal(found.embeddings[word][c], t.to(dtype)) for c, t in rows.items())
    if not same:
        raise SaveFailed(
            f"{path} does not hold what was trained, though it was written. Is the disk failing? Use another."
        )


def write_report(
    config: TrainConfig,
    folder: RunFolder,
    live: LivePipeline,
    lora: Path,
    stop: StopRequest,
    emit: Emit,
    *,
    measured: Mapping[str, float],
) -> None:
    """The same prompts and seeds without and with the file; figures, sheet, and the base's seal after unloading.

    `measured`: figures of the training itself, which are there without prompts too.
    """
    settings = config.report
    wanted = report.shots(settings, report.judge_views(settings))
    if not wanted:
        show_last_preview(config, folder, lora)
        if measured:
            report.write(folder.root / "report.json", dict(measured))
        return
    emit(Note(text=f"Making {2 * len(wanted)} pictures for the report"))
    resolution = config.data.resolution or live.resolution
    before = report.render(live, wanted, settings, resolution, stop)
    live.load(lora, name=config.name)
    after = report.render(live, wanted, settings, resolution, stop)
    live.unload()
    result = report.figures(wanted, before, after, settings, live.pipeline.vae)
    result |= measured
    result["base"] = str(live.verify_base())
    path = folder.root / "sheet.png"
    report.sheet(wanted, before, after, path)
    shown = next((picture for shot, picture in zip(wanted, after, strict=True) if shot.subject), after[0])
    show(config, lora, shown)
    report.write(folder.root / "report.json", result)
    emit(Reported(sheet=str(path), figures=result))


def show(config: TrainConfig, lora: Path, picture: Image.Image) -> None:
    """Put a small one into the finished file, for programs that show LoRAs as cards. Its hashes stay. SaveFailed."""
    if config.save.thumbnail:
        retell(lora, {thumbnail.KEY: thumbnail.data_uri(picture)})


def show_last_preview(config: TrainConfig, folder: RunFolder, lora: Path) -> None:
    """The first prompt's newest picture, where the run has made any."""
    if made := sorted(folder.previews.glob("step-*-0.png")):
        show(config, lora, open_image(made[-1]))
