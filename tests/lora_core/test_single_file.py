"""Opening one file of an SD 1.x model: it is the model that was saved, name for name and bit for bit."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.loaders.single_file_utils import (
    convert_ldm_clip_checkpoint,
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
)
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

from lora_core.errors import FileRefused
from lora_core.ldm_names import as_in_file, ldm_keys
from lora_core.models import open_base
from tests.lora_core.opening import assert_proved, assert_same_weights, parts_of, picture
from tests.small_models import save_folder, save_ldm_single_file, small_pipeline


@pytest.fixture(scope="module")
def single_pipe() -> Any:
    return small_pipeline("sd1", clip_vocabulary=True)


@pytest.fixture(scope="module")
def single(single_pipe: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_ldm_single_file(single_pipe, tmp_path_factory.mktemp("single") / "small.safetensors")


def test_a_single_file_is_the_pipeline_it_was_saved_from(single: Path, single_pipe: Any) -> None:
    opened = open_base(single, device="cpu", dtype=torch.float32)
    assert (opened.family.key, opened.name, opened.path, opened.unused) == ("sd1", "small", single, ())
    assert_same_weights(opened.pipeline, single_pipe)
    ids = opened.pipeline.tokenizer("a photo of a cat", padding="max_length", return_tensors="pt").input_ids
    words = [pipe.text_encoder(ids).last_hidden_state for pipe in (opened.pipeline, single_pipe)]
    assert torch.equal(*words)
    z = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    t = torch.tensor(500)
    assert torch.equal(opened.pipeline.unet(z, t, words[0]).sample, single_pipe.unet(z, t, words[0]).sample)
    assert torch.equal(picture(opened.pipeline), picture(single_pipe))
    assert_proved(opened)


def test_single_file_names_agree_with_the_conversion_of_diffusers(single: Path) -> None:
    opened = open_base(single, device="cpu", dtype=torch.float32)
    file, pipe = load_file(single), opened.pipeline
    unet = convert_ldm_unet_checkpoint(dict(file), pipe.unet.config)
    vae = convert_ldm_vae_checkpoint(dict(file), pipe.vae.config)
    text = convert_ldm_clip_checkpoint(dict(file))
    text = {name.removeprefix("text_model."): tensor for name, tensor in text.items()}
    for model, theirs in ((pipe.unet, unet), (pipe.vae, vae), (pipe.text_encoder, text)):
        ours = model.state_dict()
        assert sorted(set(ours) ^ set(theirs)) == []
        assert [k for k in ours if not torch.equal(ours[k], theirs[k].reshape(ours[k].shape))] == []


def full_size_parts() -> dict[str, nn.Module]:
    """SD 1.5 as it is, on the meta device."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(
            sample_size=64,
            cross_attention_dim=768,
            block_out_channels=(320, 640, 1280, 1280),
            attention_head_dim=8,
        )
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(128, 256, 512, 512),
            layers_per_block=2,
        )
        config = CLIPTextConfig(
            hidden_size=768,
            intermediate_size=3072,
            num_hidden_layers=12,
            num_attention_heads=12,
            projection_dim=768,
        )
        return {"unet": unet, "vae": vae, "text_encoder": CLIPTextModel(config)}


