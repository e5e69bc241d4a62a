"""From the samplers' draws to what one UNet call needs. All chance comes from one CPU generator, in this order:
the VAE's posterior, the noise, the timesteps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trainers.buckets import View
from trainers.caches import LatentCache, draw_latents, encoding, posterior
from trainers.conditioning import Conditioning, encode, tokenize
from trainers.dataset import Dataset, Example, Sampler
from trainers.diffusion import draw_noise


@dataclass(frozen=True)
class Batch:
    """Pictures of the subject first, pictures of the class after. On the CPU until `to`."""

    z: Tensor  # (N, 4, h, w) scaled latents
    eps: Tensor  # like z
    t: Tensor  # (N,) timesteps
    share: Tensor  # (N,) of each picture in the loss
    time_ids: Tensor  # (N, 6) SDXL's
    captions: list[str]
    names: list[str]  # of the picture files, for messages

    def __len__(self) -> int:
        return len(self.z)

    def pieces(self, count: int) -> Iterator[Batch]:
        """At most so many parts, whose losses add up to the whole one's."""
        size = -(-len(self) // count)
        for a in range(0, len(self), size):
            yield Batch(**{name: value[a : a + size] for name, value in vars(self).items()})

    def to(self, device: torch.device) -> Batch:
        """On a GPU without waiting for the copy: it is pinned, and in order with what is computed from it."""
        pinned = device.type == "cuda"
        sent = {
            name: (value.pin_memory() if pinned else value).to(device, non_blocking=pinned)
            if isinstance(value, Tensor)
            else value
            for name, value in vars(self).items()
        }
        return Batch(**sent)  # type: ignore[arg-type]


class Feeder:
    """Draws batches; its position is plain JSON and can be taken up again in mid-epoch."""

    def __init__(
        self,
        dataset: Dataset,
        vae: Any,
        cache: LatentCache | None,
        *,
        batch_size: int,
        prior_weight: float = 1.0,
        seed: int,
        noise: Mapping[str, float] | None = None,
    ) -> None:
        """`noise`: what `draw_noise` takes."""
        self.dataset, self.vae, self.cache = dataset, vae, cache
        self.batch_size, self.prior_weight, self.noise = batch_size, prior_weight, noise or {}
        self.samplers = {"instance": Sampler(len(dataset.instances), seed=seed)}
        if dataset.classes:
            self.samplers["class"] = Sampler(len(dataset.classes), seed=seed + 1)

    def next(self, generator: torch.Generator, timesteps: int) -> Batch:
        rows: list[tuple[Example, View]] = []
        for kind, sampler in self.samplers.items():
            examples = self.dataset.instances if kind == "instance" else self.dataset.classes
            for draw in sampler.take(self.batch_size):
                rows.append((examples[draw.index], self.dataset.view(examples[draw.index], draw.rng())))
        z = self._latents(rows, generator)
        eps = draw_noise(z.shape, generator, **self.noise)
        t = torch.randint(timesteps, (len(z),), generator=generator)
        share = torch.full((len(rows),), 1 / self.batch_size)
        share[self.batch_size :] *= self.prior_weight
        # fp32 whatever the text is in: bf16 would round 1023 pixels to 1024. The UNet casts after its sinusoids.
        time_ids = torch.tensor([view.time_ids(example.original_size) for example, view in rows]).float()
        captions = [example.caption for example, _ in rows]
        return Batch(z, eps, t, share, time_ids, captions, [example.path.name for example, _ in rows])

    def _latents(self, rows: Sequence[tuple[Example, View]], generator: torch.Generator) -> Tensor:
        if self.cache is not None:
            return self.cache.sample([self.cache.key(*row) for row in rows], generator)
        with encoding(self.vae) as vae:
            mean, std = posterior(vae, torch.stack([self.dataset.pixels(*row) for row in rows]))
        return draw_latents(self.vae, mean.cpu(), std.cpu(), generator)

    def state(self) -> dict[str, dict[str, int]]:
        return {kind: sampler.state() for kind, sampler in self.samplers.items()}

    def restore(self, state: dict[str, dict[str, int]]) -> None:
        """Raises ConfigError when the folders now hold other than as many pictures."""
        counts = {kind: sampler.count for kind, sampler in self.samplers.items()}
        self.samplers = {kind: Sampler.from_state(state[kind], count=counts[kind]) for kind in self.samplers}


class Words:
    """Captions -> conditioning. Frozen encoders are asked once per caption, before the first step."""

    def __init__(self, pipeline: Any, captions: Sequence[str], *, frozen: bool) -> None:
        self._pipeline, self._captions = pipeline, sorted(set(captions))
        tokens = tokenize(pipeline, self._captions)
        self._ids, self.cut = tokens.ids, tokens.cut
        self._rows = {caption: row for row, caption in enumerate(self._captions)}
        self._known: Conditioning | None = None
        if frozen:
            with torch.no_grad():
                parts = [
                    self._encode(list(range(i, min(i + 8, len(self._captions)))))
                    for i in range(0, len(self._captions), 8)
                ]
            pooled = [p.pooled for p in parts if p.pooled is not None]
            self._known = Conditioning(
                torch.cat([p.hidden for p in parts]), torch.cat(pooled) if pooled else None
            )

    def __call__(self, captions: Sequence[str]) -> Conditioning:
        """-> conditioning of each caption, with gradients where the encoders train."""
        rows = [self._rows[caption] for caption in captions]
        return self._known.at(rows) if self._known is not None else self._encode(rows)

    def _encode(self, rows: list[int]) -> Conditioning:
        return encode(self._pipeline.components, {c: ids[rows] for c, ids in self._ids.items()})
