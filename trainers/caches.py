"""Latents kept on disk by content, so that the VAE runs once per picture and then leaves the device.

What is kept is the posterior's mean and deviation, not one sample of it: each step draws anew, as it would
with the VAE at hand. A file's name is the SHA-256 of all that decides its content; a file that does not say
exactly what it should is built again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_core.errors import ConfigError, FileRefused, NotFinite, SaveFailed
from lora_core.safe_files import read_header, read_tensors, save_tensors, sweep_partials
from lora_core.upcast import upcast
from trainers.buckets import View
from trainers.dataset import Dataset, Example, pixels
from trainers.images import decode, read_bytes

FORMAT = "latents 1"  # raise it when what a file means changes: old ones are then simply not found
Posterior = tuple[Tensor, Tensor]  # mean, std: (4, h, w) each, fp32, on the CPU


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


def vae_identity(vae: Any) -> str:
    """SHA-256 of the VAE's weights and their dtypes; the same VAE in another precision has another."""
    digest = hashlib.sha256()
    for name, tensor in sorted(vae.state_dict().items()):
        plain = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {plain.dtype} {tuple(plain.shape)};".encode())
        digest.update(plain.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


@dataclass
class FillReport:
    """Counts of latents, and by name what a user should hear of."""

    found: int = 0
    built: int = 0
    rebuilt: list[str] = field(default_factory=list)
    """Pictures whose file was damaged."""
    unsaved: dict[str, str] = field(default_factory=dict)
    """Pictures whose latents are only in memory -> why (a full disk, say)."""


class LatentCache:
    """Posteriors of a dataset, in memory and under `folder`.

        cache = LatentCache(folder, vae)
        cache.fill(dataset)                    # the VAE may then leave the device
        z = cache.sample([cache.key(example, view), ...], generator)

    Keys are strings; one cache serves one VAE.
    """

    def __init__(self, folder: Path, vae: Any) -> None:
        check_latent_space(vae)
        self.folder, self.vae = folder, vae
        self._keys: dict[tuple[Path, View], str] = {}
        self._posteriors: dict[str, Posterior] = {}

    def key(self, example: Example, view: View) -> str:
        """Of a view that `fill` has seen; a ValueError for any other."""
        try:
            return self._keys[example.path, view]
        except KeyError:
            raise ValueError(
                f"{example.path.name} with {view} was not cached: fill() saw another dataset"
            ) from None

    def fill(self, dataset: Dataset, progress: Callable[[int, int], None] | None = None) -> FillReport:
        """Have every view of every example, from disk where its file is whole, else by encoding the picture.

        `progress(done, total)` after each. Raises BadImage for a picture that changed for the worse since the
        scan, ConfigError for random crops, NotFinite for a VAE that overflows.
        """
        with suppress(OSError):  # each file that cannot be written is then in the report with the reason
            self.folder.mkdir(parents=True, exist_ok=True)
        sweep_partials(self.folder)
        report = FillReport()
        jobs = [(example, view) for example in dataset.examples for view in dataset.views(example)]
        with encoding(self.vae):
            identity = vae_identity(self.vae)  # in the precision it encodes in
            for done, (example, view) in enumerate(jobs, 1):
                self._have(example, view, identity, report)
                if progress is not None:
                    progress(done, len(jobs))
        return report

    def sample(self, keys: Sequence[str], generator: torch.Generator | None = None) -> Tensor:
        """-> one fresh draw per key, (N, 4, h, w) fp32 on the CPU."""
        mean, std = self.mean_std(keys)
        return draw_latents(self.vae, mean, std, generator)

    def mean_std(self, keys: Sequence[str]) -> Posterior:
        """What `posterior` said, (N, 4, h, w) each."""
        pairs = [self._posteriors[key] for key in keys]
        return torch.stack([mean for mean, _ in pairs]), torch.stack([std for _, std in pairs])

    def _have(self, example: Example, view: View, identity: str, report: FillReport) -> None:
        data = read_bytes(example.path)
        key = _key(data, view, identity)
        self._keys[example.path, view] = key
        if key in self._posteriors:  # the same picture twice
            report.found += 1
            return
        path = self.folder / f"{key}.safetensors"
        kept = load_posterior(path, key)
        if kept is not None:
            report.found += 1
        else:
            if path.exists():
                report.rebuilt.append(example.path.name)
            kept = self._encode(data, example, view)
            report.built += 1
            try:
                save_posterior(path, key, kept)
            except SaveFailed as problem:  # training goes on from memory; the next run encodes again
                report.unsaved[example.path.name] = str(problem)
        self._posteriors[key] = kept

    def _encode(self, data: bytes, example: Example, view: View) -> Posterior:
        image = decode(data, example.path)
        if image.size != example.original_size:
            raise ConfigError(
                f"{example.path.name} is another picture than when the folder was read: start again."
            )
        mean, std = (t[0].cpu() for t in posterior(self.vae, pixels(image, view)[None]))
        if not bool(torch.isfinite(mean).all() and torch.isfinite(std).all()):
            raise NotFinite(
                f"The VAE makes NaN or Inf of {example.path.name} in {self.vae.dtype}. "
                'Set train.base_dtype = "fp32" or "bf16".'
            )
        return mean, std


def _key(data: bytes, view: View, identity: str) -> str:
    facts = [FORMAT, identity, hashlib.sha256(data).hexdigest(), view.plan.resized, view.plan.box, view.flip]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _checksum(key: str, kept: Posterior) -> str:
    digest = hashlib.sha256(key.encode())
    for tensor in kept:
        digest.update(f"{tensor.dtype} {tuple(tensor.shape)};".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def save_posterior(path: Path, key: str, kept: Posterior) -> None:
    save_tensors(path, dict(zip(("mean", "std"), kept, strict=True)), {"sha256": _checksum(key, kept)})


def load_posterior(path: Path, key: str) -> Posterior | None:
    """-> what the file holds, or None if there is none or it is not word for word what was saved."""
    if not path.is_file():
        return None
    try:
        header = read_header(path)
        if set(header.tensors) != {"mean", "std"} or header.metadata.keys() != {"sha256"}:
            return None
        tensors = read_tensors(header)
    except FileRefused:
        return None
    kept = tensors["mean"], tensors["std"]
    return kept if header.metadata["sha256"] == _checksum(key, kept) else None
