"""A bench to rehearse at: no class picture is made, and of the pictures only those of the largest step are encoded.

What the training itself would have is kept beside it, for the warnings and the forecast.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

from lora_core.errors import ConfigError
from lora_core.pipeline import LivePipeline
from trainers import class_images
from trainers.buckets import Buckets, plan_crop
from trainers.config import TrainConfig
from trainers.config_data import DatasetSettings
from trainers.control import StopRequest
from trainers.dataset import Dataset, Example
from trainers.events import Emit, Note
from trainers.folders import Source, picture_files
from trainers.largest import Largest, largest
from trainers.scan import scan


@dataclass(frozen=True)
class ToMake:
    """Class pictures that the base has still to make: squares of `side` pixels."""

    folder: Path
    count: int
    side: int
    settings: DatasetSettings


@dataclass
class Rehearsal:
    """`find` and `narrow` take the place of what `prepare` does for a training; the rest is known afterwards."""

    config: TrainConfig
    to_make: list[ToMake] = field(default_factory=list)
    _whole: Dataset | None = None
    _step: Largest | None = None
    held_out: tuple[Example, ...] = ()

    @property
    def dataset(self) -> Dataset:
        """Of the training: class pictures that are not made yet are among it."""
        assert self._whole is not None, "prepare() was not called with this rehearsal"
        return self._whole

    @property
    def step(self) -> Largest:
        assert self._step is not None, "prepare() was not called with this rehearsal"
        return self._step

    def find(self, config: TrainConfig, live: LivePipeline, stop: StopRequest, emit: Emit) -> Dataset:
        """The pictures there are, and stand-ins for those that are to be made."""
        resolution = config.data.resolution or live.resolution
        datasets = []
        for settings in config.datasets:
            own = settings.model_copy(update={"resolution": settings.resolution or resolution})
            folder = class_images.class_folder(own, config.output, class_images.base_path(live))
            there = len(picture_files(folder)) if folder is not None else 0
            known = any(
                (m.folder, m.settings.class_prompt) == (folder, own.class_prompt) for m in self.to_make
            )
            if folder is not None and own.class_count > there and not known:
                self.to_make.append(
                    ToMake(folder, own.class_count - there, own.resolution or resolution, own)
                )
            read = folder if there or not own.class_count else None
            datasets.append(own.model_copy(update={"class_images": read}))
        found = scan(
            config.data,
            resolution,
            datasets=datasets,
            report=lambda report: emit(Note(text=f"{report.folder.name}: {report}")),
        )
        stand_ins = [e for to_make in self.to_make for e in self._stand_ins(to_make, found.instances[0])]
        return replace(found, classes=(*found.classes, *stand_ins))

    def _stand_ins(self, to_make: ToMake, like: Example) -> list[Example]:
        """Pictures that are there, cut as those that are not would be."""
        if to_make.folder.exists() and not to_make.folder.is_dir():
            raise ConfigError(
                f"data.class_images must be a folder to keep class pictures in, and {to_make.folder} is a file. "
                "Choose another."
            )
        prompt = to_make.settings.class_prompt or ""
        source = Source(to_make.folder, "class", to_make.settings, prompt, 1, "data.class_images")
        side = to_make.side
        plan = plan_crop(like.original_size, Buckets.of(self.config.data, side).fit((side, side)))
        return [Example(like.path, (prompt,), like.original_size, plan, source)] * to_make.count

    def narrow(self, dataset: Dataset, held_out: tuple[Example, ...]) -> tuple[Dataset, tuple[Example, ...]]:
        self._whole, self.held_out = dataset, held_out
        self._step = step = largest(dataset, self.config)
        chosen = (tuple(dict.fromkeys(examples)) for examples in (step.instances, step.classes))
        return replace(dataset, instances=next(chosen), classes=next(chosen)), ()
