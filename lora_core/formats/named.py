"""Files whose layers have names: kohya's, diffusers' and everyone's who mixes the two are read alike.

alpha is the tensor of that name, else what the metadata `lora_adapter_metadata` says (JSON, PEFT's LoraConfig with the
component before every key: diffusers), else the rank.
"""

from __future__ import annotations

from lora_core.formats.assembly import Load, Part, Reading, assemble
from lora_core.formats.endings import role_of
from lora_core.formats.names import path_of
from lora_core.formats.peft_config import Alphas, in_config, parse
from lora_core.safe_files import Header

CONFIG = "lora_adapter_metadata"


def read_named(header: Header, load: Load) -> Reading:
    config = parse(header.metadata.get(CONFIG) or "{}", where := f"{header.path.name}, {CONFIG}")
    known: dict[str, Alphas] = {}
    for component in {key.partition(".")[0] for key in config}:
        own = {k.removeprefix(f"{component}."): v for k, v in config.items() if k.startswith(f"{component}.")}
        known[component] = Alphas(own, where)

    def alpha_of(path: str, rank: int) -> float:
        component, _, inside = path.partition(".")
        return known[component].of(in_config(inside), rank) if component in known else float(rank)

    def spell(key: str) -> Part | None:
        found = role_of(key, header.tensors)
        path = None if found is None else path_of(found[0])
        return None if found is None or path is None else Part(path, found[1])

    return assemble(header, spell, load=load, alpha_of=alpha_of)
