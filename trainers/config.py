"""TrainConfig: one frozen, complete, checked value per run. TOML is its spelling (`trainers.presets`).

Each field's meaning is the docstring under it; forms and `--help` show the same text. Every check is made
when the value is born, so a run that starts has no contradiction left in it. Paths are absolute from birth:
the value means the same wherever it is read.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar

from pydantic import AfterValidator, Field, model_validator

from lora_core.config import LoraConfig
from lora_core.errors import ConfigError
from lora_core.init_names import is_from_base
from lora_core.unet_blocks import check_named
from trainers.config_data import DatasetSettings, DataSettings, FolderSettings
from trainers.config_table import (
    AnyPath,
    BaseName,
    Count,
    Dtype,
    Numbers,
    Positive,
    Ranges,
    Seed,
    Seeds,
    Strings,
    Table,
    check_slug,
)

Value = TypeVar("Value")
TEXT_ENCODER_GROUPS = (
    "attention",
    "feed-forward",
    "all-linear",
    "all-linear+conv",
)  # CLIP has these


COMPONENTS = ("unet", "text_encoder", "text_encoder_2")


def of_component(values: Mapping[str, Value], component: str) -> dict[str, Value]:
    """Of "component.block" -> value, those of one component by block; "" is the component's own."""
    split = {key: key.partition(".") for key in values}
    return {split[key][2]: value for key, value in values.items() if split[key][0] == component}


def check_components(name: str, values: Mapping[str, object]) -> None:
    for key in values:
        if key.partition(".")[0] not in COMPONENTS:
            raise ConfigError(f'{name}: "{key}" begins with no component. Known: {", ".join(COMPONENTS)}.')


