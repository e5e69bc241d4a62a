"""What is no base model is refused in one sentence: found, expected, what to do."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lora_core.errors import FileRefused
from lora_core.models import open_base
from tests.small_models import save_folder, save_ldm_single_file, small_pipeline

UNET = "model.diffusion_model."
TOKENS = "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight"


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    pipe = small_pipeline("sd1", clip_vocabulary=True)
    return load_file(save_ldm_single_file(pipe, tmp_path_factory.mktemp("good") / "good.safetensors"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_folder(small_pipeline("sd1"), tmp_path / "model")


def refused(source: str | Path, *phrases: str) -> str:
    with pytest.raises(FileRefused) as caught:
        open_base(source, device="cpu")
    message = str(caught.value)
    assert [phrase for phrase in phrases if phrase not in message] == [], message
    assert message.endswith("."), message
    assert "\n" not in message
    return message


def named(*keys: str, shape: tuple[int, ...] = (4, 4)) -> dict[str, Tensor]:
    return {key: torch.ones(shape) for key in keys}


@pytest.mark.parametrize(
    ("tensors", "phrases"),
    [
        (
            named("lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight"),
            ("a LoRA", "Open a base model first"),
        ),
        (named("base_model.model.down_blocks.0.to_q.lora_A.weight"), ("a LoRA", "load this file as a LoRA")),
        (named("unet.down_blocks.0.attentions.0.processor.to_q_lora.down.weight"), ("a LoRA",)),
        (named("lora_unet_mid_block.hada_w1_a"), ("a LoRA",)),
        (named("unet:0:up", "unet:0:down"), ("a LoRA",)),
        (named("control_model.input_blocks.0.0.weight"), ("a ControlNet",)),
        (named("emb_params"), ("a textual inversion",)),
        (named("encoder.down.0.block.0.conv1.weight", "decoder.conv_in.weight"), ("a VAE alone",)),
        (named("first_stage_model.encoder.conv_in.weight"), ("a VAE alone",)),
        (named("embedder.model.ln_final.weight", f"{UNET}x"), ("unCLIP", "text-to-image")),
        (named("depth_model.model.x", f"{UNET}x"), ("depth-to-image", "text-to-image")),
        (named("edm_mean", "edm_std", f"{UNET}x"), ("EDM", "text-to-image")),
        (named("cond_stage_model.roberta.x", f"{UNET}x"), ("AltDiffusion",)),
        (
            named(
                f"{UNET}label_emb.0.0.weight",
                f"{UNET}input_blocks.0.0.weight",
                "conditioner.embedders.0.model.x",
            ),
            ("SDXL's refiner", "Open an SDXL base model"),
        ),
        (
            named(f"{UNET}label_emb.0.0.weight", f"{UNET}input_blocks.0.0.weight", "first_stage_model.x"),
            ("UNet of SDXL but no text encoder", "diffusers folder"),
        ),
        (named(f"{UNET}double_blocks.0.img_attn.qkv.weight"), ("a transformer model",)),
        (named("down_blocks.0.resnets.0.conv1.weight"), ("a UNet alone",)),
        (named("blocks.0.weight"), ("no Stable Diffusion model", "blocks.0.weight")),
        (named(f"{UNET}input_blocks.0.0.weight"), ("no VAE", "complete version")),
    ],
)
def test_files_of_other_kinds(tensors: dict[str, Tensor], phrases: tuple[str, ...], tmp_path: Path) -> None:
    save_file(tensors, tmp_path / "x.safetensors")
    refused(tmp_path / "x.safetensors", "x.safetensors", *phrases)


def without(key: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda tensors: {k: t for k, t in tensors.items() if k != key}


DAMAGE: list[tuple[Callable[[dict[str, Tensor]], dict[str, Tensor]], tuple[str, ...]]] = [
    (without(f"{UNET}middle_block.1.norm.weight"), (f"lacks {UNET}middle_block.1.norm.weight", "unet")),
    (
        without("first_stage_model.decoder.up.1.block.2.conv2.bias"),
        ("decoder.up.1.block.2.conv2.bias", "vae"),
    ),
    (without(f"{UNET}input_blocks.6.0.op.weight"), ("lacks input_blocks.3.0.op.weight",)),
    (without(f"{UNET}out.2.weight"), ("lacks out.2.weight", "incomplete")),
    (without(TOKENS), ("embeddings.token_embedding.weight",)),
    (lambda t: t | {TOKENS: t[TOKENS][:3000].clone()}, ("knows 3,000 words", "49,408")),
    (lambda t: t | {TOKENS: torch.ones(7)}, ("lacks embeddings.token_embedding.weight",)),
    (lambda t: t | {f"{UNET}out.0.bias": torch.ones(7)}, (f"{UNET}out.0.bias", "is 7", "32 was expected")),
    (
        lambda t: t | {f"{UNET}out.0.bias": torch.ones(32, dtype=torch.int8)},
        ("stored as I8", "not quantised"),
    ),
    (lambda t: t | {f"{UNET}input_blocks.0.0.weight": torch.ones(32, 9, 3, 3)}, ("inpainting", "9 channels")),
    (
        lambda t: t | {f"{UNET}input_blocks.1.1.fuser.weight": torch.ones(2)},
        ("input_blocks.1.1.fuser.weight", "special"),
    ),
    (
        lambda t: t | {f"{UNET}input_blocks.1.1.proj_in.weight": torch.ones(32, 32)},
        ("UNet of SD 2.x but no text",),
    ),
    (lambda t: t | {f"{UNET}input_blocks.9999.0.op.weight": torch.ones(2)}, ("one such block per level",)),
]


@pytest.mark.parametrize(("damage", "phrases"), DAMAGE)
def test_damaged_or_special_checkpoints(
    damage: Callable[[dict[str, Tensor]], dict[str, Tensor]],
    phrases: tuple[str, ...],
    good: dict[str, Tensor],
    tmp_path: Path,
) -> None:
    save_file(damage(good), tmp_path / "x.safetensors")
    refused(tmp_path / "x.safetensors", *phrases)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
def test_truncated_files(share: float, good: dict[str, Tensor], tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file(good, path)
    with path.open("r+b") as file:
        file.truncate(int(path.stat().st_size * share))
    refused(path, "x.safetensors")


class Canary:
    ran = False

    def __reduce__(self) -> Any:
        return (setattr, (Canary, "ran", True))


@pytest.mark.parametrize("name", ["model.ckpt", "model.pt", "model.bin", "model.safetensors"])
def test_pickles_are_refused_and_never_run(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(pickle.dumps(Canary()))
    message = refused(tmp_path / name, name, "safetensors")
    assert name.endswith(".safetensors") or "convert it with a tool you trust" in message
    assert not Canary.ran


def test_what_does_not_exist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refused(tmp_path / "nothing.safetensors", "does not exist", "owner/name")
    refused("C:\\models\\x.safetensors", "does not exist")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    refused("no-such-owner/no-such-model", "no-such-owner/no-such-model", "hub", "path of a model")


def test_folders_of_other_kinds(tmp_path: Path, folder: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    refused(empty, "model_index.json was expected")
    save_file(named("a"), empty / "one.safetensors")
    refused(empty, "Open one.safetensors in it instead")
    (empty / "adapter_config.json").write_text("{}")
    refused(empty, "a LoRA in PEFT's layout")
    index = folder / "model_index.json"
    original = json.loads(index.read_text())
    for change, phrase in (
        ({"_class_name": "FluxPipeline"}, "FluxPipeline"),
        (
            {"unet": ["diffusers", "UNetSpatioTemporalConditionModel"]},
            "UNetSpatioTemporalConditionModel as its unet",
        ),
        ({"text_encoder": None}, "nothing as its text_encoder"),
        ({"scheduler": ["diffusers", "StableDiffusionPipeline"]}, 'the scheduler "StableDiffusionPipeline"'),
        ({"scheduler": ["os", "system"]}, 'the scheduler "system"'),
        ({"_class_name": "StableDiffusionXLPipeline"}, "nothing as its text_encoder_2"),
    ):
        index.write_text(json.dumps(original | change))
        refused(folder, phrase)
    index.write_text("{")
    refused(folder, "model/model_index.json", "no valid JSON")
    index.write_text("[]")
    refused(folder, "a JSON object was expected")


def test_damaged_folders(folder: Path) -> None:
    unet = folder / "unet" / "diffusion_pytorch_model.safetensors"
    config = folder / "unet" / "config.json"
    original, tensors = json.loads(config.read_text()), load_file(unet)
    for change, phrase in (
        ({"layers_per_block": 10**9}, "layers_per_block = 1000000000 is out of range"),
        ({"transformer_layers_per_block": [1, [1, 10**9]]}, "transformer_layers_per_block"),
        ({"layers_per_block": 1}, "was expected from the rest of the model"),
        ({"cross_attention_dim": 48}, "48 was expected"),
        ({"down_block_types": ["NoSuchBlock"] * 4}, "NoSuchBlock"),
        ({"block_out_channels": "wide"}, "no UNet2DConditionModel that can be built"),
    ):
        config.write_text(json.dumps(original | change))
        refused(folder, phrase)
    config.write_text(json.dumps(original))
    save_file(without("mid_block.resnets.0.conv1.weight")(tensors), unet)
    refused(folder, "lacks mid_block.resnets.0.conv1.weight")
    save_file(tensors | {"mid_block.motion.weight": torch.ones(1)}, unet)
    refused(folder, "mid_block.motion.weight", "special model")
    unet.rename(unet.with_name("diffusion_pytorch_model.bin"))
    refused(folder, "diffusion_pytorch_model.bin", "safetensors version")
    (folder / "unet" / "diffusion_pytorch_model.bin").unlink()
    refused(folder, "model/unet holds no weights")
    index = {"weight_map": {"conv_in.weight": "../vae/diffusion_pytorch_model.safetensors"}}
    (folder / "unet" / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    refused(folder, "../vae", "Do not use it")


def test_folders_without_their_words(folder: Path) -> None:
    shutil.rmtree(folder / "tokenizer")
    refused(folder, "model/tokenizer holds no CLIP tokenizer")


def test_an_extra_tensor_beside_the_unet_is_named(folder: Path) -> None:
    vae = folder / "vae" / "diffusion_pytorch_model.safetensors"
    save_file(load_file(vae) | named("decoder.extra.weight"), vae)
    with pytest.warns(UserWarning, match=r"vae: decoder\.extra\.weight"):
        assert open_base(folder, device="cpu").unused == ("vae: decoder.extra.weight",)
