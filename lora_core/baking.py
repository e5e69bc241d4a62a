"""A standalone model with LoRAs in it (PEFT's merge and unload): a checkpoint that needs no LoRA any more.

    bake("sd15.safetensors", [(ink, 0.8)], "sd15-ink.safetensors")   # one file, in the original layout
    live.bake("my-model", dtype=torch.float16)                       # what a LivePipeline wears, as a diffusers folder

Every tensor is round(fp32(W0) + sum w ΔW) from the untouched W0, rounded once, to the new file's dtype: made, written,
read back and compared one at a time. Opened in the dtype it was written in, the model is the fused one bit for bit.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lora_core.adapter import COMPONENTS, Adapter, file_path, is_finite, weight_of
from lora_core.baking_file import write_single_file
from lora_core.base_weights import bias_of
from lora_core.deltas import Delta
from lora_core.deltas.bias import WithBias
from lora_core.dtypes import DTYPES
from lora_core.errors import ConfigError, FileRefused, LoraError, NotFinite, SaveFailed
from lora_core.facts import Coverage
from lora_core.families import check_belongs
from lora_core.folding import fold, fold_bias
from lora_core.formats.files import read_adapter
from lora_core.formats.metadata import MODELSPEC, parent, without_paths
from lora_core.lower_rank import Lost
from lora_core.mix import AdapterWeight, WeightValue
from lora_core.model_weights import ModelWeights, weights_of
from lora_core.models import find_base
from lora_core.replication import read_map
from lora_core.safe_files import stream_tensors
from lora_core.safe_writes import write_folder_atomic
from lora_core.worn import wear

FROM = "lora_loom.baked"  # metadata: JSON, which LoRAs and at which weights
BASE = "lora_loom.base"  # metadata: the base model's name
_FILES = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model"}  # text encoders: "model"
_TOKENIZERS = ("tokenizer", "tokenizer_2")

Loras = Sequence[tuple[Adapter | str | Path, WeightValue]]


@dataclass(frozen=True)
class Baked:
    """`changed` layers of the new model at `path` differ from the base's; `unused`: what of the LoRAs the base has no
    place for; `rounded`: the share of |sum w ΔW| that was lost in rounding to the file's dtypes."""

    path: Path
    changed: int
    unused: tuple[str, ...]
    rounded: float

    def __str__(self) -> str:
        tail = f"; not used: {', '.join(self.unused)}" if self.unused else ""
        return (
            f"{self.path.name}: {self.changed} layers changed, {self.rounded:.2g} of the change lost in rounding, all "
            f"tensors read back and compared{tail}"
        )


@torch.no_grad()
def bake(
    base: Any,
    loras: Loras,
    out: str | Path,
    *,
    dtype: torch.dtype | None = None,
    metadata: Mapping[str, str] | None = None,
    overwrite: bool = False,
) -> Baked:
    """Write `base` with `loras` (LoRA or its file, weight) fused in, as a diffusers folder or, where `out` ends in
    .safetensors, as one file.

    base        what `open_base` takes, or an opened model, which is not written to; where it came from files, W0 is
                read from them again
    dtype       float16, bfloat16 or float32 for all tensors; None: each as the base has it
    metadata    added to the file's own, and wins over it
    overwrite   a file that exists may be replaced; a folder never is

    Raises LoraError where `out` exists, for weights that move over the steps, and where none of a LoRA's layers exist
    in the base; ConfigError for a model that one file cannot say; WrongFamily, NotFinite, FileRefused, SaveFailed.
    Whenever it fails, nothing is left behind.
    """
    out = Path(out)
    if dtype is not None and dtype not in DTYPES.values():
        raise ConfigError(f"dtype = {dtype} cannot hold a model: use float16, bfloat16 or float32 of torch.")
    if out.exists() and not (overwrite and out.is_file() and out.suffix == ".safetensors"):
        raise LoraError(f"{out} exists already. Choose another name, or remove it first.")
    weights = weights_of(base, pristine=True, settled=True)
    model = Fused(weights, loras, dtype)
    facts = {**_facts(weights, model.said), **{k: without_paths(v) for k, v in (metadata or {}).items()}}
    if out.suffix == ".safetensors":
        write_single_file(model, out, facts)
    else:
        write_folder_atomic(out, lambda folder: _write_folder(model, folder, facts))
    return Baked(out, len(model.changes), model.unused, model.rounded.share)


