"""The dataset look: what the loader will feed a training, and what is odd about it, before anything is trained.

    look(config, folder) -> facts, also in folder/NAME.json and, with pictures, in folder/NAME.html

Nothing here guesses: pictures are read by `scan`, cut by their own `View`, and prompts are those of the run's own first
draws.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from lora_core.base_parts import clip_tokenizer
from lora_core.models import find_base
from lora_core.new_tokens import knowing, tokens_of
from lora_core.safe_writes import write_atomic
from trainers.batches import Feeder, turns
from trainers.buckets import View, apply
from trainers.conditioning import TOKENIZERS, lengths, tokenize
from trainers.config import TrainConfig
from trainers.dataset import Dataset, Example, layers, read
from trainers.folders import Kind
from trainers.look_page import page, thumbnail
from trainers.picture_checks import BLURRED, alike, perceptual_hash, sharpness
from trainers.scan import scan
from trainers.scan_report import unmanaged

EPOCHS = 4  # drawn from, for each picture's prompts
PROMPTS = 8  # of each picture that are shown
FIRST = 8  # batches that are shown in order
MUCH_ENLARGED = 1.1
UNKNOWN_SIDE = 512


def look(config: TrainConfig, folder: Path) -> dict[str, Any]:
    """Raises LoraError as the training would: no pictures, more than half of them bad."""
    texts, resolution, base = reader(config)
    dataset, notes = find(config, config.data.resolution or resolution)
    drawn, first = prompts_of(config, dataset)
    tokens = {text: token_facts(texts, text) for text in sorted({t for mine in drawn.values() for t in mine})}
    pictures, thumbnails, hashes, digests = [], [], [], []
    for example in dataset.examples:
        data = read(example)
        image, mask = layers(example, data)
        cut = apply(image, View(example.plan))
        facts = picture_facts(example, cut)
        facts["prompts"] = [tokens[text] for text in drawn[example]]
        pictures.append(facts)
        thumbnails.append(thumbnail(cut, mask and apply(mask, View(example.plan), Image.Resampling.BILINEAR)))
        hashes.append(perceptual_hash(image))
        digests.append(hashlib.sha256(data.picture).hexdigest())
    facts = {
        "name": config.name,
        "base": base,
        "resolution": dataset.resolution,
        "batch_size": config.train.batch_size,
        "notes": notes,
        "pictures": pictures,
        "buckets": bucket_facts(dataset),
        "folders": [folder_facts(report) for report in dataset.reports],
        "duplicates": twins(dataset.examples, digests),
        "near_duplicates": near_twins(dataset.examples, hashes, digests),
        "first_batches": first,
        "warnings": [],
    }
    facts["warnings"] = warnings(facts)
    folder.mkdir(parents=True, exist_ok=True)
    facts["page"] = str(folder / f"{config.name}.html")
    text, html = json.dumps(facts, ensure_ascii=False, indent=1), page(facts, thumbnails)
    write_atomic(folder / f"{config.name}.json", lambda path: _write(path, text))
    write_atomic(folder / f"{config.name}.html", lambda path: _write(path, html))
    return facts


def told(facts: dict[str, Any], *, as_json: bool) -> list[str]:
    """The facts for a terminal, or for a program."""
    if as_json:
        return [json.dumps(facts, ensure_ascii=False)]
    buckets = ", ".join("{} x {}: {}".format(*b["bucket"], b["pictures"]) for b in facts["buckets"])
    odd = facts["warnings"] or ["Nothing is odd about them."]
    return [*facts["notes"], f"{len(facts['pictures'])} pictures. Buckets: {buckets}.", *odd, facts["page"]]


class PlainTokenizer:
    """CLIP's own, for a base that is not on this machine: SD 1.x, SD 2.x and SDXL cut prompts alike."""

    def __init__(self) -> None:
        self.tokenizer = clip_tokenizer()

    def maybe_convert_prompt(self, prompt: str, tokenizer: Any) -> str:
        """New words of several vectors spelled out, as pipelines do."""
        known = tokenizer.get_added_vocab()
        for token in {token for token in tokenizer.tokenize(prompt) if token in known}:
            several = itertools.takewhile(known.__contains__, (f"{token}_{i}" for i in itertools.count(1)))
            prompt = prompt.replace(token, " ".join([token, *several]))
        return prompt


