"""PEFT's folders: adapter_model.safetensors beside adapter_config.json, a folder for each component.

    base_model.model.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.lora_A.weight
    base_model.model.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.lora_B.default.weight
    base_model.model.text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight    transformers 4, or _2
    base_model.model.encoder.layers.0.self_attn.q_proj.lora_magnitude_vector       transformers 5
    base_model.model.embeddings.token_embedding.lora_embedding_A                   (r, words), its B (width, r)
    base_model.model.conv_in.weight, base_model.model.conv_in.bias                 a module that was saved whole
    base_model.model.mid_block.attentions.0.proj_in.base_layer.bias                a bias that was trained
    base_model.model.mid_block.attentions.0.proj_in.ia3_l                          other methods: see peft_kinds

The alphas stand in adapter_config.json. Which text encoder a file is for stands nowhere: its folder's name
tells, or else its width (1280 is SDXL's second).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from lora_core.adapter import COMPONENTS, Adapter
from lora_core.deltas.low_rank import LowRank
from lora_core.errors import FileRefused, SaveFailed
from lora_core.formats.assembly import Load, Part, Reading, assemble
from lora_core.formats.diffusers import for_peft
from lora_core.formats.endings import role_of
from lora_core.formats.keys import adapter_path, is_embedding
from lora_core.formats.peft_config import Alphas, config_of, in_config, parse
from lora_core.formats.peft_kinds import OWN_ROLES, kinds_of
from lora_core.formats.writing import low_ranks
from lora_core.replication import KEY
from lora_core.safe_files import Header, read_tensors, save_tensors, write_atomic
from lora_core.safe_writes import write_folder_atomic

Layers = dict[str, tuple[LowRank, Tensor | None]]  # low_ranks' answer
PREFIX = "base_model.model."
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
MAX_CONFIG = 4 * 2**20  # bytes
SECOND_ENCODER_WIDTH = 1280
_INITS_THAT_MOVE_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora")  # the last is LoRA-GA's lora_ga
_OTHER_THAN_LORA = (
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
    "use_bdlora",
    "use_qalora",
)
_WRAPPED = re.compile(r"\.(?:base_layer|modules_to_save(?:\.[A-Za-z]\w*)?)$")


class Peft:
    name = "peft"

    def recognises(self, header: Header) -> bool:
        """Others put the same prefix before their own keys, with an alpha for each layer: those are read by name."""
        keys = header.tensors
        return any(key.startswith(PREFIX) for key in keys) and not any(key.endswith(".alpha") for key in keys)

    def read(self, header: Header, load: Load = read_tensors) -> Reading:
        config = _read_config(header)
        alphas = Alphas(config, CONFIG)
        encoder = _text_encoder(header, config)

        def spell(key: str) -> Part | None:
            known = _role_of(key.removeprefix(PREFIX), header) if key.startswith(PREFIX) else None
            if known is None:
                return None
            name, role = known
            path = adapter_path("unet", name) or adapter_path(encoder, name)
            return None if path is None else Part(path, role)

        reading = assemble(
            header,
            spell,
            load=load,
            alpha_of=lambda path, rank: alphas.of(in_config(path.partition(".")[2]), rank),
            kinds=kinds_of(config, CONFIG),
        )
        if not reading.deltas and any(spell(key) for key in header.tensors):
            raise FileRefused(
                f"{header.path.name} holds no {config.get('peft_type', 'LORA')} layer, which {CONFIG} beside it says "
                f"it does (its first keys: {', '.join(sorted(header.tensors)[:2])[:160]}). Put the two files of one "
                "LoRA together."
            )
        return reading

    def write(self, adapter: Adapter, path: Path, metadata: dict[str, str]) -> Path:
        """`path` becomes a folder with one folder per component, whole or not there. Into one that exists they are
        written one by one, and files of components that an earlier LoRA had there are removed: read together they
        would be another LoRA."""
        layers = low_ranks(adapter, self.name)
        if path.exists():
            self._write(adapter, layers, path, metadata)
        else:
            write_folder_atomic(path, lambda folder: self._write(adapter, layers, folder, metadata))
        return path

    def _write(self, adapter: Adapter, layers: Layers, path: Path, metadata: dict[str, str]) -> None:
        # transformers 5 names the first encoder's modules without text_model, the second's with it
        as_model = {"unet": "", "text_encoder": "text_model.", "text_encoder_2": ""}
        parts: dict[
            str, tuple[dict[str, Any], dict[str, Tensor]]
        ] = {}  # all of it before any of it is written
        for component in adapter.components():
            deltas = {p: d for p, d in adapter.deltas.items() if p.startswith(f"{component}.")}
            config = config_of({in_config(p.partition(".")[2]): d for p, d in deltas.items()}, self.name)
            tensors: dict[str, Tensor] = {}
            for layer in deltas:
                low, magnitude = layers[layer]
                name = PREFIX + layer.partition(".")[2].removeprefix(as_model[component] or "\0")
                if is_embedding(layer):
                    tensors[f"{name}.lora_embedding_A"] = low.up.T
                    tensors[f"{name}.lora_embedding_B"] = low.down.T
                else:
                    tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"] = low.down, low.up
                if magnitude is not None:
                    tensors[f"{name}.lora_magnitude_vector"] = for_peft(layer, magnitude, self.name)
            parts[component] = config, tensors
        for component, (config, tensors) in parts.items():
            folder = path / component
            _make(folder)
            text = json.dumps(config, indent=2, sort_keys=True)
            write_atomic(folder / CONFIG, partial(_write_text, text))
            save_tensors(folder / WEIGHTS, tensors, {**metadata, "format": "pt"})
        for component in set(COMPONENTS) - set(adapter.components()):
            for stale in (path / component / WEIGHTS, path / component / CONFIG):
                stale.unlink(missing_ok=True)


def weight_files(folder: Path) -> list[Path]:
    """The files of a LoRA that is a folder: PEFT's, with or without one per component, or diffusers' own.

    Raises FileRefused if there are none.
    """
    candidates = (
        [folder / WEIGHTS],
        [folder / component / WEIGHTS for component in COMPONENTS],
        [folder / "pytorch_lora_weights.safetensors"],
    )
    for files in candidates:
        if found := [file for file in files if file.is_file()]:
            return found
    if (folder / "model_index.json").is_file():
        raise FileRefused(
            f"{folder.name} is a base model in diffusers' layout, not a LoRA. Choose a LoRA's folder or its "
            ".safetensors file."
        )
    raise FileRefused(
        f"{folder.name} is a folder without {WEIGHTS}, in itself or in folders named "
        f"{', '.join(COMPONENTS)}. Choose a LoRA's folder or its .safetensors file."
    )


def _role_of(key: str, header: Header) -> tuple[str, str] | None:
    """`key` without PEFT's prefix -> name of the layer, role. What ends like a module's own parameter is one: of a
    module that was saved whole, or a bias that was trained."""
    for ending, role in OWN_ROLES.items():
        if key.endswith(f".{ending}"):
            return key.removesuffix(f".{ending}"), role
    known = role_of(key, header.tensors)
    if known is not None:
        return known
    name, _, last = key.rpartition(".")
    own = {"weight": "value", "bias": "bias_value"}.get(last)
    return None if own is None else (_WRAPPED.sub("", name), own)


def _read_config(header: Header) -> dict[str, Any]:
    """adapter_config.json beside the weights. Raises FileRefused for one that cannot be read, or that says what these
    weights alone do not tell."""
    path = header.path.with_name(CONFIG)
    try:
        if path.stat().st_size > MAX_CONFIG:
            raise FileRefused(f"{path.name} has more than {MAX_CONFIG:,} bytes: it is no PEFT configuration.")
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as problem:
        raise FileRefused(
            f"{path.name} cannot be read beside {WEIGHTS} in {path.parent.name}: without it alpha is "
            "unknown. Put it there."
        ) from problem
    config = parse(text, path.name)
    init = str(config.get("init_lora_weights", "")).partition("_")[0]
    if init in _INITS_THAT_MOVE_THE_BASE and config.get("peft_type", "LORA") == "LORA":
        raise FileRefused(
            f"{path.name} says init_lora_weights = {init}: these factors are for the base as that changed it, and not "
            "for the base itself. Save it with path_initial_model_for_weight_conversion: that makes a plain LoRA of it."
        )
    for variant in _OTHER_THAN_LORA:
        if config.get(variant):
            raise FileRefused(
                f"{path.name} has {variant}: its layers compute something else than a LoRA does, which this version "
                "cannot read. Merge it with PEFT and extract a LoRA."
            )
    if config.get("layer_replication") and KEY not in header.metadata:
        raise FileRefused(
            f"{path.name} has layer_replication, which PEFT itself has for no model of Stable Diffusion: which layers "
            "it means is not known. Use a LoRA for the model as it is."
        )
    return config


def _text_encoder(header: Header, config: Mapping[str, Any]) -> str:
    """By the folder's name, by the model's class, or by width."""
    if header.path.parent.name in COMPONENTS[1:]:
        return header.path.parent.name
    classes = config.get("auto_mapping")
    if isinstance(classes, dict) and classes.get("base_model_class") == "CLIPTextModelWithProjection":
        return COMPONENTS[2]
    sides = {n for key, info in header.tensors.items() if "_proj." in key for n in info.shape}
    return COMPONENTS[2] if SECOND_ENCODER_WIDTH in sides else COMPONENTS[1]


def _write_text(text: str, path: Path) -> None:
    path.write_text(text, "utf-8")


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        raise SaveFailed(
            f"The folder {folder} could not be made: {problem.strerror}. Choose another place for it."
        ) from problem
