"""What a UNet predicts: taken from where it is said, measured where it is not, asked for where that is not clear."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lora_core import LivePipeline, bake
from lora_core.errors import ConfigError, LoraError
from lora_core.models import find_base, open_base
from lora_core.prediction import correlation, measured, told, told_beside
from lora_core.recipe import Recipe, make
from lora_core.safe_files import read_header
from tests.small_models import ldm_tensors, save_folder, save_ldm_single_file, small_pipeline


def sd2(path: Path, metadata: dict[str, str] | None = None) -> Path:
    return save_ldm_single_file(small_pipeline("sd2", clip_vocabulary=True), path, metadata)


def hands_back_its_noise(pipe: Any) -> Any:
    """A UNet whose answer is its input, normed: silu(x) - silu(-x) = x, carried by conv_in's skip past everything."""
    unet = pipe.unet
    last = unet.up_blocks[3]
    for p in (
        unet.conv_in.weight,
        unet.conv_in.bias,
        last.resnets[2].conv_shortcut.weight,
        last.resnets[2].conv_shortcut.bias,
        last.resnets[2].conv2.weight,
        last.resnets[2].conv2.bias,
        last.attentions[2].proj_out.weight,
        last.attentions[2].proj_out.bias,
        unet.conv_norm_out.bias,
        unet.conv_out.weight,
        unet.conv_out.bias,
    ):
        p.zero_()
    unet.conv_norm_out.weight.fill_(1)
    last.resnets[2].conv_shortcut.weight[:, 32:, 0, 0] = torch.eye(32)
    for c in range(4):
        unet.conv_in.weight[c, c, 1, 1], unet.conv_in.weight[c + 4, c, 1, 1] = 1, -1
        unet.conv_out.weight[c, c, 1, 1], unet.conv_out.weight[c, c + 4, 1, 1] = 1, -1
    return pipe


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ({}, None),
        ({"modelspec.prediction_type": "v"}, "v_prediction"),
        ({"modelspec.prediction_type": "epsilon"}, "epsilon"),
        ({"modelspec.architecture": "stable-diffusion-v2-768-v"}, "v_prediction"),
        ({"modelspec.architecture": "stable-diffusion-v2-512"}, "epsilon"),
        ({"ss_base_model_version": "sd_v2_v"}, "v_prediction"),
        ({"ss_base_model_version": "sd_v2"}, "epsilon"),
        ({"modelspec.prediction_type": "x0", "modelspec.architecture": "stable-diffusion-v1"}, None),
    ],
)
def test_what_metadata_say(metadata: dict[str, str], expected: str | None, tmp_path: Path) -> None:
    save_file({"x": torch.ones(1)}, tmp_path / "x.safetensors", metadata)
    assert told(read_header(tmp_path / "x.safetensors")) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('model:\n  params:\n    parameterization: "v"\n', "v_prediction"),
        ("model:\r\n  params:\r\n    parameterization: v  # 768\r\n", "v_prediction"),
        ("    parameterization: eps\n", "epsilon"),
        ("model:\n  target: ldm.models.diffusion.ddpm.LatentDiffusion\n", "epsilon"),
        ("  target: sgm.modules.diffusionmodules.denoiser_scaling.VScaling\n", "v_prediction"),
        ("  target: sgm.modules.diffusionmodules.denoiser_scaling.EpsScaling\n", "epsilon"),
        ("# parameterization: v\n", None),
        ("parameterization: !!python/object/apply:os.system [x]\n", None),
    ],
)
def test_what_a_configuration_beside_the_file_says(text: str, expected: str | None, tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text(text, encoding="utf-8", newline="")
    assert told_beside(tmp_path / "x.safetensors") == expected
    (tmp_path / "x.yaml").write_text(text + "#" * 2**16)
    assert told_beside(tmp_path / "x.safetensors") is None


def test_a_configuration_beside_the_file_goes_before_what_the_file_says(tmp_path: Path) -> None:
    path = sd2(tmp_path / "x.safetensors", {"modelspec.prediction_type": "v"})
    assert (find_base(path).pipeline.scheduler.config.prediction_type, find_base(path).told) == (
        "v_prediction",
        True,
    )
    (tmp_path / "x.yaml").write_text("parameterization: eps\n")
    found = find_base(path)
    assert (found.pipeline.scheduler.config.prediction_type, found.pipeline.unet.config.sample_size) == (
        "epsilon",
        64,
    )
    assert find_base(path, prediction="v_prediction").pipeline.unet.config.sample_size == 96


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_marks_of_v_models(family: str, tmp_path: Path) -> None:
    """As NoobAI's files have them: tensors without elements."""
    pipe = small_pipeline(family, clip_vocabulary=True)
    tensors, none = ldm_tensors(pipe), torch.zeros(0)
    save_file(tensors, tmp_path / "plain.safetensors")
    save_file(tensors | {"v_pred": none}, tmp_path / "v.safetensors")
    save_file(tensors | {"v_pred": none, "ztsnr": none.clone()}, tmp_path / "z.safetensors")
    configs = {}
    for name in ("plain", "v", "z"):
        base = open_base(tmp_path / f"{name}.safetensors", device="cpu")
        configs[name] = base.pipeline.scheduler.config
        assert (base.unused, base.notes) == ((), ())
    assert [configs[n].prediction_type for n in ("plain", "v", "z")] == [
        "epsilon",
        "v_prediction",
        "v_prediction",
    ]
    assert [bool(configs[n].get("rescale_betas_zero_snr")) for n in ("plain", "v", "z")] == [
        False,
        False,
        True,
    ]
    assert configs["z"].timestep_spacing == "trailing"
    save_file(tensors | {"v_prod": none}, tmp_path / "other.safetensors")
    with pytest.raises(LoraError, match="not between 1"):
        find_base(tmp_path / "other.safetensors")


class Parameterised(nn.Module):
    """What a v model knows, said as the noise: eps = sqrt(abar) v + sqrt(1 - abar) x, at SD's last timestep."""

    def __init__(self, unet: Any) -> None:
        super().__init__()
        self.unet, self.config = unet, unet.config

    def forward(self, x: Tensor, t: Tensor, words: Tensor) -> Any:
        abar = 0.00466
        said = self.unet(x, t, words)
        said.sample = abar**0.5 * said.sample + (1 - abar) ** 0.5 * x
        return said


def test_a_trained_model_is_measured_in_either_parameterisation() -> None:
    pipe = open_base("demo", device="cpu", dtype=torch.float32).pipeline
    assert measured(pipe)[0] == pipe.scheduler.config.prediction_type == "v_prediction"
    ids = pipe.tokenizer("a red fox", padding="max_length", return_tensors="pt").input_ids
    words = pipe.text_encoder(ids).last_hidden_state
    assert abs(correlation(pipe.unet, words)) < 0.3
    assert correlation(Parameterised(pipe.unet), words) > 0.99


def test_a_silent_file_is_tried_out_and_that_is_said(tmp_path: Path) -> None:
    v, eps = sd2(tmp_path / "v.safetensors"), tmp_path / "eps.safetensors"
    save_ldm_single_file(hands_back_its_noise(small_pipeline("sd2", clip_vocabulary=True)), eps)
    assert not find_base(eps).told
    base = open_base(eps, device="cpu", dtype=torch.float32)
    assert base.notes == ("eps does not say what its UNet predicts; tried out, it is the noise (epsilon).",)
    assert (base.pipeline.scheduler.config.prediction_type, base.pipeline.unet.config.sample_size) == (
        "epsilon",
        64,
    )
    live = LivePipeline.open(v, device="cpu", dtype=torch.float32)
    assert live.pipeline.scheduler.config.prediction_type == "v_prediction"
    assert live.resolution == 96 * 8
    assert live.verify_base()
    told_otherwise = open_base(eps, device="cpu", prediction="v_prediction")
    assert (told_otherwise.pipeline.scheduler.config.prediction_type, told_otherwise.notes) == (
        "v_prediction",
        (),
    )
    bake(eps, [], tmp_path / "folder")  # by its path alone
    config = json.loads((tmp_path / "folder/scheduler/scheduler_config.json").read_text())
    assert config["prediction_type"] == "epsilon"
    bake(find_base(eps, prediction="v_prediction"), [], tmp_path / "said.safetensors")
    assert (
        find_base(tmp_path / "said.safetensors").pipeline.scheduler.config.prediction_type == "v_prediction"
    )


def test_what_is_not_clear_is_asked_for(tmp_path: Path) -> None:
    pipe = small_pipeline("sd2", clip_vocabulary=True)
    pipe.unet.conv_out.bias.fill_(float("nan"))
    path = save_ldm_single_file(pipe, tmp_path / "x.safetensors")
    with pytest.raises(
        LoraError, match=r'prediction = "epsilon" or "v_prediction" \(--prediction\), or put x\.yaml'
    ):
        open_base(path, device="cpu")
    assert open_base(path, device="cpu", prediction="epsilon").notes == ()
    (tmp_path / "x.yaml").write_text("parameterization: v")
    assert open_base(path, device="cpu").pipeline.scheduler.config.prediction_type == "v_prediction"


def test_a_folder_can_be_told_otherwise_and_nonsense_is_refused(tmp_path: Path) -> None:
    folder = save_folder(small_pipeline("sd1"), tmp_path / "f")
    base = open_base(folder, device="cpu", prediction="v_prediction")
    assert base.pipeline.scheduler.config.prediction_type == "v_prediction"
    assert base.pipeline.unet.config.sample_size == 16
    with pytest.raises(
        ConfigError, match=r'prediction = \'v_predict\' is unknown\. Did you mean "v_prediction"\?'
    ):
        open_base(folder, prediction="v_predict")


def test_a_recipe_says_it_too(tmp_path: Path) -> None:
    path = sd2(tmp_path / "x.safetensors")
    recipe = Recipe(base=str(path), prompt="a cat", steps=1, width=64, height=64, out=tmp_path / "out")
    assert next(line for line in make(recipe) if "predicts" in line).endswith("it is the velocity (v).")
    lines = list(make(recipe.with_flags({"prediction": "epsilon"})))
    assert not [line for line in lines if "predicts" in line]