def reader(config: TrainConfig) -> tuple[Any, int, str]:
    """-> what tokenizes, the base's resolution, and its name; no weight is read and nothing downloaded."""
    if config.base != "demo" and not Path(config.base).exists():
        texts: Any = PlainTokenizer()
        side, name = UNKNOWN_SIDE, f"{config.base} (not on this machine)"
    else:
        found = find_base(config.base)
        texts, name = found.pipeline, found.name
        side = int(found.parts["unet"].config.sample_size) * int(texts.vae_scale_factor)
    if config.lora.new_tokens:
        for own in TOKENIZERS.values():
            if (tokenizer := getattr(texts, own, None)) is not None:
                setattr(texts, own, knowing(tokenizer, new_tokens(config, tokenizer)))
    return texts, side, name


def new_tokens(config: TrainConfig, tokenizer: Any) -> list[str]:
    """The tokens that the training adds: a word's vectors are as many as the tokens it begins as, or a number."""
    counts = {
        word: len(tokenizer(begins, add_special_tokens=False).input_ids)
        if isinstance(begins, str)
        else begins
        for word, begins in config.lora.new_tokens.items()
    }
    return [token for word, count in counts.items() for token in tokens_of(word, count)]


def find(config: TrainConfig, resolution: int) -> tuple[Dataset, list[str]]:
    """The dataset as it is now: class pictures that the base has still to make are not there yet."""
    notes, datasets = [], []
    for settings in config.datasets:
        folder = settings.class_images
        if settings.has_class and (folder is None or (not folder.is_dir() and settings.class_count)):
            notes.append(
                f"{settings.class_count} pictures of “{settings.class_prompt}” will be made by the base model."
            )
            settings = settings.model_copy(update={"class_images": None})
        datasets.append(settings)
    return scan(config.data, resolution, datasets=datasets), notes


def prompts_of(config: TrainConfig, dataset: Dataset) -> tuple[dict[Example, list[str]], list[Any]]:
    """The run's own draws -> the first different prompts of each picture, and the first batches."""
    feeder = Feeder(dataset, None, None, batch_size=config.train.batch_size, seed=config.seed)
    drawn: dict[Example, list[str]] = {example: [] for example in dataset.examples}
    first: list[list[dict[str, str]]] = []
    sides: list[tuple[Kind, Sequence[Example]]] = [
        ("instance", dataset.instances),
        ("class", dataset.classes),
    ]
    for kind, examples in sides:
        left = EPOCHS * len(turns(examples))
        while left > 0:
            rows = feeder.draw(kind)
            left -= len(rows)
            for example, _, text in rows:
                if text not in drawn[example] and len(drawn[example]) < PROMPTS:
                    drawn[example].append(text)
            if kind == "instance" and len(first) < FIRST:
                first.append([{"file": e.path.name, "prompt": text} for e, _, text in rows])
    return drawn, first


def token_facts(texts: Any, text: str) -> dict[str, Any]:
    """A prompt, its tokens, and what of it is not read: the longer cut of two encoders."""
    cut = max((c.unread for c in tokenize(texts, [text]).cut), key=len, default="")
    return {"text": text, "tokens": lengths(texts, [text])[0], "unread": cut}


