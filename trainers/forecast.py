"""What a training will write, and how long it will take beyond its steps: counted from its settings, each at what one
has cost when the dry run tried it (trainers.costs)."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from lora_core.errors import ConfigError
from trainers import checkpoints, report
from trainers.bench import Bench, trained_components
from trainers.config import TrainConfig
from trainers.costs import PictureCost, SaveCost, held
from trainers.dataset import Dataset, Example
from trainers.held_out import MOST, TIMES, drift_prompts
from trainers.largest import Largest, largest
from trainers.rehearsal import Rehearsal, ToMake
from trainers.run_folder import RunFolder
from trainers.words import prompts

PNG = 3.03  # bytes a pixel at most, which is noise; photographs take about 1.7
WORDS = 4096  # bytes beside the pixels: a picture's prompt and settings, a file's header
DIGEST = 32  # bytes of what a state knows of a picture, beside its name (trainers.unchanged)
STEP_LINE = 200  # bytes of a step in events.jsonl; TensorBoard's two points take as much
IN_PAGE = 0.6  # bytes a pixel at most of a preview inside report.html: WebP, written as text
PAGE_PICTURE = 256**2  # pixels of it


@dataclass(frozen=True)
class Ahead:
    """What of a training is still to come.

    folder    where it will write; `anew`: nothing of it is there
    dataset   all of it, with class pictures that are not made yet; `held_out` likewise
    encoded   whether latents and prompts are kept already
    """

    folder: RunFolder
    dataset: Dataset
    held_out: tuple[Example, ...]
    step: Largest
    to_make: Sequence[ToMake] = ()
    anew: bool = False

    @classmethod
    def of(cls, bench: Bench, rehearsal: Rehearsal | None = None) -> Ahead:
        """A training that is ready to begin, or one that is rehearsed for."""
        config = bench.config
        if rehearsal is None:
            dataset = bench.feeder.dataset
            return cls(bench.folder, dataset, bench.held_out, largest(dataset, config))
        folder = RunFolder(config.output / config.name, config.name)
        return cls(
            folder, rehearsal.dataset, rehearsal.held_out, rehearsal.step, tuple(rehearsal.to_make), anew=True
        )

    @property
    def first(self) -> int:
        """Steps that are done."""
        return 0 if self.anew else checkpoints.last_step(self.folder.checkpoints)


@dataclass(frozen=True)
class Costs:
    """Of one of each; None or 0 where a training has none of them."""

    save: SaveCost
    picture: PictureCost | None = None
    answer_s: float = 0.0  # of the UNet, for a row
    latent_s: float = 0.0  # a pixel
    prompt_s: float = 0.0
    prompt_bytes: int = 0


@dataclass(frozen=True)
class Share:
    """Of the disk: `count` is at the end; `there` already; `besides` for as long as it is written anew."""

    what: str
    folder: Path
    count: int
    there: int = 0
    besides: int = 0


# --- how many -------------------------------------------------------------------------------------------------


def times(every: int, steps: int, first: int = 0) -> int:
    """How often a multiple of `every` comes after step `first`, up to `steps`; 0 with 0."""
    return steps // every - first // every if every else 0


def saves(config: TrainConfig, first: int = 0) -> int:
    """The last step's among them."""
    return times(config.save.every, config.train.steps - 1, first) + 1


def previews(config: TrainConfig, first: int = 0) -> int:
    return times(config.preview.every, config.train.steps, first) * len(config.preview.prompts)


def shown(config: TrainConfig) -> int:
    """Pictures of the report, without the LoRA and with it."""
    return 2 * len(report.shots(config.report, report.judge_views(config.report)))


def measured_rows(config: TrainConfig, held_out: int, first: int = 0) -> int:
    """Answers of the UNet that the measurements take; what a prompt is moved by takes two."""
    steps, every = config.train.steps, config.validation.every
    often = times(every, steps - 1, first) + 1
    return often * len(TIMES) * (min(held_out, MOST) + 2 * len(drift_prompts(config)))


def encoders(bench: Bench) -> list[str]:
    """Text encoders whose embeddings are kept on disk: those that do not train, or stop."""
    config = bench.config
    if not config.train.cache_text:
        return []
    learning = [c for c in trained_components(config, bench.live) if config.train.stop_of(c) is None]
    if config.lora.new_tokens:
        learning = [c for c in bench.words.components if config.train.stop_of(c) is None]
    return [c for c in bench.words.components if c not in learning]


def kept_prompts(bench: Bench, ahead: Ahead) -> int:
    if bench.prompts is None or not encoders(bench):
        return 0
    of_class = {d.class_prompt for d in bench.config.datasets if d.class_from == "model"}
    return len(of_class.union(prompts(ahead.dataset.examples)[0]))


def latents(ahead: Ahead) -> int:
    """Pixels of every view that is encoded."""
    found = (*ahead.dataset.examples, *ahead.held_out)
    return sum(math.prod(e.plan.bucket) * len(e.views()) for e in found)


# --- disk -----------------------------------------------------------------------------------------------------


