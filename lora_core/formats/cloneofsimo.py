"""The files of cloneofsimo's `lora`, the first LoRA trainer for Stable Diffusion (December 2022): SD 1 and 2.

    unet:0:down, unet:0:up              (r, in[, k, k]), (out, r[, 1, 1]): the first layer found in the UNet
    text_encoder:47:down, …:up          the 48th in the text encoder
    <s1>                                (768,) a learnt word: see words

Metadata: `unet` = '["CrossAttention", "Attention", "GEGLU"]', the classes below which layers were looked for, and
`unet:0:rank`. No alpha: the scale is 1.

A layer has its number for a name: its place in torch's walk through the modules of its time's diffusers. A block's
attentions came before its resnets, and the middle block last, for the lists of the others were made before it. Inside
a transformer block the order was attn1, ff, attn2; since 2023 it is attn1, attn2, ff. Which it was the shapes tell:
every one of them is compared with the block structure, and a file that fits neither is refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from lora_core.errors import FileRefused
from lora_core.formats.assembly import Load, Part, Reading, assemble
from lora_core.formats.keys import kernel_of
from lora_core.formats.layer import AGAIN
from lora_core.safe_files import Header, read_tensors

_KEY = re.compile(r"(unet|text_encoder):(\d{1,4}):(up|down)")
_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
_TEXT = {
    "CLIPAttention": ("self_attn.k_proj", "self_attn.v_proj", "self_attn.q_proj", "self_attn.out_proj"),
    "CLIPMLP": ("mlp.fc1", "mlp.fc2"),
}
_CLASSES = {  # whose layers can be counted; Attention is CrossAttention's name since 2023
    "unet": ("CrossAttention", "Attention", "GEGLU", "ResnetBlock2D"),
    "text_encoder": tuple(_TEXT),
}
_DEFAULTS = {"unet": ["CrossAttention", "Attention", "GEGLU"], "text_encoder": ["CLIPAttention"]}
_ORDERS = (("attn1", "ff", "attn2"), ("attn1", "attn2", "ff"))  # of a transformer block: 2022's first
_ATTENDED = (True, True, True, False)  # levels of a UNet of SD 1 or 2, on the way down
_WIDTHS = ("first", "second", "third", "third")  # names of theirs: the last two are of one width

Side = tuple[str, ...]  # of a weight: the widths it is the sum of, by name


class _Place(NamedTuple):
    path: str  # adapter path
    out: Side
    inn: Side


class Cloneofsimo:
    name = "cloneofsimo"

    def recognises(self, header: Header) -> bool:
        return any(_KEY.fullmatch(key) for key in header.tensors)

    def read(self, header: Header, load: Load = read_tensors) -> Reading:
        places = {component: _places(header, component) for component in _CLASSES}

        def spell(key: str) -> Part | None:
            found = _KEY.fullmatch(key)
            return None if found is None else Part(places[found[1]][int(found[2])].path, found[3])

        return assemble(header, spell, load=load)


def _places(header: Header, component: str) -> Sequence[_Place]:
    """What a component's numbers stand for. Raises FileRefused where they can be no layers of SD 1 or 2."""
    numbers = sorted({int(m[2]) for m in map(_KEY.fullmatch, header.tensors) if m and m[1] == component})
    if not numbers:
        return ()
    classes = _classes(header, component)
    if component == "unet":
        candidates = [list(_unet(classes, order)) for order in _ORDERS]
    else:
        candidates = [list(_text_encoder(classes, len(numbers)))]
    named = (
        f"{header.path.name} names its layers by their numbers below {', '.join(classes)} in the {component}"
    )
    if numbers != list(range(len(candidates[0]))):
        raise FileRefused(
            f"{named}: {len(numbers)} up to {numbers[-1]} were found where SD 1.x and 2.x have {len(candidates[0])}, "
            f"counted from 0. {AGAIN}"
        )
    found = [_weight(header, f"{component}:{number}") for number in numbers]
    misfits = [_misfit(places, found) for places in candidates]
    if None in misfits:
        return candidates[misfits.index(None)]
    number = max(n for n in misfits if n is not None)
    raise FileRefused(
        f"{named}: {component}:{number} changes a weight of shape {found[number]}, which "
        f"{candidates[misfits.index(number)][number].path} has in no model of SD 1.x or 2.x. {AGAIN}"
    )


def _classes(header: Header, component: str) -> list[str]:
    """As the metadata has them; the trainer's defaults where it is gone."""
    try:
        classes = json.loads(header.metadata.get(component, json.dumps(_DEFAULTS[component])))
    except (ValueError, RecursionError):
        classes = None
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise FileRefused(
            f'{header.path.name}: the metadata "{component}" should list the classes of its layers. {AGAIN}'
        )
    known = _CLASSES[component]
    for name in classes:
        if name not in known:
            raise FileRefused(
                f"{header.path.name} names its layers by their numbers below {name[:40]} in the {component}, a class "
                f"whose layers this version cannot count; it knows {', '.join(known)}. Save it in another spelling."
            )
    return classes