def picture_facts(example: Example, cut: Image.Image) -> dict[str, Any]:
    plan, settings = example.plan, example.source.settings
    scale = plan.resized[0] / example.original_size[0]
    edges = sharpness(cut)
    odd = []
    if scale > MUCH_ENLARGED:
        odd.append(f"too small: enlarged {scale:.1f} times")
    if edges < BLURRED:
        odd.append("blurred" if scale <= MUCH_ENLARGED else "blurred by enlarging")
    return {
        "file": example.path.name,
        "folder": example.source.folder.name,
        "kind": example.kind,
        "size": example.original_size,
        "bucket": plan.bucket,
        "resized": plan.resized,
        "crop": plan.box if settings.crop == "center" else "random",
        "cut_off": round(plan.lost, 4),
        "scale": round(scale, 4),
        "flip": settings.flip,
        "repeats": example.source.repeats,
        "weight": example.source.weight,
        "mask": None if not example.masked else example.mask.name if example.mask else "its transparency",
        "captions": list(example.lines),
        "sharpness": round(edges, 1),
        "odd": odd,
    }


def bucket_facts(dataset: Dataset) -> list[dict[str, Any]]:
    """Every shape: its pictures to learn, how often they come in an epoch, and those of the class."""
    counts = Counter((e.plan.bucket, e.kind) for e in dataset.examples)
    shown = Counter(e.plan.bucket for e in turns(dataset.instances))
    return [
        {
            "bucket": size,
            "pictures": counts[size, "instance"],
            "turns": shown[size],
            "class_pictures": counts[size, "class"],
        }
        for size in sorted({size for size, _ in counts})
    ]


def folder_facts(report: Any) -> dict[str, Any]:
    unused = {**report.bad, **dict.fromkeys(report.other, "not a picture that is read")}
    unused |= dict.fromkeys(report.orphans, "a caption without a picture")
    unused |= dict.fromkeys(report.masks, "a mask that is not used")
    return {
        "folder": report.folder.name,
        "used": report.used,
        "unused": unused,
        "colours": report.colours,
        "notes": report.lines(),
    }


def twins(examples: Sequence[Example], digests: Sequence[str]) -> list[list[str]]:
    """Files of the same bytes."""
    found: dict[str, dict[str, None]] = {}
    for example, digest in zip(examples, digests, strict=True):
        found.setdefault(digest, {})[_name(example)] = None
    return [list(names) for names in found.values() if len(names) > 1]


def near_twins(examples: Sequence[Example], hashes: Sequence[int], digests: Sequence[str]) -> list[list[str]]:
    """Pictures that look alike and are not the same bytes; a picture at two resolutions is one."""
    firsts = list({digest: i for i, digest in reversed(list(enumerate(digests)))}.values())[::-1]
    groups = alike([hashes[i] for i in firsts])
    return [[_name(examples[firsts[i]]) for i in group] for group in groups]


def _name(example: Example) -> str:
    return f"{example.source.folder.name}/{example.path.name}"


def warnings(facts: dict[str, Any]) -> list[str]:
    """What deserves a second look, a sentence each."""
    pictures = facts["pictures"]
    said = [f"The same file twice: {', '.join(names)}." for names in facts["duplicates"]]
    said += [f"Nearly the same picture: {', '.join(names)}." for names in facts["near_duplicates"]]
    said += [f"{p['file']} is {' and '.join(p['odd'])}." for p in pictures if p["odd"]]
    alone = [b for b in facts["buckets"] if b["turns"] == 1 and len(facts["buckets"]) > 1]
    if facts["batch_size"] > 1:
        said += [
            "{} x {} has one picture: its batches hold nothing else.".format(*b["bucket"]) for b in alone
        ]
    for p in pictures:
        if cut := [f for f in p["prompts"] if f["unread"]]:
            most = max(f["tokens"] for f in cut)
            said.append(
                f"{p['file']} has prompts of up to {most} tokens; not read is “{_short(cut[0]['unread'])}”."
            )
    folders = facts["folders"]
    said += [unmanaged(f"{f['folder']}/{name}", why) for f in folders for name, why in f["colours"].items()]
    bad = [f"{f['folder']}/{name}: {why}" for f in folders for name, why in f["unused"].items()]
    return said + [f"Not used: {line}." for line in bad]


def _short(text: str, most: int = 80) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8", errors="backslashreplace")  # a name on Linux may be no text
