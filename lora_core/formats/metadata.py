"""What a LoRA file says about itself, in the words A1111, civitai and ComfyUI know.

    ss_base_model_version = "sdxl_base_v1-0"     kohya's; A1111 takes the family from it and from ss_v2
    ss_network_dim = "16", ss_network_alpha = "8"
    modelspec.architecture = "stable-diffusion-xl-v1-base/lora"
    sshs_model_hash = SHA-256 of the tensors alone; its first 12 digits are civitai's AutoV3
    sshs_legacy_hash = the first 8 digits of A1111's old hash
    modelspec.hash_sha256 = "0x" and sshs_model_hash

Values are text without exception. Files travel: nothing here may tell of the disk they were made on.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from lora_core.adapter import Adapter
from lora_core.errors import ConfigError
from lora_core.families import FAMILIES, Told
from lora_core.formats.kinds import kind_of_delta
from lora_core.formats.writing import ranks_and_alphas, unwrapped
from lora_core.safe_files import serialized

HASHES = ("sshs_model_hash", "sshs_legacy_hash", "modelspec.hash_sha256")
NAMES = ("ss_output_name", "modelspec.title")  # what a file calls its LoRA
# Facts of a file's spelling, not of the LoRA: they do not survive a change of spelling.
OF_THE_FILE = (*HASHES, "format", "lora_adapter_metadata")
FAMILY_KEYS = ("ss_base_model_version", "modelspec.architecture")
MODELSPEC = "1.0.1"
_MODEL = (*FAMILY_KEYS, "ss_v2", "modelspec.prediction_type")

# How a path begins: of a disk, of a share, of somebody's home, or out of the folder one is in
_BEGINS = (
    r"(?:file:/+|[A-Za-z]:[\\/]+(?=[^\s\\/\"',])|\\{{2,}}(?=[^\s\\\"'])|~[\w.\-]*[\\/]|(?:\.\.[\\/]+)+"
    r"|(?<!:)//(?=[^/\s\"']+/)|/(?=[^/\s\"'][^/\n\"'{and_not}]*/))"
)
_LONG, _SHORT = _BEGINS.format(and_not=""), _BEGINS.format(and_not=r"\s")  # with spaces in it, or without
_QUOTED = r"(?:[^{quote}\n\\]++|\\++(?=[^{quote}\n\\]))*+"  # a quote inside quotes has a backslash before it
_PATHS = (  # possessive: metadata comes from files too, and must not be able to make these slow
    *(
        re.compile(rf"(?P<before>{quote})(?P<path>{_LONG}{_QUOTED.format(quote=quote)})(?=\\*{quote})")
        for quote in ('"', "'")  # in JSON, TOML or a list
    ),
    re.compile(rf"(?P<before>\A\s*+)(?P<path>{_LONG}[^\n]*+)(?=\s*\Z)"),  # the whole value
    re.compile(
        rf"(?P<before>(?:^|[\s=(\[{{,;:<>|`]))(?<!base64,)(?P<path>{_SHORT}[^\s\"',;)\]}}<>|`]*+)",
        re.MULTILINE,
    ),  # among words
)
_HOMES = ("home", "users", "documents and settings")


def kohya_metadata(adapter: Adapter, *, family: str | None, facts: Mapping[str, str]) -> dict[str, str]:
    """The metadata of a file, less its hashes (see with_hashes).

    What the tensors themselves say (dim, alpha, module) is always stated anew; `facts` win over everything,
    the adapter's own metadata over the defaults. Paths in values become file names. Raises ConfigError for a
    value that is not text.
    """
    check_text(facts)
    own = {k: v for k, v in adapter.metadata.items() if k not in OF_THE_FILE}
    if family_of_metadata(own).key not in (None, family):
        for key in ("ss_base_model_version", "ss_v2", "modelspec.architecture"):
            own.pop(key, None)
    stated = {**own, **facts}
    merged = {**_defaults(adapter, family, stated), **own, **_of_tensors(adapter), **facts}
    return {key: without_paths(value) for key, value in merged.items()}


def check_text(facts: Mapping[str, str]) -> None:
    """Raises ConfigError naming what is not."""
    for key, value in facts.items():
        if not isinstance(key, str) or not isinstance(value, str):
            raise ConfigError(f"metadata {key!r} = {value!r:.60} is not text to text. Write it as text.")


def parent(adapter: Adapter, weight: object) -> dict[str, Any]:
    """How a file that was made of others names one of them: its name, weight and, where it is known, its hash."""
    hashes = {key: adapter.metadata[key] for key in HASHES[:1] if key in adapter.metadata}
    return {"name": adapter.name or "lora", "weight": weight, **hashes}


def agreed(metadata: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """What all of these files say alike of the model they are for; v-prediction shows nowhere else."""
    first = metadata[0] if metadata else {}
    return {
        key: first[key] for key in _MODEL if key in first and all(m.get(key) == first[key] for m in metadata)
    }


def with_hashes(tensors: dict[str, Tensor], metadata: dict[str, str]) -> dict[str, str]:
    """`metadata` and the hashes of `tensors`. kohya's two are of the file written with the ss_* entries alone: the
    legacy one looks at 64 KiB from 1 MiB on, so a smaller file has that of no bytes. modelspec's is the first, as
    it writes one."""
    rest = {k: v for k, v in metadata.items() if k not in HASHES}
    data = serialized(tensors, {k: v for k, v in rest.items() if k.startswith("ss_")})
    start = 8 + int.from_bytes(data[:8], "little")
    model = hashlib.sha256(memoryview(data)[start:]).hexdigest()
    legacy = hashlib.sha256(memoryview(data)[0x100000:0x110000]).hexdigest()[:8]
    return {
        **rest,
        "sshs_model_hash": model,
        "sshs_legacy_hash": legacy,
        "modelspec.hash_sha256": f"0x{model}",
    }


def family_of_metadata(metadata: Mapping[str, str]) -> Told:
    """What a file claims to be for. Such claims are often wrong: shapes go first."""
    version, architecture = (metadata.get(key, "") for key in FAMILY_KEYS)
    for family in FAMILIES.values():
        if version in family.base_versions:
            return Told(family.key, f"its metadata (ss_base_model_version = {version})")
        if architecture in family.architectures:
            return Told(family.key, f"its metadata (modelspec.architecture = {architecture})")
    starts = {"sdxl": "sdxl", "sd_v2": "sd2", "sd_v1": "sd1", "sd_1": "sd1", "sd_2": "sd2"}
    known = next((key for start, key in starts.items() if version.startswith(start)), None)
    return Told(known, f"its metadata (ss_base_model_version = {version[:40]})") if known else Told()


def without_paths(value: str) -> str:
    """Every absolute path in `value` cut down to its last name.

    >>> without_paths('{"/home/ann/My dogs/10_rex": {"img_count": 12}}')
    '{"10_rex": {"img_count": 12}}'
    """
    for pattern in _PATHS:
        value = pattern.sub(lambda found: found["before"] + _last_name(found["path"]), value)
    return value


def _last_name(path: str) -> str:
    """Of somebody's home itself no more than that it is one."""
    names = [name for name in re.split(r"[\\/]+", path.removeprefix("file:")) if name.strip()]
    if len(names) > 1 and names[-2].casefold() in _HOMES:
        return "home"
    return names[-1] if names else ""


