"""The tables of a preset about what a run measures, saves and shows: [validation], [save], [preview], [report]."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from lora_core.errors import ConfigError
from trainers.config_table import AnyPath, Count, Dtype, Positive, Seed, Seeds, Strings, Table


class ValidationSettings(Table):
    """What is measured at the same noise and timesteps every time: the loss on pictures that are not trained on, and
    the drift of `class_prompt` and the report's unrelated prompts."""

    table: ClassVar[str] = "validation"

    images: AnyPath | None = None
    """Folder with pictures that are not trained on."""
    share: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Or so many of the pictures to learn are held back for it, 0.1 for every tenth; 0: none."""
    every: Count = 0
    """Steps between measurements; 0: only after the last."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.images is not None and self.share:
            raise ConfigError("validation.images and validation.share both name the pictures: leave one out.")
        return self


class SaveSettings(Table):
    """What is written, when, and how the file is spelled."""

    table: ClassVar[str] = "save"

    every: Count = 0
    """Steps between checkpoints; 0: only at the end and when stopped."""
    keep: Positive = 3
    """How many states to resume from stay; the LoRA files of every save stay."""
    dtype: Dtype = "fp16"
    """Precision of the finished LoRA file."""
    ema: bool = True
    """With `train.ema_decay`, the files hold the average; false: the weights of the last step."""
    spelling: Literal["kohya", "diffusers", "peft"] = "kohya"
    """Names inside the file; every common program reads "kohya"."""
    author: str | None = None
    """Whose work the file says it is."""
    description: str | None = None
    """What the file says about itself, as long as you like."""
    thumbnail: bool = True
    """Put a small picture of the report, or else of the last preview, into the finished file, for programs that show
    one."""


class PreviewSettings(Table):
    """Sample pictures made while training."""

    table: ClassVar[str] = "preview"

    every: Count = 0
    """Steps between previews; 0: none."""
    prompts: Strings = ()
    """One picture each."""
    steps: Positive = 25
    """Denoising steps of a preview."""
    guidance: Annotated[float, Field(ge=0)] = 7.5
    """Classifier-free guidance of a preview."""
    seed: Seed = 0
    """The same seed each time, so that previews show the training and not the noise."""
    ema: bool = True
    """With `train.ema_decay`, previews are made with the average; false: with the weights of the step."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.every and not self.prompts:
            raise ConfigError(
                f"preview.every = {self.every}, but preview.prompts is empty: give one, or set every = 0."
            )
        return self


class ReportSettings(Table):
    """report.html, and in it the sheet of before and after with its figures: without prompts there is no sheet."""

    table: ClassVar[str] = "report"

    judge: AnyPath | None = None
    """Folder with pictures of the subject that are not trained on, to compare with."""
    subject_prompts: Strings = ()
    """Prompts that name the subject: these should change."""
    unrelated_prompts: Strings = ()
    """Prompts that do not: these should stay as they were."""
    seeds: Seeds = (0, 1, 2, 3)
    """One picture per prompt and seed."""
    steps: Positive = 25
    """Denoising steps."""
    guidance: Annotated[float, Field(ge=0)] = 7.5
    """Classifier-free guidance."""
    tensorboard: bool = False
    """Write the curves and previews for TensorBoard too, into the run's folder; needs the extra "tensorboard"."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.seeds:
            raise ConfigError("report.seeds is empty: give at least one, such as [0].")
        if self.judge is not None and not self.subject_prompts:
            raise ConfigError(
                "report.judge needs report.subject_prompts to compare with: give some, or leave it out."
            )
        return self
