"""What is no LoRA for this model is refused at every public door in one sentence that names it, and changes nothing."""

from __future__ import annotations

import io
import json
import pickle
import re
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lora_core import LivePipeline, look, read_adapter
from lora_core.errors import LoraError
from lora_core.safe_files import save_tensors, serialized
from tests.fuzz_files import sentence
from tests.lora_core.adapters_on_disk import PAIR, Q
from tests.lora_core.kinds_by_hand import adapter_of
from tests.lora_core.test_pipeline import inputs
from tests.small_models import small_pipeline

one = torch.ones(2, 2)


def lora_of(*layers: str) -> dict[str, Tensor]:
    """A LoRA on layers of these names, in kohya's or diffusers' spelling as the names are."""
    ends = {True: ("lora_A.weight", "lora_B.weight"), False: ("lora_down.weight", "lora_up.weight")}
    return {f"{name}.{end}": one for name in layers for end in ends["." in name]}


def with_header(change: Callable[[dict[str, Any]], object]) -> bytes:
    """A good file whose header says something else."""
    data = serialized(PAIR, {})
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data[8 + length :]


def zipped() -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as file:
        file.writestr("archive/data.pkl", b"\x80\x02.")
    return data.getvalue()


DOWN, UP = f"{Q}.lora_down.weight", f"{Q}.lora_up.weight"
GOOD = serialized(PAIR, {})
# what -> (the file, what the sentence must say)
BYTES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "is empty"),
    "pickle": (pickle.dumps({"a": [1.0]}), "Python pickle"),
    "zip": (zipped(), "zip archive"),
    "web page": (b"<!DOCTYPE html><html><title>404</title></html>", "web page"),
    "header cut short": (GOOD[:60], "cut short"),
    "body cut short": (GOOD[:-5], "cut short"),
    "header of 2^50 bytes": ((2**50).to_bytes(8, "little") + GOOD[8:], "hostile"),
    "bytes nobody lists": (GOOD + b"more", "4 bytes too many"),
    "overlapping tensors": (
        with_header(lambda h: h[UP].update(data_offsets=h[DOWN]["data_offsets"])),
        "overlap",
    ),
    "a larger shape than its bytes": (
        with_header(lambda h: h[UP].update(shape=[800, 4])),
        "its place in the file",
    ),
    "another dtype than its bytes": (
        with_header(lambda h: h[UP].update(dtype="F64")),
        "its place in the file",
    ),
    "an unknown dtype": (with_header(lambda h: h[UP].update(dtype="F31")), "F31"),
}
FILES: dict[str, tuple[dict[str, Tensor], str]] = {
    "a checkpoint of SD 1.x": (
        {
            "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": torch.ones(
                4, 768
            ),
            "first_stage_model.decoder.conv_in.weight": one,
            "cond_stage_model.transformer.text_model.encoder.layers.0.mlp.fc1.weight": one,
        },
        "base model",
    ),
    "a checkpoint of SDXL": (
        {
            "model.diffusion_model.input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight": torch.ones(
                4, 2048
            ),
            "conditioner.embedders.1.model.ln_final.weight": one,
        },
        "base model",
    ),
    "a UNet": ({"down_blocks.0.resnets.0.conv1.weight": one, "conv_in.weight": one}, "UNet of a base model"),
    "a VAE": ({"decoder.conv_in.weight": one, "encoder.conv_in.weight": one}, "a VAE"),
    "a VAE in a checkpoint's names": ({"first_stage_model.decoder.conv_in.weight": one}, "a VAE"),
    "a text encoder": ({"text_model.encoder.layers.0.mlp.fc1.weight": one}, "text encoder"),
    "a ControlNet": ({"control_model.input_blocks.0.0.weight": one}, "ControlNet"),
    "a ControlNet of diffusers": (
        {"controlnet_cond_embedding.conv_in.weight": one, "down_blocks.0.resnets.0.conv1.weight": one},
        "ControlNet",
    ),
    "an IP-Adapter": ({"ip_adapter.1.to_k_ip.weight": one, "image_proj.proj.weight": one}, "IP-Adapter"),
    "Flux, kohya": (lora_of("lora_unet_double_blocks_0_img_attn_qkv"), "Flux"),
    "Flux, with a text encoder like ours": (
        lora_of("lora_unet_single_blocks_3_linear1", "lora_te1_text_model_encoder_layers_0_mlp_fc1"),
        "Flux",
    ),
    "Flux, diffusers": (lora_of("transformer.single_transformer_blocks.0.attn.to_q"), "Flux"),
    "SD3": (lora_of("lora_unet_joint_blocks_0_x_block_attn_qkv"), "SD3"),
    "Qwen": (lora_of("transformer_blocks.0.img_mlp.net.0.proj", "transformer_blocks.0.attn.to_q"), "Qwen"),
    "Wan": (lora_of("diffusion_model.blocks.0.self_attn.q"), "Wan"),
    "AnimateDiff": (
        lora_of("unet.down_blocks.0.motion_modules.0.temporal_transformer.proj_in"),
        "AnimateDiff.*video",
    ),
    "nothing we know": ({"hello": one}, "hello"),
    "no tensors": ({}, "no LoRA layer"),
    "half a LoRA": ({DOWN: PAIR[DOWN]}, "without its up factor"),
}


