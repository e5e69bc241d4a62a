"""A baked model as one file in the layout of the original checkpoints (ldm_names), which A1111, Forge and ComfyUI open.

Beside the parameters it has what these expect: in SD 2 the last layer of OpenCLIP, which no Stable Diffusion uses
(kohya's trainer writes a copy of the one before); in v models the empty tensor v_pred, and ztsnr where the noise
schedule ends without any signal (ComfyUI's and NoobAI's marks).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lora_core.clip_vocabulary import clip_vocabulary
from lora_core.errors import ConfigError, FileRefused
from lora_core.families import FAMILIES
from lora_core.ldm_names import OPENCLIP, PREFIXES, as_in_file, ldm_keys
from lora_core.safe_files import read_tensors, stream_tensors
from lora_core.safe_header import DTYPES, Header, TensorInfo
from lora_core.single_file import PADS, TOKENIZERS, describe

if TYPE_CHECKING:
    from lora_core.baking import Fused

# Of a configuration, what says nothing of the picture: the size nobody has asked another for, which fp16 the VAE needs,
# ids that CLIP's vocabulary fixes (published configurations have other ones, and nothing reads them).
_ASIDE = {"sample_size", "force_upcast", "bos_token_id", "eos_token_id", "pad_token_id", "projection_dim"}
_SCHEDULE = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "prediction_type")
Outline = tuple[torch.dtype, tuple[int, ...]]


def write_single_file(model: Fused, out: Path, facts: Mapping[str, str]) -> None:
    """Raises ConfigError, before anything is written, for a model that one file cannot say; SaveFailed."""
    weights, family = model.weights, model.weights.family.key
    places: dict[str, list[tuple[int, str, str]]] = {}  # key -> (which part of it, component, parameter)
    for component in weights.models:
        for name, place in ldm_keys(family, component, model.names(component)).items():
            places.setdefault(place.name, []).append((place.part, component, name))
    outlines: dict[str, Outline] = {}
    for key, parts in places.items():
        own = [model.outline(component, name) for _, component, name in sorted(parts)]
        whole = as_in_file(key, [torch.empty(shape, dtype=dtype, device="meta") for dtype, shape in own])
        outlines[key] = whole.dtype, tuple(whole.shape)
    beside = _beside(model, outlines)
    outlines |= {key: outline for key, (outline, _) in beside.items()}
    _refuse_unlike(outlines, dict(facts), weights.pipeline, out.name)

    def made(key: str) -> Tensor:
        if key in beside:
            return beside[key][1]()
        return as_in_file(key, [model.tensor(component, name) for _, component, name in sorted(places[key])])

    stream_tensors(out, outlines, made, facts)


def _refuse_unlike(
    outlines: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    metadata: dict[str, str],
    pipeline: Any,
    name: str,
) -> None:
    """Raise ConfigError unless a file of these tensors (name -> dtype and shape), read back, is this very pipeline.

    A single file has no configuration and no vocabulary: what is not as in every model of its family would be lost.
    """
    kinds = {dtype: kind for kind, dtype in DTYPES.items()}
    infos = {key: TensorInfo(kinds[dtype], shape, 0, 0) for key, (dtype, shape) in outlines.items()}
    try:
        file = describe(Header(infos, metadata, 0, Path(name)))
    except FileRefused as problem:
        raise ConfigError(f"This model cannot be one file: {problem} Write it as a folder.") from problem
    schedule = {key: value for key, value in file.scheduler.items() if key in _SCHEDULE}
    for part, config in {**file.configs, "scheduler": schedule}.items():
        own = getattr(pipeline, part).config
        for key, value in config.items():
            has = own.get(key) if isinstance(own, Mapping) else getattr(own, key, None)
            if key not in _ASIDE and not _alike(has, value):
                raise ConfigError(
                    f"{part}.{key} of this model is {has}; a single file is read as {value}, and cannot say otherwise. "
                    "Write it as a folder."
                )
    for which, pad in zip(TOKENIZERS, PADS[file.family], strict=False):
        tokenizer = getattr(pipeline, which)
        if tokenizer.get_vocab() != clip_vocabulary():
            raise ConfigError(
                f"This model has a vocabulary of its own ({len(tokenizer):,} words); a single file is read with "
                "CLIP's. Write it as a folder."
            )
        if tokenizer.pad_token != pad:
            raise ConfigError(
                f"This model fills short prompts with {tokenizer.pad_token}; a single file of "
                f"{FAMILIES[file.family].title} is read with {pad}. Write it as a folder."
            )


def _alike(has: Any, value: Any) -> bool:
    """(5, 10) and [5, 10] are; 8 and (8, 8) too, as diffusers reads them."""
    if isinstance(value, tuple) and isinstance(has, int) and not isinstance(has, bool):
        has = (has,) * len(value)
    return bool(
        (list(has) if isinstance(has, tuple) else has) == (list(value) if isinstance(value, tuple) else value)
    )


def _beside(model: Fused, outlines: Mapping[str, Outline]) -> dict[str, tuple[Outline, Callable[[], Tensor]]]:
    """What such files have beside the model's parameters: key -> its outline, and a function that makes it."""
    weights, family = model.weights, model.weights.family.key
    found: dict[str, tuple[Outline, Callable[[], Tensor]]] = {}
    config = weights.pipeline.scheduler.config
    said = {"v_pred": weights.v_prediction, "ztsnr": bool(config.get("rescale_betas_zero_snr"))}
    for marker in (name for name, true in said.items() if true):
        found[marker] = (torch.float32, (0,)), lambda: torch.empty(0)
    # OpenCLIP's tensors that Stable Diffusion does not use stay where the base's file has them
    starts = tuple(PREFIXES[f][component] for f, component in OPENCLIP if f == family)
    for key, header in weights.unplaced.items():
        info = header.tensors[key]
        if key.startswith(starts) and DTYPES[info.dtype].is_floating_point:
            dtype = model.dtype or DTYPES[info.dtype]
            found[key] = (
                (dtype, info.shape),
                lambda h=header, k=key, d=dtype: read_tensors(h, [k])[k].to(d),  # type: ignore[misc]
            )
    if family == "sd2":
        found = _last_layer(outlines) | found
    return found


def _last_layer(outlines: Mapping[str, Outline]) -> dict[str, tuple[Outline, Callable[[], Tensor]]]:
    """SD 2's OpenCLIP has a last layer that Stable Diffusion does not use, diffusers' folders lack, and other readers
    build. One that adds nothing to what goes through it stands in for it: where they stop does not matter then."""
    layers = f"{PREFIXES['sd2']['text_encoder']}transformer.resblocks."
    number = max(int(key.removeprefix(layers).split(".")[0]) for key in outlines if key.startswith(layers))
    made: dict[str, tuple[Outline, Callable[[], Tensor]]] = {}
    for key, (dtype, shape) in outlines.items():
        start, inside = f"{layers}{number}.", key.removeprefix(f"{layers}{number}.")
        if key.startswith(start):
            value = 1.0 if inside in ("ln_1.weight", "ln_2.weight") else 0.0
            made[f"{layers}{number + 1}.{inside}"] = (
                (dtype, shape),
                lambda s=shape, v=value, d=dtype: torch.full(s, v, dtype=d),  # type: ignore[misc]
            )
    return made
