"""The [lora] table of a preset: what the LoRA looks like and where it goes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal, Self, TypeVar

from pydantic import Field, model_validator

from lora_core.config import LoraConfig
from lora_core.errors import ConfigError
from trainers.config_table import AnyPath, Numbers, Ranges, Strings, Table

Value = TypeVar("Value")
COMPONENTS = ("unet", "text_encoder", "text_encoder_2")  # adapter.COMPONENTS, without loading torch for it
TEXT_ENCODER_GROUPS = ("attention", "feed-forward", "all-linear", "all-linear+conv")  # CLIP has these


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
    "text_encoder.layers.3" = 2 }, or "unet.down.1.attn.0", one attention. The longest name that holds decides; 0 leaves
    a block out."""
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
