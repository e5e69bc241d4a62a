"""What one of each costs: a save, a picture, a latent, a prompt. Measured by doing it; nothing of it stays."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from lora_core.batch_size import ran_out_of_memory
from lora_core.generation import GenerationRequest
from trainers import checkpoints
from trainers.batches import Batch
from trainers.bench import Bench
from trainers.caches import encode_view, encoding, open_view
from trainers.conditioning import Conditioning
from trainers.dataset import Example
from trainers.finish import write_lora
from trainers.predicting import predict
from trainers.resting import awake
from trainers.saving import position_of, trained


@dataclass(frozen=True)
class SaveCost:
    """Of one save: a state to resume from and the LoRA beside it."""

    state: int  # bytes
    lora: int  # bytes
    seconds: float


@dataclass(frozen=True)
class PictureCost:
    """Of one picture of `side` x `side` pixels. `guidance` above 1 asks the UNet twice in each of its steps."""

    side: int
    guidance: float
    step_s: float
    rest_s: float  # prompts and decoding

    def seconds(self, side: int, steps: int, guidance: float) -> float:
        """Of another picture, by its pixels."""
        calls = (1 + (guidance > 1)) / (1 + (self.guidance > 1))
        return (steps * calls * self.step_s + self.rest_s) * (side / self.side) ** 2


def trial_save(bench: Bench) -> SaveCost:
    """Raises SaveFailed, NotFinite, as a save of the training would."""
    place = bench.folder.root / "trial"
    shutil.rmtree(place, ignore_errors=True)  # of a process that was killed
    began = time.perf_counter()
    try:
        place.mkdir()
        state = checkpoints.state_path(place, 0)
        checkpoints.save_state(state, position_of(bench, 0), trained(bench))
        name = place / f"{bench.config.name}.safetensors"
        lora = write_lora(bench.config, name, bench.form, bench.opened, bench.ran(0), bench.feeder.dataset)
        return SaveCost(held(state), held(lora), time.perf_counter() - began)
    finally:
        shutil.rmtree(place, ignore_errors=True)


def trial_picture(bench: Bench, prompt: str) -> PictureCost | None:
    """Two denoising steps of a preview, and its decoding. None where the device has no memory for it."""
    guidance, side = bench.config.preview.guidance, bench.live.resolution
    request = GenerationRequest(prompt=prompt, seed=0, steps=2, guidance=guidance)
    ticks: list[float] = []

    def tick(*_: object) -> bool:
        ticks.append(time.perf_counter())
        return True

    bench.form.eval()
    try:
        began = time.perf_counter()
        with awake(bench):
            bench.live.generate(request, on_step=tick)
            synchronize(bench.device)
        whole = time.perf_counter() - began
    except RuntimeError as problem:
        if not ran_out_of_memory(problem):
            raise
        return None
    finally:
        bench.form.train()
    step = ticks[-1] - ticks[-2]
    return PictureCost(side, guidance, step, max(0.0, whole - 2 * step))


@torch.no_grad()
def trial_answer(bench: Bench, batch: Batch) -> float:
    """Seconds in which the UNet answers for one row, as when it is measured."""
    row = batch.part(slice(0, 1)).to(bench.device)
    return timed(bench, lambda: predict(bench, row, row.z))


def trial_latent(bench: Bench, example: Example) -> float:
    """Seconds for reading and encoding one picture, per pixel."""
    view = example.views()[0]
    with awake(bench), encoding(bench.live.pipeline.vae) as vae:
        seconds = timed(bench, lambda: encode_view(vae, example, view, open_view(example, view)))
    width, height = example.plan.bucket
    return seconds / (width * height)


def trial_prompt(bench: Bench, prompt: str, components: Sequence[str]) -> tuple[float, int]:
    """-> seconds and bytes of one prompt's embeddings, of all these encoders."""
    with awake(bench):
        made: list[Conditioning] = []
        seconds = timed(bench, lambda: made.extend(bench.words.encode(c, prompt) for c in components))
    tensors = [t for part in made for t in (part.hidden, part.pooled) if t is not None]
    return seconds, sum(t.nbytes for t in tensors)


def timed(bench: Bench, work: Callable[[], object]) -> float:
    synchronize(bench.device)
    began = time.perf_counter()
    work()
    synchronize(bench.device)
    return time.perf_counter() - began


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def held(path: Path) -> int:
    """Bytes of a file, or of all in a folder; 0 where there is none."""
    if path.is_dir():
        return sum(p.stat().st_size for p in path.rglob("*") if p.is_file())
    return path.stat().st_size if path.exists() else 0
