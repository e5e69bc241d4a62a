"""A model with LoRAs baked in: opened again it is the fused model, bit for bit, and diffusers reads it too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from diffusers.loaders.single_file_utils import convert_open_clip_checkpoint
from safetensors.torch import load_file
from transformers import CLIPTextConfig, CLIPTextModel

from lora_core import Adapter, LivePipeline, bake, write_adapter
from lora_core.baking import BASE, FROM
from lora_core.deltas.bias import WithBias
from lora_core.deltas.low_rank import LowRank
from lora_core.errors import ConfigError, LoraError, NotFinite, SaveFailed, WrongFamily
from lora_core.safe_files import read_header, read_tensors, stream_tensors
from tests.lora_core.opening import assert_same_weights, picture
from tests.lora_core.test_pipeline import bits, random_adapter, same_bits, tree
from tests.small_models import FAMILIES, save_folder, save_ldm_single_file, small_pipeline

INK = {"unet": 0.8, "text_encoder": 0.3, "blocks": {"down.1": 0.2}}


def opened(path: Any) -> LivePipeline:
    return LivePipeline.open(path, device="cpu", dtype=torch.float32)


def worn(live: LivePipeline) -> LivePipeline:
    """A LoRA with weights per part, and a DoRA over the same layers."""
    live.load(random_adapter(live, 1, targets=("attention", "conv"), name="ink"), "ink", INK)
    live.load(random_adapter(live, 2, variant="dora", name="cat"), "cat", 0.6)
    return live


@pytest.mark.parametrize("family", FAMILIES)
def test_a_baked_folder_is_the_fused_model(family: str, tmp_path: Path) -> None:
    live = worn(opened(save_folder(small_pipeline(family), tmp_path / "base")))
    before, modules = bits(live), tree(live)
    said = live.bake(tmp_path / "new")
    assert same_bits(live, before)
    assert tree(live) == modules
    assert live.verify_base()
    live.fuse()
    baked = opened(tmp_path / "new")
    assert_same_weights(baked.pipeline, live.pipeline)
    assert torch.equal(picture(baked.pipeline), picture(live.pipeline))
    assert said.changed == len({p for a in live.loaded.values() for p in a.deltas})
    assert not said.unused
    kind = StableDiffusionXLPipeline if family == "sdxl" else StableDiffusionPipeline
    theirs = kind.from_pretrained(tmp_path / "new")
    assert_same_weights(theirs, live.pipeline)
    header = read_header(tmp_path / "new/unet/diffusion_pytorch_model.safetensors")
    assert header.metadata[BASE] == "base"
    assert [(one["name"], one["weight"]) for one in json.loads(header.metadata[FROM])] == [
        ("ink", live.weights["ink"]),
        ("cat", 0.6),
    ]


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved("sd1", tmp_path_factory.mktemp("single") / "small.safetensors")


def saved(family: str, path: Path) -> Path:
    """SD 2's in its real layout, of whose 24 layers 23 are used: diffusers knows the last one by its number."""
    metadata = {"modelspec.prediction_type": "v"} if family == "sd2" else None
    return save_ldm_single_file(pipe_of(family), path, metadata)


def pipe_of(family: str) -> Any:
    return small_pipeline(family, clip_vocabulary=True, text_layers=23 if family == "sd2" else 2)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_baked_file_is_the_fused_model_in_the_original_layout(family: str, tmp_path: Path) -> None:
    single = saved(family, tmp_path / "small.safetensors")
    live = worn(opened(single))
    live.bake(tmp_path / "new.safetensors", metadata={"modelspec.title": "New"})
    live.fuse()
    baked = opened(tmp_path / "new.safetensors")
    assert_same_weights(baked.pipeline, live.pipeline)
    assert baked.opened is not None
    assert baked.opened.unused == ()
    assert torch.equal(picture(baked.pipeline), picture(live.pipeline))
    old, new = read_header(single), read_header(tmp_path / "new.safetensors")
    marks = {"v_pred"} if family == "sd2" else set()
    assert {k: (t.dtype, t.shape) for k, t in new.tensors.items() if k not in marks} == {
        k: (t.dtype, t.shape) for k, t in old.tensors.items()
    }
    assert marks <= new.tensors.keys()
    architectures = {"sd1": "v1", "sd2": "v2-768-v", "sdxl": "xl-v1-base"}
    assert new.metadata["modelspec.architecture"] == f"stable-diffusion-{architectures[family]}"
    assert new.metadata["modelspec.title"] == "New"
    last = [k for k in new.tensors if ".resblocks.23." in k]  # unused in SD 2, and kept as it was
    assert len(last) == (12 if family == "sd2" else 0)
    assert all(torch.equal(read_tensors(old)[k], read_tensors(new)[k]) for k in last)
    assert_read_by_diffusers(tmp_path / "new.safetensors", live, tmp_path)