class Fused:
    """The new model's tensors, each made when it is asked for."""

    def __init__(self, weights: ModelWeights, loras: Loras, dtype: torch.dtype | None) -> None:
        self.weights, self.dtype = weights, dtype
        self.layers = weights.layers()
        self.changes: dict[str, list[tuple[float, Delta]]] = {}
        self.said: list[dict[str, Any]] = []
        self.unused: tuple[str, ...] = ()
        self.rounded = Lost()
        for source, value in loras:
            adapter = source if isinstance(source, Adapter) else read_adapter(source)
            self._add(adapter, AdapterWeight.parse(adapter.name or "lora", value))

    def _add(self, adapter: Adapter, weight: AdapterWeight) -> None:
        name = adapter.name or "lora"
        adapter.check_finite()
        found = check_belongs(adapter, self.weights.models, self.weights.family)
        if weight.moving or weight.half != "both":
            what = "a curve over the steps" if weight.moving else "the prompt's half alone"
            raise LoraError(f'"{name}" is set to {what}, which no file of weights can say. Set it plainly.')
        if adapter.embeddings:
            raise LoraError(
                f'"{name}" has new words ({", ".join(adapter.embeddings)}), which are no weights of the model: baked, '
                "it would not know them. Load the LoRA instead, or bake one without."
            )
        if read_map(adapter.metadata):
            raise LoraError(
                f'"{name}" is made for replicated layers, which share their weights and could not have a change each. '
                "Load the LoRA instead."
            )
        if not found:
            raise LoraError(
                f'None of the {len(adapter.deltas)} layers of "{name}" exist in {self.weights.name}: nothing was '
                "written."
            )
        for path, layer in found.items():
            if weight.at(path):
                delta = adapter.deltas[path]
                if isinstance(delta, WithBias) and delta.acts(has_bias=layer.bias is not None):
                    bias_of(layer, path)  # refused where there is none
                self.changes.setdefault(path, []).append((weight.at(path), adapter.deltas[path]))
        self.unused += Coverage.of(adapter, found).unused
        self.said.append(parent(adapter, weight.plain))

    def components(self) -> list[str]:
        return list(self.weights.models)

    def names(self, component: str) -> list[str]:
        return [name for name, _ in self.weights.models[component].named_parameters()]

    def outline(self, component: str, name: str) -> tuple[torch.dtype, tuple[int, ...]]:
        """dtype and shape, without making it."""
        parameter = self.weights.models[component].get_parameter(name)
        own = self.weights.dtype_of(component, name)
        if self.dtype is None and own not in DTYPES.values():
            raise ConfigError(
                f"{component}.{name} of {self.weights.name} is stored as {own}: fused, the LoRA would be rounded away. "
                "Say which dtype the new model is to have, such as float16."
            )
        return self.dtype or own, tuple(parameter.shape)

    def tensor(self, component: str, name: str) -> Tensor:
        dtype, _ = self.outline(component, name)
        made = self._tensor(component, name, dtype)
        if not is_finite(made):
            raise NotFinite(
                f"{component}.{name} reaches values that {dtype} cannot hold. Write the model in float32 or bfloat16."
            )
        return made

    def _tensor(self, component: str, name: str, dtype: torch.dtype) -> Tensor:
        inside, _, kind = name.rpartition(".")
        path = file_path(component, inside)
        weighted = self.changes.get(path, []) if component in COMPONENTS else []
        if kind == "weight" and weighted:
            return _fused_weight(self.layers[path], path, weighted, dtype, self.rounded)
        tensor = self.weights.read(component, name)
        if kind == "bias":
            changes = [(w, delta.bias_change(tensor)) for w, delta in weighted if isinstance(delta, WithBias)]
            known = [(w, change) for w, change in changes if change is not None]
            return fold_bias(torch.empty_like(tensor, dtype=dtype), tensor, known)
        return tensor.to(dtype)


def _fused_weight(
    layer: nn.Module, path: str, weighted: Sequence[tuple[float, Delta]], dtype: torch.dtype, rounded: Lost
) -> Tensor:
    """As BaseWeights.fuse, into a tensor of its own."""
    w0 = weight_of(layer).detach()
    exact = torch.empty(w0.shape, dtype=torch.float32, device=w0.device)
    fold(exact, w0, [(weight, wear("", delta, layer, path, w0)) for weight, delta in weighted])
    target = exact.to(dtype)
    rounded.add((exact - w0).square().sum(), (exact - target).square().sum())
    return target


def _facts(weights: ModelWeights, said: list[dict[str, Any]]) -> dict[str, str]:
    row = weights.family
    return {
        BASE: without_paths(weights.name),
        FROM: without_paths(json.dumps(said)),
        "modelspec.sai_model_spec": MODELSPEC,
        "modelspec.architecture": row.architectures[-1 if weights.v_prediction else 0].removesuffix("/lora"),
        "modelspec.prediction_type": "v" if weights.v_prediction else "epsilon",
        "modelspec.merged_from": ", ".join([weights.name, *(str(one["name"]) for one in said)]),
    }


# --- a folder ------------------------------------------------------------------------------------------------


def _write_folder(model: Fused, folder: Path, facts: Mapping[str, str]) -> None:
    pipeline = model.weights.pipeline
    for component in model.components():
        (folder / component).mkdir()
        names = {_spelled(component, name): name for name in model.names(component)}
        outlines = {key: model.outline(component, name) for key, name in names.items()}
        # transformers and diffusers open no file without "format"
        stream_tensors(
            folder / component / f"{_FILES.get(component, 'model')}.safetensors",
            outlines,
            lambda key, c=component, own=names: model.tensor(c, own[key]),  # type: ignore[misc]
            {**facts, "format": "pt"},
        )
        part: Any = model.weights.models[component]
        written = json.loads((part if component in _FILES else part.config).to_json_string())
        if component not in _FILES:
            written["dtype"] = str(next(iter(outlines.values()))[0]).removeprefix("torch.")
        _write_json(folder / component / "config.json", written)
    pipeline.scheduler.save_pretrained(folder / "scheduler")
    for name in _TOKENIZERS:
        if getattr(pipeline, name, None) is not None:
            getattr(pipeline, name).save_pretrained(folder / name)
    kept = {*model.components(), "scheduler", *_TOKENIZERS}
    index = {
        key: value if key in kept else [None, None] if isinstance(value, list) else value
        for key, value in json.loads(pipeline.to_json_string()).items()
    }
    index |= {"requires_safety_checker": False} if "requires_safety_checker" in index else {}
    _write_json(folder / "model_index.json", index)
    try:
        find_base(folder)
    except FileRefused as problem:
        raise SaveFailed(
            f"The model could not be saved: what was written could not be opened ({problem})"
        ) from problem


def _spelled(component: str, name: str) -> str:
    """Text encoders as every repository has them: transformers 5 alone leaves `text_model.` out."""
    return file_path(component, name).removeprefix(f"{component}.") if component != "vae" else name


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