class LoraSettings(Table):
    """What the LoRA looks like and where it goes."""

    table: ClassVar[str] = "lora"

    rank: int = 16
    """Size of the LoRA in each layer: 4 to 64 are usual, the file grows in proportion."""
    alpha: float | None = None
    """Strength inside the LoRA, alpha/rank; left out: alpha = rank."""
    dropout: float = 0.0
    """Share of each layer's input dropped while training."""
    kind: Literal["lora", "loha", "lokr"] = "lora"
    """How the change of a layer is made: two factors, or LyCORIS' "loha" (arXiv 2108.06098) or "lokr" (2309.14859)."""
    variant: Literal["lora", "dora"] = "lora"
    """"dora" trains a magnitude per output as well, around any kind (arXiv 2402.09353)."""
    factor: int = -1
    """LoKr alone: rows and columns of the small factor; -1: near the square root of the layer's."""
    decompose_both: bool = False
    """LoKr alone: split the small factor by `rank` as well."""
    init: Literal[
        "gaussian", "kaiming", "random", "pissa", "pissa_niter_4", "pissa_niter_16", "olora", "loftq"
    ] = "gaussian"
    """How the factors begin. "pissa" (arXiv 2404.02948), faster with "_niter_4" or "_niter_16", and "olora"
    (2406.01775) begin as a part of the base's weights; "loftq" (2310.08659) makes up for what train.quantize lost.
    Their files have twice the rank. "random" does not begin at the base model and is for experiments."""
    loftq_iterations: int = 1
    """Turns of quantising and making up for it, with init = "loftq"."""
    rank_stabilized: bool = False
    """alpha/sqrt(rank) instead of alpha/rank (arXiv 2312.03732)."""
    targets: Strings = ("attention",)
    """Layers of the UNet: groups (attention, feed-forward, projection, conv, all-linear, all-linear+conv) or
    the ends of module paths."""
    text_encoder_targets: Strings | None = None
    """Layers of the text encoders; left out: the groups of `targets` that they have, else attention."""
    exclude: Strings = ()
    """Ends of module paths never to touch."""
    layers_to_transform: Numbers | None = None
    """Numbers of the UNet's layers to take, of those that `targets` names, such as [0, 1]; left out: all."""
    layers_pattern: Strings = ()
    """The list those numbers count in, such as ["transformer_blocks"]; left out: the first below the model's own."""
    text_encoder_layers_to_transform: Numbers | None = None
    """Numbers of the text encoders' layers to take; left out: all."""
    modules_to_save: Strings = ()
    """Ends of module paths of the UNet to train whole, without factors, such as ["conv_in"]: large files."""
    text_encoder_modules_to_save: Strings = ()
    """The same for the text encoders, such as ["final_layer_norm"]."""
    bias: Literal["none", "all", "lora_only"] = "none"
    """Biases to train as well: none, those of the layers with a LoRA, or all of the model."""
    layer_replication: dict[str, Ranges] = Field(default_factory=dict)
    """Stacks of the UNet's own layers to train, weights shared: the list's path -> ranges, as PEFT's layer_replication:
    { "mid_block.attentions.0.transformer_blocks" = [[0, 1], [0, 1]] }."""
    text_encoder_layer_replication: Ranges = ()
    """The same for the text encoders' layers, such as [[0, 8], [4, 12]]."""
    rank_pattern: dict[str, int] = Field(default_factory=dict)
    """End of a module path (may be a regular expression) -> its own rank."""
    alpha_pattern: dict[str, float] = Field(default_factory=dict)
    """End of a module path (may be a regular expression) -> its own alpha."""
    ranks: dict[str, int] = Field(default_factory=dict)
    """Component or block -> its own rank: { "unet.down.1" = 8, "unet.up.2.attn" = 32, "text_encoder" = 4,
    "text_encoder.layers.3" = 2 }. The longest name that holds decides; 0 leaves a block out."""
    alphas: dict[str, float] = Field(default_factory=dict)
    """Component or block -> its own alpha, named as in `ranks`."""
    new_tokens: dict[str, str | int] = Field(default_factory=dict)
    """New words to learn with the LoRA -> the word each begins as, or its number of vectors: { "<fox>" = "animal" }."""
    start_from: AnyPath | None = None
    """An existing LoRA file to go on from instead of a fresh one."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.targets or self.text_encoder_targets == ():
            raise ConfigError('lora.targets and text_encoder_targets need an entry, such as ["attention"].')
        check_components("lora.ranks", self.ranks)
        check_components("lora.alphas", self.alphas)
        for component in COMPONENTS:
            if self.ranks.get(component) == 0:
                rest = (
                    ""
                    if component == "unet"
                    else f" To leave it out, set train.{component}_learning_rate = 0."
                )
                raise ConfigError(f"lora.ranks: {component} = 0 leaves nothing of it to train.{rest}")
        try:
            for component in COMPONENTS:
                self.lora_config(component)
        except ConfigError as problem:
            raise ConfigError(f"[lora] {problem}") from None
        return self

    def lora_config(self, component: str) -> LoraConfig:
        """The LoRA of one component: "unet", "text_encoder" or "text_encoder_2"."""
        unet = component == "unet"
        ranks, alphas = of_component(self.ranks, component), of_component(self.alphas, component)
        shared = tuple(t for t in self.targets if t in TEXT_ENCODER_GROUPS)
        return LoraConfig(
            rank=ranks.pop("", self.rank),
            alpha=alphas.pop("", self.alpha),
            dropout=self.dropout,
            kind=self.kind,
            variant=self.variant,
            factor=self.factor,
            decompose_both=self.decompose_both,
            targets=self.targets if unet else self.text_encoder_targets or shared or ("attention",),
            exclude=self.exclude,
            layers_to_transform=self.layers_to_transform if unet else self.text_encoder_layers_to_transform,
            layers_pattern=self.layers_pattern if unet else (),
            modules_to_save=self.modules_to_save if unet else self.text_encoder_modules_to_save,
            bias=self.bias,
            init=self.init,
            loftq_iterations=self.loftq_iterations,
            rank_stabilized=self.rank_stabilized,
            layer_replication=dict(self.layer_replication) if unet else self.text_encoder_layer_replication,
            rank_pattern=dict(self.rank_pattern),
            alpha_pattern=dict(self.alpha_pattern),
            block_ranks=ranks,
            block_alphas=alphas,
        )


class TrainSettings(Table):
    """How long, how fast and with how much memory."""

    table: ClassVar[str] = "train"

    steps: Positive = 500
    """Optimizer steps."""
    batch_size: Positive = 1
    """Pictures at a time; with class pictures, as many of those again."""
    gradient_accumulation: Positive = 1
    """Batches per optimizer step: a larger batch in the memory of a small one, at the time of a large one."""
    learning_rate: Annotated[float, Field(gt=0)] = 1e-4
    """Peak learning rate."""
    text_encoder_learning_rate: Annotated[float, Field(ge=0)] | None = None
    """The same for the text encoders; left out: as `learning_rate`. 0: they are not trained."""
    text_encoder_2_learning_rate: Annotated[float, Field(ge=0)] | None = None
    """The same for SDXL's second text encoder; left out: as the first."""
    text_encoder_stop: Annotated[float, Field(ge=0)] = 0.0
    """The step after which the text encoders stay as they are, below 1 a share of all steps; 0: they learn to the end.
    Their embeddings are then kept, and they leave the device."""
    text_encoder_2_stop: Annotated[float, Field(ge=0)] | None = None
    """The same for SDXL's second text encoder; left out: as the first."""
    rates: dict[str, Annotated[float, Field(gt=0)]] = Field(default_factory=dict)
    """Block -> its own peak learning rate, named as in `lora.ranks`: { "unet.down.1" = 5e-5 }."""
    lora_plus_ratio: Annotated[float, Field(ge=1)] = 1.0
    """LoRA+ (arXiv 2402.12354): how many times as fast the up factors learn; 1: as fast, 4 to 16 are usual."""
    new_token_learning_rate: Annotated[float, Field(gt=0)] = 1e-3
    """The same for the rows of `lora.new_tokens`."""
    schedule: Literal["constant", "cosine"] = "constant"
    """The learning rate after warm-up."""
    warmup_steps: Count = 0
    """Steps in which the learning rate rises from 0 to its peak."""
    weight_decay: Annotated[float, Field(ge=0)] = 1e-2
    """AdamW's decay of the LoRA's weights."""
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Average the LoRA's weights over the steps, each counting this much less than the next: 0.99 to 0.9999 are usual,
    0: no average."""
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    """Gradients longer than this are shortened to it."""
    base_dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Precision of the frozen base model; the LoRA itself is always fp32. "auto" asks the device."""
    quantize: Literal["none", "nf4", "int8", "fp8"] = "none"
    """Keep the frozen base in fewer bits (QLoRA, arXiv 2305.14314): "nf4" takes a good quarter of fp16's memory and
    "int8" half, in the linear layers; "fp8" half, in the UNet. A little slower. nf4 and int8 need bitsandbytes."""
    gradient_checkpointing: bool = False
    """Compute activations twice instead of keeping them: far less memory, about a third slower."""
    cache_latents: bool = True
    """Encode every picture once, before the first step; the VAE then leaves the device."""
    cache_text: bool = True
    """Encode every prompt once where the text encoders are not trained; they then leave the device."""
    channels_last: bool = False
    """Memory order that convolutions like better: faster on some cards and on CPUs."""
    log_every: Positive | None = None
    """Steps between two looks at the loss, each of which waits for the device; left out: 10 on a GPU, 1 on a CPU."""
    loss_weighting: Literal["uniform", "min_snr", "min_snr_floored"] = "uniform"
    """How much each noise level counts; "min_snr" is arXiv 2303.09556."""
    snr_gamma: Annotated[float, Field(gt=0)] = 5.0
    """The gamma of the two min-SNR weightings."""

    def rate_of(self, component: str) -> float:
        """Peak learning rate of "unet", "text_encoder" or "text_encoder_2"; 0: it is not trained."""
        found = None
        if component == "text_encoder_2":
            found = self.text_encoder_2_learning_rate
        if component != "unet" and found is None:
            found = self.text_encoder_learning_rate
        return self.learning_rate if found is None else found

    noise_offset: Annotated[float, Field(ge=0)] = 0.0
    """Noise that is the same all over a picture, for darker and lighter ones: 0.05 to 0.1 are usual, 0: none."""
    pyramid_noise: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Noise of coarser sizes too, each so much weaker than the one before: 0.3 to 0.8 are usual, 0: none."""
    input_perturbation: Annotated[float, Field(ge=0)] = 0.0
    """More noise on what the UNet sees than it has to tell (arXiv 2301.11706): 0.1 is usual, 0: none."""

    def stop_of(self, component: str) -> int | None:
        """The last step in which it learns; None: every one."""
        stop = self.text_encoder_stop
        if component == "text_encoder_2" and self.text_encoder_2_stop is not None:
            stop = self.text_encoder_2_stop
        if component == "unet" or stop == 0:
            return None
        return max(1, round(stop * self.steps)) if stop < 1 else int(stop)

    @property
    def trains_text_encoder(self) -> bool:
        """Whether any of them is."""
        return self.rate_of("text_encoder") != 0 or self.rate_of("text_encoder_2") != 0

    @model_validator(mode="after")
    def _check(self) -> Self:
        for name in ("text_encoder_stop", "text_encoder_2_stop"):
            stop = getattr(self, name)
            if stop is not None and stop > 1 and stop != int(stop):
                raise ConfigError(
                    f"train.{name} = {stop} is neither a step nor a share of them: below 1, or whole."
                )
            if stop and self.rate_of(name.removesuffix("_stop")) == 0:
                raise ConfigError(
                    f"train.{name} = {stop} has no effect with train.{name.removesuffix('_stop')}_learning_rate = 0: "
                    "leave it out, or raise the rate."
                )
        check_components("train.rates", self.rates)
        for component in COMPONENTS:
            blocks = of_component(self.rates, component)
            if "" in blocks:
                name = "learning_rate" if component == "unet" else f"{component}_learning_rate"
                raise ConfigError(f"train.rates is for blocks: the rate of {component} is train.{name}.")
            if blocks and self.rate_of(component) == 0:
                raise ConfigError(
                    f"train.rates: {component} is not trained at all, with train.{component}_learning_rate = 0. Raise "
                    "that, or take its blocks out."
                )
            try:
                check_named(blocks)
            except ConfigError as problem:
                raise ConfigError(f"train.rates: {problem}") from None
        if self.warmup_steps >= self.steps:
            raise ConfigError(
                f"train.warmup_steps = {self.warmup_steps} leaves nothing of train.steps = {self.steps}: the "
                "learning rate would never arrive. A tenth of the steps is usual."
            )
        return self


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
        """What a [[dataset]] leaves out is as in [data]."""
        if not isinstance(given, dict) or not isinstance(given.get("dataset"), list | tuple):
            return given
        shared = FolderSettings.model_fields.keys() - {"images"}
        common = {k: v for k, v in _given(given.get("data")).items() if k in shared}
        tables = [{**common, **table} if (table := _given(t)) else t for t in given["dataset"]]
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


def _given(table: Any) -> dict[str, Any]:
    """The settings a table names, as text of a file or as a value; empty for what is no table."""
    if isinstance(table, Table):
        return {name: getattr(table, name) for name in table.model_fields_set}
    return dict(table) if isinstance(table, dict) else {}
