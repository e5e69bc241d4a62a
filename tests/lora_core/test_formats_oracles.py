"""Spellings against other people's readers and writers: diffusers, PEFT, LyCORIS. alpha is never the rank.

The oracle of a weight is our dense formula: W + algebra.low_rank(...), or algebra.dora_delta(...).
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import safetensors.torch
import torch
from peft.tuners.lora import LoraLayer
from torch import nn

from lora_core.adapter import Adapter, file_path, resolve, weight_of
from lora_core.deltas import Delta
from lora_core.deltas.bias import WithBias
from lora_core.deltas.low_rank import LowRank
from lora_core.deltas.magnitude import WithMagnitude
from lora_core.formats import read_adapter, write_adapter
from lora_core.formats.cautions import OTHER, REFUSES, cautions
from tests.lora_core import kinds_by_hand as by_hand
from tests.lora_core.adapters_on_disk import LYCORIS_LAYERS, layer_of, saved
from tests.small_models import FAMILIES, TEXT_WIDTH, small_pipeline

# PEFT asks transformers for an attribute that has a new name
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

COMPONENTS = ("unet", "text_encoder", "text_encoder_2")
EVERY_KIND = (
    "attn1.to_q",
    "attn2.to_k",
    "attn2.to_v",
    "to_out.0",
    "ff.net.0.proj",
    "ff.net.2",
    "proj_in",
    "proj_out",
    "conv1",
    "conv2",
    "conv_shortcut",
    "time_emb_proj",
    "downsamplers.0.conv",
    "upsamplers.0.conv",
    "q_proj",
    "out_proj",
    "fc1",
    "fc2",
)
SOME_KINDS = (
    "attn2.to_k",
    "to_out.0",
    "ff.net.2",
    "proj_in",
    "conv1",
    "downsamplers.0.conv",
    "q_proj",
    "fc2",
)


def models(pipe: Any) -> dict[str, nn.Module]:
    return {c: getattr(pipe, c) for c in COMPONENTS if getattr(pipe, c, None) is not None}


def adapter_for(
    pipe: Any,
    family: str,
    *,
    dora: bool = False,
    alphas: tuple[float, ...] = (3.0,),
    ranks: tuple[int, ...] = (2,),
    kinds: tuple[str, ...] = EVERY_KIND,
) -> Adapter:
    """A random LoRA for every layer of these kinds, small enough to leave the models in their senses."""
    g, deltas = torch.Generator().manual_seed(1), dict[str, Delta]()
    for component, model in models(pipe).items():
        for path, layer in model.named_modules():
            if not isinstance(layer, nn.Linear | nn.Conv2d) or not path.endswith(kinds):
                continue
            (out, *inner), i = layer.weight.shape, len(deltas)
            rank = ranks[i % len(ranks)]
            down = torch.randn(rank, *inner, generator=g) / inner[0] ** 0.5
            up = torch.randn(out, rank, *[1] * (len(inner) - 1), generator=g) * 0.1
            low = LowRank(down, up, alphas[i % len(alphas)])
            gain = torch.rand(out, generator=g) + 0.5
            column = (layer.weight.flatten(1).norm(dim=1) * gain).reshape(-1, *[1] * len(inner))
            deltas[file_path(component, path)] = WithMagnitude(low, column) if dora else low
    assert len(deltas) > 20
    return Adapter(deltas, family=family, name="x")


def dense_weights(adapter: Adapter, base: Mapping[str, nn.Module]) -> dict[str, torch.Tensor]:
    """Adapter path -> what the layer's weight should become."""
    layers = resolve(adapter.deltas, dict(base))
    assert len(layers) == len(adapter.deltas)
    return {
        p: weight_of(m).detach() + adapter.deltas[p].delta(weight_of(m).detach()) for p, m in layers.items()
    }


def assert_wears(pipe_models: Mapping[str, nn.Module], expected: dict[str, torch.Tensor]) -> None:
    """PEFT's layers in these models, merged, have exactly the expected weights, and there are no others."""
    found = 0
    for component, model in pipe_models.items():
        inner = model.get_base_model() if isinstance(model, peft.PeftModel) else model
        for path, layer in list(inner.named_modules()):
            if not isinstance(layer, LoraLayer):
                continue
            found += 1
            layer.merge()
            name = file_path(component, path)
            torch.testing.assert_close(
                layer.get_base_layer().weight.detach(), expected[name], atol=2e-5, rtol=1e-4
            )
    assert found == len(expected)


