"""open_base: a base model from wherever it lies, with its weights read safely and proved later.

    "demo"                           the small model that comes with the program
    folder                           diffusers' layout (model_index.json), SD 1.x, SD 2.x or SDXL
    file.safetensors                 a checkpoint of one of these as civitai has them; opened without any network
    owner/name                       a diffusers repository of the Hugging Face hub, downloaded once

Weights are read by safe_files and never mapped, into modules built on the meta device: at no time are there
two copies of the model in memory. Old repositories' safety checker is not loaded, nor any code of theirs.
"""

from __future__ import annotations

import functools
import hashlib
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from torch import Tensor, nn

from lora_core.adapter import COMPONENTS
from lora_core.base_files import Stored, fill
from lora_core.base_parts import in_file, in_folder
from lora_core.base_sources import find_source
from lora_core.errors import FileRefused, PredictionUnclear
from lora_core.families import Family
from lora_core.prediction import NAMES, check, measured
from lora_core.quantised import Quantised, quantise, refuse_unknown

# SD 2's base models drew at 512 pixels, its v models at 768: sides of a latent.
_SD2_SIDES = {"epsilon": 64, "v_prediction": 96}


@dataclass(frozen=True, eq=False)
class OpenedBase:
    """An opened base model and the way back to its files.

    pipeline    a StableDiffusion(XL)Pipeline on its device, frozen
    path        the folder or file it was read from
    unused      tensors of the files that belong to nothing in this model, by key
    stored      where each parameter lies
    quantised   what keeping the base in fewer bits did, if that was asked for
    notes       what was found out about it that its files do not say, in sentences for its user
    """

    pipeline: Any
    family: Family
    name: str
    path: Path
    unused: tuple[str, ...] = ()
    stored: tuple[Stored, ...] = field(default=(), repr=False)
    quantised: Quantised | None = None
    notes: tuple[str, ...] = ()

    @functools.cached_property
    def model_hash(self) -> str | None:
        """First 10 hex of a single file's SHA-256 (civitai's AutoV2); None for a folder."""
        if self.path.is_dir():
            return None
        with self.path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()[:10]

    def checkpoint_tensors(self) -> Iterator[tuple[str, str, Tensor]]:
        """(component, live parameter name, tensor), every parameter once, read from disk again.

        Shapes are the live model's, the dtype is the file's: `tensor.to(live.dtype)` equals an untouched live
        parameter bit for bit. Raises FileRefused if a file has changed since.
        """
        for part in self.stored:
            for name, tensor in part.tensors():
                yield part.component, name, tensor

    def original(self, component: str, name: str) -> Tensor:
        """One parameter by its live name, read from disk again: W0 where the live model keeps it in fewer bits."""
        return self._stored(component).tensor(name)

    def offload(self, component: str) -> None:
        """The weights of a part that is as it was read leave memory (they are on the meta device) until `reload`."""
        for module in getattr(self.pipeline, component).modules():
            for name, p in module.named_parameters(recurse=False):
                module.register_parameter(name, nn.Parameter(torch.empty_like(p, device="meta"), False))

    def reload(self, component: str, device: torch.device) -> None:
        """Read them from disk again, in the precision they had. FileRefused if a file has changed since."""
        module = getattr(self.pipeline, component)
        fill(module, self._stored(component), device=device, dtype=module.dtype)

    def reread(self, component: str, name: str) -> Tensor:
        """`original`, of a base that may have been exchanged meanwhile: FileRefused if its file has changed since."""
        stored = self._stored(component)
        stored.check_unchanged()
        return stored.tensor(name)

    def _stored(self, component: str) -> Stored:
        return next(part for part in self.stored if part.component == component)


@dataclass(frozen=True, eq=False)
class FoundBase:
    """A base model on disk, measured and checked, its weights not yet read: the modules of `parts` are on the meta
    device.

    told    whether it is known what the UNet predicts; else it has to be measured (`settled`)
    """

    family: Family
    name: str
    path: Path
    parts: dict[str, Any]
    stored: tuple[Stored, ...]
    unused: tuple[str, ...]
    told: bool = True

    @functools.cached_property
    def pipeline(self) -> Any:
        """A StableDiffusion(XL)Pipeline of the parts as they are."""
        return _assemble(self.parts)

    def settled(self) -> FoundBase:
        """Itself, with what the UNet predicts known: where it is not told, the model is opened for a moment."""
        if self.told:
            return self
        scheduler = open_base(self.path).pipeline.scheduler
        return find_base(self.path, prediction=scheduler.config.prediction_type)


