"""LoftQ in one step, on a base that is quantised already (arXiv 2310.08659): A and B make up for what that lost."""

from __future__ import annotations

from collections.abc import Callable

import torch

from lora_core import init_from_base
from lora_core.errors import ConfigError
from lora_core.train_form import LoraForm, Originals
from lora_core.trainable.layer import TrainableLayer
from lora_core.trainable.low_rank import TrainableLowRank
from lora_core.trainable.residual import TrainableResidual

Accept = Callable[[LoraForm, str], bool]


@torch.no_grad()
def loftq_in_place(form: LoraForm, originals: Originals, accept: Accept | None = None) -> tuple[str, ...]:
    """Begin the LoRA of each nf4 or int8 layer with s B0 A0 = the top-r part of W - Q; Q stays as it is.

    Call it between `attach` and the optimizer. After each layer `accept(form, path)` is asked, with the new factors in
    place: False puts back what was there. (PEFT's replace_lora_weights_loftq.) `originals(component, parameter name)`
    gives W. A DoRA's magnitude follows. What is collected is the rank 2r difference, for the ORIGINAL base; its error
    there is what rank r does not hold of W - Q.

    -> the paths of the layers that kept it. Raises ConfigError where no layer of the form is quantised.
    """
    kept, any_quantised = [], False
    for path, layer in zip(form.paths, form.layers, strict=True):
        assert isinstance(layer, TrainableLayer)
        before, site = layer.factors, layer.site
        if not isinstance(before, TrainableLowRank) or not site.is_quantised:
            continue
        any_quantised = True
        weight = originals(path.split(".", 1)[0], f"{site.path}.weight").to(site.device)
        lost = weight.float() - site.original()
        down, up = init_from_base.pissa(lost, rank=site.rank, scale=site.scale)
        old = [p.detach().clone() for p in layer.parameters()]
        before.down.copy_(down)
        before.up.copy_(up)
        layer.factors = TrainableResidual.around(before)
        layer.follow_magnitude()
        if accept is None or accept(form, path):
            kept.append(path)
            continue
        layer.factors = before
        for parameter, value in zip(layer.parameters(), old, strict=True):
            parameter.copy_(value)
    if not any_quantised:
        raise ConfigError(
            "LoftQ makes up for what quantising loses, and no layer of this LoRA is quantised. Open the base with "
            'quantize = "nf4" or "int8", or set init = "pissa".'
        )
    return tuple(kept)