def _weight(header: Header, name: str) -> tuple[int, ...]:
    """(out, in[, k, k]) of the weight that a pair of factors changes; () where they are no pair, which the reading of
    the layer will say better."""
    down, up = (header.tensors.get(f"{name}:{role}") for role in ("down", "up"))
    if down is None or up is None or not 2 <= len(down.shape) == len(up.shape):
        return ()
    return (up.shape[0], *down.shape[1:])


def _misfit(places: Sequence[_Place], found: Sequence[tuple[int, ...]]) -> int | None:
    """The first number whose shape cannot be that of its place. Widths are whatever the layers that have them say."""
    widths: dict[str, int] = {}
    for check in (False, True):
        for number, (place, shape) in enumerate(zip(places, found, strict=True)):
            if not shape:
                continue
            for side, n in zip((place.out, place.inn), shape, strict=False):
                if len(side) == 1:
                    widths.setdefault(side[0], n)
                if check and sum(widths.get(name, 0) for name in side) != n:
                    return number
            if check and shape[2:] not in _kernels(place.path):
                return number
    return None


def _kernels(path: str) -> tuple[tuple[int, ...], ...]:
    if path.endswith(".conv_shortcut"):
        return ((1, 1),)
    return ((3, 3),) if kernel_of(path) == 3 else ((),)


# ---------------------------------------------------------------- the order, from how the models are built


def _text_encoder(classes: Sequence[str], count: int) -> Iterator[_Place]:
    inside = [layer for name, own in _TEXT.items() if name in classes for layer in own]
    for n in range(-(-count // max(1, len(inside)))):
        for layer in inside:
            out, inn = ("inner" if layer == end else "width" for end in ("mlp.fc1", "mlp.fc2"))
            yield _Place(f"text_encoder.text_model.encoder.layers.{n}.{layer}", (out,), (inn,))


def _unet(classes: Sequence[str], order: Sequence[str]) -> Iterator[_Place]:
    """Down, up, middle."""
    attends = "CrossAttention" in classes or "Attention" in classes
    resnets = "ResnetBlock2D" in classes
    inside = [part for part in order if (attends if part != "ff" else "GEGLU" in classes)]
    levels, last = _WIDTHS, len(_WIDTHS) - 1
    # what the way up gets from the way down: the first convolution's, each resnet's, each downsampler's
    skips = [
        levels[0],
        *(name for i, level in enumerate(levels) for name in [level] * (3 if i < last else 2)),
    ]
    for level, width in enumerate(levels):
        block = f"unet.down_blocks.{level}"
        yield from _attentions(block, 2 * _ATTENDED[level], width, inside)
        if resnets:
            first = levels[max(0, level - 1)]
            yield from _resnets(block, [((first,), width), ((width,), width)])
    for n, width in enumerate(reversed(levels)):
        block = f"unet.up_blocks.{n}"
        yield from _attentions(block, 3 * _ATTENDED[last - n], width, inside)
        if resnets:
            before = [levels[min(last, last - n + 1)], width, width]
            yield from _resnets(block, [((name, skips.pop()), width) for name in before])
    yield from _attentions("unet.mid_block", 1, levels[last], inside)
    if resnets:
        yield from _resnets("unet.mid_block", [((levels[last],), levels[last])] * 2)


def _attentions(block: str, count: int, width: str, inside: Sequence[str]) -> Iterator[_Place]:
    for n in range(count):
        for part in inside:
            path = f"{block}.attentions.{n}.transformer_blocks.0.{part}"
            if part == "ff":
                yield _Place(f"{path}.net.0.proj", (width,) * 8, (width,))
                continue
            for layer in _ATTENTION:
                of_text = part == "attn2" and layer in ("to_k", "to_v")
                yield _Place(f"{path}.{layer}", (width,), ("text",) if of_text else (width,))


def _resnets(block: str, sides: Sequence[tuple[Side, str]]) -> Iterator[_Place]:
    """`sides`: of each resnet, what comes in and what goes out."""
    for n, (inn, width) in enumerate(sides):
        path = f"{block}.resnets.{n}"
        yield _Place(f"{path}.conv1", (width,), inn)
        yield _Place(f"{path}.time_emb_proj", (width,), ("time",))
        yield _Place(f"{path}.conv2", (width,), (width,))
        if inn != (width,):
            yield _Place(f"{path}.conv_shortcut", (width,), inn)
