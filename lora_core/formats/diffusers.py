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
from pathlib import Path
from typing import Any

from torch import Tensor

from lora_core.adapter import Adapter
from lora_core.errors import ConfigError
from lora_core.formats.assembly import Load, Reading
from lora_core.formats.endings import role_of
from lora_core.formats.keys import is_embedding
from lora_core.formats.metadata import with_hashes
from lora_core.formats.named import CONFIG, read_named
from lora_core.formats.peft_config import config_of, in_config
from lora_core.formats.writing import column_or_refuse, low_ranks
from lora_core.safe_files import Header, read_tensors, save_tensors

_UNET_FACTORS = ("lora_A", "lora_B", "lora_magnitude_vector")
# With lora_A diffusers 0.42 cannot load a text encoder trained in its feed-forward layers alone; a magnitude
# without `.weight` transformers 5 leaves out with no more than a line in the log.
_TEXT_FACTORS = ("lora_linear_layer.down", "lora_linear_layer.up", "lora_magnitude_vector.weight")


class Diffusers:
    name = "diffusers"

    def recognises(self, header: Header) -> bool:
        return any(role_of(key, header.tensors) is not None for key in header.tensors)

    def read(self, header: Header, load: Load = read_tensors) -> Reading:
        return read_named(header, load)

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
        metadata = {**metadata, "format": "pt", CONFIG: json.dumps(config, sort_keys=True)}
        save_tensors(path, tensors, with_hashes(tensors, metadata))
        return path


def for_peft(path: str, magnitude: Tensor, spelling: str) -> Tensor:
    """PEFT's shapes of a magnitude: (out,), for a convolution (1, out, 1, 1)."""
    column = column_or_refuse(path, magnitude, spelling)
    return column[None, :, None, None] if magnitude.dim() == 4 else column
