"""From the samplers' draws to what one UNet call needs. All chance of tensors comes from one CPU generator, in this
order: the VAE's posterior, the noise, the timesteps; that of crops, flips and words from the draw itself."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from trainers.ahead import Ahead
from trainers.buckets import View
from trainers.caches import Encoded, LatentCache, draw_latents, encode_view, encoding
from trainers.dataset import Dataset, Example
from trainers.diffusion import draw_noise
from trainers.folders import Kind
from trainers.sampler import BatchSampler, Draw
from trainers.sending import sent


@dataclass(frozen=True)
class Batch:
    """Pictures of the subject first, pictures of the class after, all of one size. On the CPU until `to`."""

    z: Tensor  # (N, 4, h, w) scaled latents
    eps: Tensor  # like z
    t: Tensor  # (N,) timesteps
    share: Tensor  # (N,) of each picture in the loss
    mask: Tensor  # (N, 1, h, w) what each latent counts in its picture's loss, 1 on average
    time_ids: Tensor  # (N, 6) SDXL's
    captions: list[str]
    names: list[str]  # of the picture files, for messages
    from_base: list[bool]  # whether its target is what the base model says, for the last ones of a batch

    def __len__(self) -> int:
        return len(self.z)

    def pieces(self, count: int) -> Iterator[Batch]:
        """At most so many parts, whose losses add up to the whole one's."""
        size = -(-len(self) // count)
        for a in range(0, len(self), size):
            yield self.part(slice(a, a + size))

    def part(self, rows: slice | list[int]) -> Batch:
        numbers = range(len(self))[rows] if isinstance(rows, slice) else rows
        chosen: dict[str, Any] = {
            name: value[rows] if isinstance(value, Tensor) else [value[i] for i in numbers]
            for name, value in vars(self).items()
        }
        return Batch(**chosen)

    def with_rows(self, other: Batch) -> Batch:
        both: dict[str, Any] = {
            name: torch.cat([value, vars(other)[name]])
            if isinstance(value, Tensor)
            else value + vars(other)[name]
            for name, value in vars(self).items()
        }
        return Batch(**both)

    def to(self, device: torch.device) -> Batch:
        """On a GPU without waiting for the copy."""
        there: dict[str, Any] = {
            name: sent(value, device) if isinstance(value, Tensor) else value
            for name, value in vars(self).items()
        }
        return Batch(**there)


Row = tuple[Example, View, str]  # with its prompt


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
        mask_floor: float = 0.0,
    ) -> None:
        """`noise`: what `draw_noise` takes; `mask_floor`: what `weigh` takes."""
        self.dataset, self.vae, self.cache, self.batch_size = dataset, vae, cache, batch_size
        self.prior_weight, self.noise, self.mask_floor = prior_weight, noise or {}, mask_floor
        self._ahead = Ahead()
        self._turns: dict[Kind, list[Example]] = {"instance": turns(dataset.instances)}
        if dataset.classes:
            self._turns["class"] = turns(dataset.classes)
        self.samplers = {
            kind: BatchSampler([e.plan.bucket for e in mine], seed=seed + i)
            for i, (kind, mine) in enumerate(self._turns.items())
        }

    @property
    def kinds(self) -> tuple[Kind, ...]:
        return tuple(self._turns)

    def next(self, generator: torch.Generator, timesteps: int, drawings: int = 1) -> list[list[Batch]]:
        """What one optimizer step sees, of each drawing of the batch size: one batch, or two where the class has
        another size than the pictures to learn.

        The losses of all add up to the step's, in which every picture counts alike: several drawings are one large
        batch, also where a rare shape has made some of them short.
        """
        found = self.batches(self._drawn(drawings), generator, timesteps)
        if self.cache is None:
            self._open_ahead(drawings)
        return found

    def _drawn(self, drawings: int) -> list[dict[Kind, list[Row]]]:
        return [{kind: self.draw(kind) for kind in self._turns} for _ in range(drawings)]

    def _open_ahead(self, drawings: int) -> None:
        """What the next step will see. Whose turn it is stays as it is: a run saved now goes on with that step."""
        position = self.state()
        self._ahead.foresee(
            (example, view)
            for drawn in self._drawn(drawings)
            for rows in drawn.values()
            for example, view, _ in rows
        )
        self.restore(position)

    def batches(
        self, drawn: Sequence[Mapping[Kind, list[Row]]], generator: torch.Generator, timesteps: int
    ) -> list[list[Batch]]:
        """`drawn`: of each drawing its rows, those of a kind of one bucket; see `next`."""

        def sharers(kind: Kind) -> int:
            return sum(len(rows.get(kind, [])) for rows in drawn)

        shares = {"instance": 1 / sharers("instance"), "class": self.prior_weight / max(sharers("class"), 1)}
        taught = sum(taught_by_model(example) for rows in drawn for example, _, _ in rows["instance"])
        shares["model"] = self.prior_weight / max(taught, 1)
        found = []
        for rows in drawn:
            instances, classes = rows["instance"], rows.get("class", [])
            apart = classes and classes[0][0].plan.bucket != instances[0][0].plan.bucket
            parts = [instances, classes] if apart else [[*instances, *classes]]
            found.append([self._batch(part, shares, generator, timesteps) for part in parts])
        return found

    def draw(self, kind: Kind) -> list[Row]:
        """The next batch of the pictures to learn, or of the class: what is shown, cut and said."""
        return [(e, e.view(draw), e.words(draw)) for e, draw in self.turn(kind)]

    def turn(self, kind: Kind) -> list[tuple[Example, Draw]]:
        """The next batch's pictures alone."""
        return [(self._turns[kind][draw.index], draw) for draw in self.samplers[kind].take(self.batch_size)]

    def _batch(
        self, rows: Sequence[Row], shares: Mapping[str, float], generator: torch.Generator, timesteps: int
    ) -> Batch:
        """`shares`: of one picture in the step's loss, by its kind."""
        encoded = self.encoded(rows)
        mean, std = torch.stack([e.mean for e in encoded]), torch.stack([e.std for e in encoded])
        z = draw_latents(self.vae, mean, std, generator)
        eps = draw_noise(z.shape, generator, **self.noise)
        t = torch.randint(timesteps, (len(z),), generator=generator)
        share = torch.tensor([shares[example.kind] for example, _, _ in rows])
        share *= torch.tensor([example.source.weight for example, _, _ in rows])
        # fp32 whatever the text is in: bf16 would round 1023 pixels to 1024. The UNet casts after its sinusoids.
        time_ids = torch.tensor([view.time_ids(example.original_size) for example, view, _ in rows]).float()
        captions, names = [words for _, _, words in rows], [example.path.name for example, _, _ in rows]
        mask, from_base = weigh(encoded, self.mask_floor), [False] * len(rows)
        batch = Batch(z, eps, t, share, mask, time_ids, captions, names, from_base)
        return self._with_class_of_model(batch, [example for example, _, _ in rows], shares["model"])

    def _with_class_of_model(self, batch: Batch, examples: Sequence[Example], share: float) -> Batch:
        """The same latents at the same noise once more, with the class's prompt, where no pictures of it are had."""
        again = [i for i, example in enumerate(examples) if taught_by_model(example)]
        if not again:
            return batch
        prompts = [examples[i].source.settings.class_prompt or "" for i in again]
        weights = torch.tensor([examples[i].source.settings.weight for i in again])
        rows = batch.part(again)
        return batch.with_rows(
            replace(
                rows,
                captions=prompts,
                share=weights * share,
                mask=torch.ones_like(rows.mask),
                from_base=[True] * len(again),
            )
        )

    def encoded(self, rows: Sequence[Row]) -> list[Encoded]:
        """What the VAE says of each."""
        if self.cache is not None:
            return [self.cache.encoded(example, view) for example, view, _ in rows]
        with encoding(self.vae) as vae:
            return [
                encode_view(vae, example, view, self._ahead.open(example, view)) for example, view, _ in rows
            ]

    def state(self) -> dict[str, Any]:
        return {kind: sampler.state() for kind, sampler in self.samplers.items()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Raises ConfigError when the folders now hold other than as many pictures."""
        for kind, sampler in self.samplers.items():
            sampler.restore(state[kind])


def taught_by_model(example: Example) -> bool:
    """Whether the base model stands in for pictures of its class."""
    return example.source.settings.class_from == "model"


def turns(examples: Sequence[Example]) -> list[Example]:
    """An epoch of them: each as often as its folder says."""
    return [example for example in examples for _ in range(example.source.repeats)]


def weigh(encoded: Sequence[Encoded], floor: float) -> Tensor:
    """Masks -> (N, 1, h, w): floor + (1 - floor) mask, over its own mean, so that a small subject is not learnt more
    slowly than a large one; 1 for a picture without a mask."""
    rows = []
    for e in encoded:
        weight = torch.ones_like(e.mean[:1]) if e.mask is None else floor + (1 - floor) * e.mask
        # a crop that the mask leaves out has no loss at floor 0
        rows.append(weight / weight.mean().clamp(min=1e-6))
    return torch.stack(rows)