@torch.no_grad()
def unet_output(pipe: Any) -> torch.Tensor:
    g = torch.Generator().manual_seed(3)
    config = pipe.unet.config
    args: dict[str, Any] = {
        "encoder_hidden_states": torch.randn(1, 7, config.cross_attention_dim, generator=g)
    }
    if config.addition_embed_type == "text_time":
        width = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        args["added_cond_kwargs"] = {
            "text_embeds": torch.randn(1, width, generator=g),
            "time_ids": torch.ones(1, 6),
        }
    return pipe.unet(torch.randn(1, 4, 16, 16, generator=g), 7, **args).sample


@torch.no_grad()
def put(weights: dict[str, torch.Tensor], base: Mapping[str, nn.Module]) -> None:
    for path, layer in resolve(weights, dict(base)).items():
        weight_of(layer).copy_(weights[path])


def load(pipe: Any, path: Path) -> None:
    pipe.load_lora_weights(str(path.parent), weight_name=path.name, adapter_name="x")


# ---------------------------------------------------------------- diffusers reads what we write


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
@pytest.mark.parametrize("spelling", ["kohya", "diffusers"])
def test_diffusers_loads_our_file_to_the_same_weights_and_images(
    family: str, spelling: str, tmp_path: Path
) -> None:
    pipe, dense = small_pipeline(family), small_pipeline(family)
    adapter = adapter_for(pipe, family)
    expected = dense_weights(adapter, models(pipe))
    base = unet_output(pipe)
    load(pipe, write_adapter(adapter, tmp_path / "x", spelling=spelling))
    worn = unet_output(pipe)
    put(expected, models(dense))
    torch.testing.assert_close(worn, unet_output(dense), atol=1e-4, rtol=1e-4)
    assert (worn - base).abs().max() > 0.01
    assert_wears(models(pipe), expected)


def test_diffusers_loads_ranks_and_alphas_that_differ_by_layer(tmp_path: Path) -> None:
    pipe = small_pipeline("sd1")
    adapter = adapter_for(pipe, "sd1", kinds=SOME_KINDS, ranks=(2, 3, 3), alphas=(0.5, 2.0, 1.25, 5.0))
    expected = dense_weights(adapter, models(pipe))
    load(pipe, write_adapter(adapter, tmp_path / "x", spelling="diffusers"))
    assert_wears(models(pipe), expected)


@pytest.mark.parametrize("kinds", [SOME_KINDS, ("fc1", "fc2", "to_q", "to_k")])
def test_diffusers_loads_our_dora(kinds: tuple[str, ...], tmp_path: Path) -> None:
    """Also without any attention layer in the text encoder, which diffusers reads from one spelling only."""
    pipe = small_pipeline("sd1", text_layers=8)
    adapter = adapter_for(pipe, "sd1", dora=True, kinds=kinds)
    expected = dense_weights(adapter, models(pipe))
    load(pipe, write_adapter(adapter, tmp_path / "x", spelling="diffusers"))
    assert_wears(models(pipe), expected)


