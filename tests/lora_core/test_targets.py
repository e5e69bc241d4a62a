"""Which layers are chosen, beside PEFT on the same models; and what is said where none is."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from lora_core import LoraConfig, attach, detach
from lora_core.errors import ConfigError, NothingMatched
from lora_core.targets import choose, find_targets, layer_index
from tests.small_models import small_pipeline


@pytest.fixture(scope="module")
def models() -> dict[str, nn.Module]:
    pipe = small_pipeline("sd1")
    return {"unet": pipe.unet, "text_encoder": pipe.text_encoder}


def peft_choice(model: nn.Module, options: dict[str, Any]) -> dict[str, tuple[int, float]]:
    """-> path -> (rank, alpha), with PEFT's own injection into a model of the same names on the meta device."""
    with torch.device("meta"):
        twin = (
            type(model).from_config(model.config)
            if hasattr(model, "from_config")
            else type(model)(model.config)
        )
    injected = peft.inject_adapter_in_model(peft.LoraConfig(r=4, lora_alpha=6, **options), twin)
    return {
        path: (module.r["default"], module.lora_alpha["default"])
        for path, module in injected.named_modules()
        if isinstance(module, BaseTunerLayer)
    }


CASES: list[tuple[str, dict[str, Any]]] = [
    ("unet", {"targets": ("to_q", "to_out.0")}),
    ("unet", {"targets": ("to_q", "conv1"), "exclude": ("attn2.to_q", "mid_block.resnets.0.conv1")}),
    ("unet", {"targets": r".*attn2\.to_[kv]", "exclude": r"up_blocks.*"}),
    ("unet", {"targets": "all-linear"}),
    ("unet", {"targets": ("to_q",), "layers_to_transform": 0}),
    ("unet", {"targets": ("to_q",), "layers_to_transform": 1}),
    ("unet", {"targets": ("to_q", "conv1"), "layers_to_transform": (1, 2)}),
    ("unet", {"targets": ("to_q",), "layers_to_transform": (0,), "layers_pattern": "transformer_blocks"}),
    ("unet", {"targets": ("to_v",), "layers_to_transform": (1, 3), "layers_pattern": ("up_blocks",)}),
    (
        "unet",
        {
            "targets": ("to_v", "conv2"),
            "layers_to_transform": 1,
            "layers_pattern": ("resnets", "down_blocks"),
        },
    ),
    ("unet", {"targets": ("to_q", "time_embedding.linear_1"), "layers_to_transform": 1}),
    ("unet", {"targets": ("conv_in", "conv1", "mid_block.attentions.0.proj_in"), "layers_to_transform": 1}),
    ("unet", {"targets": ("to_q", "conv1"), "modules_to_save": ("resnets.0", "conv_in")}),
    (
        "unet",
        {
            "targets": ("to_q", "to_k", "proj_in"),
            "rank_pattern": {"attn2.to_q": 2, r"down_blocks\.\d\..*to_q": 7, "to_k": 3},
            "alpha_pattern": {"mid_block.attentions.0.proj_in": 9, r".*blocks\.1\..*": 5},
        },
    ),
    ("text_encoder", {"targets": ("q_proj", "fc1"), "layers_to_transform": 1, "layers_pattern": "layers"}),
    ("text_encoder", {"targets": ("q_proj",), "layers_to_transform": (0,)}),
    ("text_encoder", {"targets": ("v_proj", "token_embedding"), "exclude": ("layers.0.self_attn.v_proj",)}),
]
NAMES = {
    "targets": "target_modules",
    "exclude": "exclude_modules",
    "layers_to_transform": "layers_to_transform",
    "layers_pattern": "layers_pattern",
    "modules_to_save": "modules_to_save",
    "rank_pattern": "rank_pattern",
    "alpha_pattern": "alpha_pattern",
}


@pytest.mark.parametrize(("component", "options"), CASES, ids=lambda v: str(v)[:60])
def test_the_same_layers_ranks_and_alphas_as_peft(
    models: dict[str, nn.Module], component: str, options: dict[str, Any]
) -> None:
    config = LoraConfig(rank=4, alpha=6, **options)
    ours = {
        path: (config.rank_at(path), config.alpha_at(path))
        for path, _ in find_targets(models[component], config)
    }
    words = {NAMES[k]: list(v) if isinstance(v, tuple) else v for k, v in options.items()}
    assert ours == peft_choice(models[component], words)


