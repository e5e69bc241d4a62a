"""What the loss of the steps does not tell: the loss on pictures that are not trained on, and how far the LoRA moves
prompts that it should leave alone.

Both at the same noise and timesteps every time and without dropout, so that two measurements differ by the weights
alone. No chance of the training's is used: a run that is measured is bit for bit the run that is not.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from trainers.batches import Batch
from trainers.bench import Bench
from trainers.buckets import View
from trainers.caches import Encoded, draw_latents
from trainers.dataset import Example
from trainers.events import Measured
from trainers.held_out import MOST, TIMES, Probe, drift_prompts
from trainers.predicting import predict, predict_as_base
from trainers.sampler import Draw

SHOWN = 4  # pictures on whose latents the prompts are tried


def make_probe(bench: Bench) -> Probe:
    """Pictures are seen cropped from the middle and not mirrored."""
    generator = torch.Generator().manual_seed(bench.config.seed)
    shown, prompts = bench.feeder.dataset.instances[:SHOWN], drift_prompts(bench.config)

    def encoded(examples: Sequence[Example]) -> list[Encoded]:
        return bench.feeder.encoded([(e, View(e.plan, False), "") for e in examples])

    def at_all_times(example: Example, code: Encoded, prompt: str) -> Batch:
        n = len(TIMES)
        z = draw_latents(bench.live.pipeline.vae, code.mean[None], code.std[None], generator)
        return Batch(
            z=z.expand(n, -1, -1, -1),
            eps=torch.randn((n, *z.shape[1:]), generator=generator),
            t=torch.tensor([int(share * len(bench.schedule)) for share in TIMES]),
            share=torch.full((n,), 1 / n),
            mask=torch.ones(n, 1, *z.shape[2:]),
            time_ids=torch.tensor([View(example.plan, False).time_ids(example.original_size)] * n).float(),
            captions=[prompt] * n,
            names=[example.path.name] * n,
            from_base=[False] * n,
        )

    chosen = bench.held_out[:MOST]
    said = [example.words(Draw(i, i, bench.config.seed)) for i, example in enumerate(chosen)]
    held = [
        at_all_times(example, code, words)
        for example, code, words in zip(chosen, encoded(chosen), said, strict=True)
    ]
    codes = encoded(shown) if prompts else []
    tried = [
        at_all_times(shown[i % len(shown)], codes[i % len(shown)], prompt) for i, prompt in enumerate(prompts)
    ]
    return Probe(tuple(held), tuple(tried))


@torch.no_grad()
def measure(bench: Bench, step: int) -> None:
    """Emit `Measured` with what the finished file would do now. Nothing where there is nothing to measure."""
    probe = bench.probe
    if not probe:
        return
    bench.form.eval()
    try:
        with bench.averaged(bench.config.save.ema):
            by_time = [error for batch in probe.held_out for error in held_out_errors(bench, batch)]
            drift = {batch.captions[0]: moved(bench, batch) for batch in probe.prompts}
    finally:
        bench.form.train()
    rows = torch.tensor(by_time).reshape(-1, len(TIMES))
    times = [int(share * len(bench.schedule)) for share in TIMES]
    bench.measured = Measured(
        step=step,
        validation=float(rows.mean()) if by_time else None,
        validation_by_timestep=dict(zip(times, rows.mean(0).tolist(), strict=True)) if by_time else {},
        drift=sum(drift.values()) / len(drift) if drift else None,
        drift_by_prompt=drift,
    )
    bench.emit(bench.measured)


def held_out_errors(bench: Bench, batch: Batch) -> list[float]:
    """Mean squared error at each of TIMES."""
    batch = batch.to(bench.device)
    target = bench.schedule.target(batch.z, batch.eps, batch.t)
    errors = (predict(bench, batch, noised(bench, batch)).float() - target).square().mean((1, 2, 3))
    found: list[float] = errors.tolist()
    return found


def moved(bench: Bench, batch: Batch) -> float:
    """Mean |prediction with the LoRA - without| over TIMES and the latent."""
    batch = batch.to(bench.device)
    z_t = noised(bench, batch)
    apart = predict(bench, batch, z_t).float() - predict_as_base(bench, batch, z_t).float()
    return float(apart.abs().mean())


def noised(bench: Bench, batch: Batch) -> Tensor:
    return bench.schedule.noise(batch.z, batch.eps, batch.t)


def figures(measured: Measured | None) -> dict[str, float]:
    """Of the last measurement, for the report."""
    if measured is None:
        return {}
    found = {"validation_loss": measured.validation, "drift_unet": measured.drift}
    return {name: round(value, 6) for name, value in found.items() if value is not None}
