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
import inspect
import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import (
    AutoencoderKL,
    SchedulerMixin,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from huggingface_hub import snapshot_download
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from lora_core.adapter import COMPONENTS
from lora_core.base_files import (
    Stored,
    check_counts,
    class_in,
    fill,
    folder_keys,
    locate,
    model_index,
    read_json,
    weight_files,
)
from lora_core.clip_vocabulary import SIZE, clip_merges, clip_vocabulary
from lora_core.errors import FileRefused, LoraError
from lora_core.families import FAMILIES, Family, family_of_unet
from lora_core.prediction import NAMES, check, measured, told_beside
from lora_core.quantised import Quantised, quantise, refuse_unknown
from lora_core.safe_files import read_header
from lora_core.single_file import PADS, TOKENIZERS, describe

DEMO = Path(__file__).resolve().parent.parent / "presets" / "demo" / "base"
PICKLES = (".ckpt", ".pt", ".pth", ".bin")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_HUB_FILES = ["model_index.json", "scheduler/*.json", "tokenizer*/*", "*/config.json"]
# SD 2's base models drew at 512 pixels, its v models at 768: sides of a latent.
_SD2_SIDES = {"epsilon": 64, "v_prediction": 96}
Build = Callable[[dict[str, Any]], nn.Module]
_BUILDERS: dict[str, Build] = {
    "UNet2DConditionModel": UNet2DConditionModel.from_config,
    "AutoencoderKL": AutoencoderKL.from_config,
    "CLIPTextModel": lambda config: CLIPTextModel(CLIPTextConfig.from_dict(config)),
    "CLIPTextModelWithProjection": lambda config: CLIPTextModelWithProjection(
        CLIPTextConfig.from_dict(config)
    ),
}
_EXPECTED = {
    "unet": "UNet2DConditionModel",
    "vae": "AutoencoderKL",
    "text_encoder": "CLIPTextModel",
    "text_encoder_2": "CLIPTextModelWithProjection",
}


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
        part = next(part for part in self.stored if part.component == component)
        return part.tensor(name)


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
    name, path = _find(source)
    found = _folder(path, name) if path.is_dir() else _single(path, name)
    if (found.family.key == "sdxl") != ("text_encoder_2" in found.parts):
        raise FileRefused(
            f"{name} has the UNet of {found.family.title} but not its text encoders: its parts belong to different "
            "models. Download it again."
        )
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
        raise LoraError(
            f"{found.name} does not say whether its UNet predicts noise or velocity, and trying it out does not tell "
            f'(a correlation of {likeness:.2f}). Give prediction = "epsilon" or "v_prediction" (--prediction), or put '
            f"{found.path.stem}.yaml with the line parameterization: v (or eps) beside it; 768-v models predict v."
        )
    return _predicting(found, prediction), (
        f"{found.name} does not say what its UNet predicts; tried out, it is {NAMES[prediction]}."
    )


def clip_tokenizer(pad: str = "<|endoftext|>") -> CLIPTokenizer:
    """CLIP's tokenizer, from the vocabulary that is shipped; 77 tokens at most, filled up with `pad`."""
    return CLIPTokenizer(
        vocab=clip_vocabulary(), merges=list(clip_merges()), model_max_length=77, pad_token=pad
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


def _find(source: str | Path) -> tuple[str, Path]:
    """-> display name and a path that exists; downloads where the source is a hub id."""
    if source == "demo":
        if not DEMO.is_dir():
            raise FileRefused(
                "The demo base is not in this installation (presets/demo/base is missing). Make it with "
                "`python -m trainers.demo_base`, or open another model."
            )
        return "demo", DEMO
    path = Path(source).expanduser()
    if path.suffix.lower() in PICKLES and not path.is_dir():
        raise FileRefused(
            f"{path.name} is a pickle file ({path.suffix}), which can run code when opened; only "
            ".safetensors is read. Get its .safetensors version, or convert it with a tool you trust, "
            "such as the merger of A1111's web UI."
        )
    if path.is_dir():
        return path.resolve().name, path
    if path.exists():
        return path.stem, path
    if isinstance(source, str) and _HUB_ID.fullmatch(source) and path.suffix != ".safetensors":
        return source.split("/")[1], _download(source)
    raise FileRefused(
        f'"{source}" does not exist; a folder, a .safetensors file or owner/name of the hub was expected.'
    )


def _download(hub_id: str) -> Path:
    """-> the snapshot's folder: configurations and safetensors alone, fp16 ones where there are no others."""
    wanted = [*_HUB_FILES, *(f"{component}/*.safetensors*" for component in _EXPECTED)]
    try:
        for unwanted in (["*.fp16.*", "*.non_ema.*"], ["*.non_ema.*"]):
            folder = Path(snapshot_download(hub_id, allow_patterns=wanted, ignore_patterns=unwanted))
            if list(folder.glob("unet/*.safetensors")):
                break
    except (OSError, ValueError, RuntimeError) as problem:  # the hub's errors are of these kinds
        reason = str(problem).strip().splitlines()[0] if str(problem).strip() else type(problem).__name__
        raise FileRefused(
            f'"{hub_id}" is no folder here, and could not be fetched from the Hugging Face hub ({reason}). '
            "Check the name and the connection, or give the path of a model on this computer."
        ) from problem
    return folder


# --- folders ---


def _folder(folder: Path, name: str) -> FoundBase:
    index = model_index(folder)
    xl = index["_class_name"] == "StableDiffusionXLPipeline"
    components = [c for c in _EXPECTED if xl or c != "text_encoder_2"]
    parts: dict[str, Any] = {}
    stored, unused = [], []
    for component in components:
        found = class_in(index, component)
        if found != _EXPECTED[component]:
            raise FileRefused(
                f"{folder.name} has {found or 'nothing'} as its {component}; {_EXPECTED[component]} was "
                "expected. Open an SD 1.x, SD 2.x or SDXL model."
            )
        headers = weight_files(folder / component)
        model = _build(found, read_json(folder / component / "config.json"), f"{folder.name}/{component}")
        names = [name for name, _ in model.named_parameters()]
        part = locate(component, model, folder_keys(names, headers), headers)
        _refuse_other_unet(folder.name, part)
        parts[component] = model
        stored.append(part)
        unused += [f"{component}: {key}" for key in part.unused]
    parts["scheduler"] = _scheduler(folder, class_in(index, "scheduler"))
    for tokenizer in ["tokenizer", "tokenizer_2"] if xl else ["tokenizer"]:
        parts[tokenizer] = _tokenizer(folder / tokenizer)
    if xl:
        parts["force_zeros_for_empty_prompt"] = bool(index.get("force_zeros_for_empty_prompt", True))
    return FoundBase(family_of_unet(parts["unet"]), name, folder, parts, tuple(stored), tuple(unused))


def _scheduler(folder: Path, name: str) -> Any:
    scheduler: Any = getattr(diffusers, name, None) if name.isidentifier() else None
    known = inspect.isclass(scheduler) and issubclass(scheduler, SchedulerMixin)
    if not known:
        raise FileRefused(f'{folder.name} asks for the scheduler "{name}", which diffusers does not have.')
    config = read_json(folder / "scheduler" / "scheduler_config.json")
    steps = config.get("num_train_timesteps", 1000)
    if not (isinstance(steps, int) and 1 <= steps <= 10_000):
        raise FileRefused(
            f"{folder.name}/scheduler: num_train_timesteps must be 1 to 10,000 (1,000 is usual)."
        )
    try:
        return scheduler.from_config(config)
    except (ValueError, TypeError, NotImplementedError) as problem:
        raise FileRefused(
            f"{folder.name}/scheduler cannot be used ({problem}). Download the model again."
        ) from problem


def _tokenizer(folder: Path) -> CLIPTokenizer:
    try:
        return CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, TypeError, KeyError) as problem:
        raise FileRefused(
            f"{folder.parent.name}/{folder.name} holds no CLIP tokenizer that can be read. Download the "
            "model again."
        ) from problem


# --- single files ---


def _single(path: Path, name: str) -> FoundBase:
    header = read_header(path)
    file = describe(header)
    parts: dict[str, Any] = {}
    stored = []
    for component, config in file.configs.items():
        model = _build(_EXPECTED[component], config, path.name)
        keys = file.keys(component, [name for name, _ in model.named_parameters()])
        stored.append(locate(component, model, keys, [header]))
        parts[component] = model
    unused = file.leftovers({key.name for part in stored for _, key in part.places.values()})
    _refuse_other_unet(
        path.name, Stored("unet", {}, {}, tuple(k for k in unused if k.startswith("model.diffusion_model.")))
    )
    for component in set(file.configs) - {"unet", "vae"}:
        if (words := file.configs[component]["vocab_size"]) > SIZE:
            unused += (f"words {SIZE} to {words - 1} of {component}",)
    settings = dict(file.scheduler)
    parts["scheduler"] = getattr(diffusers, settings.pop("class")).from_config(settings)
    parts |= {which: clip_tokenizer(pad) for which, pad in zip(TOKENIZERS, PADS[file.family], strict=False)}
    told = told_beside(path) or file.told
    found = FoundBase(FAMILIES[file.family], name, path, parts, tuple(stored), unused, told is not None)
    return _predicting(found, told) if told else found


def _build(kind: str, config: dict[str, Any], where: str) -> nn.Module:
    """The module on the meta device: no memory, no time spent on random weights."""
    check_counts(config, where)
    try:
        with torch.device("meta"):
            return _BUILDERS[kind](config)
    except (ValueError, TypeError, LookupError, ArithmeticError, AttributeError, RuntimeError) as problem:
        # libraries' constructors refuse a bad configuration in all these ways
        reason = str(problem).splitlines()[0] if str(problem) else type(problem).__name__
        raise FileRefused(
            f"{where} describes no {kind} that can be built ({reason}). Download the model again, or open "
            "another."
        ) from problem


def _refuse_other_unet(name: str, part: Stored) -> None:
    """A UNet with parts that have no place in ours would draw something else than its makers meant."""
    if part.component == "unet" and part.unused:
        raise FileRefused(
            f"{name} has {len(part.unused)} tensors in its UNet that a plain Stable Diffusion UNet does "
            f"not have ({part.unused[0]}): it is a special model. Open a text-to-image model."
        )