def disk(bench: Bench, ahead: Ahead, costs: Costs) -> list[Share]:
    """Every part of what the run folder will hold, and class pictures beside it."""
    config, folder = bench.config, ahead.folder
    there = (lambda path: 0) if ahead.anew else held
    count, save = saves(config), costs.save
    state = save.state + sum(known_of(e) for e in ahead.dataset.examples) + 4 * DIGEST
    side = bench.live.resolution
    pictures = previews(config) * (side**2 * PNG + WORDS)
    found = [
        Share(
            _some(min(count, config.save.keep), "state to resume from", "states to resume from"),
            folder.checkpoints,
            min(count, config.save.keep) * state,
            sum(held(path) for _, path in checkpoints.saved_steps(folder.checkpoints))
            if not ahead.anew
            else 0,
            state if count > config.save.keep else 0,
        ),
        Share(
            f"{count + 1} LoRA files",
            folder.checkpoints,
            (count + 1) * (save.lora + WORDS),
            sum(map(held, folder.checkpoints.glob(f"{config.name}-*"))) if not ahead.anew else 0,
        ),
        Share("previews", folder.previews, math.ceil(pictures), there(folder.previews)),
        Share("latents and prompts", folder.cache, cached(bench, ahead, costs), there(folder.cache)),
        Share("the report", folder.root, report_bytes(config, side), there(folder.events)),
    ]
    if config.report.tensorboard:
        board = math.ceil(pictures) + config.train.steps * STEP_LINE
        found.append(Share("TensorBoard", folder.tensorboard, board, there(folder.tensorboard)))
    for made in ahead.to_make:
        bytes_ = math.ceil(made.count * (made.side**2 * PNG + WORDS))
        found.append(Share("class pictures", made.folder, bytes_))
    return [share for share in found if share.count]


def known_of(example: Example) -> int:
    return DIGEST + len(example.source.folder.name) + len(example.path.name)


def _some(count: int, one: str, many: str) -> str:
    return f"{count} {one if count == 1 else many}"


def cached(bench: Bench, ahead: Ahead, costs: Costs) -> int:
    """At the end: mean and deviation of every view, four channels of fp32 each, and a mask's one; and embeddings."""
    factor, found = int(bench.live.pipeline.vae_scale_factor), 0
    if bench.config.train.cache_latents:
        for e in (*ahead.dataset.examples, *ahead.held_out):
            cells = math.prod(side // factor for side in e.plan.bucket)
            found += len(e.views()) * ((8 + e.masked) * 4 * cells + 400)
    return found + kept_prompts(bench, ahead) * (costs.prompt_bytes + 400 * len(encoders(bench)))


def report_bytes(config: TrainConfig, side: int) -> int:
    """events.jsonl, report.html, report.json and the sheet, whose pictures are at most 192 pixels wide."""
    per_prompt = times(config.preview.every, config.train.steps)
    in_page = min(per_prompt, 16) * len(config.preview.prompts) * PAGE_PICTURE * IN_PAGE
    sheet = min(shown(config), 2 * 12 * len(config.report.seeds)) * min(side, 192) ** 2 * PNG
    return math.ceil(config.train.steps * STEP_LINE + in_page + 1.3 * sheet + 20_000)


@dataclass(frozen=True)
class Disk:
    """A file system the training writes to, and what of it."""

    folder: Path
    free: int
    shares: tuple[Share, ...]

    @property
    def needed(self) -> int:
        """Bytes that are not there yet, at the worst moment."""
        still = sum(max(0, share.count - share.there) for share in self.shares)
        return still + max(share.besides for share in self.shares)


def disks(shares: Sequence[Share]) -> list[Disk]:
    """Each file system by itself: previews, caches or class pictures may lie on others. Raises ConfigError for a folder
    that is nowhere."""
    by_device: dict[int, tuple[Path, list[Share]]] = {}
    for share in shares:
        place = existing(share.folder)
        by_device.setdefault(place.stat().st_dev, (place, []))[1].append(share)
    return [Disk(place, shutil.disk_usage(place).free, tuple(own)) for place, own in by_device.values()]


def existing(folder: Path) -> Path:
    """`folder`, or the nearest one above it that is there."""
    found = next((path for path in (folder, *folder.parents) if path.exists()), None)
    if found is None:
        raise ConfigError(
            f"{folder} cannot be made: {folder.anchor or folder} is not there. Choose another place."
        )
    return found


def told(shares: Sequence[Share]) -> dict[str, int]:
    """By what it is, bytes at the end."""
    found: dict[str, int] = {}
    for share in shares:
        found[share.what] = found.get(share.what, 0) + share.count
    return found


# --- time -----------------------------------------------------------------------------------------------------


def more_seconds(bench: Bench, ahead: Ahead, costs: Costs) -> dict[str, float]:
    """Beyond the steps, in the order in which it comes."""
    return {what: round(seconds, 1) for what, seconds in _more(bench, ahead, costs) if seconds > 0}


def _more(bench: Bench, ahead: Ahead, costs: Costs) -> Iterator[tuple[str, float]]:
    config, first = bench.config, ahead.first
    look, final, side = config.preview, config.report, bench.live.resolution
    picture = costs.picture
    if ahead.anew:
        if picture is not None:
            each = [m.count * picture.seconds(m.side, look.steps, look.guidance) for m in ahead.to_make]
            yield "class pictures", sum(each)
        if config.train.cache_latents:
            yield "latents", latents(ahead) * costs.latent_s
        yield "prompts", kept_prompts(bench, ahead) * costs.prompt_s
    if picture is not None:
        yield "previews", previews(config, first) * picture.seconds(side, look.steps, look.guidance)
    yield "measuring", measured_rows(config, len(ahead.held_out), first) * costs.answer_s
    yield "saving", saves(config, first) * costs.save.seconds
    if picture is not None:
        each_s = picture.seconds(config.data.resolution or side, final.steps, final.guidance)
        yield "the report", shown(config) * each_s
