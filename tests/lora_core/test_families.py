"""Which family a model or a LoRA is of, and that one on the other is refused in a sentence."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import nn

from lora_core.adapter import COMPONENTS, Adapter, file_path, weight_of
from lora_core.deltas import Delta
from lora_core.deltas.bias import WithBias
from lora_core.deltas.hadamard import Hadamard
from lora_core.deltas.kronecker import Kronecker
from lora_core.deltas.low_rank import LowRank
from lora_core.deltas.magnitude import WithMagnitude
from lora_core.errors import WrongFamily
from lora_core.families import (
    FAMILIES,
    Told,
    check_belongs,
    compatible,
    family_of_adapter,
    family_of_layers,
    family_of_unet,
)
from tests.small_models import FAMILIES as KEYS
from tests.small_models import small_pipeline


@functools.cache
def models_of(family: str) -> dict[str, nn.Module]:
    """Shared by the tests: none of them changes a weight."""
    pipe = small_pipeline(family)
    return {c: getattr(pipe, c) for c in COMPONENTS if getattr(pipe, c, None) is not None}


def low_rank_for(weight: torch.Tensor, rank: int = 2) -> LowRank:
    out, inn, *kernel = weight.shape
    return LowRank(
        down=torch.randn(rank, inn, *kernel), up=torch.randn(out, rank, *(1 for _ in kernel)), alpha=1.0
    )


def adapter_for(models: dict[str, nn.Module], wanted: str = ".*", **rest: Any) -> Adapter:
    """A LoRA on every linear and convolution layer whose adapter path matches."""
    deltas = {
        file_path(component, path): low_rank_for(weight_of(layer))
        for component, model in models.items()
        for path, layer in model.named_modules()
        if isinstance(layer, nn.Linear | nn.Conv2d) and re.fullmatch(wanted, file_path(component, path))
    }
    assert deltas
    return Adapter(deltas, **rest)


def shapes_of(adapter: Adapter) -> dict[str, tuple[int, ...]]:
    return {path: tuple(delta.shape()) for path, delta in adapter.deltas.items()}


def test_the_table() -> None:
    assert list(FAMILIES) == list(KEYS)
    assert {key: family.key for key, family in FAMILIES.items()} == {key: key for key in KEYS}
    assert [f.context_width for f in FAMILIES.values()] == [768, 1024, 2048]
    assert FAMILIES["sdxl"].base_versions == ("sdxl_base_v1-0",)
    assert FAMILIES["sd2"].base_versions == ("sd_v2", "sd_v2_v")
    for family in FAMILIES.values():
        assert len(family.base_versions) == len(family.architectures)
        assert family.components == tuple(c for c in COMPONENTS if c in family.components)


@pytest.mark.parametrize("key", KEYS)
def test_a_unets_family_does_not_hang_on_its_widths(key: str) -> None:
    pipe = small_pipeline(key)
    assert family_of_unet(pipe.unet) is FAMILIES[key]
    assert family_of_unet(pipe.unet.half()) is FAMILIES[key]


def test_the_demo_base_is_sd1_although_its_text_is_128_wide() -> None:
    with torch.device("meta"):
        unet = UNet2DConditionModel(
            block_out_channels=(64, 128, 192),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=128,
            attention_head_dim=(2, 4, 6),
            norm_num_groups=16,
        )
    assert family_of_unet(unet) is FAMILIES["sd1"]


def test_what_is_no_unet_has_no_family() -> None:
    with pytest.raises(WrongFamily, match=r"Linear has 0 attention blocks.*SD 1\.x, SD 2\.x, SDXL"):
        family_of_unet(nn.Linear(2, 2))


ATTENTION = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"


@pytest.mark.parametrize(
    ("shapes", "family", "by"),
    [
        ({ATTENTION: (640, 768)}, "sd1", "768 features"),
        ({ATTENTION: (640, 1024)}, "sd2", "1024 features"),
        ({ATTENTION: (640, 2048)}, "sdxl", "2048 features"),
        ({ATTENTION: (640, 128)}, None, ""),
        ({"unet.mid_block.attentions.0.proj_in": (1280, 1280, 1, 1)}, "sd1", "a convolution"),
        ({"unet.down_blocks.0.attentions.0.proj_in": (320, 320)}, "sd2", "a linear layer"),
        ({"unet.mid_block.attentions.0.proj_in": (1280, 1280)}, None, ""),  # SDXL's is the same
        (
            {"unet.mid_block.attentions.0.transformer_blocks.1.attn1.to_q": (8, 8)},
            "sdxl",
            "transformer layers",
        ),
        (
            {"text_encoder_2.text_model.encoder.layers.0.self_attn.q_proj": (8, 8)},
            "sdxl",
            "second text encoder",
        ),
        ({"text_encoder.text_model.encoder.layers.0.self_attn.q_proj": (768, 768)}, None, ""),
        (
            {"text_encoder.text_model.encoder.layers.0.self_attn.q_proj": (1024, 1024)},
            "sd2",
            "text encoder of 1024",
        ),
        (
            {"unet.mid_block.attentions.0.proj_in": (1280, 1280), ATTENTION: (640, 2048)},
            "sdxl",
            "2048 features",
        ),
        # OFT tells one side
        (
            {"text_encoder.text_model.encoder.layers.0.self_attn.q_proj": (1024,)},
            "sd2",
            "text encoder of 1024",
        ),
        ({"unet.add_embedding.linear_1": (1280, 2816)}, "sdxl", "picture sizes"),
        ({}, None, ""),
    ],
)
def test_the_family_of_layers_and_what_tells_it(
    shapes: dict[str, tuple[int, ...]], family: str | None, by: str
) -> None:
    told = family_of_layers(shapes)
    assert told.key == family
    assert by in told.by
    assert bool(told.by) == bool(family)


@pytest.mark.parametrize("key", KEYS)
def test_a_whole_adapter_shows_its_family_at_any_width(key: str) -> None:
    assert family_of_layers(shapes_of(adapter_for(models_of(key)))).key == key


@pytest.mark.parametrize(
    "wrap", [lambda d: d, lambda d: WithBias(WithMagnitude(d, torch.ones(320, 1)), torch.ones(320))]
)
@pytest.mark.parametrize("kind", ["loha", "lokr"])
def test_a_kind_that_is_stored_as_matrices_does_not_tell_sd1_from_sd2(
    kind: str, wrap: Callable[[Delta], Delta]
) -> None:
    """A LoHa of SD 1 without text layers was taken for SD 2: its entry layers are convolutions stored as matrices."""
    loha = Hadamard(torch.ones(320, 2), torch.ones(2, 320), torch.ones(320, 2), torch.ones(2, 320), 1.0)
    delta = wrap(loha if kind == "loha" else Kronecker((torch.ones(4, 4),), (torch.ones(80, 80),), 1.0))
    deltas: dict[str, Delta] = {
        f"unet.down_blocks.0.attentions.0.{layer}": delta
        for layer in ("proj_in", "transformer_blocks.0.attn1.to_q", "transformer_blocks.0.attn2.to_q")
    }
    assert family_of_adapter(Adapter(deltas)) == Told()
    assert family_of_adapter(Adapter(deltas, family="sd1", told_by="it")) == Told("sd1", "it")
    deltas["unet.down_blocks.0.attentions.0.proj_in"] = low_rank_for(torch.empty(320, 320))
    assert family_of_adapter(Adapter(deltas, family="sd1", told_by="it")).key == "sd2"


@pytest.mark.parametrize("lora", KEYS)
@pytest.mark.parametrize("base", KEYS)
def test_each_family_on_each(lora: str, base: str) -> None:
    adapter = adapter_for(models_of(lora), r".*(attn.*|proj_in|proj_out|_proj)")
    models = models_of(base)
    if lora == base:
        check_belongs(adapter, models, FAMILIES[base])
        return
    a, b = FAMILIES[lora].title, FAMILIES[base].title
    with pytest.raises(WrongFamily) as caught:
        check_belongs(adapter, models, FAMILIES[base])
    assert str(caught.value) == f"This is an {a} LoRA; the model is {b}. Load it on an {a} model."


def test_the_layers_are_believed_before_the_label() -> None:
    models = models_of("sdxl")
    mislabelled = adapter_for(models, family="sd1")
    check_belongs(mislabelled, models, FAMILIES["sdxl"])
    silent = adapter_for(models, r"text_encoder\..*q_proj", family="sd1")
    with pytest.raises(WrongFamily, match=r"This is an SD 1\.x LoRA; the model is SDXL"):
        check_belongs(silent, models, FAMILIES["sdxl"])


def test_another_size_of_the_same_family_names_the_first_layer_that_does_not_fit() -> None:
    models = models_of("sd1")
    path = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
    full_size = Adapter({path: low_rank_for(torch.empty(320, 768))})
    with pytest.raises(WrongFamily, match=rf"{re.escape(path)} .* 320 x 768, .* 32 x 32.*of other sizes"):
        check_belongs(full_size, models, FAMILIES["sd1"])
    unknown = Adapter({path: low_rank_for(torch.empty(32, 128))})
    with pytest.raises(WrongFamily, match=r"32 x 128, .* 32 x 32.*another kind than this SD 1\.x"):
        check_belongs(unknown, models, FAMILIES["sd1"])


def test_layers_the_model_lacks_are_for_the_coverage_to_tell() -> None:
    models = models_of("sd1")
    good = adapter_for(models, r"unet\.mid_block.*attn1.*")
    extra = {
        "unet.no.such.layer": low_rank_for(torch.empty(7, 7)),
        "prior.x": low_rank_for(torch.empty(7, 7)),
    }
    check_belongs(Adapter(good.deltas | extra), models, FAMILIES["sd1"])


def test_a_layer_without_a_weight_is_named() -> None:
    models = models_of("sd1")
    path = "unet.mid_block.attentions.0"
    with pytest.raises(WrongFamily, match=rf"{path} .* Transformer2DModel .*no weight"):
        check_belongs(Adapter({path: low_rank_for(torch.empty(4, 4))}), models, FAMILIES["sd1"])


def test_convolutions_of_one_pixel_are_matrices() -> None:
    assert compatible((64, 32), (64, 32, 1, 1))
    assert compatible((64, 32, 1, 1), (64, 32))
    assert not compatible((64, 32), (64, 32, 3, 3))
    assert not compatible((64, 32, 3, 3), (64, 32, 1, 1))
    assert not compatible((32, 64), (64, 32))
    models = models_of("sd1")
    layer = "unet.mid_block.attentions.0.proj_out"
    assert weight_of(models["unet"].get_submodule(layer.removeprefix("unet."))).dim() == 4
    check_belongs(Adapter({layer: low_rank_for(torch.empty(64, 64))}), models, FAMILIES["sd1"])
    kernel = "unet.mid_block.resnets.0.conv1"  # LyCORIS stores (out, in*k*k) for some kinds
    check_belongs(Adapter({kernel: low_rank_for(torch.empty(64, 64 * 9))}), models, FAMILIES["sd1"])
    with pytest.raises(WrongFamily, match=r"64 x 64, .* 64 x 64 x 3 x 3"):
        check_belongs(Adapter({kernel: low_rank_for(torch.empty(64, 64))}), models, FAMILIES["sd1"])
