"""A step's loss and gradient beside a loop that takes one picture at a time, from MATHS: no batch, no hook, no cache.

The loop has a model of its own with W + alpha/rank B A put in the weights' place, so that what the base says is said by
a model that never had a LoRA. Only the draws (latents, noise, timesteps, prompts) are asked of the trainer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import DDPMScheduler, DiffusionPipeline
from PIL import Image
from torch import Tensor
from torch.func import functional_call

from lora_core import collect, detach
from tests.trainers.runs import base_folder, config, pictures
from trainers.batches import Batch
from trainers.bench import Bench, prepare
from trainers.config import TrainConfig
from trainers.control import StopRequest
from trainers.dreambooth import gradients
from trainers.run_folder import RunFolder

Drawn = list[list[Batch]]  # one step's: of each drawing, one batch or two


@contextmanager
def bench_of(settings: TrainConfig) -> Iterator[Bench]:
    bench = prepare(settings, RunFolder.create(settings), StopRequest(), lambda event: None)
    try:
        yield bench
    finally:
        detach(bench.form)
        AcceleratorState._reset_state(True)


class ByHand:
    """Models of diffusers alone, and the LoRA as plain leaves: path -> (down, up)."""

    def __init__(self, bench: Bench) -> None:
        self.pipe = DiffusionPipeline.from_pretrained(
            bench.config.base, safety_checker=None, dtype=torch.float64
        )
        self.sdxl = getattr(self.pipe, "text_encoder_2", None) is not None
        self.leaves, self.scales = {}, {}
        for path, delta in collect(bench.form).deltas.items():
            tensors = delta.tensors()
            self.leaves[path] = [tensors[name].double().requires_grad_() for name in ("down", "up")]
            self.scales[path] = float(tensors["alpha"]) / len(tensors["down"])

    def weights(self, component: str, lora: bool) -> dict[str, Tensor]:
        model = getattr(self.pipe, component)
        found = {name: p.detach() for name, p in model.named_parameters()}
        for path, (down, up) in self.leaves.items():
            where, _, inside = path.partition(".")
            if lora and where == component:
                name = f"{inside}.weight"
                name = name if name in found else name.removeprefix("text_model.")
                change = (up.flatten(1) @ down.flatten(1)).reshape(found[name].shape)
                found[name] = found[name] + self.scales[path] * change
        return found

    def says(self, z_t: Tensor, t: Tensor, prompt: str, time_ids: Tensor, *, lora: bool = True) -> Tensor:
        """z_t (4, h, w) -> the same."""
        hidden, pooled = [], None
        for component, name in (("text_encoder", "tokenizer"), ("text_encoder_2", "tokenizer_2")):
            if getattr(self.pipe, component, None) is None:
                continue
            tokenizer = getattr(self.pipe, name)
            ids = tokenizer(prompt, padding="max_length", max_length=77, truncation=True, return_tensors="pt")
            out = functional_call(
                getattr(self.pipe, component),
                self.weights(component, lora),
                (ids.input_ids,),
                {"output_hidden_states": True},
            )
            hidden.append(out.hidden_states[-2] if self.sdxl else out.last_hidden_state)
            pooled = out.text_embeds if component == "text_encoder_2" else None
        added = {"text_embeds": pooled, "time_ids": time_ids[None]} if self.sdxl else None
        asked = (z_t[None], t, torch.cat(hidden, -1))
        more = {"added_cond_kwargs": added}
        answer: Tensor = functional_call(self.pipe.unet, self.weights("unet", lora), asked, more).sample[0]
        return answer


def snr_weight(settings: TrainConfig, abar: Tensor, v: bool) -> Tensor:
    """min-SNR-gamma, arXiv 2303.09556 section 3.4 and diffusers' scripts."""
    if settings.train.loss_weighting == "uniform":
        return torch.ones((), dtype=torch.float64)
    snr = abar / (1 - abar)
    return torch.minimum(snr, torch.tensor(settings.train.snr_gamma)) / (snr + 1 if v else snr)


def mask_weight(settings: TrainConfig, picture: Path, size: torch.Size) -> Tensor:
    """Of each latent: its 8 x 8 pixels' mean, the floor below it, and 1 on average."""
    mask = picture.with_suffix(".mask.png")
    if not mask.exists():
        return torch.ones(size)
    pixels = np.asarray(Image.open(mask).convert("L")).astype(np.float64) / 255
    floor = settings.data.mask_floor
    found = torch.empty(size)
    for row in range(size[0]):
        for column in range(size[1]):
            block = pixels[8 * row : 8 * row + 8, 8 * column : 8 * column + 8]
            found[row, column] = floor + (1 - floor) * float(block.mean())
    return found / found.mean()


