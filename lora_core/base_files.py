"""A base model's tensors on disk: which file and key holds which live parameter, and reading them.

Diffusers folders spell a parameter as the model does, with exceptions that old and new libraries left behind:

    text_encoder   text_model.encoder.layers.0...   transformers 5 dropped the prefix from the live names
    vae            mid_block.attentions.0.query     to_q since 2023; key, value and proj_attn likewise

Nothing is taken for granted: a parameter without a tensor, a wrong shape or a leftover is said.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lora_core.errors import FileRefused
from lora_core.families import by, compatible
from lora_core.ldm_names import Key
from lora_core.safe_files import Header, read_header, read_rows, read_tensors
from lora_core.safe_header import DTYPES

_OLD_ATTENTION = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
PIPELINES = ("StableDiffusionPipeline", "StableDiffusionXLPipeline")
# Most that is accepted of what multiplies parts; real models have at most 2, 10, 10 and 32, on 4 levels.
_COUNTS = {
    "layers_per_block": 8,
    "transformer_layers_per_block": 32,
    "reverse_transformer_layers_per_block": 32,
    "num_hidden_layers": 96,
}
_LEVELS = 16
_BUFFERS = re.compile(r"(.*\.)?position_ids")  # 0..76, which the model counts by itself


@dataclass(frozen=True, eq=False)
class Stored:
    """One component on disk: live parameter name -> (file, where in it), and the shape it has in the model."""

    component: str
    places: dict[str, tuple[Header, Key]]
    shapes: dict[str, tuple[int, ...]]
    unused: tuple[str, ...] = ()

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Live name and tensor, in the model's shape and the file's dtype, one after the other from the disk.

        Raises FileRefused if a file is no longer the one that was opened.
        """
        self.check_unchanged()
        for name in self.places:
            yield name, self.tensor(name)

    def tensor(self, name: str) -> Tensor:
        """One of them, read now. Changed files are not noticed: see check_unchanged."""
        header, key = self.places[name]
        if key.of > 1:
            rows = header.tensors[key.name].shape[0] // key.of
            tensor = read_rows(header, key.name, key.part * rows, (key.part + 1) * rows)
        else:
            tensor = read_tensors(header, [key.name])[key.name]
        return (tensor.T.contiguous() if key.transposed else tensor).reshape(self.shapes[name])

    def dtype(self, name: str) -> torch.dtype:
        header, key = self.places[name]
        return DTYPES[header.tensors[key.name].dtype]

    def check_unchanged(self) -> None:
        """Raise FileRefused if a file is no longer the one that was opened."""
        for path, known in {header.path: header for header, _ in self.places.values()}.items():
            if read_header(path).tensors != known.tensors:
                raise FileRefused(f"{path.name} has changed on disk since it was opened. Open it again.")


def locate(component: str, model: nn.Module, keys: Mapping[str, Key], headers: Iterable[Header]) -> Stored:
    """Find every parameter of `model` (on any device, meta too) under its key. `keys`: live name -> key.

    Raises FileRefused naming the first tensor that is missing, of another shape, or quantised.
    """
    headers = list(headers)
    held = {key: header for header in headers for key in header.tensors}
    files = ", ".join(header.path.name for header in headers)
    places, shapes = {}, {}
    for name, parameter in model.named_parameters():
        key, shape = keys[name], tuple(parameter.shape)
        if key.name not in held:
            raise FileRefused(
                f"{files} lacks {key.name}, which its {component} needs: the file is incomplete or of another "
                "kind of model. Download it again, or open another."
            )
        info = held[key.name].tensors[key.name]
        whole = (shape[0] * key.of, *shape[1:]) if not key.transposed else shape[::-1]
        if not compatible(info.shape, whole):
            raise FileRefused(
                f"{key.name} in {files} is {by(info.shape)}; {by(whole)} was expected from the rest of the "
                "model. The file is of another kind of model, or damaged. Open another."
            )
        if not DTYPES[info.dtype].is_floating_point:
            raise FileRefused(
                f"{key.name} in {files} is stored as {info.dtype}, quantised for another program; F16, BF16 or "
                "F32 was expected. Open a file that is not quantised."
            )
        places[name], shapes[name] = (held[key.name], key), shape
    used = {key.name for _, key in places.values()}
    unused = tuple(key for key in held if key not in used and not _BUFFERS.fullmatch(key))
    return Stored(component, places, shapes, unused)


def folder_keys(names: Iterable[str], headers: Iterable[Header]) -> dict[str, Key]:
    """Live name -> the spelling these files use for it; a name they do not have at all stays as it is."""
    held = {key for header in headers for key in header.tensors}
    return {name: Key(next((s for s in _spellings(name) if s in held), name)) for name in names}


def _spellings(name: str) -> Iterator[str]:
    yield name
    yield f"text_model.{name}"
    yield name.removeprefix("text_model.")
    for new, old in _OLD_ATTENTION.items():
        yield re.sub(rf"(mid_block\.attentions\.0)\.{re.escape(new)}\.", rf"\1.{old}.", name)


