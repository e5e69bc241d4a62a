"""What the fuzzer starts from and how it spoils it: real files of every spelling and kind, changed so that they stay
files (another shape of the same size, another dtype, a key of another layer), or so that they do not.

A Draft is a file taken apart. Changes of a draft keep a layout that holds, and so reach deep; changes of the header's
JSON and of the file's bytes come on top.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from lora_core import Adapter, LivePipeline, write_adapter
from lora_core.deltas import Delta
from lora_core.deltas.hadamard import Hadamard
from lora_core.deltas.kronecker import Kronecker
from lora_core.formats.peft import CONFIG, WEIGHTS
from lora_core.safe_files import read_header, read_raw, save_tensors
from tests.lora_core.adapters_on_disk import adapter, low_rank
from tests.lora_core.kinds_by_hand import KINDS, adapter_of
from tests.lora_core.test_formats_peft import TINY, Tiny, trained
from tests.small_models import FAMILIES, save_ldm_single_file, small_pipeline

SIZES = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
}
SIZES |= {"U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1}
PEFT_CASES = ("loha", "lokr, whole", "ia3", "oft, held", "oft, exact", "boft", "modules")
LAYERS = 14  # of a sample: more of the same kind would only take longer


@dataclass
class Draft:
    """A file taken apart: [name, dtype, shape, bytes] each, the metadata, and the file that lies beside it. `bytes` are
    None where nobody reads them: a base model's, of which the header alone is."""

    source: str
    tensors: list[list[Any]]
    metadata: dict[str, str]
    beside: bytes | None = None
    changes: list[str] = field(default_factory=list)

    @property
    def is_base(self) -> bool:
        return self.source.startswith("base")

    def copy(self) -> Draft:
        return replace(
            self, tensors=[list(t) for t in self.tensors], metadata=dict(self.metadata), changes=[]
        )

    def header(self) -> list[tuple[str, Any]]:
        """As pairs, so that a name can stand there twice."""
        pairs: list[tuple[str, Any]] = [("__metadata__", list(self.metadata.items()))]
        end = 0
        for name, dtype, shape, _ in self.tensors:
            start, end = end, end + SIZES[dtype] * count(shape)
            entry = [("dtype", dtype), ("shape", list(shape)), ("data_offsets", [start, end])]
            pairs.append((name, entry))
        return pairs

    def body(self) -> bytes | int:
        """The tensors' bytes, or how many they are."""
        sizes = [SIZES[dtype] * count(shape) for _, dtype, shape, _ in self.tensors]
        if self.is_base:
            return sum(sizes)
        return b"".join(
            (data * (size // max(len(data), 1) + 1))[:size]
            for (*_, data), size in zip(self.tensors, sizes, strict=True)
        )


def count(shape: Any) -> int:
    n = 1
    for side in shape:
        n *= side
    return n


def as_json(value: Any) -> str:
    """json.dumps, but for objects that are lists of pairs."""
    if isinstance(value, list) and value and all(isinstance(v, tuple) for v in value):
        return "{" + ",".join(f"{json.dumps(k)}:{as_json(v)}" for k, v in value) + "}"
    if isinstance(value, Raw):
        return value
    return json.dumps(value, ensure_ascii=False)


class Raw(str):
    """JSON as it stands, or what is none."""


# ---------------------------------------------------------------- where it starts


def corpus(folder: Path) -> list[Draft]:
    """One of every spelling and kind. A minute of work of which most is a small base model's."""
    live = LivePipeline(small_pipeline("sd1"))
    made: dict[str, Adapter] = {
        f"kohya {kind}": fewer(
            adapter_of(live, kind, 1, "beside" if kind in ("whole", "low rank") else "none")
        )
        for kind in KINDS
    }
    plain = adapter(dtype=torch.float16)
    words = {"<fox>": {"text_encoder": torch.ones(2, 12), "text_encoder_2": torch.ones(2, 10)}}
    made |= {
        "kohya sdxl": replace(plain, embeddings=words),
        "kohya dora": adapter(dora=True),
        "kohya loha and lokr": products(),
    }
    drafts = []
    for name, one in made.items():
        drafts.append(taken_apart(name, write_adapter(one, folder / name, metadata=SAID)))
    drafts.append(
        taken_apart("diffusers", write_adapter(adapter(dora=True), folder / "d", spelling="diffusers"))
    )
    drafts.append(taken_apart("diffusers words", write_adapter(plain, folder / "e", spelling="diffusers")))
    for component in ("unet", "text_encoder_2"):
        peft = write_adapter(plain, folder / "peft", spelling="peft") / component
        drafts.append(taken_apart_beside(f"peft {component}", peft))
    drafts += [taken_apart_beside(f"peft {case}", of_peft(case, folder / "theirs")) for case in PEFT_CASES]
    for name, (tensors, said) in {"cloneofsimo": numbered(), "tucker": tucker(), **words_alone()}.items():
        save_tensors(folder / "x.safetensors", tensors, said)
        drafts.append(taken_apart(name, folder / "x.safetensors"))
    for family in FAMILIES:
        pipe = small_pipeline(family, clip_vocabulary=True)
        drafts.append(taken_apart(f"base {family}", save_ldm_single_file(pipe, folder / "base.safetensors")))
    return drafts


SAID = {
    "ss_tag_frequency": '{"1_x": {"fox": 3}}',
    "modelspec.trigger_phrase": "zxq fox",
    "lora_loom.layer_replication": '{"text_encoder.text_model.encoder.layers": [[0, 2], [1, 2]]}',
}


def fewer(made: Adapter) -> Adapter:
    """Some layers of every part of the model."""
    paths = list(made.deltas)
    return replace(made, deltas={p: made.deltas[p] for p in paths[:: max(1, len(paths) // LAYERS)]})


def products() -> Adapter:
    r = torch.randn
    paths = [f"unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_{x}" for x in "qkv"]
    conv = "unet.mid_block.resnets.0.conv1"
    deltas: dict[str, Delta] = {
        paths[0]: Hadamard(r(8, 2), r(2, 8), r(8, 2), r(2, 8), 1.0),
        paths[1]: Kronecker((r(2, 2),), (r(4, 4),), 1.0),
        paths[2]: Kronecker((r(2, 2), r(2, 2)), (r(4, 2), r(2, 4)), 1.0),
        conv: Hadamard(r(3, 8), r(3, 4), r(3, 8), r(3, 4), 2.0, r(3, 3, 3, 3), r(3, 3, 3, 3)),
        paths[0].replace("attn1", "attn2"): low_rank((8, 8), 2, 1.0, torch.Generator()),
    }
    return Adapter(deltas)


def numbered() -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """cloneofsimo's: a text encoder's attention, and two words."""
    tensors = {"<s1>": torch.ones(8), "<s2>": torch.ones(8)}
    for i in range(12):
        tensors[f"text_encoder:{i}:up"] = torch.ones(8, 1)
        tensors[f"text_encoder:{i}:down"] = torch.ones(1, 8)
    said = {"text_encoder": '["CLIPAttention"]', "<s1>": "<embed>", "<s2>": "<embed>"}
    return tensors, said | {f"text_encoder:{i}:rank": "1" for i in range(12)}


def tucker() -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    name = "lora_unet_down_blocks_0_resnets_0_conv1"
    shapes = {"lora_down": (3, 5, 1, 1), "lora_mid": (3, 3, 3, 3), "lora_up": (7, 3, 1, 1)}
    factors = {f"{name}.{key}.weight": torch.ones(shape) for key, shape in shapes.items()}
    return factors | {f"{name}.alpha": torch.tensor(1.5)}, {}


def words_alone() -> dict[str, tuple[dict[str, torch.Tensor], dict[str, str]]]:
    return {
        "word of A1111": ({"emb_params": torch.ones(3, 768)}, {}),
        "word of SDXL": ({"clip_l": torch.ones(2, 768), "clip_g": torch.ones(2, 1280)}, {}),
        "word of diffusers": ({"<cat>": torch.ones(768)}, {}),
    }


def of_peft(case: str, folder: Path) -> Path:
    """What PEFT saves of its other methods, and of modules that are trained whole."""
    method, options = TINY.get(case) or ("Lora", {"r": 3, "modules_to_save": ["conv1"], "lora_bias": True})
    chosen = ["linear_1"] if method == "Lora" else ["linear_1", "conv1"]
    with patch("peft.tuners.boft.layer.get_fbd_cuda", lambda: None):  # it would look for a CUDA compiler
        trained(method, {"target_modules": chosen} | options, Tiny()).save_pretrained(folder)
    return folder


def taken_apart_beside(source: str, folder: Path) -> Draft:
    return replace(taken_apart(source, folder / WEIGHTS), beside=(folder / CONFIG).read_bytes())


def taken_apart(source: str, path: Path) -> Draft:
    header = read_header(path)
    tensors = [
        [name, i.dtype, list(i.shape), None if source.startswith("base") else read_raw(header, [i])]
        for name, i in sorted(header.tensors.items(), key=lambda item: item[1].start)
    ]
    return Draft(source, tensors, dict(header.metadata))


# ---------------------------------------------------------------- changes that keep a file a file


def each(text: str) -> tuple[str, ...]:
    return tuple(text.split())


ODD_TEXT = each('null { {} [] 0 " -1 1e999 NaN True ../../x (a+)+$ ["x",3] {"x":{"y":1e400}}')
ODD_TEXT += ("", "\u0000", "\u202e", "\ud83d\ude00", "a" * 70_000, "[" * 3000, '{"a":' * 2000, "9" * 5000)
_NUMBERS: tuple[Any, ...] = (None, True, -1, 0, 0.5, 1e308, 2**70, 10**400, float("inf"))
ODD_JSON = (*_NUMBERS, "8", "", "LOHA", "LOKR", "OFT", [], [[1]], {}, {"a": 1})
KEYS_SAID = each("""
    lora_adapter_metadata lora_loom.layer_replication unet text_encoder text_encoder:0:rank <s1> format ss_v2 ss_seed
    ss_tag_frequency ss_base_model_version ss_network_args modelspec.architecture modelspec.thumbnail
    modelspec.trigger_phrase modelspec.prediction_type
""")
ENDS = each("""
    lora_down.weight lora_up.weight lora_mid.weight alpha dora_scale diff diff_b w_norm b_norm set_weight weight bias
    hada_w1_a hada_w1_b hada_w2_a hada_t1 lokr_w1 lokr_w1_a lokr_w2 lokr_t2 oft_blocks oft_diag rescale on_input
    a1.weight b2.weight bm.weight lora_A.weight lora_B.default.weight lora_magnitude_vector lora_embedding_A
    lora.down.weight ia3_l oft_R.weight boft_R boft_s base_layer.bias modules_to_save.weight lora_B.bias
""")
NAMES = each("""
    __metadata__ lora_unet_ clip_l emb_params bundle_emb.x.clip_l <a> unet:0:up unet:9999:down text_encoder:3:up
    lora_te3_x.alpha transformer.x.lora_A.weight model.diffusion_model.out.2.weight control_model.x
    lora_unet_1_2_3_4.alpha unet.a.lora_A.weight
""")
NAMES += ("", "\n", "a" * 999, "a" * 1001)
NAMES_IN_JSON = (*ODD_TEXT[:9], *each("r alpha alpha_pattern rank_pattern unet.lora_alpha peft_type"))

Change = Callable[[Draft, random.Random], None]


def another_dtype(draft: Draft, r: random.Random) -> None:
    for tensor in r.sample(draft.tensors, r.choice((1, 1, len(draft.tensors)))):
        same = [name for name, size in SIZES.items() if size == SIZES[tensor[1]]]
        tensor[1] = r.choice(same if r.random() < 0.7 else list(SIZES))


def another_shape(draft: Draft, r: random.Random) -> None:
    """Of the same size, mostly."""
    tensor = r.choice(draft.tensors)
    shape, n = tensor[2], count(tensor[2])
    ways: list[Callable[[], list[int]]] = [
        lambda: shape[::-1],
        lambda: r.sample(shape, len(shape)),
        lambda: [n],
        lambda: [1, n],
        lambda: [n, 1],
        lambda: [n, 1, 1, 1],
        lambda: [1, *shape][:8],
        lambda: [*shape, 1, 1][:8],
        lambda: [n // 2, 2] if n % 2 == 0 else [n],
        lambda: [n // 9, 3, 3] if n % 9 == 0 else [n],
        lambda: [1] * r.randrange(9) + shape[:1],
        lambda: [],
        lambda: [*shape[:-1], shape[-1] + 1] if shape else [2],
        lambda: [max(1, side + r.choice((-1, 1))) for side in shape],
    ]
    if not draft.is_base:
        ways.append(lambda: [r.choice((1, 2, 3, 4096, 2**16)), *shape[1:2]])
    else:
        ways.append(lambda: [r.choice((1, 31, 10**6, 2**24)), *shape[1:]])
    changed = r.choice(ways)()
    if draft.is_base or count(changed) <= 2**21:
        tensor[2] = changed[:8]


def another_key(draft: Draft, r: random.Random) -> None:
    tensor = r.choice(draft.tensors)
    name, other = tensor[0], r.choice(draft.tensors)[0]
    ways: list[Callable[[], str]] = [
        lambda: f"{name.partition('.')[0]}.{r.choice(ENDS)}",
        lambda: f"{name.rpartition('.')[0]}.{r.choice(ENDS)}",
        lambda: f"{name.partition('.')[0]}.{other.partition('.')[2]}",
        lambda: name.replace(r.choice("0123456789"), str(r.choice((0, 1, 2, 9, 77, 10**30)))),
        lambda: name.replace("_", "."),
        lambda: name.replace(".", "_"),
        lambda: name[r.randrange(len(name) + 1) :],
        lambda: name[: r.randrange(len(name) + 1)],
        lambda: name + r.choice(("", ".", "\u0000", "é", "²", "٣", "\ud83d\ude00", ".x", "\n")),
        lambda: name.upper(),
        lambda: name.replace("lora_unet_", "lora_te_"),
        lambda: name.replace("unet", "text_encoder_2"),
        lambda: r.choice(NAMES),
    ]
    tensor[0] = r.choice(ways)()


def one_less(draft: Draft, r: random.Random) -> None:
    for _ in range(r.choice((1, 1, 1, len(draft.tensors) // 2))):
        if draft.tensors:
            draft.tensors.pop(r.randrange(len(draft.tensors)))


def one_more(draft: Draft, r: random.Random) -> None:
    again = list(r.choice(draft.tensors))
    stem = again[0].partition(".")[0]
    again[0] = r.choice((f"{stem}.{r.choice(ENDS)}", r.choice(NAMES), f"{again[0]}2"))
    draft.tensors.insert(r.randrange(len(draft.tensors) + 1), again)


def other_order(draft: Draft, r: random.Random) -> None:
    r.shuffle(draft.tensors)


def other_values(draft: Draft, r: random.Random) -> None:
    tensor = r.choice(draft.tensors)
    if tensor[3]:
        n = len(tensor[3])
        tensor[3] = r.choice(
            (bytes(n), b"\xff" * n, b"\x7f" * n, r.randbytes(n), b"\x00\x7c" * (n // 2) + bytes(n % 2))
        )


def other_alpha(draft: Draft, r: random.Random) -> None:
    alphas = [tensor for tensor in draft.tensors if tensor[0].endswith((".alpha", ".on_input"))]
    for tensor in alphas[: r.choice((1, 99))]:
        value = r.choice((0.0, -1.0, float("nan"), float("inf"), 1e38, 1e-38, 65504.0))
        tensor[1:] = ["F32", r.choice(([], [1], [2])), torch.tensor(value).numpy().tobytes()]


def other_metadata(draft: Draft, r: random.Random) -> None:
    key = r.choice((*KEYS_SAID, *draft.metadata))
    said = draft.metadata.get(key, "")
    ways: list[Callable[[], str]] = [
        lambda: r.choice(ODD_TEXT),
        lambda: spoiled_json(said, r),
        lambda: spoiled_json(said, r),
        lambda: said[: r.randrange(len(said) + 1)],
        lambda: said * 3,
        lambda: json.dumps(r.choice(ODD_JSON)),
    ]
    draft.metadata[key] = r.choice(ways)()


def other_file_beside(draft: Draft, r: random.Random) -> None:
    if draft.beside is None:
        other_metadata(draft, r)
        return
    text = draft.beside.decode(errors="replace")
    draft.beside = r.choice(
        (
            lambda: spoiled_json(text, r).encode(errors="replace"),
            lambda: spoiled_json(text, r).encode(errors="replace"),
            lambda: r.choice(ODD_TEXT).encode(errors="replace"),
            lambda: spoiled_bytes(text.encode(), r),
            lambda: None,
        )
    )()


def spoiled_json(text: str, r: random.Random) -> str:
    """One value somewhere in it replaced, added or taken away."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return r.choice(ODD_TEXT)
    places: list[tuple[Any, Any]] = []
    stack = [value]
    while stack:
        here = stack.pop()
        if isinstance(here, dict | list):
            inside = list(here.items()) if isinstance(here, dict) else list(enumerate(here))
            places += [(here, key) for key, _ in inside]
            stack += [below for _, below in inside]
    if not places or r.random() < 0.1:
        return json.dumps(r.choice(ODD_JSON))
    here, key = r.choice(places)
    if r.random() < 0.2:
        del here[key]
    elif r.random() < 0.2 and isinstance(here, dict):
        here[r.choice(NAMES_IN_JSON)] = here.pop(key)
    else:
        here[key] = r.choice(ODD_JSON)
    return json.dumps(value)


CHANGES: tuple[Change, ...] = (
    another_dtype,
    another_shape,
    another_shape,
    another_key,
    another_key,
    one_less,
    one_more,
    other_order,
    other_values,
    other_alpha,
    other_metadata,
    other_metadata,
    other_file_beside,
)

# ---------------------------------------------------------------- changes that do not


def spoiled_header(pairs: list[tuple[str, Any]], r: random.Random) -> list[tuple[str, Any]] | Raw:
    """Types, nesting, huge numbers, duplicates, overlaps."""
    at = r.randrange(len(pairs))
    name, entry = pairs[at]
    what = r.randrange(8)
    if what == 0:
        pairs.insert(r.randrange(len(pairs) + 1), pairs[at])  # a name twice
    elif what == 1:
        pairs[at] = (name, r.choice(ODD_JSON))
    elif what == 2:
        inner = r.randrange(max(1, len(entry)))
        if entry:
            entry[inner] = (entry[inner][0], r.choice(ODD_JSON))
    elif what == 3 and name != "__metadata__":
        start, end = entry[2][1]
        by = r.choice((-8, -4, -1, 1, 4, 8, 2**31, 2**63, -(2**63)))
        entry[2] = (
            "data_offsets",
            r.choice(([start + by, end + by], [start, end + by], [end, start], [start])),
        )
    elif what == 4 and name != "__metadata__":
        shape = list(entry[1][1])
        shape.insert(
            r.randrange(len(shape) + 1), r.choice((0, -1, 2**24 + 1, 2**64, True, None, 1.0, [1], "1"))
        )
        entry[1] = ("shape", shape)
    elif what == 5:
        entry.append(r.choice((("code", "x"), ("dtype", "F32"), ("shape", []), ("a", {}))))
    elif what == 6:
        pairs.append(pairs.pop(0))  # the metadata last
    else:
        text = as_json(pairs)
        cut = r.randrange(len(text))
        return Raw(
            text[:cut]
            + r.choice(('"', "[", "{", "}", ",", "[" * 5000, "\\ud800", "NaN", " ", "\\"))
            + text[cut:]
        )
    return pairs


def spoiled_bytes(data: bytes, r: random.Random) -> bytes:
    spoiled = bytearray(data)
    for _ in range(r.choice((1, 1, 2, 5))):
        at = r.randrange(len(spoiled) + 1) if r.random() < 0.3 else r.randrange(min(len(spoiled) + 1, 4096))
        what = r.randrange(6)
        if what == 0:
            spoiled[at : at + 1] = r.randbytes(1)
        elif what == 1:
            del spoiled[at : at + r.choice((1, 8, 64))]
        elif what == 2:
            spoiled[at:at] = r.randbytes(r.randrange(1, 9))
        elif what == 3:
            spoiled[at:at] = spoiled[at : at + r.randrange(1, 200)]
        elif what == 4:
            digits = [i for i in range(at, min(at + 500, len(spoiled))) if spoiled[i] in b"0123456789"]
            if digits:
                spoiled[r.choice(digits)] = r.choice(b"0123456789-.e")
        else:
            del spoiled[r.randrange(len(spoiled) + 1) :]
    return bytes(spoiled)
