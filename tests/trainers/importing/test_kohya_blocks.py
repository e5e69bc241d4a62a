"""Ranks, alphas and rates by block, against sd-scripts' own rule for the number of a layer's block, read off the names
in the file that is written: networks/lora.py get_block_index."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from lora_core import attach, collect, write_adapter
from lora_core.ldm_names import to_sgm
from tests.small_models import small_pipeline
from tests.trainers.importing.foreign import LEAST, imported
from trainers.importing.kohya_network import network_args

RATE = 1e-4


def place_of(name: str, *, sdxl: bool) -> int:
    """lora_unet_down_blocks_1_attentions_0_..., lora_unet_input_blocks_4_1_... -> the number of its block."""
    if sdxl:
        side, number = re.match(r"lora_unet_(input|middle|output)_blocks?_(\d+)", name).groups()  # type: ignore[union-attr]
        return {"input": 1, "middle": 10, "output": 13}[side] + int(number)
    if name.startswith("lora_unet_mid_block_"):
        return 12
    found = re.match(r"lora_unet_(down|up)_blocks_(\d+)_(\w+?)_(\d+)_", name)
    assert found is not None, name
    side, block, kind, j = found.groups()
    inside = 2 if kind.endswith("samplers") else int(j)
    return (1 if side == "down" else 13) + 3 * int(block) + inside


def is_convolution(name: str) -> bool:
    """One that conv_dim is for: 3x3."""
    ends = ("_conv1", "_conv2", "_conv", "_in_layers_2", "_out_layers_3", "_op")
    return name.endswith(ends)


def trained(
    folder: Path, args: list[str], *, sdxl: bool, dims: dict[str, Any]
) -> tuple[dict[str, tuple[int, float, float]], list[str]]:
    """The imported preset's LoRA of the UNet: kohya's name -> rank, alpha, rate; and what was lost."""
    given = {**LEAST, "network_args": args, "unet_lr": RATE, "sdxl": sdxl, **dims}
    found = imported(folder, given)
    pipe = small_pipeline("sdxl" if sdxl else "sd1")
    form = attach({"unet": pipe.unet}, found.config.lora.lora_config("unet"))
    rates = {"unet": found.config.train.learning_rate, **found.config.train.rates}
    by_parameter = {id(p): group["lr"] for group in form.parameter_groups(rates) for p in group["params"]}
    adapter = collect(form)
    write_adapter(adapter, folder / "lora.safetensors", spelling="kohya")
    with safe_open(folder / "lora.safetensors", "pt") as file:
        names = [key for key in file.keys() if key.endswith(".lora_down.weight")]  # noqa: SIM118
        ends = {name.removesuffix(".lora_down.weight"): name for name in names}
        shapes = {
            name: (file.get_slice(key).get_shape()[0], float(file.get_tensor(f"{name}.alpha")))
            for name, key in ends.items()
        }
    layers = dict(zip(form.paths, form.layers, strict=True))
    paths = {name_of(path, sdxl=sdxl): path for path in adapter.deltas}
    assert paths.keys() == shapes.keys()
    rates_of = {
        name: {by_parameter[id(p)] for p in layers[path].parameters()} for name, path in paths.items()
    }
    return {name: (*shapes[name], *rates_of[name]) for name in shapes}, list(found.losses)  # type: ignore[misc]


def name_of(path: str, *, sdxl: bool) -> str:
    """Of our module path: what the file calls it."""
    inside = path.removeprefix("unet.")
    if sdxl:
        inside = str(to_sgm(inside, attention_up=frozenset((0, 1)), layers=2))
    return "lora_unet_" + inside.replace(".", "_")


def numbers(values: list[Any]) -> str:
    return ",".join(map(str, values))


SD = [0, *range(2, 26)]
SDXL = [0, *range(2, 24)]


@pytest.mark.parametrize("sdxl", [False, True], ids=["sd", "sdxl"])
@pytest.mark.parametrize("conv", [False, True], ids=["linear", "conv"])
def test_every_layer_has_the_rank_alpha_and_rate_of_its_place(tmp_path: Path, sdxl: bool, conv: bool) -> None:
    """A different rank at every place, 0 at some; factors that differ and one of 0; convolutions' own."""
    count = 23 if sdxl else 25
    dims = list(range(1, count + 1))
    dims[6 if sdxl else 5] = 0
    alphas = [n / 2 + 0.5 for n in range(count)]
    conv_dims = [30 - n for n in range(count)]
    conv_dims[8] = 0
    conv_alphas = [3.0 + n for n in range(count)]
    down = [0.1 * (n + 1) for n in range(9 if sdxl else 12)]
    up = [1.0, 0.0, 0.3]  # the rest: 1
    middle = [0.25, 0.5, 0.75] if sdxl else [0.5]
    args = [
        f"block_dims={numbers(dims)}",
        f"block_alphas={numbers(alphas)}",
        f"down_lr_weight={numbers(down)}",
    ]
    args += [f"mid_lr_weight={numbers(middle)}", f"up_lr_weight={numbers(up)}"]
    if conv:
        args += [f"conv_block_dims={numbers(conv_dims)}", f"conv_block_alphas={numbers(conv_alphas)}"]
    factors = [1.0, *down, *middle, *up, *[1.0] * 6, 1.0] if sdxl else [*down, *middle, *up, *[1.0] * 9]
    assert len(factors) == count
    found, losses = trained(tmp_path, args, sdxl=sdxl, dims={"network_dim": 7, "network_alpha": 2})
    assert losses == []
    assert len(found) > (100 if conv else 60)
    for name, (rank, alpha, rate) in found.items():
        place = place_of(name, sdxl=sdxl)
        ranks, own = (conv_dims, conv_alphas) if is_convolution(name) else (dims, alphas)
        assert (rank, alpha) == (ranks[place], own[place]), name
        assert rate == pytest.approx(RATE * factors[place]), name
    seen = {place_of(name, sdxl=sdxl) for name in found}
    places = {place_of(name, sdxl=sdxl) for name in _all_names(tmp_path, sdxl=sdxl, conv=conv)}
    gone = {i for i in places if factors[i] == 0 or (dims[i] == 0 and not (conv and conv_dims[i]))}
    assert seen == places - gone
    assert gone


