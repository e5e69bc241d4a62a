"""Warnings about pictures that teach the wrong thing and words that nobody reads (see trainers.advice)."""

from __future__ import annotations

import hashlib
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from trainers.captions import ENDINGS, own_caption, read_caption, sidecars, with_trigger
from trainers.config import TrainConfig
from trainers.dataset import Dataset, Example
from trainers.folders import picture_files
from trainers.scan_report import listed

VIEWS = (8, 1000)  # how often each picture is seen
ENOUGH = 2000  # pictures shown: of a large set each need not come often
SOFT = 1.5  # times enlarged
RARE = (
    40_000  # of CLIP's 49,408 tokens, which stand in the order of how common they are; "sks" is number 48,136
)
CLIP_TOKENS = 49_408
OTHER_ENDINGS = (".text", ".tags", ".tag", ".cap", ".captions", ".caption.txt", ".txt.txt")
LISTS = ("metadata.jsonl", "metadata.csv", "captions.json", "captions.csv", "captions.txt", "meta_cap.json")


def about_pictures(config: TrainConfig, dataset: Dataset) -> Iterator[str]:
    shown = config.train.steps * config.train.batch_size * config.train.gradient_accumulation
    paths = {example.path for example in dataset.instances}
    count = len(paths)
    each = shown / count
    if each < 1 or (each < VIEWS[0] and shown < ENOUGH):
        yield (
            f"Each of the {count} pictures is seen {each:.1f} times: too seldom to be learnt. Raise train.steps to "
            f"{-(-50 * count * config.train.steps // shown)} or so."
        )
    if each > VIEWS[1]:
        yield (
            f"Each of the {count} pictures is seen {each:,.0f} times: they would be learnt by heart. 50 to 300 are "
            "usual; lower train.steps, or save often and take an early one."
        )
    if count == 1:
        yield "There is one picture alone: it would be learnt by heart, with its background. Four or more are usual."
    elif config.train.batch_size > count:
        yield (
            f"train.batch_size = {config.train.batch_size} is more than the {count} pictures: each batch holds the "
            f"same ones again. Lower it to {count} or less."
        )
    buckets = Counter(example.plan.bucket for example in dataset.instances)
    for bucket, number in buckets.items():
        if number == 1 and len(buckets) > 1:
            name = next(e.path.name for e in dataset.instances if e.plan.bucket == bucket)
            yield (
                f"{name} is the only picture of its shape, {bucket[0]} x {bucket[1]}: what is special about it is "
                "learnt with the shape. Crop it like others, or set data.buckets = false."
            )
    small = {e.path.name for e in dataset.instances if e.plan.resized[0] > SOFT * e.original_size[0]}
    if 2 * len(small) > count:
        yield (
            f"{len(small)} of {count} pictures are enlarged more than {SOFT:g} times: the LoRA learns their blur. Take "
            "larger ones, or set data.upscale = false or a lower data.resolution."
        )


def about_twins(config: TrainConfig, dataset: Dataset, held_out: Sequence[Example]) -> Iterator[str]:
    """Files of the same bytes."""
    own = {e.path for e in dataset.instances}
    judges = picture_files(config.report.judge) if config.report.judge is not None else []
    # a class picture that is not made yet has the file of one to learn (trainers.rehearsal)
    classes = {e.path for e in dataset.classes} - own
    for group in twins([*own, *classes, *judges, *(e.path for e in held_out)]):
        mine = sorted(path for path in group if path in own)
        judged = sorted(path for path in group if path in judges or path in {e.path for e in held_out})
        if len(mine) > 1:
            yield f"{listed(_names(mine))} are one picture: it counts {len(mine)} times. Take out all but one."
        if mine and judged:
            yield (
                f"{mine[0].name} is trained on and judged by: what is measured with it says nothing. Take it out of "
                "one of the folders."
            )
        if mine and any(path in classes for path in group):
            yield (
                f"{mine[0].name} is a picture to learn and one of the class: the two pull in opposite ways. Take it "
                "out of one of the folders."
            )


def twins(paths: Iterable[Path]) -> list[set[Path]]:
    """Groups of the same bytes; only files of one length are read."""
    by_length: dict[int, set[Path]] = defaultdict(set)
    for path in paths:
        by_length[path.stat().st_size].add(path)
    by_content: dict[str, set[Path]] = defaultdict(set)
    for alike in (group for group in by_length.values() if len(group) > 1):
        for path in alike:
            by_content[hashlib.sha256(path.read_bytes()).hexdigest()].add(path)
    return sorted((group for group in by_content.values() if len(group) > 1), key=min)


# --- captions that are not read -------------------------------------------------------------------------------