def find_base(source: str | Path, *, prediction: str | None = None) -> FoundBase:
    """`open_base` without its last step, for those who want a few tensors or none. Raises FileRefused, ConfigError."""
    check(prediction)
    name, path = find_source(source)
    made = in_folder(path) if path.is_dir() else in_file(path)
    found = FoundBase(made.family, name, path, made.by_name, made.stored, made.unused, made.told)
    if (found.family.key == "sdxl") != ("text_encoder_2" in found.parts):
        raise FileRefused(
            f"{name} has the UNet of {found.family.title} but not its text encoders: its parts belong to different "
            "models. Download it again."
        )
    prediction = prediction or made.prediction
    return _predicting(found, prediction) if prediction else found


def _predicting(found: FoundBase, prediction: str) -> FoundBase:
    """The same whose UNet is known to predict this; the size of its pictures follows where nothing says it."""
    own = found.parts["scheduler"]
    found.parts["scheduler"] = type(own).from_config(own.config, prediction_type=prediction)
    if found.family.key == "sd2" and not found.path.is_dir():
        found.parts["unet"].register_to_config(sample_size=_SD2_SIDES[prediction])
    return replace(found, told=True)


def open_base(
    source: str | Path,
    *,
    device: Any = None,
    dtype: torch.dtype | None = None,
    quantize: str | None = None,
    prediction: str | None = None,
) -> OpenedBase:
    """Open "demo", a diffusers folder, a single .safetensors checkpoint or a hub id.

    device None is the best there is (cuda, mps, cpu); dtype None is fp16 on cuda and fp32 elsewhere. `quantize`
    "nf4", "int8" or "fp8" keeps the UNet and the text encoders in fewer bits (quantised.py); they are read into main
    memory and packed on their way to the device. `prediction` "epsilon" or "v_prediction" is what the UNet predicts,
    against whatever the files say; where they say nothing and it is not given, it is measured (prediction.py).

    Raises LoraError where a model cannot be quantised or its prediction is not clear, and FileRefused, whose sentence
    says what was found, what was expected and what to do. Tensors that nothing needs are named in a warning and in
    `unused`.
    """
    device = torch.device(device) if device is not None else _best_device()
    dtype = dtype or (torch.float16 if device.type == "cuda" else torch.float32)
    found = find_base(source, prediction=prediction)
    refuse_unknown(quantize)
    for part in found.stored:  # now that nothing can be refused any more: this reads gigabytes
        fill(found.parts[part.component], part, device="cpu" if quantize else device, dtype=dtype)
    models = {c: found.parts[c] for c in COMPONENTS if c in found.parts}
    packed = quantise(models, quantize, device) if quantize else None
    _assemble(found.parts).to(device)  # weights are there already: this moves the buffers
    notes: tuple[str, ...] = ()
    if not found.told:
        found, note = _measure(found)
        notes = (note,)
    if found.unused:
        shown = ", ".join(found.unused[:5]) + (
            f" and {len(found.unused) - 5} more" if len(found.unused) > 5 else ""
        )
        warnings.warn(
            f"{found.name}: {len(found.unused)} tensors belong to nothing in an {found.family.title} model and are "
            f"not used: {shown}.",
            stacklevel=2,
        )
    return OpenedBase(
        found.pipeline, found.family, found.name, found.path, found.unused, found.stored, packed, notes
    )


def _measure(found: FoundBase) -> tuple[FoundBase, str]:
    """-> the same with what its UNet predicts, and how that was found out. LoraError where it is not clear."""
    prediction, likeness = measured(_assemble(found.parts))
    if prediction is None:
        raise PredictionUnclear(
            f"{found.name} does not say whether its UNet predicts noise or velocity, and trying it out does not tell "
            f'(a correlation of {likeness:.2f}). Give prediction = "epsilon" or "v_prediction" (--prediction), or put '
            f"{found.path.stem}.yaml with the line parameterization: v (or eps) beside it; 768-v models predict v."
        )
    return _predicting(found, prediction), (
        f"{found.name} does not say what its UNet predicts; tried out, it is {NAMES[prediction]}."
    )


def _assemble(parts: dict[str, Any]) -> Any:
    if "text_encoder_2" in parts:
        return StableDiffusionXLPipeline(**parts, add_watermarker=False)
    return StableDiffusionPipeline(
        **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )


def _best_device() -> torch.device:
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