def test_an_index_counts_in_the_first_list_below_the_models_own() -> None:
    path = "down_blocks.0.attentions.1.transformer_blocks.2.attn1.to_q"
    assert layer_index(path, ()) == 1
    assert layer_index(path, ("transformer_blocks",)) == 2
    assert layer_index(path, ("nothing", "down_(blocks)")) == 0
    assert layer_index("time_embedding.linear_1", ()) is None
    assert layer_index("encoder.layers.11.mlp.fc1", ()) == 11


def test_groups_take_an_index_too(models: dict[str, nn.Module]) -> None:
    config = LoraConfig(targets="attention", layers_to_transform=1, layers_pattern="layers")
    found = [path for path, _ in find_targets(models["text_encoder"], config)]
    assert len(found) == 4
    assert all(".layers.1." in f".{path}" for path in found)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"targets": ("to_qq",)}, "Did you mean to_q"),
    (
        {"targets": ("to_q",), "layers_to_transform": 7, "layers_pattern": "transformer_blocks"},
        "The numbers there are 0",
    ),
    ({"targets": ("time_embedding.linear_2",), "layers_to_transform": 0, "layers_pattern": "x"}, ""),
    ({"targets": r".*to_q", "layers_to_transform": 0}, "does not go with targets = '.*to_q'"),
    ({"modules_to_save": ("conv_inn",)}, "Did you mean conv_in"),
    ({"modules_to_save": ("nonlinearity",)}, "without a parameter to train"),
    ({"targets": ("conv_in",), "modules_to_save": ("conv_in",)}, "leave no layer to train"),
    (
        {"targets": ("to_q",), "bias": "lora_only"},
        "none of the 32 layers that targets = ('to_q',) names has a bias",
    ),
    ({"targets": ("to_q",), "exclude": ("to_z",)}, 'exclude "to_z" names no layer'),
    (
        {"targets": ("to_q",), "rank_pattern": {"attn1.to_k": 2}},
        'rank_pattern "attn1.to_k" is the end of none',
    ),
    ({"targets": ("to_q",), "alpha_pattern": {"attn1.too_q": 2}}, "Did you mean attn1.to_q"),
    (
        {"targets": ("to_q", "conv_out"), "rank": 5},
        "rank = 5 is larger than unet.conv_out allows: its weight has rank 4 at most. Set rank_pattern = "
        '{"conv_out" = 4}',
    ),
    ({"targets": ("to_q", "to_k"), "rank": 40}, "more layers"),
    ({"targets": ("to_q",), "kind": "loha", "rank": 33}, "rank = 33 is larger than"),
]


@pytest.mark.parametrize(("options", "sentence"), REFUSED, ids=lambda v: str(v)[:60])
def test_what_does_not_fit_the_model_is_said_before_anything_is_touched(
    models: dict[str, nn.Module], options: dict[str, Any], sentence: str
) -> None:
    unet = models["unet"]
    if sentence == "":  # a path that is named whole needs no number, as in PEFT
        assert len(find_targets(unet, LoraConfig(**options))) == 1
        return
    unet.requires_grad_(True)
    try:
        with pytest.raises((ConfigError, NothingMatched)) as problem:
            attach(unet, LoraConfig(**options))
        assert sentence in str(problem.value)
        assert all(p.requires_grad for p in unet.parameters())
        assert not any(m._forward_hooks for m in unet.modules())
    finally:
        unet.requires_grad_(False)


def test_a_module_of_an_unknown_type_is_not_trained_whole() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.PReLU(3))
    with pytest.raises(ConfigError, match="meets 1, a PReLU"):
        choose(model, LoraConfig(targets="all-linear", modules_to_save=("1",)))
    odd = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    with pytest.raises(ConfigError, match="meets 1, a BatchNorm1d"):
        choose(odd, LoraConfig(targets="all-linear", bias="all"))


def test_patterns_shared_by_components_need_be_of_use_in_one(models: dict[str, nn.Module]) -> None:
    shared = {"fc1": 2, "attn2.to_q": 3}
    form = attach(
        models,
        {
            "unet": LoraConfig(rank=4, alpha=6, targets=("to_q",), rank_pattern=shared),
            "text_encoder": LoraConfig(rank=4, alpha=6, targets=("fc1",), rank_pattern=shared),
        },
    )
    detach(form)
