"""The [train] table of a preset: how long, how fast and with how much memory."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from lora_core.errors import ConfigError
from lora_core.unet_blocks import check_named
from trainers.config_lora import COMPONENTS, check_components, of_component
from trainers.config_table import Count, Positive, Table


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
    """Noise of coarser sizes too, each this many times as strong as the one before, as sd-scripts'
    multires_noise_discount; the sum is brought back to variance 1. 0.3 to 0.8 are usual, 0: none."""
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
