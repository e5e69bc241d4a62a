"""The text a picture carries: the one A1111 writes and many programs read.

    a cat in the snow <lora:ink:0.8>
    Negative prompt: blurry
    Steps: 25, Sampler: DDIM, CFG scale: 7.5, Seed: 7, Size: 512x512, Model hash: 6ce0161689, Model: v1-5, ...

and at its end `Lora hashes: "ink: 1a2b3c4d5e6f"`. That spelling cannot say everything: a prompt may itself
look like a tag or a heading, and a mix may have weights per block. Where reading the text back would not
give exactly what was meant, `Exact: "<JSON>"` follows.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypedDict

from lora_core.errors import ConfigError
from lora_core.mix import AdapterWeight, WeightValue
from lora_core.prompt_tags import TAG, read_tag

if TYPE_CHECKING:
    from lora_core.generation import GenerationRequest

Weights = Mapping[str, WeightValue]  # LoRA name -> weight, or weights per component and block

_EXACT = ("prompt", "negative_prompt", "loras", "lora_hashes")
# Both take time in proportion to the text, whatever stands in it: names are short, no part is tried twice.
_FIELD = re.compile(r' {0,4}(\w[\w \-/]{0,40}): {0,4}("(?:\\.|[^\\"])*"|[^,]*)(?:,|$)')
_TAG = re.compile(f" ?{TAG.pattern}", TAG.flags)


class Parameters(TypedDict):
    """`parse_parameters`' result. `fields` has the other facts as they are spelled ("Steps": "25")."""

    prompt: str
    negative_prompt: str
    fields: dict[str, str]
    loras: dict[str, Any]
    lora_hashes: dict[str, str]


def parameters_text(
    request: GenerationRequest,
    *,
    seed: int,
    size: tuple[int, int],
    sampler: str,
    model: str,
    model_hash: str | None = None,
    weights: Weights | None = None,
    history: Sequence[tuple[int, Weights]] = (),
    lora_hashes: Mapping[str, str] | None = None,
) -> str:
    """The text for one picture. `size` is (width, height) in pixels, `weights` what the LoRAs had
    at the last step, `history` (step, weights) wherever they changed on the way (field `Lora steps`, JSON),
    `lora_hashes` the first 12 hex of each one's `sshs_model_hash`. `parse_parameters` gives back exactly
    what went in."""
    loras = {name: _said(weight) for name, weight in (weights or {}).items()}
    tags = [_tag(name, weight) for name, weight in loras.items()]
    lines = [" ".join(filter(None, [request.prompt, *tags]))]
    if request.negative_prompt:
        lines.append(f"Negative prompt: {request.negative_prompt}")
    hashes = dict(lora_hashes or {})
    facts: dict[str, str] = {
        "Steps": str(request.steps),
        "Sampler": sampler,
        "CFG scale": _plain(request.guidance),
        "Seed": str(seed),
        "Size": f"{size[0]}x{size[1]}",
        **({"Model hash": model_hash} if model_hash else {}),
        "Model": model,
        **(
            {"Lora hashes": ", ".join(f"{name}: {value}" for name, value in hashes.items())} if hashes else {}
        ),
    }
    if len(history) > 1:
        facts["Lora steps"] = json.dumps(history)
    text = _joined(lines, facts)
    meant = (request.prompt, request.negative_prompt, loras, hashes)
    read = parse_parameters(text)
    if (read["prompt"], read["negative_prompt"], read["loras"], read["lora_hashes"]) != meant:
        facts["Exact"] = json.dumps(dict(zip(_EXACT, meant, strict=True)))
        text = _joined(lines, facts)
    return text


