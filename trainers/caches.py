"""Latents kept on disk by content, so that the VAE runs once per picture and then leaves the device.

What is kept is the posterior's mean and deviation, not one sample of it: each step draws anew, as it would
with the VAE at hand; and with masked loss the mask as the latents see it. A file's name is the SHA-256 of all that
decides its content; a file that does not say exactly what it should is built again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from lora_core.errors import ConfigError, NotFinite, SaveFailed
from lora_core.upcast import upcast
from trainers.buckets import View
from trainers.dataset import Bytes, Dataset, Example, coverage, layers, pixels, read
from trainers.kept_tensors import FillReport, KeptTensors, all_finite, weights_identity

FORMAT = "latents 3"  # raise it when what a file means changes: old ones are then simply not found
Posterior = tuple[Tensor, Tensor]  # mean, std: (N, 4, h, w) each, fp32, on the CPU


@dataclass(frozen=True)
class Encoded:
    """One view of one picture: `mean` and `std` (4, h, w) of its posterior, and `mask` (1, h, w), 0 to 1, if it has
    one; fp32, on the CPU."""

    mean: Tensor
    std: Tensor
    mask: Tensor | None = None


@dataclass(frozen=True)
class Opened:
    """One view of one picture, before the VAE: `pixels` (3, H, W) in -1..1, and its whole mask if it has one."""

    pixels: Tensor
    mask: Image.Image | None


def open_view(example: Example, view: View, data: Bytes | None = None) -> Opened:
    """From its files, or from `data`, which they hold. Raises BadImage, ConfigError for a picture that changed since
    the scan."""
    image, mask = layers(example, read(example) if data is None else data)
    if image.size != example.original_size:
        raise ConfigError(
            f"{example.path.name} is another picture than when the folder was read: start again."
        )
    return Opened(pixels(image, view), mask)


def encode_view(vae: Any, example: Example, view: View, opened: Opened) -> Encoded:
    """One picture at a time, so that its bits never depend on its neighbours: cached equals uncached.

    Raises NotFinite for a VAE that overflows.
    """
    mean, std = (t[0].cpu() for t in posterior(vae, opened.pixels[None]))
    if not all_finite({"mean": mean, "std": std}):
        raise NotFinite(
            f"The VAE makes NaN or Inf of {example.path.name} in {vae.dtype}. "
            'Set train.base_dtype = "fp32" or "bf16".'
        )
    height, width = mean.shape[-2:]
    return Encoded(mean, std, None if opened.mask is None else coverage(opened.mask, view, (height, width)))


def posterior(vae: Any, images: Tensor) -> Posterior:
    """Pictures (N, 3, H, W) in -1..1 -> mean and std of q(z|x), (N, 4, H/8, W/8) each, fp32, unscaled."""
    images = images.to(vae.device, vae.dtype)
    found = vae.encode(images).latent_dist
    return found.mean.float(), found.std.float()


def draw_latents(vae: Any, mean: Tensor, std: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """z = (mean + std · eps) · scaling: one sample of the posterior, scaled as the UNet knows it.

    eps is drawn on the generator's device (the CPU's draws are the same on every machine).
    """
    check_latent_space(vae)
    device = generator.device if generator is not None else mean.device
    eps = torch.randn(mean.shape, generator=generator, device=device).to(mean.device)
    return (mean + std * eps) * float(vae.config.scaling_factor)


def check_latent_space(vae: Any) -> None:
    """Raise ConfigError for a VAE with shifted latents: those of SD 1.x, SD 2.x and SDXL are only scaled."""
    for name in ("shift_factor", "latents_mean", "latents_std"):
        if getattr(vae.config, name, None) is not None:
            raise ConfigError(
                f"This base model's VAE has a {name}; SD 1.x, SD 2.x and SDXL have none. Choose such a base."
            )


@contextmanager
def encoding(vae: Any) -> Iterator[Any]:
    """The VAE ready to encode without gradients; SDXL's overflows in fp16 and is in fp32 for as long."""
    training = vae.training
    try:
        vae.eval()
        with torch.no_grad(), upcast(vae):
            yield vae
    finally:
        vae.train(training)


class LatentCache:
    """What a VAE makes of a dataset, in memory and under `folder`.

        cache = LatentCache(folder, vae)
        cache.fill(dataset)                    # the VAE may then leave the device
        cache.encoded(example, view)

    One cache serves one VAE.
    """

    def __init__(self, folder: Path, vae: Any) -> None:
        check_latent_space(vae)
        self.folder, self.vae = folder, vae
        self._keys: dict[tuple[Example, View], str] = {}
        self._kept: dict[str, Encoded] = {}

    def key(self, example: Example, view: View) -> str:
        """Of a view that `fill` has seen; a ValueError for any other."""
        try:
            return self._keys[example, view]
        except KeyError:
            raise ValueError(
                f"{example.path.name} with {view} was not cached: fill() saw another dataset"
            ) from None

    def encoded(self, example: Example, view: View) -> Encoded:
        """Of a view that `fill` has seen; a ValueError for any other."""
        return self._kept[self.key(example, view)]

    def fill(self, dataset: Dataset, progress: Callable[[int, int], None] | None = None) -> FillReport:
        """Have every view of every example, from disk where its file is whole, else by encoding the picture.

        `progress(done, total)` after each. Raises ConfigError for random crops, and as `open_view` and `encode_view`.
        """
        files, report = KeptTensors(self.folder), FillReport()
        jobs = [(example, view) for example in dataset.examples for view in example.views()]
        with encoding(self.vae):
            identity = weights_identity(self.vae)  # in the precision it encodes in
            for done, (example, view) in enumerate(jobs, 1):
                self._have(example, view, identity, files, report)
                if progress is not None:
                    progress(done, len(jobs))
        return report

    def _have(
        self, example: Example, view: View, identity: str, files: KeptTensors, report: FillReport
    ) -> None:
        data = read(example)
        key = view_key(example, view, data, identity)
        self._keys[example, view] = key
        if key in self._kept:  # the same picture twice
            report.found += 1
            return
        tensors = files.load(key)
        if tensors is not None and tensors.keys() - {"mask"} == {"mean", "std"}:
            report.found += 1
            self._kept[key] = Encoded(**tensors)
            return
        if files.path(key).exists():
            report.rebuilt.append(example.path.name)
        kept = encode_view(self.vae, example, view, open_view(example, view, data))
        report.built += 1
        try:
            files.save(key, {name: t for name, t in vars(kept).items() if t is not None})
        except SaveFailed as problem:  # training goes on from memory; the next run encodes again
            report.unsaved[example.path.name] = str(problem)
        self._kept[key] = kept


def view_key(example: Example, view: View, data: Bytes, identity: str) -> str:
    """SHA-256 of all that decides an `Encoded`."""
    mask = None if not example.masked else "opacity" if data.mask is None else _sha256(data.mask)
    crop = [view.plan.resized, view.plan.box, view.flip]
    facts = [FORMAT, identity, _sha256(data.picture), mask, example.source.settings.background, *crop]
    return _sha256(json.dumps(facts).encode())


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
