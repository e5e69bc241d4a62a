"""Ranks, alphas and rates by block: the longest name decides, 0 leaves out, and what holds nothing is said."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch

from lora_core import LoraConfig, attach, collect, detach
from lora_core.errors import ConfigError, NothingMatched
from tests.small_models import small_pipeline


def ranks_of(
    config: LoraConfig, component: str = "unet", family: str = "sd1"
) -> dict[str, tuple[int, float]]:
    """Path inside the component -> rank and alpha, as they are in the file."""
    pipe = small_pipeline(family)
    form = attach({component: getattr(pipe, component)}, config)
    adapter = collect(form)
    detach(form)
    found = {}
    for path, delta in adapter.deltas.items():
        tensors = delta.tensors()
        found[path.split(".", 1)[1]] = (len(tensors["down"]), float(tensors["alpha"]))
    return found


def test_every_layer_has_the_rank_and_alpha_of_its_block() -> None:
    config = LoraConfig(
        rank=4,
        targets=("attention", "conv"),
        block_ranks={"down": 2, "down.1": 8, "down.1.res": 6, "mid": 0, "up.3.attn": 3},
        block_alphas={"down.1": 5.0},
        rank_pattern={r"down_blocks\.1\..*attn2\.to_q": 7},
    )
    found = ranks_of(config)
    assert not [path for path in found if path.startswith("mid_block")]

    def wanted(path: str) -> tuple[int, float]:
        if path.startswith("down_blocks.1."):
            if path.endswith("attn2.to_q"):
                return 7, 5.0
            return (6 if ".resnets." in path else 8), 5.0
        if path.startswith("down_blocks."):
            return 2, 2.0
        return (3, 3.0) if path.startswith("up_blocks.3.attentions.") else (4, 4.0)

    assert found == {path: wanted(path) for path in found}
    assert set(Counter(rank for rank, _ in found.values())) == {2, 3, 4, 6, 7, 8}


def test_one_attention_or_resnet_of_a_block_may_have_its_own() -> None:
    config = LoraConfig(
        rank=4,
        targets=("attention", "conv"),
        block_ranks={"down.1.attn.0": 2, "down.1": 3, "mid.res.1": 5, "up.res.0": 6, "down.2.attn.1": 0},
        block_alphas={"mid.res.1": 1.5},
    )
    found = ranks_of(config)
    wanted = {
        "down_blocks.1.attentions.0.": (2, 2.0),
        "down_blocks.1.": (3, 3.0),
        "mid_block.resnets.1.": (5, 1.5),
        **{f"up_blocks.{b}.resnets.0.": (6, 6.0) for b in range(4)},
        "": (4, 4.0),
    }
    assert found == {path: next(wanted[key] for key in wanted if path.startswith(key)) for path in found}
    assert not [path for path in found if path.startswith("down_blocks.2.attentions.1.")]
    assert [path for path in found if path.startswith("down_blocks.2.attentions.0.")]
    with pytest.raises(ConfigError, match=r'both hold for "down.1.attn.0"'):
        LoraConfig(block_ranks={"down.1.attn": 2, "down.attn.0": 4})
    LoraConfig(block_ranks={"down.1.attn": 2, "down.attn.0": 4, "down.1.attn.0": 8})


@pytest.mark.parametrize(("component", "family"), [("text_encoder", "sd1"), ("text_encoder_2", "sdxl")])
def test_a_text_encoders_layers_have_their_own(component: str, family: str) -> None:
    """transformers 5 spells the two encoders differently."""
    found = ranks_of(LoraConfig(rank=4, block_ranks={"layers.1": 2}), component, family)
    assert {rank for path, (rank, _) in found.items() if ".layers.0." in path} == {4}
    assert {rank for path, (rank, _) in found.items() if ".layers.1." in path} == {2}


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"block_ranks": {"sideways": 2}}, '"sideways" is no block'),
        ({"block_ranks": {"down.1": 2, "down.attn": 4}}, 'both hold for "down.1.attn"'),
        ({"block_alphas": {"mid": 0.0}}, r"block_alphas.mid = 0.0 must be a positive number"),
        ({"block_ranks": {"mid": -1}}, r"block_ranks.mid = -1 is out of range"),
        ({"rank": 0}, "rank = 0 is out of range: use 1 to"),
    ],
)
def test_what_cannot_be_is_refused_at_birth(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        LoraConfig(**settings)


@pytest.mark.parametrize("name", ["block_ranks", "block_alphas"])
def test_a_block_without_a_layer_is_said(name: str) -> None:
    """down.3 of an SD 1.5 has no attention."""
    with pytest.raises(NothingMatched, match=rf'{name} "down.3" holds none of the 128 layers'):
        ranks_of(LoraConfig(**{name: {"down.3": 2}}))  # type: ignore[arg-type]
    if name == "block_ranks":
        with pytest.raises(NothingMatched, match=r'block_ranks "down\.7" holds none'):
            ranks_of(LoraConfig(block_ranks={"down.7": 0}))


def test_rates_by_block_are_groups_that_miss_and_double_nothing() -> None:
    pipe = small_pipeline("sd1")
    form = attach({"unet": pipe.unet, "text_encoder": pipe.text_encoder}, LoraConfig(rank=2))
    rates = {
        "unet": 1.0,
        "unet.down": 2.0,
        "unet.down.1": 3.0,
        "text_encoder": 4.0,
        "text_encoder.layers.1": 5.0,
    }
    groups = form.parameter_groups(rates, ratio=2.0)
    assert {g["name"]: g["lr"] for g in groups} == {
        **rates,
        **{f"{key}.fast": 2 * rate for key, rate in rates.items()},
    }
    given = [id(p) for group in groups for p in group["params"]]
    assert sorted(given) == sorted(id(p) for p in form.parameters())
    rate = {id(p): g["lr"] for g in groups for p in g["params"]}
    for path, layer in zip(form.paths, form.layers, strict=True):
        key = (
            "unet.down.1" if path.startswith("unet.down_blocks.1.")
            else "unet.down" if path.startswith("unet.down_blocks.")
            else "text_encoder.layers.1" if ".layers.1." in path
            else path.split(".")[0]
        )  # fmt: skip
        assert {name: rate[id(p)] for name, p in layer.named_parameters()} == {
            "factors.down": rates[key],
            "factors.up": 2 * rates[key],
        }
    with pytest.raises(NothingMatched, match=r'"unet\.down\.3"'):
        form.parameter_groups({"unet": 1.0, "text_encoder": 1.0, "unet.down.3": 1.0})
    plain = form.parameter_groups(1e-3)
    assert [g["name"] for g in plain] == ["unet", "text_encoder"]
    assert torch.optim.AdamW(plain)
