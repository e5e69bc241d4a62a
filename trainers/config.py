"""TrainConfig: one frozen, complete, checked value per run. TOML is its spelling (`trainers.presets`).

Each field's meaning is the docstring under it; forms and `--help` show the same text. Every check is made
when the value is born, so a run that starts has no contradiction left in it. Paths are absolute from birth:
the value means the same wherever it is read. Each table has its own home (config_lora, config_data, config_train,
config_watch); here is the whole of them, and what they must agree on.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from lora_core.errors import ConfigError
from lora_core.init_names import is_from_base
from trainers.config_data import REMOVABLE, DatasetSettings, DataSettings, FolderSettings
from trainers.config_lora import LoraSettings
from trainers.config_table import AnyPath, BaseName, Seed, Table, check_slug
from trainers.config_train import TrainSettings
from trainers.config_watch import PreviewSettings, ReportSettings, SaveSettings, ValidationSettings

__all__ = [
    "DataSettings",
    "DatasetSettings",
    "LoraSettings",
    "PreviewSettings",
    "ReportSettings",
    "SaveSettings",
    "TrainConfig",
    "TrainSettings",
    "ValidationSettings",
]


class TrainConfig(Table):
    """Everything a run needs to know."""

    name: Annotated[str, AfterValidator(check_slug)]
    """Name of the run and of the LoRA file."""
    base: BaseName = "demo"
    """Base model: "demo", a Hugging Face id, or a folder or .safetensors file (begin with ./ or /)."""
    prediction: Literal["auto", "epsilon", "v_prediction"] = "auto"
    """What the base model's UNet predicts. "auto": what its files say or, where they say nothing, what it is found to
    do when it is tried out."""
    output: AnyPath = Path("runs")
    """Runs are written to a folder of their own in here."""
    seed: Seed = 0
    """Order, crops, noise and the LoRA's beginning all follow from it."""
    lora: LoraSettings = Field(default_factory=LoraSettings)
    """What the LoRA looks like and where it goes."""
    data: DataSettings
    """The pictures and their words."""
    dataset: Annotated[tuple[DatasetSettings, ...], Field(strict=False)] = ()
    """Several folders of pictures, each a [[dataset]] table, in place of data.images."""
    train: TrainSettings = Field(default_factory=TrainSettings)
    """How long, how fast and with how much memory."""
    validation: ValidationSettings = Field(default_factory=ValidationSettings)
    """What is measured while training."""
    save: SaveSettings = Field(default_factory=SaveSettings)
    """What is written, and when."""
    preview: PreviewSettings = Field(default_factory=PreviewSettings)
    """Sample pictures made while training."""
    report: ReportSettings = Field(default_factory=ReportSettings)
    """The sheet of before and after."""

    @model_validator(mode="before")
    @classmethod
    def _inherit(cls, given: Any) -> Any:
        """What a [[dataset]] leaves out is as in [data]; an empty text takes it away."""
        if not isinstance(given, dict) or not isinstance(given.get("dataset"), list | tuple):
            return given
        shared = FolderSettings.model_fields.keys() - {"images"}
        common = {k: v for k, v in _given(given.get("data")).items() if k in shared}
        tables = [{**common, **_without(table)} if (table := _given(t)) else t for t in given["dataset"]]
        return {"data": {}, **given, "dataset": tables}

    @property
    def datasets(self) -> tuple[DatasetSettings, ...]:
        """Every folder to learn from, whichever way the preset names them."""
        return self.dataset or (self.data.as_dataset(),)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.data.images is None) != bool(self.dataset):
            raise ConfigError(
                "data.images and [[dataset]] tables both name folders to learn from: leave one of them out."
                if self.dataset
                else f"The setting data.images is missing. {FolderSettings.model_fields['images'].description}"
            )
        if self.train.cache_latents and any(d.crop == "random" for d in self.datasets):
            raise ConfigError(
                'data.crop = "random" makes a new picture each time, which train.cache_latents = true cannot '
                'keep. Set train.cache_latents = false, or data.crop = "center".'
            )
        if self.train.lora_plus_ratio != 1 and self.lora.kind != "lora":
            raise ConfigError(
                f'train.lora_plus_ratio = {self.train.lora_plus_ratio} is about the up factors of lora.kind = "lora", '
                f'which "{self.lora.kind}" has not. Set it to 1, or lora.kind = "lora".'
            )
        for name in ("text_encoder_modules_to_save", "text_encoder_layers_to_transform"):
            if getattr(self.lora, name) and not self.train.trains_text_encoder:
                raise ConfigError(
                    f"lora.{name} = {list(getattr(self.lora, name))} has no effect with "
                    "train.text_encoder_learning_rate = 0: leave it out, or raise the rate."
                )
        if self.train.ema_decay and not (self.save.ema or self.preview.ema):
            raise ConfigError(
                f"train.ema_decay = {self.train.ema_decay} makes an average that nothing shows: set save.ema or "
                "preview.ema to true, or leave it out."
            )
        self._check_spelling()
        if self.lora.init == "loftq" and self.train.quantize == "none":
            raise ConfigError(
                'lora.init = "loftq" makes up for what quantising loses, and train.quantize = "none". Set '
                'train.quantize = "nf4", or lora.init = "pissa".'
            )
        if self.lora.start_from is not None and is_from_base(self.lora.init):
            raise ConfigError(
                f'lora.init = "{self.lora.init}" begins from the base, and lora.start_from is another beginning: '
                "leave one of them out."
            )
        return self

    def _check_spelling(self) -> None:
        """What the file cannot say is refused before anything is trained, not at the first save."""
        lora, spelling = self.lora, self.save.spelling
        if spelling == "kohya":
            return
        for name, value, plain in (
            ("kind", lora.kind, "lora"),
            ("bias", lora.bias, "none"),
            ("modules_to_save", lora.modules_to_save, ()),
            ("text_encoder_modules_to_save", lora.text_encoder_modules_to_save, ()),
        ):
            if value != plain:
                raise ConfigError(
                    f'save.spelling = "{spelling}" has no words for lora.{name} = {json.dumps(value)}. Set '
                    'save.spelling = "kohya".'
                )


def _without(table: dict[str, Any]) -> dict[str, Any]:
    """TOML has no word for None: a [[dataset]] says masks = "" where [data] has some."""
    return {key: None if value == "" and key in REMOVABLE else value for key, value in table.items()}


def _given(table: Any) -> dict[str, Any]:
    """The settings a table names, as text of a file or as a value; empty for what is no table."""
    if isinstance(table, Table):
        return {name: getattr(table, name) for name in table.model_fields_set}
    return dict(table) if isinstance(table, dict) else {}