@torch.no_grad()
def picture(pipe: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    args = {"num_inference_steps": 2, "height": 128, "width": 128, "guidance_scale": 3.0}
    out = pipe("a red cat", negative_prompt="blue", generator=generator, output_type="pt", **args)
    return out.images


@functools.cache
def picture_of_base(family: str) -> torch.Tensor:
    return picture(small_pipeline(family))


PICTURES = [
    ("sd1", "kohya", False, torch.bfloat16),
    ("sd2", "kohya", False, torch.float16),
    ("sdxl", "kohya", False, torch.float16),
    *((family, "diffusers", True, torch.float16) for family in FAMILIES),
    *((family, "peft", True, torch.bfloat16) for family in FAMILIES),
]


@pytest.mark.parametrize(("family", "spelling", "dora", "dtype"), PICTURES)
def test_our_files_make_the_same_pictures_in_diffusers(
    family: str, spelling: str, dora: bool, dtype: torch.dtype, tmp_path: Path
) -> None:
    """LoRA, LoCon and DoRA on every kind of layer, alpha not the rank; SDXL's kohya file has sgm's names."""
    pipe, dense = small_pipeline(family), small_pipeline(family)
    alphas = (3.0,) if spelling == "kohya" else (3.0, 0.5)
    adapter = adapter_for(pipe, family, dora=dora, ranks=(2, 3), alphas=alphas)
    path = write_adapter(adapter, tmp_path / "x", spelling=spelling, dtype=dtype)
    if spelling == "peft":
        for component, model in models(pipe).items():
            peft.PeftModel.from_pretrained(model, path / component)  # puts its layers into the model itself
    else:
        load(pipe, path)
    if (family, spelling) == ("sdxl", "kohya"):
        assert any("input_blocks" in key for key in safetensors.torch.load_file(path))
    put(dense_weights(read_adapter(path), models(dense)), models(dense))
    worn = picture(pipe)
    assert (worn - picture(dense)).abs().max() < 1e-4
    assert (worn - picture_of_base(family)).abs().max() > 0.1


# What diffusers does with kinds and with words in a kohya file, and that it is said
KOHYA_ONLY: dict[str, tuple[Any, str | None]] = {
    "whole": (by_hand.whole, REFUSES),
    "(IA)³": (by_hand.scaling, REFUSES),
    "GLoRA": (by_hand.generalized, REFUSES),
    "OFT": (by_hand.turning, REFUSES),
    "bias": (lambda *args: WithBias(by_hand.low_rank(*args), torch.ones(args[0][0])), REFUSES),
    "bias alone": (lambda shape, g, i: WithBias(None, torch.ones(shape[0])), REFUSES),
    "LoRA": (by_hand.low_rank, None),
}


@pytest.mark.parametrize("kind", KOHYA_ONLY)
def test_what_diffusers_refuses_in_a_kohya_file_is_said(kind: str, tmp_path: Path) -> None:
    make, outcome = KOHYA_ONLY[kind]
    pipe, g = small_pipeline("sd1"), torch.Generator().manual_seed(1)
    paths = (
        "mid_block.attentions.0.proj_in",
        "mid_block.resnets.0.conv1",
        "mid_block.resnets.0.time_emb_proj",
    )
    deltas = {f"unet.{p}": make(pipe.unet.get_submodule(p).weight.shape, g, i) for i, p in enumerate(paths)}
    said = [caution.effects.get("diffusers") for caution in cautions(Adapter(deltas))]
    assert (REFUSES in said) is (outcome == REFUSES)
    path = write_adapter(Adapter(deltas, family="sd1"), tmp_path / "x")
    if outcome == REFUSES:
        with pytest.raises(ValueError, match="not been correctly renamed"):
            load(pipe, path)
    else:
        load(pipe, path)


@pytest.mark.parametrize("axis", ["outputs", "inputs"])
def test_diffusers_reads_a_kohya_dora_as_a_plain_lora_and_it_is_said(axis: str, tmp_path: Path) -> None:
    pipe, path = small_pipeline("sd1"), "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    low = LowRank(torch.randn(2, 64), torch.randn(64, 2), 3.0)
    magnitude = torch.full((64, 1) if axis == "outputs" else (1, 64), 2.0)
    adapter = Adapter({path: WithMagnitude(low, magnitude)}, family="sd1")
    assert OTHER in {caution.effects["diffusers"] for caution in cautions(adapter)}
    plain = dense_weights(Adapter({path: low}), models(pipe))
    load(pipe, write_adapter(adapter, tmp_path / "x"))
    assert_wears(models(pipe), plain)


def test_diffusers_refuses_a_file_with_words_and_takes_it_without_them(tmp_path: Path) -> None:
    """It wants "lora" in every key; bundle_emb. has none."""
    pipe = small_pipeline("sd1")
    adapter = adapter_for(pipe, "sd1", kinds=("to_q", "fc1"))
    expected = dense_weights(adapter, models(pipe))
    words = {"<fox>": {"text_encoder": torch.randn(1, TEXT_WIDTH)}}
    told = cautions(with_words := replace(adapter, embeddings=words))
    assert [c.effects["diffusers"] for c in told] == [REFUSES]
    assert "bundle_emb" in str(told[0])
    assert cautions(adapter) == ()
    path = write_adapter(with_words, tmp_path / "x")
    with pytest.raises(ValueError, match="contain `'lora'`"):
        load(pipe, path)
    state = {k: v for k, v in safetensors.torch.load_file(path).items() if not k.startswith("bundle_emb")}
    pipe.load_lora_weights(state, adapter_name="x")
    assert_wears(models(pipe), expected)


def test_diffusers_asks_for_out_proj_in_a_kohya_text_encoder_and_it_is_said(tmp_path: Path) -> None:
    pipe = small_pipeline("sd1")
    for kinds, taken in ((("to_q", "q_proj"), False), (("to_q", "q_proj", "out_proj"), True)):
        adapter = adapter_for(pipe, "sd1", kinds=kinds)
        assert [c.effects["diffusers"] for c in cautions(adapter)] == ([] if taken else [REFUSES])
        path = write_adapter(adapter, tmp_path / "x")
        if taken:
            load(small_pipeline("sd1"), path)
        else:
            with pytest.raises(ValueError, match="infer state dict type"):
                load(small_pipeline("sd1"), path)


@pytest.mark.filterwarnings("ignore:The following alpha_pattern keys did not match:RuntimeWarning")
def test_diffusers_loses_alphas_that_differ_in_a_kohya_file_and_it_is_said(tmp_path: Path) -> None:
    """It keeps an attention layer's under a name of 2023 and finds it no more; in its own spelling they stay."""
    path = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn{}.to_q"
    low = LowRank(torch.randn(2, 32), torch.randn(32, 2), 3.0)
    mixed: dict[str, Delta] = {
        path.format(1): low,
        path.format(2): replace(low, alpha=0.5),
        "unet.down_blocks.0.attentions.1.transformer_blocks.0.attn1.to_q": low,
    }
    adapter = Adapter(mixed, family="sd1")
    assert [str(c) for c in cautions(adapter)] == [
        "Alphas of the UNet's layers differ: another change is read by diffusers. Write diffusers' spelling for it."
    ]
    for spelling, meant in (("kohya", dict.fromkeys(mixed, low)), ("diffusers", mixed)):
        pipe = small_pipeline("sd1")
        expected = dense_weights(Adapter(dict(meant)), models(pipe))
        load(pipe, write_adapter(adapter, tmp_path / "x", spelling=spelling))
        assert_wears(models(pipe), expected)


# ---------------------------------------------------------------- we read what diffusers writes or wrote


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_what_diffusers_saves_today_is_read(family: str, tmp_path: Path) -> None:
    pipe = small_pipeline(family)
    adapter = adapter_for(pipe, family, kinds=SOME_KINDS, alphas=(3.0, 5.0))
    load(pipe, write_adapter(adapter, tmp_path / "x", spelling="diffusers"))
    arguments: dict[str, Any] = {}
    for component, model in models(pipe).items():
        arguments[f"{component}_lora_layers"] = peft.get_peft_model_state_dict(model, adapter_name="x")
        arguments[f"{component}_lora_adapter_metadata"] = {
            k: v for k, v in model.peft_config["x"].to_dict().items() if not isinstance(v, (set, type(None)))
        }
    type(pipe).save_lora_weights(tmp_path / "theirs", **arguments)
    read = read_adapter(tmp_path / "theirs")
    assert read.unused == ()
    assert set(read.deltas) == set(adapter.deltas)
    for path, delta in adapter.deltas.items():
        like = torch.zeros(delta.shape())
        torch.testing.assert_close(read.deltas[path].delta(like), delta.delta(like))


def old_names(adapter: Adapter, generation: str) -> Iterator[tuple[str, torch.Tensor]]:
    for path, delta in adapter.deltas.items():
        assert isinstance(delta, LowRank)
        parent, _, last = path.replace(".to_out.0", ".to_out").rpartition(".")
        for way, tensor in (("down", delta.down), ("up", delta.up)):
            if generation == "2023":
                middle = "lora" if path.startswith("unet") else "lora_linear_layer"
                yield f"{path}.{middle}.{way}.weight", tensor
            elif path.startswith("unet"):
                yield f"{parent}.processor.{last}_lora.{way}.weight", tensor
            else:
                yield f"{parent}.to_{last.removesuffix('_proj')}_lora.{way}.weight", tensor


@pytest.mark.parametrize("generation", ["2023", "processors"])
def test_old_spellings_of_diffusers_mean_to_us_what_they_mean_to_it(generation: str, tmp_path: Path) -> None:
    pipe = small_pipeline("sd1")
    kinds = ("attn1.to_q", "attn2.to_v", "to_out.0", "q_proj", "out_proj")
    adapter = adapter_for(pipe, "sd1", kinds=kinds, alphas=(2.0,))  # no alpha can be said: it is the rank
    path = tmp_path / "old.safetensors"
    safetensors.torch.save_file(dict(old_names(adapter, generation)), path)
    read = read_adapter(path)
    assert (set(read.deltas), read.unused) == (set(adapter.deltas), ())
    expected = dense_weights(read, models(pipe))
    load(pipe, path)
    assert_wears(models(pipe), expected)


# ---------------------------------------------------------------- PEFT


@pytest.mark.parametrize("dora", [False, True])
def test_peft_loads_our_folder(dora: bool, tmp_path: Path) -> None:
    pipe = small_pipeline("sdxl")
    adapter = adapter_for(pipe, "sdxl", dora=dora, kinds=SOME_KINDS, ranks=(2, 3), alphas=(3.0, 0.5, 7.0))
    expected = dense_weights(adapter, models(pipe))
    folder = write_adapter(adapter, tmp_path / "x", spelling="peft")
    worn = {c: peft.PeftModel.from_pretrained(m, folder / c) for c, m in models(pipe).items()}
    assert_wears(worn, expected)


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"use_rslora": True}], ids=str)
def test_what_peft_saves_is_read(options: dict[str, bool], tmp_path: Path) -> None:
    pipe = small_pipeline("sd1")
    base = copy.deepcopy(models(pipe))
    torch.manual_seed(0)
    worn = {}
    patterns: dict[str, Any] = {
        "unet": {
            "target_modules": ["to_q", "to_out.0", "proj_in", "conv1"],
            "rank_pattern": {"proj_in": 2},
            "alpha_pattern": {"attn1.to_q": 5, "^down_blocks.0.resnets.0.conv1": 7},
        },
        "text_encoder": {
            "target_modules": ["q_proj", "fc2"],
            "rank_pattern": {"fc2": 6},
            "alpha_pattern": {"encoder.layers.1.mlp.fc2": 9},
        },
    }
    for component, model in models(pipe).items():
        config = peft.LoraConfig(r=4, lora_alpha=3, init_lora_weights=False, **patterns[component], **options)
        worn[component] = peft.get_peft_model(model, config)
        worn[component].save_pretrained(tmp_path / component)
    read = read_adapter(tmp_path)
    assert read.unused == ()
    assert_wears(worn, dense_weights(read, base))