KNOWN_OF_SD15 = {  # as they stand in v1-5-pruned-emaonly.safetensors
    "model.diffusion_model.time_embed.2.bias": (1280,),
    "model.diffusion_model.input_blocks.0.0.weight": (320, 4, 3, 3),
    "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": (320, 768),
    "model.diffusion_model.input_blocks.3.0.op.weight": (320, 320, 3, 3),
    "model.diffusion_model.input_blocks.4.0.skip_connection.weight": (640, 320, 1, 1),
    "model.diffusion_model.input_blocks.11.0.out_layers.3.weight": (1280, 1280, 3, 3),
    "model.diffusion_model.middle_block.1.transformer_blocks.0.ff.net.0.proj.weight": (10240, 1280),
    "model.diffusion_model.middle_block.2.emb_layers.1.weight": (1280, 1280),
    "model.diffusion_model.output_blocks.2.1.conv.weight": (1280, 1280, 3, 3),
    "model.diffusion_model.output_blocks.5.2.conv.weight": (1280, 1280, 3, 3),
    "model.diffusion_model.output_blocks.8.0.in_layers.2.weight": (640, 960, 3, 3),
    "model.diffusion_model.output_blocks.11.1.proj_in.weight": (320, 320, 1, 1),
    "model.diffusion_model.out.2.weight": (4, 320, 3, 3),
    "first_stage_model.encoder.down.2.block.0.nin_shortcut.weight": (512, 256, 1, 1),
    "first_stage_model.encoder.down.0.downsample.conv.weight": (128, 128, 3, 3),
    "first_stage_model.encoder.mid.attn_1.proj_out.weight": (512, 512, 1, 1),
    "first_stage_model.decoder.up.0.block.0.nin_shortcut.weight": (128, 256, 1, 1),
    "first_stage_model.decoder.up.3.upsample.conv.weight": (512, 512, 3, 3),
    "first_stage_model.quant_conv.weight": (8, 8, 1, 1),
    "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight": (49408, 768),
    "cond_stage_model.transformer.text_model.encoder.layers.11.mlp.fc1.weight": (3072, 768),
    "cond_stage_model.transformer.text_model.final_layer_norm.bias": (768,),
}


def test_the_names_of_the_real_sd15_file() -> None:
    shapes, counts = {}, {}
    for component, model in full_size_parts().items():
        state = model.state_dict()
        keys = ldm_keys(component, state)
        counts[component] = len(set(keys.values()))
        shapes |= {key: tuple(as_in_file(key, state[name]).shape) for name, key in keys.items()}
    assert counts == {"unet": 686, "vae": 248, "text_encoder": 196}
    assert {key: shapes.get(key) for key in KNOWN_OF_SD15} == KNOWN_OF_SD15


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16])
def test_half_precision_checkpoints(stored: torch.dtype, tmp_path: Path) -> None:
    pipe = small_pipeline("sd1", seed=1, dtype=stored, clip_vocabulary=True)
    path = save_ldm_single_file(pipe, tmp_path / "half.safetensors")
    same = open_base(path, device="cpu", dtype=stored)
    assert_same_weights(same.pipeline, pipe)
    wide = open_base(path, device="cpu", dtype=torch.float32)
    assert torch.equal(wide.pipeline.unet.conv_in.weight, pipe.unet.conv_in.weight.float())
    assert_proved(wide)


def test_dtype_and_device_are_chosen_when_not_given(single: Path) -> None:
    pipe = open_base(single).pipeline
    expected = torch.float16 if torch.cuda.is_available() else torch.float32
    assert {p.dtype for model in parts_of(pipe).values() for p in model.parameters()} == {expected}
    assert pipe.text_encoder.device == pipe.unet.device


def test_model_hash_is_the_start_of_the_files_sha256(single: Path, tmp_path: Path) -> None:
    assert open_base(single, device="cpu").model_hash == hashlib.sha256(single.read_bytes()).hexdigest()[:10]
    assert open_base(save_folder(small_pipeline("sd1"), tmp_path / "f"), device="cpu").model_hash is None


