"""QLoRA: training over nf4, int8 and fp8, against the dense base with the same numbers; beginnings from the base."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lora_core import LivePipeline, LoraConfig, attach, collect, detach, read_adapter
from lora_core.deltas.magnitude import WithMagnitude
from lora_core.errors import ConfigError, FileRefused, Stopped
from lora_core.quantised import KINDS, count_weights, quantise
from lora_core.storages import dequantised, storage_of
from tests.lora_core.test_pipeline import inputs
from tests.small_models import small_pipeline
from tests.trainers.runs import Recorder, base_folder, config, events_in, losses_of, pictures
from trainers import checkpoints
from trainers.dreambooth import train
from trainers.events import Finished, Note, Started


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return base_folder(tmp_path_factory.mktemp("small") / "base")


def unpack(model: nn.Module, into: nn.Module) -> None:
    """The numbers a quantised model computes with, into a dense one."""
    with torch.no_grad():
        for path, layer in model.named_modules():
            if storage_of(layer) is not None:
                own: Any = into.get_submodule(path)
                own.weight.copy_(dequantised(layer))
                if own.bias is not None:
                    own.bias.copy_(layer.bias)


@pytest.mark.parametrize("variant", ["lora", "dora"])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_over_the_unpacked_base(kind: str, variant: str) -> None:
    """To rounding, 1e-3 of the whole gradient's size through the UNet's layers. int8 rounds the inputs of each layer to
    127 steps as well, which the dense base does not: 20 %, on random weights that pass every error on."""
    gradients, losses = [], []
    packed, dense = LivePipeline(small_pipeline("sd1")), LivePipeline(small_pipeline("sd1"))
    quantise({"unet": packed.models["unet"]}, kind)
    unpack(packed.models["unet"], dense.models["unet"])
    for live in (packed, dense):
        form = attach(
            {"unet": live.models["unet"]},
            LoraConfig(rank=4, alpha=6, variant=variant, init="random"),
            generator=torch.Generator().manual_seed(1),
        )
        loss = live.pipeline.unet(**inputs(live)).sample.square().mean()
        loss.backward()
        losses.append(loss.item())
        gradients.append(torch.cat([p.grad.flatten() for p in form.parameters() if p.grad is not None]))
        assert all(p.grad is None for p in live.models["unet"].parameters())
        detach(form)
        with torch.no_grad():  # and the base is called as before
            assert torch.isfinite(live.pipeline.unet(**inputs(live)).sample).all()
    error = (gradients[0] - gradients[1]).norm() / gradients[1].norm()
    assert error < (0.2 if kind == "int8" else 1e-3)
    assert losses[0] == pytest.approx(losses[1], rel=0.05 if kind == "int8" else 1e-4)


@pytest.mark.parametrize(
    ("kind", "variant", "dtype"),
    [
        ("nf4", "dora", "bf16"),
        ("int8", "lora", "fp32"),
        ("fp8", "dora", "fp32"),
    ],
)
def test_a_run_over_a_quantised_base(tmp_path: Path, base: Path, kind: str, variant: str, dtype: str) -> None:
    """The loss falls, the file is read back and worn, and the base's bytes were said."""
    pictures(tmp_path / "images", 1)
    settings = config(
        tmp_path,
        base,
        lora={"variant": variant, "rank": 8, "alpha": 12.0},
        train={
            "quantize": kind,
            "base_dtype": dtype,
            "steps": 10,
            "learning_rate": 5e-3,
            "text_encoder_learning_rate": 0.0,
        },
    )
    recorder = Recorder()
    lora = train(settings, listeners=[recorder])
    losses = list(recorder.losses.values())
    assert sum(losses[-4:]) < sum(losses[:4])
    notes = [e.text for e in recorder.seen if isinstance(e, Note)]
    assert any(f"layers kept in {kind}" in note and "MB instead of" in note for note in notes)
    started = next(e for e in recorder.seen if isinstance(e, Started))
    pipe = small_pipeline("sd1")
    assert started.total == sum(count_weights(m) for m in (pipe.unet, pipe.text_encoder, pipe.vae))
    adapter = read_adapter(lora)
    assert adapter.metadata["loom.quantized_base"] == kind
    live = LivePipeline.open(base, device="cpu", quantize=kind)
    assert str(live.load(adapter)).startswith("128 of 128")
    live.unload()
    assert live.verify_base()