def fill(model: nn.Module, stored: Stored, *, device: torch.device | str, dtype: torch.dtype) -> None:
    """Give a model built on the meta device its weights, from disk to `device`; frozen, in eval mode."""
    state = {name: tensor.to(device=device, dtype=dtype) for name, tensor in stored.tensors()}
    model.load_state_dict(state, assign=True, strict=True)
    for path, module in model.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_meta:
                if name != "position_ids":
                    raise RuntimeError(
                        f"{path}.{name} of {stored.component} has no value on disk and none known here"
                    )
                module.register_buffer(name, torch.arange(buffer.shape[-1])[None], persistent=False)
    model.eval().requires_grad_(False)


def weight_files(folder: Path) -> list[Header]:
    """The checked headers of a component's weights, all shards of it; plain files before fp16 ones.

    Raises FileRefused where there are none that can be read safely.
    """
    for stem in ("diffusion_pytorch_model", "model"):
        for variant in ("", ".fp16"):
            index = folder / f"{stem}.safetensors.index{variant}.json"
            if index.is_file():
                return [read_header(path) for path in _shards(index)]
            single = folder / f"{stem}{variant}.safetensors"
            if single.is_file():
                return [read_header(single)]
    where = f"{folder.parent.name}/{folder.name}"
    pickles = sorted(p.name for p in folder.glob("*") if p.suffix in (".bin", ".pt", ".ckpt"))
    if pickles:
        raise FileRefused(
            f"{where} holds {pickles[0]}, which can run code when opened; only .safetensors is read. Get "
            "the safetensors version of this model."
        )
    raise FileRefused(f"{where} holds no weights; model.safetensors was expected. Download the model again.")


def _shards(index: Path) -> list[Path]:
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise FileRefused(f"{index.name} lists no shards. Download the model again.")
    shards = sorted({str(name) for name in names.values()})
    for name in shards:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise FileRefused(
                f'{index.name} names "{name}", which is no .safetensors file beside it. Do not use it.'
            )
    return [index.parent / name for name in shards]


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a model folder. Raises FileRefused, saying which file it was."""
    where = f"{path.parent.name}/{path.name}"
    try:
        if path.stat().st_size > 2**20:
            raise FileRefused(
                f"{where} is larger than a configuration can be (1 MiB). Download the model again."
            )
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as problem:
        raise FileRefused(
            f"{where} cannot be read ({problem.strerror}). Download the model again."
        ) from problem
    except (ValueError, RecursionError) as problem:
        raise FileRefused(f"{where} is no valid JSON ({problem}). Download the model again.") from problem
    if not isinstance(content, dict):
        raise FileRefused(f"{where} holds a {type(content).__name__}; a JSON object was expected.")
    return content


def model_index(folder: Path) -> dict[str, Any]:
    """model_index.json of a Stable Diffusion folder. Raises FileRefused for any other, saying what it is."""
    if (folder / "adapter_config.json").is_file():
        raise FileRefused(
            f"{folder.name} is a LoRA in PEFT's layout, not a base model. Open a base model first, then "
            "load it."
        )
    if not (folder / "model_index.json").is_file():
        files = sorted(p.name for p in folder.glob("*.safetensors"))
        advice = f"Open {files[0]} in it instead." if files else "Choose the folder that has it."
        raise FileRefused(
            f"{folder.name} is no diffusers model: model_index.json was expected in it. {advice}"
        )
    index = read_json(folder / "model_index.json")
    found = index.get("_class_name")
    if found not in PIPELINES:
        raise FileRefused(
            f"{folder.name} is a {found}; {' or '.join(PIPELINES)} was expected. Open an SD 1.x, SD 2.x or "
            "SDXL model."
        )
    return index


def class_in(index: dict[str, Any], part: str) -> str:
    """model_index.json says `"unet": ["diffusers", "UNet2DConditionModel"]` -> the class's name, or ""."""
    entry = index.get(part)
    return str(entry[1] or "") if isinstance(entry, list) and len(entry) == 2 else ""


def check_counts(config: dict[str, Any], where: str) -> None:
    """A configuration that asks for a billion layers would keep the program busy for ever, weights or not."""
    for name, most in _COUNTS.items():
        if any(n is not None and not (isinstance(n, int) and 0 < n <= most) for n in _flat(config.get(name))):
            raise FileRefused(
                f"{where}: {name} = {str(config[name])[:40]} is out of range: use 1 to {most}. Do not use it."
            )
    for name in ("block_out_channels", "down_block_types", "up_block_types"):
        if len(_flat(config.get(name))) > _LEVELS:
            raise FileRefused(f"{where}: {name} lists more than {_LEVELS} levels. Do not use it.")


def _flat(value: object) -> list[object]:
    return [n for part in value for n in _flat(part)] if isinstance(value, list | tuple) else [value]