def test_injected_form_accepts_our_tensors(tmp_path: Path) -> None:
    """set_peft_model_state_dict on a bare UNet, as training scripts resume."""
    pipe = small_pipeline("sd2")
    adapter = adapter_for(pipe, "sd2", kinds=SOME_KINDS)
    unet = Adapter({p: d for p, d in adapter.deltas.items() if p.startswith("unet.")})
    expected = dense_weights(unet, models(pipe))
    folder = write_adapter(unet, tmp_path / "x", spelling="peft") / "unet"
    peft.inject_adapter_in_model(peft.LoraConfig.from_pretrained(folder), pipe.unet)
    state = safetensors.torch.load_file(folder / "adapter_model.safetensors")
    result = peft.set_peft_model_state_dict(pipe.unet, state)
    assert not result.unexpected_keys
    assert_wears({"unet": pipe.unet}, expected)


# ---------------------------------------------------------------- LyCORIS


LOCON: dict[str, dict[str, Any]] = {
    "plain": {},
    "tucker": {"use_tucker": True},
    "rs": {"rs_lora": True},
    "scalar": {"use_scalar": True},
    "dora, outputs": {"weight_decompose": True, "wd_on_out": True},
    "dora, inputs": {"weight_decompose": True, "wd_on_out": False},
    "dora, inputs, tucker": {"weight_decompose": True, "wd_on_out": False, "use_tucker": True},
}