def assert_read_by_diffusers(file: Path, live: LivePipeline, tmp_path: Path) -> None:
    """Its own loader of such files, given the family's configurations, draws the same picture from it."""
    save_folder(live.pipeline, tmp_path / "configurations")
    for weights in (tmp_path / "configurations").rglob("*.safetensors"):
        weights.unlink()
    kind = StableDiffusionXLPipeline if live.family.key == "sdxl" else StableDiffusionPipeline
    settings = {"add_watermarker": False} if live.family.key == "sdxl" else {"safety_checker": None}
    theirs = kind.from_single_file(
        str(file), config=str(tmp_path / "configurations"), local_files_only=True, **settings
    )
    assert_same_weights(theirs, live.pipeline)
    # its attention weights of the VAE are strided views of convolutions: the products are rounded otherwise
    assert torch.allclose(picture(theirs), picture(live.pipeline), atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_folder_with_the_published_ids_bakes_to_one_file(family: str, tmp_path: Path) -> None:
    """Published configurations name other special tokens than CLIP has. SD 2's folder lacks the layer that is not used,
    so one that adds nothing stands in for it."""
    pipe = pipe_of(family)
    for encoder in (pipe.text_encoder, getattr(pipe, "text_encoder_2", pipe.text_encoder)):
        encoder.config.bos_token_id, encoder.config.eos_token_id, encoder.config.pad_token_id = 0, 2, 1
    base = save_folder(pipe, tmp_path / "base")
    live = worn(opened(base))
    live.bake(tmp_path / "new.safetensors")
    live.fuse()
    baked = opened(tmp_path / "new.safetensors")
    assert_same_weights(baked.pipeline, live.pipeline)
    assert torch.equal(picture(baked.pipeline), picture(live.pipeline))
    if family == "sd2":
        assert_read_by_diffusers(tmp_path / "new.safetensors", live, tmp_path)
        assert_last_layer_adds_nothing(tmp_path / "new.safetensors", pipe.text_encoder.config)


def assert_last_layer_adds_nothing(file: Path, config: Any) -> None:
    whole = CLIPTextConfig.from_dict({**config.to_dict(), "num_hidden_layers": 24})
    encoder = CLIPTextModel(whole).eval()
    tensors = {
        k.replace("resblocks.23.", "resblocks.x."): t for k, t in load_file(file).items()
    }  # or it is ignored
    state = convert_open_clip_checkpoint(encoder, tensors)
    encoder.load_state_dict(
        {k.removeprefix("text_model.").replace("layers.x.", "layers.23."): t for k, t in state.items()}
    )
    with torch.no_grad():
        states = encoder(torch.arange(77)[None], output_hidden_states=True).hidden_states
    assert torch.equal(states[-1], states[-2])
    assert not torch.equal(states[-2], states[-3])


def test_by_paths_alone_in_half_precision_with_one_rounding(single: Path, tmp_path: Path) -> None:
    live = opened(single)
    ink = random_adapter(live, 1, name="ink")
    lora = write_adapter(ink, tmp_path / "ink.safetensors")
    said = bake(single, [(lora, 0.8)], tmp_path / "folder", dtype=torch.float16)
    live.load(ink, "ink", 0.8)
    whole = gone = 0.0
    before = {c: {n: p.clone() for n, p in model.named_parameters()} for c, model in live.models.items()}
    live.fuse()
    for component, model in live.models.items():
        for name, p in model.named_parameters():
            whole += float((p - before[component][name]).square().sum())
            gone += float((p - p.half()).square().sum()) * (not torch.equal(p, before[component][name]))
    assert said.rounded == pytest.approx((gone / whole) ** 0.5, rel=1e-3)
    assert str(said) == (
        f"folder: {len(ink.deltas)} layers changed, {said.rounded:.2g} of the change lost in rounding, all tensors "
        "read back and compared"
    )
    for component, file in (("unet", "diffusion_pytorch_model"), ("text_encoder", "model")):
        tensors = load_file(tmp_path / "folder" / component / f"{file}.safetensors")
        for name, p in live.models[component].named_parameters():
            key = f"text_model.{name}" if component == "text_encoder" else name
            assert torch.equal(tensors.pop(key), p.half()), name
        assert not tensors
    config = json.loads((tmp_path / "folder/text_encoder/config.json").read_text())
    assert config["dtype"] == "float16"


def test_the_demo_base_bakes_to_a_folder_and_not_to_a_file(tmp_path: Path) -> None:
    live = opened("demo")
    live.load(random_adapter(live, 1), "ink", 0.5)
    live.bake(tmp_path / "new")  # in fp16, as its files are
    live.bake(tmp_path / "exact", dtype=torch.float32)
    with pytest.raises(ConfigError, match="Write it as a folder"):
        live.bake(tmp_path / "new.safetensors")
    live.fuse()
    expected = picture(live.pipeline)
    assert torch.equal(picture(opened(tmp_path / "exact").pipeline), expected)
    assert torch.allclose(picture(opened(tmp_path / "new").pipeline), expected, atol=2e-3)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["exact", "new"]


@pytest.mark.parametrize("fused", [False, True])
def test_a_model_given_from_memory_bakes_and_stays_as_it_was(fused: bool, tmp_path: Path) -> None:
    live = worn(LivePipeline(small_pipeline("sd1")))
    if fused:
        live.fuse()
    before = bits(live)
    live.bake(tmp_path / "new")
    assert live.fused is fused
    assert same_bits(live, before)
    live.fuse()
    assert_same_weights(opened(tmp_path / "new").pipeline, live.pipeline)
    live.unfuse()
    assert live.verify_base()


def test_a_change_of_the_bias_is_baked_in(tmp_path: Path) -> None:
    pipe = small_pipeline("sd1")
    path = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
    layer = pipe.text_encoder.encoder.layers[0].self_attn.q_proj
    g = torch.Generator().manual_seed(0)
    low = LowRank(torch.randn(2, 32, generator=g), torch.randn(32, 2, generator=g), 3.0)
    change = torch.randn(32, generator=g)
    adapter = Adapter({path: WithBias(low, change)}, family="sd1", name="ink")
    bake(pipe, [(adapter, 0.5)], tmp_path / "new")
    q = opened(tmp_path / "new").models["text_encoder"].get_submodule("encoder.layers.0.self_attn.q_proj")
    assert torch.allclose(q.weight, layer.weight + 0.5 * low.delta(layer.weight), atol=1e-6)
    assert torch.allclose(q.bias, layer.bias + 0.5 * change, atol=1e-6)


def test_what_cannot_be_baked_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    live = worn(LivePipeline(small_pipeline("sd1")))
    ink = live.loaded["ink"]
    with pytest.raises(LoraError, match="curve over the steps"):
        bake(live.pipeline, [(ink, {"curve": [[0, 1], [1, 0]]})], tmp_path / "new")
    live.set_weights({"ink": {"half": "conditional"}})
    with pytest.raises(LoraError, match="half alone"):
        live.bake(tmp_path / "new")
    with pytest.raises(WrongFamily):
        bake(small_pipeline("sdxl"), [(ink, 1.0)], tmp_path / "new")
    with pytest.raises(ConfigError, match="knows 1,215 words"):
        bake(small_pipeline("sdxl"), [], tmp_path / "new.safetensors")
    with pytest.raises(ConfigError, match="int8"):
        bake(live.pipeline, [], tmp_path / "new", dtype=torch.int8)
    elsewhere = {
        "unet.down_blocks.7.resnets.0.conv1": LowRank(torch.ones(1, 4, 3, 3), torch.ones(4, 1, 1, 1), 2.0)
    }
    with pytest.raises(LoraError, match="None of the 1 layers"):
        bake(live.pipeline, [(Adapter(elsewhere, name="ink"), 1.0)], tmp_path / "new")
    with pytest.raises(NotFinite, match="float16 cannot hold"):
        bake(live.pipeline, [(ink, 1e6)], tmp_path / "new", dtype=torch.float16)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "new").mkdir()
    with pytest.raises(LoraError, match="exists already"):
        bake(live.pipeline, [], tmp_path / "new")