def _defaults(adapter: Adapter, family: str | None, stated: Mapping[str, str]) -> dict[str, str]:
    """What readers expect and nobody has said."""
    title = stated.get("ss_output_name") or adapter.name or "lora"
    values = {**dict.fromkeys(NAMES, title), "modelspec.sai_model_spec": MODELSPEC}
    if family not in FAMILIES:
        return values
    row = FAMILIES[family]
    v_prediction = (
        stated.get("modelspec.prediction_type") == "v"
        or stated.get("ss_base_model_version") in row.base_versions[1:]
        or stated.get("modelspec.architecture") in row.architectures[1:]
    )
    which = -1 if v_prediction else 0  # the families that have a v-prediction kind name it last
    # SD 2's epsilon models are the 512 ones
    side = 512 if family == "sd2" and not v_prediction else row.resolution
    return values | {
        "ss_v2": str(family == "sd2"),
        "ss_base_model_version": row.base_versions[which],
        "modelspec.architecture": row.architectures[which],
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models"
        if family == "sdxl"
        else "diffusers",
        "modelspec.resolution": f"{side}x{side}",
        "modelspec.prediction_type": "v" if v_prediction else "epsilon",
    }


def _of_tensors(adapter: Adapter) -> dict[str, str]:
    """kohya's names for rank and alpha; "Dynamic" where layers differ, as its resize script says it. Kinds that have
    neither say neither."""
    ranks, alphas = ranks_and_alphas(adapter.deltas)
    matrices = {p for p in ranks if adapter.deltas[p].shape()[2:] in ((), (1, 1))}
    convolutions = set(ranks) - matrices
    args: dict[str, str] = {}
    if convolutions:
        args["conv_dim"] = _common([ranks[p] for p in convolutions])
        args["conv_alpha"] = _common([alphas[p] for p in convolutions])
    parts = [unwrapped(delta) for delta in adapter.deltas.values()]
    dora = any(part.magnitude is not None for part in parts)
    known = [(kind_of_delta(part.change), part.change) for part in parts]
    algos = {kind.algo(change) for kind, change in known if kind is not None and change is not None}
    lycoris = dora or algos != {"lora"} or any(part.bias is not None for part in parts)
    if lycoris and len(algos) == 1:  # LyCORIS has one word for the whole file
        args["algo"] = algos.pop()
    if dora:
        args["dora_wd"] = "True"
    plain = sorted(matrices or convolutions)
    of_rank = {
        "ss_network_dim": _common([ranks[p] for p in plain]),
        "ss_network_alpha": _common([alphas[p] for p in plain]),
    }
    return {
        "ss_network_module": "lycoris.kohya" if lycoris else "networks.lora",
        **(of_rank if ranks else {}),
        "ss_network_args": json.dumps(args, sort_keys=True),
    }


def _common(values: list[int] | list[float]) -> str:
    """Alphas to the digits that a file holds them in: 0.1 and not 0.10000000149011612 once it was read."""
    short = {value if isinstance(value, int) else float(f"{value:.7g}") for value in values}
    return str(short.pop()) if len(short) == 1 else "Dynamic"