def loss_by_hand(model: ByHand, settings: TrainConfig, drawn: Drawn, seen: Sequence[Tensor]) -> Tensor:
    """MSE(instance) + lambda MSE(class) over all pictures of a step. `seen`: the noise in z_t, of each batch."""
    scheduler = DDPMScheduler.from_config(model.pipe.scheduler.config)
    v = scheduler.config.prediction_type == "v_prediction"
    sums: dict[str, Tensor] = {}
    counts: Counter[str] = Counter()
    weight_of = {d.images: d.weight for d in settings.datasets}
    files = {p.name: p for d in settings.datasets for p in (*d.images.iterdir(), *in_folder(d.class_images))}
    class_names = {p.name for d in settings.datasets for p in in_folder(d.class_images)}
    for batch, noise in zip([batch for batches in drawn for batch in batches], seen, strict=True):
        for i, name in enumerate(batch.names):
            z, eps, t = batch.z[i].double(), batch.eps[i].double(), batch.t[i]
            z_t = scheduler.add_noise(z[None], noise[i].double()[None], t[None])[0]
            answer = model.says(z_t, t, batch.captions[i], batch.time_ids[i])
            if batch.from_base[i]:
                kind = "model"
                with torch.no_grad():
                    target = model.says(z_t, t, batch.captions[i], batch.time_ids[i], lora=False)
                mask = torch.ones(z.shape[1:])
            else:
                kind = "class" if name in class_names else "instance"
                target = scheduler.get_velocity(z[None], eps[None], t[None])[0] if v else eps
                mask = mask_weight(settings, files[name], z.shape[1:])
            own = weight_of.get(files[name].parent, 1.0)
            error = ((answer - target) ** 2 * mask).mean()
            error = own * snr_weight(settings, scheduler.alphas_cumprod[t], v) * error
            sums[kind] = sums.get(kind, torch.zeros((), dtype=torch.float64)) + error
            counts[kind] += 1
    prior = settings.data.prior_weight
    return sum((1.0 if kind == "instance" else prior) * total / counts[kind] for kind, total in sums.items())  # type: ignore[return-value]


def in_folder(folder: Path | None) -> list[Path]:
    return [] if folder is None else list(folder.iterdir())


