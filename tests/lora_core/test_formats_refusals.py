"""Odd files are read with every key named; what is no LoRA of ours is refused by its name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lora_core.deltas.low_rank import LowRank
from lora_core.errors import FileRefused, NotFinite
from lora_core.formats import read_adapter, write_adapter
from tests.lora_core.adapters_on_disk import PAIR, QPATH, Q, adapter, saved


def test_missing_alpha_is_the_rank_and_odd_keys_are_named(tmp_path: Path) -> None:
    odd = {
        "lora_unet_nothing_real.lora_down.weight": torch.ones(1, 1),
        "bundle_emb.cat.clip_l_out": torch.ones(1, 8),
        "lora_unet_nothing_real.oft_blocks": torch.ones(2, 2, 2),
        "lora_unet_nothing_real.hada_w1_a": torch.ones(2, 2),
        f"{Q}.hada_t1": torch.ones(2, 2),
        "lora_unet_mid_block_attentions_0_proj_in.alpha": torch.tensor(1.0),
        f"{Q.replace('down_blocks_0_attentions_0', 'input_blocks_1_1')}.lora_down.weight": torch.ones(4, 8),
    }
    read = read_adapter(saved({**PAIR, **odd}, tmp_path))
    assert list(read.deltas) == [QPATH]
    assert read.deltas[QPATH].tensors()["alpha"] == 4
    assert len(read.unused) == len(odd)
    for key in odd:
        assert sum(note.startswith(key) for note in read.unused) == 1
    notes = " ".join(read.unused)
    for word in (
        "of a bundled word, but no embedding",
        "OFT of a layer that Stable Diffusion does not have",
        "LoHa of a layer that Stable Diffusion does not have",
        "LoRA of a layer that Stable Diffusion does not have",
        "the layer has a LoRA",
        "a second time",
        "has no LoRA",
    ):
        assert word in notes


def test_fp8_is_read_as_fp16_exactly(tmp_path: Path) -> None:
    eighths = {key: tensor.to(torch.float8_e4m3fn) for key, tensor in PAIR.items()}
    low = read_adapter(saved(eighths, tmp_path)).deltas[QPATH]
    assert isinstance(low, LowRank)
    assert low.down.dtype == torch.float16
    assert torch.equal(low.down.float(), eighths[f"{Q}.lora_down.weight"].float())


def test_tucker_core_is_composed(tmp_path: Path) -> None:
    name, path = "lora_unet_mid_block_resnets_0_conv1", "unet.mid_block.resnets.0.conv1"
    down, mid, up = torch.randn(3, 5, 1, 1), torch.randn(3, 3, 3, 3), torch.randn(7, 3, 1, 1)
    parts = {"lora_down": down, "lora_mid": mid, "lora_up": up}
    tensors = {f"{name}.{k}.weight": v for k, v in parts.items()} | {f"{name}.alpha": torch.tensor(2.0)}
    delta = read_adapter(saved(tensors, tmp_path)).deltas[path]
    by_hand = 2 / 3 * torch.einsum("or,rskl,si->oikl", up[:, :, 0, 0], mid, down[:, :, 0, 0])
    torch.testing.assert_close(delta.delta(torch.zeros(7, 5, 3, 3)), by_hand)


def drop(name: str) -> dict[str, torch.Tensor]:
    return {key: tensor for key, tensor in PAIR.items() if name not in key}


def renamed(name: str) -> dict[str, torch.Tensor]:
    return {key.replace(Q, name): tensor for key, tensor in PAIR.items()}


one = torch.ones(2, 2)
REFUSED: dict[str, tuple[dict[str, torch.Tensor], str]] = {
    "no up": (drop("lora_up"), f"{Q}.lora_down.weight without its up"),
    "bomb": (
        {
            "lora_unet_mid_block_resnets_0_conv1.lora_down.weight": torch.ones(1, 2**16, 1, 1),
            "lora_unet_mid_block_resnets_0_conv1.lora_mid.weight": torch.ones(1, 1, 256, 256),
            "lora_unet_mid_block_resnets_0_conv1.lora_up.weight": torch.ones(1, 1, 1, 1),
        },
        r"\(1, 1, k, k\) was expected",
    ),
    "no down": (drop("lora_down"), f"{Q}.lora_up.weight without its down"),
    "ranks": ({**PAIR, f"{Q}.lora_up.weight": torch.ones(8, 5)}, "its rank is 4"),
    "integers": ({k: v.int() for k, v in PAIR.items()}, "int32"),
    "shape": ({k: v[None] for k, v in PAIR.items()}, "no LoRA of a linear"),
    "two alphas": ({**PAIR, f"{Q}.alpha": torch.ones(2)}, "alpha is one"),
    "magnitude": (
        {**PAIR, f"{Q}.dora_scale": torch.ones(3, 1)},
        "fits neither the 8 outputs nor the 8 inputs",
    ),
    "loha": (
        {f"{Q}.hada_w1_a": one, f"{Q}.hada_w1_b": one, f"{Q}.alpha": torch.tensor(1.0)},
        r"hada_w1_a without its hada_w2_a factor: the file is incomplete",
    ),
    "loha elsewhere": (
        {"unet.down_blocks.0.gates.0.hada_w1_a": one},
        r"of the kind LoHa, for layers that no Stable Diffusion model has \(its first keys: unet.down_blocks.0.gates",
    ),
    "lokr": ({f"{Q}.lokr_w1": one, f"{Q}.lokr_w2_a": one}, r"lokr_w2_a without its lokr_w2_b factor"),
    "ia3": ({f"{QPATH}.on_input": torch.tensor(True)}, r"on_input without its vector factor"),
    "oft": ({"oft_unet_mid_block.oft_blocks": one}, "of the kind OFT, for layers"),
    "flux": (
        renamed("lora_unet_double_blocks_0_img_attn_qkv")
        | renamed("lora_te1_text_model_encoder_layers_0_mlp_fc1"),
        "Flux",
    ),
    "sd3": (renamed("lora_unet_joint_blocks_0_x_block_attn_qkv"), "SD3"),
    "wan": (renamed("lora_unet_blocks_0_self_attn_q"), "Wan"),
    "motion": (renamed("unet.down_blocks.0.motion_modules.0.temporal_transformer.proj_in"), "AnimateDiff"),
    "base": (
        {"model.diffusion_model.out.2.weight": one, "first_stage_model.decoder.conv_in.weight": one},
        "base model",
    ),
    "vae": ({"decoder.conv_in.weight": one, "encoder.conv_in.weight": one}, "a VAE"),
    "unet": ({"down_blocks.0.resnets.0.conv1.weight": one, "conv_in.weight": one}, "the UNet of"),
    "controlnet": ({"control_model.input_blocks.0.0.weight": one}, "ControlNet"),
    "text": ({"text_model.encoder.layers.0.mlp.fc1.weight": one}, "text encoder"),
    "unknown": ({"hello": one}, "its first keys: hello"),
    "nothing": ({}, "its first keys: none"),
    "peft alone": (
        {"base_model.model.mid_block.attentions.0.proj_in.lora_A.weight": one},
        "alpha is unknown",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_no_lora_of_ours_is_refused_by_its_name(what: str, tmp_path: Path) -> None:
    tensors, why = REFUSED[what]
    with pytest.raises(FileRefused, match=why) as refusal:
        read_adapter(saved(tensors, tmp_path))
    assert "lora.safetensors" in str(refusal.value) or what == "peft alone"


def test_non_finite_is_named(tmp_path: Path) -> None:
    with pytest.raises(NotFinite, match=QPATH):
        read_adapter(saved({**PAIR, f"{Q}.lora_up.weight": torch.full((8, 4), float("inf"))}, tmp_path))


@pytest.mark.parametrize(
    "config", ["{", "[]", '{"lora_alpha": "8"}', '{"peft_type": "LOHA"}', '{"alpha_pattern": {"(a+)+$": 1}}']
)
def test_bad_peft_configuration_is_refused(config: str, tmp_path: Path) -> None:
    write_adapter(adapter(), tmp_path, spelling="peft")
    (tmp_path / "unet" / "adapter_config.json").write_text(config)
    with pytest.raises(FileRefused, match=r"adapter_config\.json"):
        read_adapter(tmp_path)
