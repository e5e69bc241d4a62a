"""Opening one file of a model: it is the model that was saved, name for name and bit for bit."""

from __future__ import annotations

import hashlib
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.loaders.single_file_utils import (
    convert_ldm_clip_checkpoint,
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
    convert_open_clip_checkpoint,
)
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lora_core.errors import FileRefused
from lora_core.ldm_names import OPENCLIP, PREFIXES, as_in_file, ldm_keys
from lora_core.models import find_base, open_base
from tests.lora_core.full_size import models_of, vae_of
from tests.lora_core.opening import assert_proved, assert_same_weights, parts_of, picture
from tests.small_models import FAMILIES, ldm_tensors, save_folder, save_ldm_single_file, small_pipeline

V = {"modelspec.prediction_type": "v"}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def single_pipe(family: str) -> Any:
    return small_pipeline(family, clip_vocabulary=True)


@pytest.fixture(scope="module")
def single(family: str, single_pipe: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("single") / "small.safetensors"
    return save_ldm_single_file(single_pipe, path, V if family == "sd2" else None)


def opened(path: Path) -> Any:
    return open_base(path, device="cpu", dtype=torch.float32)


def test_a_single_file_is_the_pipeline_it_was_saved_from(family: str, single: Path, single_pipe: Any) -> None:
    base = opened(single)
    assert (base.family.key, base.name, base.path, base.unused, base.notes) == (
        family,
        "small",
        single,
        (),
        (),
    )
    assert_same_weights(base.pipeline, single_pipe)
    for name in ("tokenizer", "tokenizer_2"):
        if hasattr(single_pipe, name):
            ids = [
                getattr(p, name)("a red cat", padding="max_length").input_ids
                for p in (base.pipeline, single_pipe)
            ]
            assert ids[0] == ids[1]
    assert torch.equal(picture(base.pipeline), picture(single_pipe))
    assert_proved(base)


def theirs(family: str, file: dict[str, Tensor], parts: dict[str, nn.Module]) -> dict[str, dict[str, Tensor]]:
    """diffusers' own conversions of a single file, by component."""
    found = {
        "unet": convert_ldm_unet_checkpoint(dict(file), parts["unet"].config),
        "vae": convert_ldm_vae_checkpoint(dict(file), parts["vae"].config),
    }
    for component in ("text_encoder", "text_encoder_2"):
        if component in parts:
            if (family, component) in OPENCLIP:
                prefix = PREFIXES[family][component]
                state = convert_open_clip_checkpoint(parts[component], dict(file), prefix=prefix)
            else:
                state = convert_ldm_clip_checkpoint(dict(file))
            live = set(parts[component].state_dict())
            found[component] = {
                name if name in live else name.removeprefix("text_model."): tensor
                for name, tensor in state.items()
            }
    return found


def test_single_file_names_agree_with_the_conversion_of_diffusers(family: str, tmp_path: Path) -> None:
    """Of SD 2, diffusers ignores layer 23 of OpenCLIP by its number."""
    pipe = small_pipeline(family, clip_vocabulary=True, text_layers=23 if family == "sd2" else 2)
    path = save_ldm_single_file(pipe, tmp_path / "x.safetensors", V if family == "sd2" else None)
    parts = parts_of(opened(path).pipeline)
    for component, state in theirs(family, load_file(path), parts).items():
        ours = parts[component].state_dict()
        assert sorted(set(ours) ^ set(state)) == []
        assert [k for k in ours if not torch.equal(ours[k], state[k].reshape(ours[k].shape))] == []


def full_size_parts(family: str) -> dict[str, nn.Module]:
    return {**models_of(family), "vae": vae_of(family)}


def in_file(family: str, parts: dict[str, nn.Module]) -> dict[str, Tensor]:
    """The tensors of a single file, on the meta device."""
    found: dict[str, dict[int, Tensor]] = {}
    for component, model in parts.items():
        state = dict(model.named_parameters())
        for name, key in ldm_keys(family, component, state).items():
            found.setdefault(key.name, {})[key.part] = state[name].detach()
    return {key: as_in_file(key, [some[n] for n in sorted(some)]) for key, some in found.items()}


def sparse_file(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> Path:
    """A file with the header of these tensors in fp16, whose data is a hole."""
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for key, tensor in tensors.items():
        start, end = end, end + 2 * math.prod(tensor.shape)
        header[key] = {"dtype": "F16", "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return path


_M = "model.diffusion_model."
KNOWN: dict[str, dict[str, tuple[int, ...]]] = {  # as they stand in the files that were published
    "sd1": {  # v1-5-pruned-emaonly
        f"{_M}time_embed.2.bias": (1280,),
        f"{_M}input_blocks.0.0.weight": (320, 4, 3, 3),
        f"{_M}input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": (320, 768),
        f"{_M}input_blocks.3.0.op.weight": (320, 320, 3, 3),
        f"{_M}input_blocks.4.0.skip_connection.weight": (640, 320, 1, 1),
        f"{_M}input_blocks.11.0.out_layers.3.weight": (1280, 1280, 3, 3),
        f"{_M}middle_block.1.transformer_blocks.0.ff.net.0.proj.weight": (10240, 1280),
        f"{_M}middle_block.2.emb_layers.1.weight": (1280, 1280),
        f"{_M}output_blocks.2.1.conv.weight": (1280, 1280, 3, 3),
        f"{_M}output_blocks.5.2.conv.weight": (1280, 1280, 3, 3),
        f"{_M}output_blocks.8.0.in_layers.2.weight": (640, 960, 3, 3),
        f"{_M}output_blocks.11.1.proj_in.weight": (320, 320, 1, 1),
        f"{_M}out.2.weight": (4, 320, 3, 3),
        "first_stage_model.encoder.down.2.block.0.nin_shortcut.weight": (512, 256, 1, 1),
        "first_stage_model.encoder.down.0.downsample.conv.weight": (128, 128, 3, 3),
        "first_stage_model.encoder.mid.attn_1.proj_out.weight": (512, 512, 1, 1),
        "first_stage_model.decoder.up.0.block.0.nin_shortcut.weight": (128, 256, 1, 1),
        "first_stage_model.decoder.up.3.upsample.conv.weight": (512, 512, 3, 3),
        "first_stage_model.quant_conv.weight": (8, 8, 1, 1),
        "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight": (49408, 768),
        "cond_stage_model.transformer.text_model.encoder.layers.11.mlp.fc1.weight": (3072, 768),
        "cond_stage_model.transformer.text_model.final_layer_norm.bias": (768,),
    },
    "sd2": {  # v2-1_768-ema-pruned
        f"{_M}input_blocks.1.1.proj_in.weight": (320, 320),
        f"{_M}input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": (320, 1024),
        f"{_M}output_blocks.2.1.conv.weight": (1280, 1280, 3, 3),
        "first_stage_model.decoder.mid.attn_1.q.weight": (512, 512, 1, 1),
        "cond_stage_model.model.positional_embedding": (77, 1024),
        "cond_stage_model.model.token_embedding.weight": (49408, 1024),
        "cond_stage_model.model.transformer.resblocks.22.attn.in_proj_weight": (3072, 1024),
        "cond_stage_model.model.transformer.resblocks.22.attn.in_proj_bias": (3072,),
        "cond_stage_model.model.transformer.resblocks.0.attn.out_proj.weight": (1024, 1024),
        "cond_stage_model.model.transformer.resblocks.0.mlp.c_fc.weight": (4096, 1024),
        "cond_stage_model.model.transformer.resblocks.0.ln_2.bias": (1024,),
        "cond_stage_model.model.ln_final.weight": (1024,),
    },
    "sdxl": {  # sd_xl_base_1.0
        f"{_M}label_emb.0.0.weight": (1280, 2816),
        f"{_M}label_emb.0.2.bias": (1280,),
        f"{_M}input_blocks.4.1.transformer_blocks.1.attn2.to_k.weight": (640, 2048),
        f"{_M}input_blocks.6.0.op.weight": (640, 640, 3, 3),
        f"{_M}middle_block.1.transformer_blocks.9.ff.net.2.weight": (1280, 5120),
        f"{_M}output_blocks.2.2.conv.weight": (1280, 1280, 3, 3),
        f"{_M}output_blocks.5.2.conv.weight": (640, 640, 3, 3),
        f"{_M}output_blocks.8.0.skip_connection.weight": (320, 640, 1, 1),
        "conditioner.embedders.0.transformer.text_model.encoder.layers.11.mlp.fc1.weight": (3072, 768),
        "conditioner.embedders.1.model.text_projection": (1280, 1280),
        "conditioner.embedders.1.model.transformer.resblocks.31.attn.in_proj_weight": (3840, 1280),
        "conditioner.embedders.1.model.transformer.resblocks.31.mlp.c_fc.weight": (5120, 1280),
        "conditioner.embedders.1.model.positional_embedding": (77, 1280),
    },
}
COUNTS = {"sd1": 686 + 248 + 196, "sd2": 686 + 248 + 280, "sdxl": 1680 + 248 + 196 + 389}


def plain(config: Any) -> dict[str, Any]:
    config = config if isinstance(config, dict) else config.to_dict()
    listed = {k: list(v) if isinstance(v, tuple) else v for k, v in config.items() if not k.startswith("_")}
    return {
        k: v for k, v in listed.items() if not k.endswith("_token_id") and k not in ("dtype", "architectures")
    }


def test_a_full_size_header_is_the_published_model(family: str, tmp_path: Path) -> None:
    """Names, shapes and every setting, as far as the header gives them: all of it; diffusers' conversions agree."""
    parts = full_size_parts(family)
    tensors = in_file(family, parts)
    assert len(tensors) == COUNTS[family]
    assert {key: tuple(tensors[key].shape) if key in tensors else None for key in KNOWN[family]} == KNOWN[
        family
    ]
    for component, state in theirs(family, tensors, parts).items():
        ours = {name: p.shape for name, p in parts[component].named_parameters()}
        assert sorted(set(ours) ^ set(state)) == []
        assert [k for k in ours if state[k].shape != ours[k]] == []
    found = find_base(sparse_file(tmp_path / "full.safetensors", tensors, V if family == "sd2" else {}))
    assert (found.family.key, found.unused, found.told) == (family, (), True)
    for component, model in parts.items():
        assert plain(found.parts[component].config) == plain(model.config), component
        read = {name: p.shape for name, p in found.parts[component].named_parameters()}
        assert read == {name: p.shape for name, p in model.named_parameters()}
    assert found.pipeline.vae.config.force_upcast


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16])
def test_half_precision_checkpoints(stored: torch.dtype, tmp_path: Path) -> None:
    pipe = small_pipeline("sdxl", seed=1, dtype=stored, clip_vocabulary=True)
    path = save_ldm_single_file(pipe, tmp_path / "half.safetensors")
    same = open_base(path, device="cpu", dtype=stored)
    assert_same_weights(same.pipeline, pipe)
    wide = opened(path)
    assert torch.equal(wide.pipeline.unet.conv_in.weight, pipe.unet.conv_in.weight.float())
    assert_proved(wide)


@pytest.fixture(scope="module")
def sd1(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pipe = small_pipeline("sd1", clip_vocabulary=True)
    return save_ldm_single_file(pipe, tmp_path_factory.mktemp("sd1") / "small.safetensors")


def test_dtype_and_device_are_chosen_when_not_given(sd1: Path) -> None:
    pipe = open_base(sd1).pipeline
    expected = torch.float16 if torch.cuda.is_available() else torch.float32
    assert {p.dtype for model in parts_of(pipe).values() for p in model.parameters()} == {expected}
    assert pipe.text_encoder.device == pipe.unet.device


def test_model_hash_is_the_start_of_the_files_sha256(sd1: Path, tmp_path: Path) -> None:
    assert open_base(sd1, device="cpu").model_hash == hashlib.sha256(sd1.read_bytes()).hexdigest()[:10]
    assert open_base(save_folder(small_pipeline("sd1"), tmp_path / "f"), device="cpu").model_hash is None


ASIDE = {
    "sd1": (
        "cond_stage_model.transformer.text_model.embeddings.position_ids",
        "cond_stage_model.logit_scale",
    ),
    "sd2": ("cond_stage_model.model.logit_scale", "cond_stage_model.model.text_projection", "global_step"),
    "sdxl": (
        "conditioner.embedders.0.transformer.text_model.embeddings.position_ids",
        "conditioner.embedders.0.transformer.text_projection.weight",
        "conditioner.embedders.1.model.logit_scale",
        "denoiser.sigmas",
    ),
}
ASIDE_ALWAYS = (
    "model_ema.diffusion_modelinput_blocks00weight",
    "model_ema.decay",
    "betas",
    "alphas_cumprod_prev",
    "sqrt_recipm1_alphas_cumprod",
    "posterior_log_variance_clipped",
    "log_one_minus_alphas_cumprod",
    "first_stage_model.loss.logvar",
)


def test_known_extras_are_left_aside_and_unknown_ones_are_named(
    family: str, single: Path, tmp_path: Path
) -> None:
    tensors, one = load_file(single), torch.ones(1)
    metadata = V if family == "sd2" else None
    known = {key: one.clone() for key in (*ASIDE_ALWAYS, *ASIDE[family])}
    save_file(tensors | known, tmp_path / "known.safetensors", metadata)
    assert find_base(tmp_path / "known.safetensors").unused == ()
    unknown = {"cond_stage_model.strange": one, "some.strange.thing": one.clone()}
    save_file(tensors | unknown, tmp_path / "unknown.safetensors", metadata)
    with pytest.warns(UserWarning, match=r"2 tensors belong to nothing .*cond_stage_model\.strange"):
        base = opened(tmp_path / "unknown.safetensors")
    assert sorted(base.unused) == sorted(unknown)


def test_other_spellings(family: str, single: Path, single_pipe: Any, tmp_path: Path) -> None:
    """Of the text encoder's beginning, OpenCLIP's projection and the VAE's attention, as they occur."""
    attention = {"q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
    other = {}
    for key, tensor in load_file(single).items():
        spelled = key.replace("cond_stage_model.transformer.text_model.", "cond_stage_model.transformer.")
        if family == "sd2":
            spelled = spelled.replace("cond_stage_model.model.", "conditioner.embedders.0.model.")
        before, at, rest = spelled.partition(".attn_1.")
        part, _, kind = rest.rpartition(".")
        spelled = (
            f"{before}{at}{attention.get(part, part)}.{kind}"
            if at and key.startswith("first_stage")
            else spelled
        )
        if key.endswith(".text_projection"):
            spelled, tensor = f"{spelled}.weight", tensor.T.contiguous()
        other[spelled] = tensor
    assert len(other.keys() - load_file(single).keys()) > 8
    save_file(other, tmp_path / "other.safetensors", V if family == "sd2" else None)
    base = opened(tmp_path / "other.safetensors")
    assert base.unused == ()
    assert_same_weights(base.pipeline, single_pipe)
    assert_proved(base)


def test_an_openclip_without_its_unused_layer_is_used_whole(tmp_path: Path) -> None:
    """diffusers' own script writes SD 2's 23 layers and no more."""
    pipe = small_pipeline("sd2", clip_vocabulary=True, text_layers=23)
    tensors = {key: t for key, t in ldm_tensors(pipe).items() if ".resblocks.23." not in key}
    save_file(tensors, tmp_path / "x.safetensors", V)
    assert_same_weights(opened(tmp_path / "x.safetensors").pipeline, pipe)


@pytest.mark.parametrize(
    "lost",
    ["middle_block.1.transformer_blocks.9.", "middle_block.", "output_blocks.1.1.transformer_blocks.9."],
)
def test_an_sdxl_without_all_of_its_layers_is_incomplete_and_no_sibling(lost: str, tmp_path: Path) -> None:
    tensors = ldm_tensors(small_pipeline("sdxl", clip_vocabulary=True))
    save_file(
        {k: t for k, t in tensors.items() if not k.startswith(f"{_M}{lost}")}, tmp_path / "x.safetensors"
    )
    with pytest.raises(FileRefused, match=rf"x\.safetensors lacks {re.escape(_M + lost)}"):
        find_base(tmp_path / "x.safetensors")


# SDXL's smaller siblings: transformer layers of every block in the original layout, as ComfyUI's table has them, and of
# the middle (-1: one residual block and no attention, -2: no middle). diffusers' configuration of the same.
SIBLINGS: dict[str, tuple[list[int], int, list[int], dict[str, Any]]] = {
    "SSD-1B": (
        [0, 0, 2, 2, 4, 4],
        -1,
        [4, 4, 10, 2, 1, 1, 0, 0, 0],
        {
            "transformer_layers_per_block": [1, [2, 2], [4, 4]],
            "reverse_transformer_layers_per_block": [[4, 4, 10], [2, 1, 1], 1],
            "mid_block_type": "UNetMidBlock2D",
        },
    ),
    "Segmind-Vega": (
        [0, 0, 1, 1, 2, 2],
        -1,
        [2, 2, 2, 1, 1, 1, 0, 0, 0],
        {"transformer_layers_per_block": [1, 1, 2], "mid_block_type": "UNetMidBlock2D"},
    ),
    "KOALA 700M": (
        [0, 2, 5],
        -2,
        [5, 5, 2, 2, 0, 0],
        {"transformer_layers_per_block": [1, 2, 5], "mid_block_type": None, "layers_per_block": 1},
    ),
    "KOALA 1B": (
        [0, 2, 6],
        6,
        [6, 6, 2, 2, 0, 0],
        {"transformer_layers_per_block": [1, 2, 6], "layers_per_block": 1},
    ),
}


@pytest.mark.parametrize("name", SIBLINGS)
def test_smaller_siblings_of_sdxl_are_opened_as_they_are(name: str, tmp_path: Path) -> None:
    down, middle, up, config = SIBLINGS[name]
    pipe = small_pipeline("sdxl", clip_vocabulary=True)
    own = {k: v for k, v in pipe.unet.config.items() if not k.startswith("_")}
    torch.manual_seed(0)
    pipe.register_modules(unet=UNet2DConditionModel(**{**own, **config}).eval())
    path = save_ldm_single_file(pipe, tmp_path / "x.safetensors")
    keys = [key.removeprefix(_M) for key in load_file(path) if key.startswith(_M)]

    def depth(block: str) -> int:
        found = [re.match(rf"{block}\.1\.transformer_blocks\.(\d+)\.", key) for key in keys]
        return 1 + max((int(f[1]) for f in found if f), default=-1)

    layers = len(down) // 3
    blocks = [n for n in range(1, 3 * (layers + 1)) if n % (layers + 1)]
    assert [depth(f"input_blocks.{n}") for n in blocks] == down
    assert [depth(f"output_blocks.{n}") for n in range(len(up))] == up
    assert depth("middle_block") == max(middle, 0)
    assert {key.split(".")[1] for key in keys if key.startswith("middle_block.")} == {
        -1: {"0"},
        -2: set(),
    }.get(middle, {"0", "1", "2"})
    base = opened(path)
    assert (base.family.key, base.unused) == ("sdxl", ())
    assert_same_weights(base.pipeline, pipe)
    assert_proved(base)
    # some CPUs' kernels add up in another order where the same weights lie elsewhere in memory
    torch.testing.assert_close(picture(base.pipeline), picture(pipe), atol=1e-5, rtol=0)


def test_a_part_of_a_fused_matrix_of_another_size_is_refused(tmp_path: Path) -> None:
    tensors = ldm_tensors(small_pipeline("sd2", clip_vocabulary=True))
    key = "cond_stage_model.model.transformer.resblocks.1.attn.in_proj_weight"
    save_file(tensors | {key: tensors[key][:-1].clone()}, tmp_path / "x.safetensors", V)
    with pytest.raises(
        FileRefused, match=r"in_proj_weight in x\.safetensors is 95 x 32; 96 x 32 was expected"
    ):
        find_base(tmp_path / "x.safetensors")


def test_an_opened_file_may_be_cut_and_the_change_is_seen(sd1: Path, tmp_path: Path) -> None:
    """A mapped file would kill the process here (SIGBUS), not fail."""
    path = tmp_path / "cut.safetensors"
    path.write_bytes(sd1.read_bytes())
    base = open_base(path, device="cpu")
    with path.open("r+b") as file:
        file.truncate(5000)
    assert all(bool(p.isfinite().all()) for p in base.pipeline.unet.parameters())
    with pytest.raises(FileRefused, match=r"cut\.safetensors"):
        list(base.checkpoint_tensors())
    save_file({"other": torch.ones(3)}, path)
    with pytest.raises(FileRefused, match="has changed on disk since it was opened"):
        list(base.checkpoint_tensors())


@pytest.mark.slow
def test_a_full_size_sd15_file(tmp_path: Path) -> None:
    """2.1 GB of random fp16: the same code as for small files, measures included."""
    generator, kept = torch.Generator().manual_seed(0), {}
    parts = full_size_parts("sd1")
    places = {
        key.name: (component, name)
        for component, model in parts.items()
        for name, key in ldm_keys("sd1", component, dict(model.named_parameters())).items()
    }
    tensors = {}
    for key, outline in in_file("sd1", parts).items():
        tensors[key] = torch.empty(outline.shape, dtype=torch.float16).normal_(std=0.02, generator=generator)
        if key.endswith(("input_blocks.0.0.weight", "token_embedding.weight", "attn2.to_v.weight")):
            kept[places[key]] = tensors[key].clone()
    path = tmp_path / "full.safetensors"
    save_file(tensors, path)
    del tensors
    base = open_base(path, device="cpu", dtype=torch.float16)
    assert (base.family.key, base.unused) == ("sd1", ())
    live = {c: dict(getattr(base.pipeline, c).named_parameters()) for c in ("unet", "vae", "text_encoder")}
    assert sum(len(parameters) for parameters in live.values()) == 686 + 248 + 196
    assert len(kept) >= 18
    assert [at for at, tensor in kept.items() if not torch.equal(live[at[0]][at[1]], tensor)] == []
