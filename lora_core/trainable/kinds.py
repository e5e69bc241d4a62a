"""The kinds that can be trained, in the order they are asked whether they are meant."""

from __future__ import annotations

from lora_core.errors import ConfigError
from lora_core.trainable import Factors, Site
from lora_core.trainable.hadamard import TrainableHadamard
from lora_core.trainable.kronecker import TrainableKronecker
from lora_core.trainable.low_rank import TrainableEmbedding, TrainableLowRank
from lora_core.trainable.residual import TrainableResidual

KINDS: tuple[type[Factors], ...] = (
    TrainableEmbedding,
    TrainableResidual,  # before plain LoRA, of which it is a special case
    TrainableLowRank,
    TrainableHadamard,
    TrainableKronecker,
)


def factors_for(site: Site) -> Factors:
    """Fresh factors of the kind that the config names. ConfigError where that kind has no form for such a layer."""
    kind = next((kind for kind in KINDS if kind.trains(site)), None)
    if kind is None:
        raise ConfigError(
            f'kind = "{site.config.kind}" has no form for {site.path}, a {type(site.layer).__name__}. Set kind = '
            '"lora", or name the layer in exclude.'
        )
    return kind(site)