def about_captions(dataset: Dataset) -> Iterator[str]:
    examples = {e.path: e for e in dataset.instances}.values()
    mute = sorted({p for e in examples if not e.source.settings.captions for p in sidecars(e.path)[:1]})
    if mute:
        yield f"{_files(mute)} not read, since data.captions = false. Set it to true, if they are meant."
    read = [e for e in examples if e.source.own_words]
    second = [pair for e in read if len(pair := sidecars(e.path)) > 1 and _differ(*pair[:2])]
    if second:
        yield (
            f"{_files([pair[1] for pair in second])} not read, since {second[0][0].name} comes first and says "
            "something else. Keep the ones that are meant."
        )
    bad = [path for e in read for path in sidecars(e.path)[:1] if read_caption(path).unreadable]
    if bad:
        yield f"{_files(bad)} not read: {read_caption(bad[0]).note}."
    wordless = [e for e in read if not own_caption(e.path).lines]
    others = [path for e in wordless for path in strange_captions(e.path)]
    if others:
        yield (
            f"{_files(others)} not read: a caption has the picture's name and the ending {' or '.join(ENDINGS)}. "
            "Rename them, if they are meant."
        )
    for folder in dict.fromkeys(e.source.folder for e in wordless):
        if lists := [name for name in LISTS if (folder / name).is_file()]:
            yield (
                f"{lists[0]} in {folder.name} is not read: captions are text files, one beside each picture. Write "
                "them so, if they are meant."
            )
        orphans = next((r.orphans for r in dataset.reports if r.folder == folder), [])
        if orphans := [name for name in orphans if folder / name not in others and name not in LISTS]:
            yield (
                f"{_files(orphans)} read by no picture, and {_files(_of(wordless, folder), verb='has|have')} no "
                "caption. Give a picture and its caption the same name."
            )


def strange_captions(picture: Path) -> list[Path]:
    """Files that look like the picture's caption and are not read as one: photo.tags, photo.jpg.txt."""
    found = []
    for path in picture.parent.iterdir():
        if not path.name.startswith(picture.stem + ".") or path in (picture, *sidecars(picture)):
            continue
        ending = path.name[len(picture.stem) :]
        whole = path.name in (picture.name + end for end in ENDINGS)
        if whole or ending.lower() in (*OTHER_ENDINGS, *ENDINGS):
            found.append(path)
    return sorted(found)


def _of(examples: Sequence[Example], folder: Path) -> list[str]:
    return [e.path.name for e in examples if e.source.folder == folder]


def _differ(first: Path, second: Path) -> bool:
    return read_caption(first).lines != read_caption(second).lines


def _files(paths: Sequence[Path | str], verb: str = "is|are") -> str:
    names = [path if isinstance(path, str) else path.name for path in paths]
    one, many = verb.split("|")
    return f"{names[0]} {one}" if len(names) == 1 else f"{names[0]} and {len(names) - 1} more {many}"


def _names(paths: Sequence[Path]) -> list[str]:
    return [path.name for path in paths]


# --- words that teach nothing ---------------------------------------------------------------------------------


def about_words(config: TrainConfig, dataset: Dataset, pipeline: Any) -> Iterator[str]:
    captions = {with_trigger(line, e.source.settings.trigger) for e in dataset.instances for line in e.lines}
    same = sorted(captions & {folder.class_prompt for folder in config.datasets if folder.class_prompt})
    if same:
        yield (
            f'"{same[0]}" is the prompt of pictures to learn and of the class: the two pull in opposite ways. Put a '
            'word of its own into data.prompt, such as "a photo of sks dog", and leave it out of data.class_prompt.'
        )
    said = {word for caption in captions for word in words(caption)}
    known = set(config.lora.new_tokens)
    for word in asked_for(config):
        if word not in said and word not in known and rare(word, pipeline.tokenizer):
            yield (
                f'"{word}" is in every prompt of the previews or the report, and in no caption: nothing teaches it. '
                f'Set data.trigger = "{word}", which puts it before every caption.'
            )
    if config.train.trains_text_encoder:
        return
    for word in words_of_all(captions):
        pieces = pipeline.tokenizer.tokenize(word)
        if len(pieces) > 1 and word not in known:
            yield (
                f'"{word}" is in every caption and no word the text encoder knows: it reads {" + ".join(pieces)}, '
                "and with "
                "train.text_encoder_learning_rate = 0 it cannot learn it. Raise that to 5e-5, or make it a word of its "
                f'own: lora.new_tokens = {{ "{word}" = "thing" }}.'
            )


def words(text: str) -> list[str]:
    split = (word.strip(".,;:!?\"'()[]{}|") for word in re.split(r"[\s,|{}]+", text))
    return [word for word in dict.fromkeys(split) if len(word) > 1]


def words_of_all(texts: Iterable[str]) -> list[str]:
    """The words that every text has, in the order of the first."""
    split = [words(text) for text in sorted(texts)]
    return [word for word in split[0] if all(word in others for others in split[1:])] if split else []


def asked_for(config: TrainConfig) -> list[str]:
    """Words of all prompts that are to show the subject, and of none that is not."""
    others = [*config.report.unrelated_prompts, *(d.class_prompt or "" for d in config.datasets)]
    plain = {word for text in others for word in words(text)}
    return [
        word
        for word in words_of_all([*config.preview.prompts, *config.report.subject_prompts])
        if word not in plain
    ]


def rare(word: str, tokenizer: Any) -> bool:
    """Whether it means nothing to the text encoder: in pieces, or among the last of CLIP's vocabulary."""
    pieces = tokenizer.tokenize(word)
    if len(pieces) != 1:
        return len(pieces) > 1
    return len(tokenizer) >= CLIP_TOKENS and tokenizer.convert_tokens_to_ids(pieces[0]) >= RARE
