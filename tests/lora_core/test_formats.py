"""Spellings: laws that hold without any other library, and the names of the real models at full size."""

from __future__ import annotations

from pathlib import Path

import pytest
import safetensors.torch
import torch
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

from lora_core.adapter import Adapter
from lora_core.deltas.low_rank import LowRank
from lora_core.deltas.magnitude import WithMagnitude
from lora_core.errors import ConfigError, NotFinite
from lora_core.formats import read_adapter, write_adapter
from lora_core.formats.keys import adapter_path, flattened
from lora_core.ldm_names import to_diffusers, to_sgm
from lora_core.safe_files import read_header
from tests.lora_core.adapters_on_disk import LAYERS, adapter, assert_same
from tests.lora_core.full_size import UP_WITH_ATTENTION, full_size

# ---------------------------------------------------------------- names


@pytest.mark.parametrize(
    ("family", "count"), [("sd1", 192 + 72), ("sd2", 192 + 138), ("sdxl", 722 + 72 + 192)]
)
def test_every_layer_of_the_real_models_resolves_from_its_flattened_name(family: str, count: int) -> None:
    """`count`: the layers that kohya's trainer trains by default, attention blocks and text encoders."""
    shapes = full_size(family)
    assert sum(".attentions." in path or ".encoder.layers." in path for path in shapes) == count
    assert len(shapes) > count
    for path in shapes:
        component, _, inside = path.partition(".")
        assert adapter_path(component, flattened(inside)) == path
        assert adapter_path(component, inside) == path


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_sgm_names_are_those_of_diffusers_own_conversion(family: str) -> None:
    """diffusers' converter of original checkpoints is fed our sgm names: each layer must land where it was."""
    paths = [p.removeprefix("unet.") for p in full_size(family) if p.startswith("unet.")]
    theirs: dict[str, str] = {}
    for path in paths:
        sgm = to_sgm(path, attention_up=UP_WITH_ATTENTION[family])
        assert sgm is not None, path
        assert to_diffusers(sgm) == path
        assert adapter_path("unet", flattened(sgm)) == f"unet.{path}"
        theirs |= {f"model.diffusion_model.{sgm}.{kind}": path for kind in ("weight", "bias")}
    assert len(theirs) == 2 * len(paths)
    config = {"layers_per_block": 2, "addition_embed_type": "text_time" if family == "sdxl" else None}
    converted = convert_ldm_unet_checkpoint(theirs, config)
    assert {p.removesuffix(".weight") for p in converted if p.endswith(".weight")} == set(paths)
    assert all(key.removesuffix(".weight").removesuffix(".bias") == path for key, path in converted.items())


def test_the_upsampler_stands_behind_attention_where_there_is_some() -> None:
    """As in the original checkpoints: SD 1 has no attention on the first level of the way up, SDXL has."""
    upsampler = "up_blocks.0.upsamplers.0.conv"
    assert to_sgm(upsampler, attention_up=UP_WITH_ATTENTION["sd1"]) == "output_blocks.2.1.conv"
    assert to_sgm(upsampler, attention_up=UP_WITH_ATTENTION["sdxl"]) == "output_blocks.2.2.conv"


def test_names_of_no_layer_are_none() -> None:
    for name in (
        "double_blocks_0_img_attn_qkv",
        "down_blocks_attentions_0_proj_in",
        "input_blocks_3_1_proj_in",
        "",
    ):
        assert adapter_path("unet", name) is None
    assert adapter_path("unet", "output_blocks_4_2_conv") is None
    assert adapter_path("text_encoder", "text_model_encoder_layers_0_mlp_fc3") is None
    # transformers 5 leaves text_model out
    expected = "text_encoder.text_model.encoder.layers.0.mlp.fc1"
    assert adapter_path("text_encoder", "encoder.layers.0.mlp.fc1") == expected
    assert adapter_path("text_encoder", "encoder_layers_0_mlp_fc1") == expected


# ---------------------------------------------------------------- laws


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_through_all_spellings_and_back_is_the_same_file(
    dora: bool, dtype: torch.dtype, tmp_path: Path
) -> None:
    first = write_adapter(adapter(dora, dtype), tmp_path / "first")
    step: Path = first
    for spelling in ("diffusers", "peft", "kohya"):
        read = read_adapter(step)
        assert_same(adapter(dora, dtype), read)
        assert (read.unused, read.family) == ((), "sdxl")
        step = write_adapter(read, tmp_path / spelling, spelling=spelling)
    before, after = (safetensors.torch.load_file(p) for p in (first, step))
    assert list(before) == list(after)
    assert read_header(first).tensors == read_header(step).tensors
    assert all(torch.equal(before[key], after[key]) for key in before)
    hashes = [read_header(p).metadata["sshs_model_hash"] for p in (first, step)]
    assert hashes[0] == hashes[1]


def test_dtype_is_cast_and_a_value_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    path = write_adapter(adapter(), tmp_path / "half", dtype=torch.float16)
    assert {info.dtype for info in read_header(path).tensors.values()} == {"F16"}
    large = Adapter({next(iter(LAYERS)): LowRank(torch.full((2, 24), 70_000.0), torch.ones(24, 2), 1.0)})
    with pytest.raises(NotFinite, match="bfloat16"):
        write_adapter(large, path, dtype=torch.float16)
    large.deltas[next(iter(LAYERS))].tensors()["up"][3, 1] = float("nan")
    with pytest.raises(NotFinite):
        write_adapter(large, path)
    assert len(read_adapter(path).deltas) == len(LAYERS)


def test_input_axis_dora_keeps_its_shape_in_kohya_and_is_refused_elsewhere(tmp_path: Path) -> None:
    path, low = "unet.mid_block.attentions.0.proj_out", LowRank(torch.randn(2, 6), torch.randn(6, 2), 1.0)
    ours = Adapter({path: WithMagnitude(low, torch.rand(1, 6))})
    assert_same(ours, read_adapter(write_adapter(ours, tmp_path / "x")))
    for spelling in ("diffusers", "peft"):
        with pytest.raises(ConfigError, match="input columns"):
            write_adapter(ours, tmp_path / "x", spelling=spelling)
    mixed = Adapter({**ours.deltas, "unet.mid_block.attentions.0.proj_in": low})
    with pytest.raises(ConfigError, match="all or none"):
        write_adapter(mixed, tmp_path / "x", spelling="peft")
    with pytest.raises(ConfigError, match="kohya"):
        write_adapter(ours, tmp_path / "x", spelling="khoya")


def test_an_earlier_peft_folder_does_not_mix_with_the_new(tmp_path: Path) -> None:
    write_adapter(adapter(), tmp_path / "x", spelling="peft")
    unet = Adapter({p: d for p, d in adapter().deltas.items() if p.startswith("unet.")})
    write_adapter(unet, tmp_path / "x", spelling="peft")
    assert_same(unet, read_adapter(tmp_path / "x"))