@pytest.mark.parametrize("which", LYCORIS_LAYERS)
@pytest.mark.parametrize("case", LOCON)
def test_locon_of_lycoris_is_what_it_computes(case: str, which: str, tmp_path: Path) -> None:
    for needed in ("einops", "toml"):  # half an import of LyCORIS would succeed at the second try
        pytest.importorskip(needed, reason=f"LyCORIS cannot be imported without {needed}")
    locon = pytest.importorskip("lycoris.modules.locon")
    torch.manual_seed(0)
    layer, (name, path) = layer_of(which), LYCORIS_LAYERS[which]
    module = locon.LoConModule(name, layer, lora_dim=4, alpha=3, **LOCON[case])
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    state = {f"{name}.{k}": v.detach().clone().contiguous() for k, v in module.custom_state_dict().items()}
    assert (f"{name}.lora_mid.weight" in state) is ("tucker" in case and which == "conv")
    if "dora" in case:
        assert state[f"{name}.dora_scale"].shape[:2] == ((40, 1) if "outputs" in case else (1, 24))
    read = read_adapter(saved(state, tmp_path))
    assert read.unused == ()
    x = torch.randn(3, 24) if which == "linear" else torch.randn(2, 24, 5, 6)
    expected, plain = module(x).detach(), layer(x).detach()
    with torch.no_grad():
        layer.weight += read.deltas[path].delta(layer.weight)
    torch.testing.assert_close(layer(x).detach(), expected, atol=2e-5, rtol=1e-4)
    assert (expected - plain).abs().max() > 0.05
