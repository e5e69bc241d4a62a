"""New words beside a LoRA's layers or alone: textual inversion's embeddings.

bundle_emb.<fox>.string_to_param.*     (n, 768)  kohya's bundle beside a LoRA's keys, SD 1 and 2
bundle_emb.<fox>.clip_l, .clip_g       (n, 768), (n, 1280)  the same for SDXL; A1111 and Forge read both
emb_params, string_to_param.*          a file of its own, A1111's; the word is the file's name
clip_l, clip_g                         the same for SDXL
<fox>                                  (768,) or (n, 768)  diffusers' learned_embeds.safetensors
<fox>                                  the same beside cloneofsimo's layers, where the metadata "<fox>" is "<embed>"
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import replace

from torch import Tensor

from lora_core.adapter import Adapter
from lora_core.errors import ConfigError, FileRefused
from lora_core.new_tokens import check_word
from lora_core.safe_files import Header

BUNDLE = "bundle_emb."
_LEARNT = "<embed>"  # cloneofsimo's mark
_PARTS = {
    "string_to_param.*": "text_encoder",
    "emb_params": "text_encoder",
    "clip_l": "text_encoder",
    "clip_g": "text_encoder_2",
}
_WIDTHS = (768, 1024, 1280)  # of SD's text encoders
Rows = dict[str, dict[str, Tensor]]
Places = dict[str, dict[str, str]]  # word -> component -> key


def split(header: Header) -> tuple[Places, Header]:
    """-> where the words are, and the header without them. Keys of a bundle that are none stay, to be named."""
    places: Places = {}
    if header.tensors and all(key in _PARTS for key in header.tensors):  # a file of one word
        places[_of_file(header)] = {_PARTS[key]: key for key in header.tensors}
    elif len(header.tensors) == 1 and _is_row(header, key := next(iter(header.tensors))):
        places[key] = {"text_encoder": key}
    else:
        for key in header.tensors:
            if header.metadata.get(key) == _LEARNT:
                places[key] = {"text_encoder": key}
            elif key.startswith(BUNDLE):
                word, _, part = key.removeprefix(BUNDLE).partition(".")
                if word and part in _PARTS and _PARTS[part] not in places.get(word, {}):
                    places.setdefault(word, {})[_PARTS[part]] = key
    used = {key for parts in places.values() for key in parts.values()}
    return places, replace(header, tensors={k: t for k, t in header.tensors.items() if k not in used})


def read(header: Header, places: Places, load: Callable[[Header, Iterable[str]], dict[str, Tensor]]) -> Rows:
    """Word -> component -> (n, width). Raises FileRefused for what can be no rows, or no word."""
    tensors = load(header, [key for parts in places.values() for key in parts.values()])
    for word, parts in places.items():
        try:
            check_word(word)
        except ConfigError as problem:
            raise FileRefused(f"{header.path.name}: {problem}") from problem
        if any(
            tensors[key].dim() not in (1, 2) or not tensors[key].is_floating_point() for key in parts.values()
        ):
            raise FileRefused(
                f'{header.path.name}: "{word}" has no rows of numbers of shape (n, width). Download or copy the file '
                "again."
            )
    return {
        word: {
            component: tensors[key].reshape(-1, tensors[key].shape[-1]) for component, key in parts.items()
        }
        for word, parts in places.items()
    }


def bundled(adapter: Adapter) -> dict[str, Tensor]:
    """The keys of a bundle. With two encoders A1111 asks for both by name; with one it takes any."""
    tensors: dict[str, Tensor] = {}
    for word, rows in adapter.embeddings.items():
        two = "text_encoder_2" in rows
        names = {"text_encoder": "clip_l" if two else "string_to_param.*", "text_encoder_2": "clip_g"}
        tensors |= {f"{BUNDLE}{word}.{names[component]}": tensor for component, tensor in rows.items()}
    return tensors


def _is_row(header: Header, key: str) -> bool:
    """A file of one tensor says no more than its key and its width."""
    info = header.tensors[key]
    return "." not in key and ":" not in key and len(info.shape) in (1, 2) and info.shape[-1] in _WIDTHS


def _of_file(header: Header) -> str:
    """A1111's way: the word is the file's name."""
    return re.sub(r"[\s.]+", "_", header.path.name.removesuffix(".safetensors")).strip("_") or "word"