def parted(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


def compare(settings: TrainConfig, count: int = 1) -> list[Drawn]:
    """Loss and gradient of some steps, ours and by hand -> what was drawn for them."""
    steps = []
    with bench_of(settings) as bench:
        model = ByHand(bench)
        for _ in range(count):
            drawn = bench.feeder.next(
                bench.generator, len(bench.schedule), settings.train.gradient_accumulation
            )
            extra, chance = settings.train.input_perturbation, torch.get_rng_state()
            seen = [b.eps + extra * torch.randn_like(b.eps) if extra else b.eps for bs in drawn for b in bs]
            torch.set_rng_state(chance)
            bench.optimizer.zero_grad()
            loss = sum(gradients(bench, drawn))
            wanted = loss_by_hand(model, settings, drawn, seen)
            leaves = [leaf for pair in model.leaves.values() for leaf in pair]
            by_hand = iter(torch.autograd.grad(wanted, leaves, materialize_grads=True))
            slopes = {path: [next(by_hand), next(by_hand)] for path in model.leaves}
            assert float(loss) == pytest.approx(float(wanted.detach()), rel=1e-5)
            for component in bench.live.models:
                mine, theirs = [], []
                for path, layer in zip(bench.form.paths, bench.form.layers, strict=True):
                    if path.split(".")[0] == component:
                        own = dict(layer.named_parameters())
                        both = [own[f"factors.{name}"] for name in ("down", "up")]
                        mine += [torch.zeros(p.numel()) if p.grad is None else p.grad.flatten() for p in both]
                        theirs += [g.flatten() for g in slopes[path]]
                assert parted(torch.cat(mine), torch.cat(theirs)) < 1e-4, component
            steps.append(drawn)
    return steps


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    tmp = tmp_path_factory.mktemp("bases")
    # not SD 1's small model: it norms two numbers at a time at this size, and fp32 gradients keep three digits there
    kinds = {"v": ("sd2", "v_prediction"), "epsilon": ("sd2", "epsilon"), "sdxl": ("sdxl", "epsilon")}
    return {name: base_folder(tmp / name, *kind) for name, kind in kinds.items()}


BEGUN: dict[str, Any] = {"init": "random", "rank": 3, "alpha": 0.5}


def picture(path: Path, size: tuple[int, int], seed: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    return path


def shapes(steps: list[Drawn]) -> set[tuple[int, ...]]:
    """Of the latents in each batch, with how many there are."""
    return {(len(batch), *batch.z.shape[2:]) for drawn in steps for batches in drawn for batch in batches}


def test_every_layer_of_a_batch(tmp_path: Path, bases: dict[str, Path]) -> None:
    pictures(tmp_path / "images", 3, caption="a zxq cat")
    lora = {**BEGUN, "targets": ["all-linear+conv"]}
    compare(config(tmp_path, bases["epsilon"], lora=lora, train={"batch_size": 3}))


def test_class_pictures_in_other_buckets_and_short_batches_of_a_step(
    tmp_path: Path, bases: dict[str, Path]
) -> None:
    """Of a step's pictures each counts alike, also those that are alone in their batch; v-prediction, min-SNR."""
    pictures(tmp_path / "images", 3, caption="a zxq cat")
    picture(tmp_path / "images" / "wide.png", (128, 32), 5)
    for i in range(3):
        picture(tmp_path / "class" / f"class{i}.png", (128, 32) if i else (64, 64), i)
    steps = compare(
        config(
            tmp_path,
            bases["v"],
            lora=BEGUN,
            data={"class_images": tmp_path / "class", "class_prompt": "a cat", "prior_weight": 0.7},
            train={"batch_size": 2, "gradient_accumulation": 3, "loss_weighting": "min_snr"},
        ),
        count=3,
    )
    sizes = {shape[0] for shape in shapes(steps)}
    assert sizes > {1, 2} or sizes > {2, 3}  # short ones, and together with the class
    assert {shape[1:] for shape in shapes(steps)} == {(8, 8), (4, 16)}


def test_folders_with_weights_masks_and_a_class_of_the_model(tmp_path: Path, bases: dict[str, Path]) -> None:
    """One folder's class is what the base says, the other has none; one picture has a mask."""
    pictures(tmp_path / "images", 2)
    pictures(tmp_path / "more", 2, seed=7)
    for i in range(2):
        (tmp_path / "more" / f"{i}.png").rename(tmp_path / "more" / f"more{i}.png")
    mask = Image.new("L", (64, 64), 0)
    mask.paste(255, (5, 0, 40, 30))
    mask.paste(100, (5, 30, 40, 45))
    mask.save(tmp_path / "more" / "more1.mask.png")
    one = {"images": tmp_path / "images", "class_from": "model", "class_prompt": "a cat", "weight": 0.6}
    other = {"images": tmp_path / "more", "masked_loss": True, "weight": 1.7}
    settings = config(
        tmp_path,
        bases["epsilon"],
        lora=BEGUN,
        train={
            "batch_size": 3,
            "gradient_accumulation": 2,
            "loss_weighting": "min_snr",
            "input_perturbation": 0.2,
        },
    )
    table = settings.model_dump(exclude={"dataset"}, exclude_unset=True)
    table["data"] = {"prompt": "a zxq cat", "resolution": 64, "prior_weight": 0.8, "mask_floor": 0.2}
    steps = compare(TrainConfig.model_validate({**table, "dataset": [one, other]}), count=2)
    taught = [sum(batch.from_base) for drawn in steps for batches in drawn for batch in batches]
    assert len(set(taught)) > 1
    assert any((batch.mask != 1).any() for drawn in steps for batches in drawn for batch in batches)


def test_two_text_encoders_and_offset_noise(tmp_path: Path, bases: dict[str, Path]) -> None:
    pictures(tmp_path / "images", 2, caption="a zxq cat")
    compare(
        config(
            tmp_path,
            bases["sdxl"],
            lora=BEGUN,
            data={"class_from": "model", "class_prompt": "a cat", "prior_weight": 0.5},
            train={"batch_size": 2, "noise_offset": 0.1, "pyramid_noise": 0.3},
        )
    )


def test_with_a_base_in_bf16_all_that_learns_is_in_fp32(tmp_path: Path, bases: dict[str, Path]) -> None:
    """Parameters, their slopes, AdamW's moments, the average and the loss; the frozen models are in bf16."""
    pictures(tmp_path / "images", 2)
    settings = config(
        tmp_path,
        bases["epsilon"],
        lora={"variant": "dora", "bias": "lora_only"},
        train={"base_dtype": "bf16", "ema_decay": 0.9},
    )
    with bench_of(settings) as bench:
        (loss,) = gradients(bench, bench.feeder.next(bench.generator, len(bench.schedule)))
        bench.optimizer.step()
        learns = [*bench.form.parameters()]
        slopes = [p.grad for p in learns]
        moments = [t for state in bench.optimizer.state.values() for t in state.values()]
        assert bench.average is not None
        all_of_it = [loss, *learns, *slopes, *moments, *bench.average.tensors.values()]
        assert {t.dtype for t in all_of_it} == {torch.float32}
        assert len(moments) == 3 * len(learns)
        for model in bench.live.models.values():
            assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