@pytest.mark.parametrize(("init", "kind"), [("pissa_niter_4", "none"), ("loftq", "nf4")])
def test_a_beginning_from_the_base_leaves_as_a_file_for_the_original(
    tmp_path: Path, base: Path, init: str, kind: str
) -> None:
    """A DoRA with such a beginning, trained, saved, resumed: the file has twice the rank and fits the original base,
    and a resumed run is the straight one bit for bit."""
    pictures(tmp_path / "images", 2)
    settings = config(
        tmp_path,
        base,
        lora={"init": init, "variant": "dora"},
        train={"quantize": kind, "steps": 2, "text_encoder_learning_rate": 0.0},
    )
    straight = read_adapter(train(settings))
    halfway = Recorder(stop_at=1)
    with pytest.raises(Stopped):
        train(settings, stop=halfway.stop, listeners=[halfway])
    run = max((tmp_path / "runs").iterdir(), key=lambda p: p.stat().st_mtime)
    resumed = read_adapter(train(settings, resume=run))
    assert events_in(run)[-1]["event"] == Finished.__name__
    for path, delta in straight.deltas.items():
        assert isinstance(delta, WithMagnitude)
        assert delta.inner.tensors()["down"].shape[0] == 2 * 4
        for name, tensor in delta.tensors().items():
            assert torch.equal(tensor, resumed.deltas[path].tensors()[name])
    live = LivePipeline.open(base, device="cpu")
    assert str(live.load(straight)).startswith("128 of 128")


def test_pissa_trains_from_the_base_and_the_worn_file_is_the_trained_model(base: Path) -> None:
    """The law on a whole UNet, fp32, to 1e-5: the rank 2r file, worn on the ORIGINAL base, is the trained model."""
    live, original = LivePipeline.open(base, device="cpu"), LivePipeline.open(base, device="cpu")
    form = attach({"unet": live.models["unet"]}, LoraConfig(rank=4, alpha=6, init="pissa", variant="dora"))
    bare = original.pipeline.unet(**inputs(live)).sample
    g = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in form.parameters():
            p.mul_(1 + 0.05 * torch.randn(p.shape, generator=g))
        trained = live.pipeline.unet(**inputs(live)).sample
        original.load(collect(form), name="a")
        worn = original.pipeline.unet(**inputs(live)).sample
    assert (worn - trained).norm() < 1e-5 * trained.norm()
    assert (bare - trained).norm() > 1e-2 * trained.norm()
    detach(form)
    assert live.verify_base()


def test_a_state_that_was_begun_otherwise_is_refused(tmp_path: Path, base: Path) -> None:
    live = LivePipeline.open(base, device="cpu")
    wanted = LoraConfig(rank=2, alpha=3, init="pissa", targets=("to_q",))
    form = attach({"unet": live.models["unet"]}, wanted)
    trained = checkpoints.Trained(form, torch.optim.AdamW(form.parameters()), torch.Generator())
    path = tmp_path / "state.safetensors"
    checkpoints.save_state(path, checkpoints.Position(1, {}), trained)
    assert checkpoints.load_state(path, trained).step == 1
    next(form.buffers()).mul_(-1)
    with pytest.raises(FileRefused, match="other factors of the base"):
        checkpoints.load_state(path, trained)
    detach(form)


@pytest.mark.parametrize(
    ("lora", "said"),
    [
        ({"init": "loftq"}, "makes up for what quantising loses"),
        ({"init": "pissa", "start_from": "a.safetensors"}, "another beginning"),
        ({"loftq_iterations": 2}, 'about init = "loftq"'),
    ],
)
def test_what_does_not_go_together(tmp_path: Path, lora: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        config(tmp_path, "demo", lora=lora)


def test_class_pictures_and_previews_are_made_on_a_quantised_base(tmp_path: Path, base: Path) -> None:
    pictures(tmp_path / "images", 1)
    settings = config(
        tmp_path,
        base,
        data={"class_prompt": "a cat", "class_count": 1},
        train={"quantize": "nf4", "steps": 2, "gradient_checkpointing": True, "channels_last": True},
        preview={"every": 2, "prompts": ("a zxq cat",), "steps": 1},
    )
    assert len(losses_of(settings)) == 2