def test_known_extras_are_left_aside_and_unknown_ones_are_named(single: Path, tmp_path: Path) -> None:
    tensors, one = load_file(single), torch.ones(1)
    known = [
        "model_ema.diffusion_modelinput_blocks00weight",
        "model_ema.decay",
        "betas",
        "alphas_cumprod_prev",
        "sqrt_recipm1_alphas_cumprod",
        "posterior_log_variance_clipped",
        "log_one_minus_alphas_cumprod",
        "first_stage_model.loss.logvar",
        "cond_stage_model.transformer.text_model.embeddings.position_ids",
    ]
    save_file(tensors | {key: one.clone() for key in known}, tmp_path / "known.safetensors")
    opened = open_base(tmp_path / "known.safetensors", device="cpu", dtype=torch.float32)
    assert opened.unused == ()
    assert_proved(opened)
    unknown = {"cond_stage_model.logit_scale": one, "some.strange.thing": one.clone()}
    save_file(tensors | unknown, tmp_path / "unknown.safetensors")
    with pytest.warns(UserWarning, match=r"2 tensors belong to nothing .*cond_stage_model\.logit_scale"):
        opened = open_base(tmp_path / "unknown.safetensors", device="cpu")
    assert sorted(opened.unused) == sorted(unknown)


def test_text_encoders_without_their_prefix(single: Path, single_pipe: Any, tmp_path: Path) -> None:
    short = {k.replace("transformer.text_model.", "transformer."): t for k, t in load_file(single).items()}
    save_file(short, tmp_path / "short.safetensors")
    assert_same_weights(
        open_base(tmp_path / "short.safetensors", device="cpu", dtype=torch.float32).pipeline, single_pipe
    )


def test_what_a_single_file_says_of_its_prediction(single: Path, single_pipe: Any, tmp_path: Path) -> None:
    scheduler = open_base(single, device="cpu").pipeline.scheduler.config
    assert (scheduler.prediction_type, scheduler.clip_sample) == ("epsilon", False)
    path = save_ldm_single_file(single_pipe, tmp_path / "v.safetensors", {"modelspec.prediction_type": "v"})
    assert open_base(path, device="cpu").pipeline.scheduler.config.prediction_type == "v_prediction"


def test_an_opened_file_may_be_cut_and_the_change_is_seen(single: Path, tmp_path: Path) -> None:
    """A mapped file would kill the process here (SIGBUS), not fail."""
    path = tmp_path / "cut.safetensors"
    path.write_bytes(single.read_bytes())
    opened = open_base(path, device="cpu")
    with path.open("r+b") as file:
        file.truncate(5000)
    assert all(bool(p.isfinite().all()) for p in opened.pipeline.unet.parameters())
    with pytest.raises(FileRefused, match=r"cut\.safetensors"):
        list(opened.checkpoint_tensors())
    save_file({"other": torch.ones(3)}, path)
    with pytest.raises(FileRefused, match="has changed on disk since it was opened"):
        list(opened.checkpoint_tensors())


@pytest.mark.slow
def test_a_full_size_sd15_file(tmp_path: Path) -> None:
    """2.1 GB of random fp16: the same code as for small files, measures included."""
    generator, tensors, kept = torch.Generator().manual_seed(0), {}, {}
    for component, model in full_size_parts().items():
        state = model.state_dict()
        for name, key in ldm_keys(component, state).items():
            shape = as_in_file(key, state[name]).shape
            tensors[key] = torch.empty(shape, dtype=torch.float16).normal_(std=0.02, generator=generator)
            if name.endswith(("conv_in.weight", "token_embedding.weight", "attn2.to_v.weight")):
                kept[component, name] = tensors[key].clone()
    path = tmp_path / "full.safetensors"
    save_file(tensors, path)
    del tensors
    opened = open_base(path, device="cpu", dtype=torch.float16)
    assert (opened.family.key, opened.unused) == ("sd1", ())
    unet = opened.pipeline.unet.config
    assert (tuple(unet.block_out_channels), unet.cross_attention_dim) == ((320, 640, 1280, 1280), 768)
    assert opened.pipeline.text_encoder.config.num_attention_heads == 12
    live = {c: dict(getattr(opened.pipeline, c).named_parameters()) for c in ("unet", "vae", "text_encoder")}
    assert sum(len(parameters) for parameters in live.values()) == 686 + 248 + 196
    assert len(kept) >= 19
    assert [at for at, tensor in kept.items() if not torch.equal(live[at[0]][at[1]], tensor)] == []
