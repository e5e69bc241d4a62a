"""What leaves a run: the LoRA file, and the report of before and after made from that very file."""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from pathlib import Path

import torch

from lora_core.adapter import Adapter
from lora_core.errors import NotFinite, SaveFailed
from lora_core.formats import read_adapter, write_adapter
from lora_core.models import OpenedBase
from lora_core.pipeline import LivePipeline
from lora_core.train_form import LoraForm, collect
from trainers import presets, report
from trainers.config import TrainConfig
from trainers.control import StopRequest
from trainers.dataset import Dataset
from trainers.events import Emit, Note, Reported
from trainers.report_page import without_folders
from trainers.run_folder import RunFolder

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def write_lora(
    config: TrainConfig, path: Path, form: LoraForm, opened: OpenedBase, *, step: int, dataset: Dataset
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
    metadata = facts(config, opened, step=step, dataset=dataset)
    written = write_adapter(adapter, path, spelling=config.save.spelling, dtype=dtype, metadata=metadata)
    compare(read_adapter(written), adapter, dtype, written)
    return written


def try_spelling(config: TrainConfig, form: LoraForm, opened: OpenedBase) -> None:
    """Raises ConfigError, before a step is taken, where the file's spelling has no words for a layer that is trained:
    diffusers' has none for embeddings."""
    if config.save.spelling == "kohya":  # has words for everything that trains
        return
    with tempfile.TemporaryDirectory() as folder:
        adapter = collect(form, family=opened.family.key)
        write_adapter(adapter, Path(folder) / "trial", spelling=config.save.spelling)


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


def facts(config: TrainConfig, opened: OpenedBase, *, step: int, dataset: Dataset) -> dict[str, str]:
    """Training facts in kohya's words. Names only: no folder of the user's disk leaves the machine in a file."""
    train, captions = config.train, Counter(e.caption for e in dataset.instances)
    words = {
        "ss_learning_rate": train.learning_rate,
        "ss_unet_lr": train.learning_rate,
        "ss_text_encoder_lr": train.rate_of("text_encoder"),
        "ss_num_train_images": len(dataset.instances),
        "ss_num_reg_images": len(dataset.classes),
        "ss_steps": step,
        "ss_max_train_steps": train.steps,
        "ss_seed": config.seed,
        "ss_resolution": f"({dataset.resolution}, {dataset.resolution})",
        "ss_batch_size_per_device": train.batch_size,
        "ss_gradient_accumulation_steps": train.gradient_accumulation,
        "ss_gradient_checkpointing": train.gradient_checkpointing,
        "ss_lr_scheduler": train.schedule,
        "ss_lr_warmup_steps": train.warmup_steps,
        "ss_optimizer": f"torch.optim.AdamW(weight_decay={train.weight_decay})",
        "ss_max_grad_norm": train.max_grad_norm,
        "ss_prior_loss_weight": config.data.prior_weight,
        "ss_min_snr_gamma": train.snr_gamma if train.loss_weighting != "uniform" else None,
        "ss_network_dropout": config.lora.dropout,
        "ss_output_name": config.name,
        "ss_sd_model_name": opened.name,
        "ss_tag_frequency": json.dumps({config.data.images.name: dict(captions)}),
        "ss_dataset_dirs": json.dumps(
            {config.data.images.name: {"n_repeats": 1, "img_count": len(dataset.instances)}}
        ),
    }
    if config.data.prompt:
        words["modelspec.trigger_phrase"] = config.data.prompt
    if opened.quantised is not None:
        words["loom.quantized_base"] = opened.quantised.kind
    return {**{k: str(v) for k, v in words.items()}, "loom.preset": presets.dump(without_folders(config))}


def write_report(
    config: TrainConfig, folder: RunFolder, live: LivePipeline, lora: Path, stop: StopRequest, emit: Emit
) -> None:
    """The same prompts and seeds without and with the file; figures, sheet, and the base's seal after unloading."""
    settings = config.report
    wanted = report.shots(settings, report.judge_views(settings))
    if not wanted:
        return
    emit(Note(text=f"Making {2 * len(wanted)} pictures for the report"))
    resolution = config.data.resolution or live.resolution
    before = report.render(live, wanted, settings, resolution, stop)
    live.load(lora, name=config.name)
    after = report.render(live, wanted, settings, resolution, stop)
    live.unload()
    result = report.figures(wanted, before, after, settings, live.pipeline.vae)
    result["base"] = str(live.verify_base())
    path = folder.root / "sheet.png"
    report.sheet(wanted, before, after, path)
    report.write(folder.root / "report.json", result)
    emit(Reported(sheet=str(path), figures=result))