def parse_parameters(text: str) -> Parameters:
    """Read an A1111 `parameters` text, ours or another program's. Never fails: what is not understood stays
    in the prompt, and a text without a line of fields is all prompt."""
    lines = text.split("\n")
    fields = _read_fields(lines[-1])
    if fields:
        lines = lines[:-1]
    body = "\n" + "\n".join(lines)
    body, found, negative = body.partition("\nNegative prompt:")
    negative = negative.removeprefix(" ") if found else ""
    loras: dict[str, Any] = {}

    def take(tag: re.Match[str]) -> str:
        try:
            name, weight = read_tag(tag)
        except ConfigError:  # no tag of ours: it stays in the prompt
            return tag[0]
        if name in loras:
            return tag[0]
        loras[name] = weight
        return ""

    prompt = _TAG.sub(take, body[1:])
    hashes: dict[str, str] = {}
    for entry in filter(None, fields.get("Lora hashes", "").split(", ")):
        name, _, value = entry.rpartition(": ")
        hashes[name] = value
    read = Parameters(prompt=prompt, negative_prompt=negative, fields=fields, loras=loras, lora_hashes=hashes)
    return _exact(read)


def _read_fields(line: str) -> dict[str, str]:
    """`Steps: 25, Sampler: DDIM, ...` -> name to value; empty for a line that is not wholly of that kind.
    A1111's own rule asks for three fields: "masterpiece: 1" alone is a prompt."""
    fields: dict[str, str] = {}
    position, line = 0, line.rstrip()
    while position < len(line):
        match = _FIELD.match(line, position)
        if match is None:
            return {}
        fields[match[1].strip()] = _unquoted(match[2].strip())
        position = match.end()
    return fields if len(fields) >= 3 else {}


def _exact(read: Parameters) -> Parameters:
    """The `Exact` field over what was guessed from the readable text, if it is one of ours."""
    if "Exact" not in read["fields"]:
        return read
    try:
        exact = json.loads(read["fields"]["Exact"])
        kinds = {"prompt": str, "negative_prompt": str, "loras": dict, "lora_hashes": dict}
        ours = set(exact) == set(kinds) and all(isinstance(exact[k], kind) for k, kind in kinds.items())
        ours = ours and all(isinstance(weight, int | float | dict) for weight in exact["loras"].values())
    except (
        ValueError,
        TypeError,
        RecursionError,
    ):  # someone else's field of that name: it stays among the fields
        return read
    if not ours:
        return read
    fields = {k: v for k, v in read["fields"].items() if k != "Exact"}
    return Parameters(
        prompt=exact["prompt"],
        negative_prompt=exact["negative_prompt"],
        fields=fields,
        loras=exact["loras"],
        lora_hashes=exact["lora_hashes"],
    )


def _joined(lines: list[str], facts: Mapping[str, str]) -> str:
    fields = ", ".join(f"{name}: {_quoted(value)}" for name, value in facts.items())
    # a LoRA's name comes from the disk, where half a surrogate pair is possible; UTF-8 has none
    return "\n".join([*lines, fields]).encode("utf-8", "replace").decode("utf-8")


def _quoted(value: str) -> str:
    """As JSON where a bare value would be read wrongly: A1111's rule, and values that begin with a quote."""
    return json.dumps(value) if re.search(r'[,:"\n]', value) or value != value.strip() or not value else value


def _unquoted(value: str) -> str:
    if len(value) >= 2 and value[0] == value[-1] == '"':
        try:
            return str(json.loads(value))
        except ValueError:  # a foreign writer's quotes are not JSON's: keep them as they stand
            return value
    return value


def _said(weight: WeightValue) -> float | dict[str, Any]:
    if isinstance(weight, AdapterWeight):
        return weight.plain
    return dict(weight) if isinstance(weight, Mapping) else float(weight)


def _tag(name: str, weight: float | Mapping[str, Any]) -> str:
    """<lora:name:weight>, or A1111's <lora:name:text encoder:unet> where the two differ."""
    if not isinstance(weight, Mapping):
        return f"<lora:{name}:{_plain(weight)}>"
    unet, text = float(weight.get("unet", 1)), float(weight.get("text_encoder", 1))
    return f"<lora:{name}:{_plain(text)}:{_plain(unet)}>"


def _plain(number: float) -> str:
    """The shortest spelling that reads back as the same number: 7.5, 7, 0.1."""
    number = float(number)
    return str(int(number)) if number.is_integer() and abs(number) < 1e15 else repr(number)