def _all_names(folder: Path, *, sdxl: bool, conv: bool) -> list[str]:
    args = ["conv_dim=4"] if conv else []
    return list(trained(folder, args, sdxl=sdxl, dims={})[0])


def test_what_is_not_said_is_as_for_the_whole_network(tmp_path: Path) -> None:
    """block_dims without block_alphas: network_alpha; with conv_dim: that rank everywhere; and a lr_weight alone."""
    dims = numbers([4] * 13 + [16] * 12)
    args = [f"block_dims = {dims}".replace(" = ", "="), "conv_dim=2", "conv_alpha=1"]
    found, _ = trained(tmp_path, args, sdxl=False, dims={"network_dim": 8, "network_alpha": 3})
    for name, (rank, alpha, rate) in found.items():
        wanted = (2, 1.0) if is_convolution(name) else (16 if place_of(name, sdxl=False) > 12 else 4, 3.0)
        assert (rank, alpha, rate) == (*wanted, RATE), name
    preset = imported(tmp_path, {**LEAST, "network_dim": 8, "network_args": [f"block_dims={dims}"]}).config
    assert preset.lora.ranks == {  # a whole block by its name
        **dict.fromkeys(("unet.down.0", "unet.down.1", "unet.down.2", "unet.mid"), 4),
        **dict.fromkeys(("unet.up.1", "unet.up.2", "unet.up.3"), 16),
    }
    assert preset.lora.alphas == {}
    found, _ = trained(tmp_path, ["mid_lr_weight=0.5"], sdxl=False, dims={"network_dim": 8})
    assert {rate for name, (_, _, rate) in found.items() if "_mid_" in name} == {0.5 * RATE}
    assert {rate for name, (_, _, rate) in found.items() if "_mid_" not in name} == {RATE}


@pytest.mark.parametrize(
    ("curve", "rule"),
    [
        ("sine", lambda i: math.sin(math.pi * i / 11 / 2)),
        ("cosine", lambda i: math.sin(math.pi * (11 - i) / 11 / 2)),
        ("linear+0.25", lambda i: i / 11 + 0.25),
        ("reverse_linear", lambda i: (11 - i) / 11),
        ("zeros+0.5", lambda i: 0.5),
    ],
)
def test_a_curve_is_twelve_factors(tmp_path: Path, curve: str, rule: Any) -> None:
    args = [f"up_lr_weight={curve}", "block_lr_zero_threshold=0.2"]
    found, losses = trained(tmp_path, args, sdxl=False, dims={})
    assert losses == []
    for name, (_, _, rate) in found.items():
        place = place_of(name, sdxl=False)
        factor = rule(place - 13) if place >= 13 else 1.0
        assert factor > 0.2, name
        assert rate == pytest.approx(RATE * factor), name


@pytest.mark.parametrize(
    ("args", "named"),
    [
        ("block_alphas=" + numbers([1] * 25), "sd-scripts reads it only with block_dims"),
        ("block_dims=" + numbers([4] * 24), "it is not 25 numbers"),
        ("block_dims=" + numbers(["x"] * 25), "it is not 25 numbers"),
        (f"block_dims={numbers([4] * 25)} block_alphas={numbers([4] * 23)}", "different models"),
        ("down_lr_weight=upwards", "no list of 12 numbers"),
        ("mid_lr_weight=x", "no list of 1 numbers"),
    ],
)
def test_what_is_no_list_of_blocks_is_named(tmp_path: Path, args: str, named: str) -> None:
    found = imported(tmp_path, {**LEAST, "network_args": args})
    assert [line for line in found.losses if named in line]
    assert found.config.lora.ranks == found.config.lora.rank_pattern == {}


def test_the_lists_may_have_spaces_or_be_lists() -> None:
    wanted = {"block_dims": "4,8,4", "conv_dim": "2"}
    assert network_args(["block_dims=4, 8, 4", "conv_dim=2"]) == wanted
    assert network_args("block_dims=[4,8,4] conv_dim=2") == wanted
    assert network_args({"block_dims": [4, 8, 4], "conv_dim": 2}) == wanted