@pytest.fixture(scope="module")
def live() -> LivePipeline:
    """A model that wears a LoRA already, live and at a weight of its own."""
    pipe = LivePipeline(small_pipeline("sd1"))
    pipe.load(adapter_of(pipe, "low rank", 1), name="worn", weight=0.7)
    return pipe


def state(live: LivePipeline) -> tuple[object, ...]:
    """All that could have changed: weights of every model, their hooks, what is loaded, and what the UNet answers."""
    models = {**live.models, "vae": live.pipeline.vae}
    with torch.no_grad():
        answer = live.models["unet"](**inputs(live)).sample
    return (
        {f"{c}.{n}": t.clone() for c, model in models.items() for n, t in model.state_dict().items()},
        {f"{c}.{n}": len(m._forward_hooks) for c, model in models.items() for n, m in model.named_modules()},
        {name: id(adapter) for name, adapter in live.loaded.items()},
        live.weights,
        live.fused,
        len(live.pipeline.tokenizer),
        answer,
    )


def same(a: object, b: object) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return a == b


def refusals(path: Path, live: LivePipeline) -> Iterator[str]:
    """What each door says."""
    yield look(path, hashes=True).problem
    for door in (read_adapter, live.load):
        with pytest.raises(LoraError) as refusal:
            door(path)
        yield str(refusal.value)


def assert_refused(
    path: Path, words: str, live: LivePipeline, doors: Callable[..., Iterator[str]] = refusals
) -> None:
    before = state(live)
    for said in doors(path, live):
        sentence(said)
        assert len(said) < 400
        assert re.search(words, said), said
    assert all(same(a, b) for a, b in zip(before, state(live), strict=True))


@pytest.mark.parametrize("what", BYTES)
def test_what_is_no_safetensors_file(what: str, tmp_path: Path, live: LivePipeline) -> None:
    data, words = BYTES[what]
    (tmp_path / "x.safetensors").write_bytes(data)
    assert_refused(tmp_path / "x.safetensors", words, live)


@pytest.mark.parametrize("what", FILES)
def test_what_is_no_lora_of_stable_diffusion(what: str, tmp_path: Path, live: LivePipeline) -> None:
    tensors, words = FILES[what]
    save_tensors(tmp_path / "x.safetensors", tensors)
    assert_refused(tmp_path / "x.safetensors", words, live)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_lora_with_one_value_that_is_no_number(value: float, tmp_path: Path, live: LivePipeline) -> None:
    up = PAIR[UP].clone()
    up[3, 2] = value
    save_tensors(tmp_path / "x.safetensors", {**PAIR, UP: up})
    assert_refused(tmp_path / "x.safetensors", r"lora_up|\(up\)", live)


def loading_alone(path: Path, live: LivePipeline) -> Iterator[str]:
    """A good LoRA, of another model: it is the model that refuses it."""
    assert not look(path).problem
    assert read_adapter(path).deltas
    with pytest.raises(LoraError) as refusal:
        live.load(path)
    yield str(refusal.value)


@pytest.mark.parametrize(("family", "title"), [("sd2", "SD 2.x"), ("sdxl", "SDXL")])
def test_a_lora_of_another_family(family: str, title: str, tmp_path: Path, live: LivePipeline) -> None:
    width = {"sd2": 1024, "sdxl": 2048}[family]
    k = Q.replace("attn1_to_q", "attn2_to_k")
    tensors = {f"{k}.lora_down.weight": torch.ones(2, width), f"{k}.lora_up.weight": torch.ones(320, 2)}
    save_tensors(tmp_path / "x.safetensors", tensors)
    assert look(tmp_path / "x.safetensors").family.key == family
    assert_refused(
        tmp_path / "x.safetensors", rf"^This is an {title} LoRA; the model is SD 1\.x\.", live, loading_alone
    )


def test_a_lora_of_a_larger_model_of_the_family(tmp_path: Path, live: LivePipeline) -> None:
    k = Q.replace("attn1_to_q", "attn2_to_k")
    save_tensors(
        tmp_path / "x.safetensors",
        {f"{k}.lora_down.weight": torch.ones(2, 768), f"{k}.lora_up.weight": torch.ones(320, 2)},
    )
    assert_refused(tmp_path / "x.safetensors", r"changes a weight of 320 x 768", live, loading_alone)
