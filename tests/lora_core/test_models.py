"""Opening a folder: what comes out is what lies on the disk, bit for bit, and as diffusers opens it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from safetensors.torch import load_file, save_file

from lora_core import base_sources
from lora_core.errors import FileRefused
from lora_core.models import open_base
from tests.lora_core.opening import assert_proved, assert_same_weights, parts_of, picture
from tests.small_models import FAMILIES, save_folder, small_pipeline


@pytest.mark.parametrize("family", FAMILIES)
def test_a_folder_opens_as_diffusers_opens_it(family: str, tmp_path: Path) -> None:
    saved = small_pipeline(family)
    folder = save_folder(saved, tmp_path / "my model")
    opened = open_base(folder, device="cpu", dtype=torch.float32)
    kind = StableDiffusionXLPipeline if family == "sdxl" else StableDiffusionPipeline
    theirs = kind.from_pretrained(folder)
    assert (opened.family.key, opened.name, opened.unused) == (family, "my model", ())
    assert type(opened.pipeline) is kind
    assert_same_weights(opened.pipeline, theirs)
    for part in ("unet", "vae", "scheduler"):
        ours, expected = getattr(opened.pipeline, part).config, getattr(theirs, part).config
        assert {k: v for k, v in ours.items() if k[0] != "_"} == {
            k: v for k, v in expected.items() if k[0] != "_"
        }
    assert type(opened.pipeline.scheduler) is type(theirs.scheduler)
    assert torch.equal(picture(opened.pipeline), picture(saved))
    # theirs are mapped from the file, unaligned, where the same sums round otherwise
    assert torch.allclose(picture(opened.pipeline), picture(theirs), atol=1e-4)
    assert_proved(opened)
    for model in parts_of(opened.pipeline).values():
        assert not model.training
        assert not any(p.requires_grad for p in model.parameters())


def test_checkpoint_tensors_show_a_changed_weight(tmp_path: Path) -> None:
    opened = open_base(save_folder(small_pipeline("sd1"), tmp_path / "m"), device="cpu", dtype=torch.float32)
    with torch.no_grad():
        opened.pipeline.vae.decoder.conv_in.bias[0] += 1e-6
    with pytest.raises(AssertionError):
        assert_proved(opened)


def test_spellings_of_older_libraries(tmp_path: Path) -> None:
    pipe = small_pipeline("sd1")
    folder = save_folder(pipe, tmp_path / "old")
    vae, text = folder / "vae/diffusion_pytorch_model.safetensors", folder / "text_encoder/model.safetensors"
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    renamed = {}
    for key, tensor in load_file(vae).items():
        for new, name in old.items():
            key = key.replace(f".attentions.0.{new}.", f".attentions.0.{name}.")
        renamed[key] = tensor
    assert sum(".query." in key for key in renamed) == 4
    save_file(renamed, vae, metadata={"format": "pt"})
    bare = {key.removeprefix("text_model."): tensor for key, tensor in load_file(text).items()}
    prefixed = {f"text_model.{key}": tensor for key, tensor in bare.items()}
    prefixed["text_model.embeddings.position_ids"] = torch.arange(77)[None]
    for spelling in (bare, prefixed):
        save_file(spelling, text, metadata={"format": "pt"})
        opened = open_base(folder, device="cpu", dtype=torch.float32)
        assert opened.unused == ()
        assert_same_weights(opened.pipeline, pipe)
        assert_proved(opened)


@pytest.mark.parametrize("options", [{"variant": "fp16"}, {"max_shard_size": "1MB"}])
def test_variants_and_shards(options: dict[str, str], tmp_path: Path) -> None:
    pipe = small_pipeline("sd2")
    pipe.save_pretrained(tmp_path / "m", **options)
    files = list((tmp_path / "m" / "unet").glob("*.safetensors"))
    assert len(files) > 1 or ".fp16." in files[0].name
    opened = open_base(tmp_path / "m", device="cpu", dtype=torch.float32)
    assert_same_weights(opened.pipeline, pipe)
    assert_proved(opened)


def test_the_safety_checker_is_never_loaded(tmp_path: Path) -> None:
    folder = save_folder(small_pipeline("sd1"), tmp_path / "m")
    index = json.loads((folder / "model_index.json").read_text())
    index["safety_checker"] = [
        "stable_diffusion",
        "StableDiffusionSafetyChecker",
    ]  # as in every SD 1.5 folder
    index["requires_safety_checker"] = True
    (folder / "model_index.json").write_text(json.dumps(index))
    assert open_base(folder, device="cpu").pipeline.safety_checker is None


def test_demo_is_the_folder_beside_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert base_sources.DEMO.parts[-3:] == ("presets", "demo", "base")
    monkeypatch.setattr(base_sources, "DEMO", save_folder(small_pipeline("sd1"), tmp_path / "base"))
    assert (open_base("demo", device="cpu").name, open_base("demo", device="cpu").family.key) == (
        "demo",
        "sd1",
    )
    monkeypatch.setattr(base_sources, "DEMO", tmp_path / "nothing")
    with pytest.raises(FileRefused, match="demo base is not in this installation"):
        open_base("demo")
