"""How a key ends: which factor of its layer it is, in every spelling that has names for layers.

.lora_down.weight  .lora_up.weight  .lora_mid.weight  .alpha  .dora_scale       kohya, LyCORIS, OneTrainer
.hada_w1_a  .lokr_w2  .a1.weight  .oft_blocks  .diff  .w_norm  .on_input …      the other kinds: see factor_kinds
.lora_A.weight  .lora_B[.default].weight  .lora_magnitude_vector[.weight]       PEFT, diffusers today
.lora_B.bias                                                                    PEFT with `lora_bias`
.lora_embedding_A                                                               PEFT, of an embedding
.lora.down.weight  .processor.to_q_lora.down.weight  .lora_linear_layer.up.weight    diffusers of 2023
.magnitude                                                                      ai-toolkit's DoRA

They mix freely with the names of layers (names): ComfyUI takes LyCORIS' endings behind any name, and so do we.
"""

from __future__ import annotations

import re
from collections.abc import Container
from functools import lru_cache
from typing import NamedTuple

from lora_core.formats.kinds import KINDS

# What may stand beside the factors of a kind -> role. A bias may stand alone as well.
BESIDE = {
    "alpha": "alpha",
    "dora_scale": "magnitude",
    "magnitude": "magnitude",
    "diff_b": "bias",
    "b_norm": "bias",
}
ROLES = {ending: role for kind in KINDS for ending, role in kind.roles.items()} | BESIDE
_AB = {"down": "down", "A": "down", "up": "up", "B": "up", "mid": "mid"}
_KEY = re.compile(
    r"(?P<name>.+?)(?:"
    r"[._]lora(?:_linear_layer)?[._](?P<role>down|up|mid|A|B)(?:\.[A-Za-z]\w*)??\.weight"
    r"|\.lora_B\.(?:[A-Za-z]\w*\.)?(?P<bias>bias)"
    r"|\.lora_(?P<bare>[AB])(?:\.[A-Za-z]\w*)?"
    r"|\.lora_embedding_(?P<words>[AB])(?:\.[A-Za-z]\w*)??(?:\.weight)?"
    r"|\.(?P<magnitude>lora_magnitude_vector|dora_scale)(?:\.[A-Za-z]\w*)??(?:\.weight)?)"
)


def role_of(key: str, keys: Container[str]) -> tuple[str, str] | None:
    """A key -> (name of the layer, role); None for one that ends like no factor. `keys`: the whole file's."""
    found = told(key)
    # a base model's own weights end as an (IA)³'s vector does
    if found is None or (found.doubtful and f"{key.removesuffix('weight')}on_input" not in keys):
        return None
    return found.layer, found.role


class Told(NamedTuple):
    layer: str
    role: str
    doubtful: bool = False  # not without the other key of its kind


@lru_cache(maxsize=2**14)  # of a thousand files most have the same keys
def told(key: str) -> Told | None:
    """What a key tells by itself."""
    if found := _KEY.fullmatch(key):
        role = (
            _AB.get(found["role"] or found["bare"])
            or (found["words"] and f"embedding_{found['words']}")
            or ("up_bias" if found["bias"] else "magnitude")
        )
        return Told(_layer(found["name"]), role)
    name, _, last = key.rpartition(".")
    before, _, first = name.rpartition(".")
    for layer, ending in ((before, f"{first}.{last}"), (name, last)):
        if layer and ending in ROLES:
            flat = "." not in layer and layer.startswith(("lora_", "lycoris_"))
            return Told(_layer(layer), ROLES[ending], ending == "weight" and not flat)
    return None


def says_outputs(key: str) -> bool:
    """Whether this key of a magnitude leaves no choice of its axis."""
    return ".lora_magnitude_vector" in key


def _layer(name: str) -> str:
    """The names of the old attention processors -> those of the layers they stood for."""
    name = name.replace(".processor.", ".")
    if ".self_attn.to_" in name:
        return re.sub(r"\.to_(q|k|v|out)$", r".\1_proj", name)
    return f"{name}.0" if name.endswith(".to_out") else name
