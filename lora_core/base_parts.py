"""The parts of a base model, built on the meta device and each parameter found on disk: nothing is read yet."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import torch
from diffusers import AutoencoderKL, SchedulerMixin, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from lora_core.base_files import (
    Stored,
    check_counts,
    class_in,
    folder_keys,
    locate,
    model_index,
    read_json,
    weight_files,
)
from lora_core.clip_vocabulary import SIZE, clip_merges, clip_vocabulary
from lora_core.errors import FileRefused
from lora_core.families import FAMILIES, Family, family_of_unet
from lora_core.prediction import told_beside
from lora_core.safe_files import read_header
from lora_core.single_file import PADS, TOKENIZERS, describe

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


class Parts(NamedTuple):
    """What a pipeline takes, by name, and where the weights lie. `unused`: tensors that belong to nothing.

    prediction  what the UNet predicts, where something beside the scheduler's configuration tells it
    told        whether that or the configuration tells it; a single file need not
    """

    family: Family
    by_name: dict[str, Any]
    stored: tuple[Stored, ...]
    unused: tuple[str, ...]
    prediction: str | None = None
    told: bool = True


def clip_tokenizer(pad: str = "<|endoftext|>") -> CLIPTokenizer:
    """CLIP's tokenizer, from the vocabulary that is shipped; 77 tokens at most, filled up with `pad`."""
    return CLIPTokenizer(
        vocab=clip_vocabulary(), merges=list(clip_merges()), model_max_length=77, pad_token=pad
    )


def in_folder(folder: Path) -> Parts:
    """Of a diffusers folder. Raises FileRefused."""
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
    return Parts(family_of_unet(parts["unet"]), parts, tuple(stored), tuple(unused))


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


def in_file(path: Path) -> Parts:
    """Of a single .safetensors checkpoint. Raises FileRefused."""
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
    return Parts(FAMILIES[file.family], parts, tuple(stored), unused, told, told is not None)


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
