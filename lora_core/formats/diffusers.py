"""diffusers' dotted spelling, old and new, and the dotted names other programs put before it.

    unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.lora_A.weight            today
    unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.lora.down.weight         2023
    down_blocks.0.attentions.0.transformer_blocks.0.attn1.processor.to_q_lora.down.weight    early 2023
    text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_linear_layer.down.weight  or _2
    text_encoder.encoder.layers.0.mlp.fc1.lora_A.weight                                      transformers 5
    text_encoder.text_model.encoder.layers.0.self_attn.to_q_lora.down.weight                 early 2023
    unet.mid_block.attentions.0.proj_in.lora_magnitude_vector                                DoRA
    diffusion_model.input_blocks.4.1.proj_in.lora_A.weight                                   sgm's names
    text_encoders.clip_l.transformer.text_model.encoder.layers.0.mlp.fc1.lora_A.weight       ComfyUI

No alpha tensors: alpha is the rank, unless the metadata `lora_adapter_metadata` (JSON, PEFT's LoraConfig with
the component before every key) says otherwise.
"""

from __future__ import annotations

import json
import re
from functools import lru_cache
from pathlib import Path
from typing import Any

from torch import Tensor

from lora_core.adapter import Adapter
from lora_core.errors import ConfigError
from lora_core.formats.assembly import Load, Part, Reading, assemble, column_or_refuse, low_ranks
from lora_core.formats.keys import adapter_path, is_embedding
from lora_core.formats.peft_config import Alphas, config_of, parse
from lora_core.safe_files import Header, read_tensors, save_tensors

CONFIG = "lora_adapter_metadata"
PREFIXES = {
    "unet.": "unet",
    "diffusion_model.": "unet",
    "text_encoder_2.": "text_encoder_2",
    "text_encoder.": "text_encoder",
    "text_encoders.clip_l.transformer.": "text_encoder",
    "text_encoders.clip_g.transformer.": "text_encoder_2",
    "": "unet",
}
_UNET_FACTORS = ("lora_A", "lora_B", "lora_magnitude_vector")
# With lora_A diffusers 0.42 cannot load a text encoder trained in its feed-forward layers alone; a magnitude
# without `.weight` transformers 5 leaves out with no more than a line in the log.
_TEXT_FACTORS = ("lora_linear_layer.down", "lora_linear_layer.up", "lora_magnitude_vector.weight")
_ROLES = {"down": "down", "A": "down", "up": "up", "B": "up", "mid": "mid"}
_KEY = re.compile(
    r"(?P<path>.+?)(?:"
    r"[._]lora(?:_linear_layer)?[._](?P<role>down|up|mid|A|B)(?:\.[A-Za-z]\w*)??\.weight"
    r"|\.lora_embedding_(?P<words>A|B)(?:\.[A-Za-z]\w*)??(?:\.weight)?"
    r"|\.(?P<alpha>alpha)"
    r"|\.(?P<magnitude>lora_magnitude_vector|dora_scale)(?:\.[A-Za-z]\w*)??(?:\.weight)?)"
)


class Diffusers:
    name = "diffusers"

    def recognises(self, header: Header) -> bool:
        return any(_KEY.fullmatch(key) for key in header.tensors)

    def read(self, header: Header, load: Load = read_tensors) -> Reading:
        config = parse(header.metadata.get(CONFIG) or "{}", f"{header.path.name}, {CONFIG}")
        alphas = {component: _alphas(config, component, header) for component in set(PREFIXES.values())}

        def alpha_of(path: str, rank: int) -> float:
            component, _, inside = path.partition(".")
            known = alphas[component]
            return float(rank) if known is None else known.of(in_config(inside), rank)

        return assemble(header, _spell, load=load, alpha_of=alpha_of, magnitude_is_output=True)

    def write(self, adapter: Adapter, path: Path, metadata: dict[str, str]) -> Path:
        """The names diffusers itself writes today for the UNet, and reads in the text encoders."""
        layers = low_ranks(adapter, self.name)
        for layer in filter(is_embedding, layers):
            raise ConfigError(
                f"{layer} is an embedding, of which diffusers' loader takes no LoRA. Write it in the kohya or the peft "
                "spelling."
            )
        tensors: dict[str, Tensor] = {}
        config: dict[str, Any] = {}
        for component in adapter.components():
            deltas = {p: d for p, d in adapter.deltas.items() if p.startswith(f"{component}.")}
            described = config_of({in_config(p.partition(".")[2]): d for p, d in deltas.items()}, self.name)
            config |= {f"{component}.{key}": value for key, value in described.items()}
            down, up, gain = _UNET_FACTORS if component == "unet" else _TEXT_FACTORS
            for layer in deltas:
                low, magnitude = layers[layer]
                tensors[f"{layer}.{down}.weight"] = low.down
                tensors[f"{layer}.{up}.weight"] = low.up
                if magnitude is not None:
                    tensors[f"{layer}.{gain}"] = for_peft(layer, magnitude, self.name)
        save_tensors(path, tensors, {**metadata, "format": "pt", CONFIG: json.dumps(config, sort_keys=True)})
        return path


def in_config(inside: str) -> str:
    """A layer as PEFT's patterns name it: they match the end of a path, so without `text_model.` they match
    the modules of transformers 4 and 5 alike."""
    return inside.removeprefix("text_model.")


def for_peft(path: str, magnitude: Tensor, spelling: str) -> Tensor:
    """PEFT's shapes of a magnitude: (out,), for a convolution (1, out, 1, 1)."""
    column = column_or_refuse(path, magnitude, spelling)
    return column[None, :, None, None] if magnitude.dim() == 4 else column


def layer_name(name: str) -> str:
    """The names of the old attention processors -> those of the layers they stood for."""
    name = name.replace(".processor.", ".")
    if ".self_attn.to_" in name:
        return re.sub(r"\.to_(q|k|v|out)$", r".\1_proj", name)
    return f"{name}.0" if name.endswith(".to_out") else name


@lru_cache(maxsize=2**14)  # of a thousand files most have the same keys
def role_of(key: str) -> tuple[str, str] | None:
    """A key -> (name of the layer, role)."""
    found = _KEY.fullmatch(key)
    if found is None:
        return None
    if found["words"]:
        return found["path"], f"embedding_{found['words']}"
    role = "alpha" if found["alpha"] else "magnitude" if found["magnitude"] else _ROLES[found["role"]]
    return layer_name(found["path"]), role


def _spell(key: str) -> Part | None:
    known = role_of(key)
    if known is None:
        return None
    name, role = known
    prefix = next(p for p in PREFIXES if name.startswith(p))
    path = adapter_path(PREFIXES[prefix], name.removeprefix(prefix))
    return None if path is None else Part(path, role)


def _alphas(config: dict[str, Any], component: str, header: Header) -> Alphas | None:
    own = {k.removeprefix(f"{component}."): v for k, v in config.items() if k.startswith(f"{component}.")}
    return Alphas(own, f"{header.path.name}, {CONFIG}") if own else None