def test_streamed_tensors_are_aligned_read_back_and_whole_or_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = {
        "a": torch.randn(3, 5).half(),
        "b": torch.randn(7, dtype=torch.float64),
        "c": torch.tensor(2.0, dtype=torch.bfloat16),
        "d": torch.randn(4, 4).T,
    }
    outlines = {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()}
    path = tmp_path / "x.safetensors"
    stream_tensors(path, outlines, tensors.__getitem__, {"who": "Ünal"})
    header = read_header(path)
    assert header.metadata == {"who": "Ünal"}
    assert all((header.data_start + t.start) % (int(t.dtype[-2:]) // 8) == 0 for t in header.tensors.values())
    for found in (read_tensors(header), load_file(path)):
        assert found.keys() == tensors.keys()
        assert all(torch.equal(found[name], t) for name, t in tensors.items())

    def failing(name: str) -> torch.Tensor:
        raise NotFinite("no")

    before = path.read_bytes()
    with pytest.raises(NotFinite):
        stream_tensors(path, outlines, failing, {})
    monkeypatch.setattr(
        "lora_core.safe_files.read_tensors", lambda header, names: dict.fromkeys(names, tensors["b"])
    )
    with pytest.raises(SaveFailed, match="other bytes"):
        stream_tensors(path, outlines, tensors.__getitem__, {})
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]
