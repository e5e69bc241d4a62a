"""The two sides of benchmarks.train and .likeness: our trainer and a loop of diffusers + PEFT, step by step."""

from __future__ import annotations

import random
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
from accelerate import PartialState
from diffusers import StableDiffusionPipeline
from diffusers.optimization import get_scheduler
from diffusers.utils import convert_state_dict_to_diffusers
from diffusers.utils.logging import disable_progress_bar
from greenlet import getcurrent, greenlet
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from lora_core import LoraConfig, attach, collect, detach, read_adapter, write_adapter
from lora_core.dtypes import DTYPES
from lora_core.errors import Stopped
from trainers.config import TrainConfig
from trainers.control import StopRequest
from trainers.dreambooth import train
from trainers.events import Step, TrainEvent

Shown = tuple[Path, str]  # a picture and its words


class Ours:
    """`train` as a coroutine, held after every step until the next is asked for. In the thread of the other side: torch
    keeps workers for each thread that computes, and with two lots of them on the same cores every operation waits
    longer for its parts."""

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        self.losses: list[float] = []
        self._stop, self._asking = StopRequest(), getcurrent()
        self._run = greenlet(self._train)
        self._run.switch()  # it is ready, and has taken its first step: what is made once is no part of a step

    def step(self) -> None:
        self._run.switch()

    def close(self) -> None:
        self._stop.ask()
        self._run.switch()

    def _train(self) -> None:
        with suppress(Stopped):
            train(self.config, stop=self._stop, listeners=[self._after])

    def _after(self, event: TrainEvent) -> None:
        if isinstance(event, Step):
            self.losses.append(event.loss)
            self._asking.switch()


class Peer:
    """The reference script's loop, written out: what a step needs is made in the step. One folder of pictures, and one
    of the class where the preset has it."""

    def __init__(self, config: TrainConfig) -> None:
        self.config, self.losses = config, list[float]()
        dtype = DTYPES[str(config.train.base_dtype)]
        disable_progress_bar()  # of its loading: it would stand among the figures
        pipe = StableDiffusionPipeline.from_pretrained(config.base, safety_checker=None, dtype=dtype)
        self.device = PartialState().device  # as ours chooses it
        self.pipe: Any = pipe.to(self.device)
        for model in (self.pipe.unet, self.pipe.vae, self.pipe.text_encoder):
            model.requires_grad_(False)
        self.parts = self._attach()
        groups: list[dict[str, Any]] = [
            {"params": [p for p in model.parameters() if p.requires_grad], "lr": config.train.rate_of(name)}
            for name, model in self.parts.items()
        ]
        self.parameters = [p for group in groups for p in group["params"]]
        for p in self.parameters:
            p.data = p.data.float()  # the script's cast_training_params
        if config.lora.start_from is not None:
            _begin_as(self.parts, config.lora.start_from)
        self.optimizer = torch.optim.AdamW(groups, weight_decay=config.train.weight_decay)
        self.rate = get_scheduler(
            config.train.schedule,
            self.optimizer,
            num_warmup_steps=config.train.warmup_steps,
            num_training_steps=config.train.steps,
        )
        self.timesteps = len(self.pipe.scheduler.alphas_cumprod)
        self.generator = torch.Generator().manual_seed(config.seed)
        data = config.data
        self.instances = _shown(data.images, data.prompt)
        self.classes = _shown(data.class_images, data.class_prompt) if data.class_images else []
        self.waiting: list[int] = []  # of this epoch
        self.shuffled = random.Random(config.seed)
        self.step()

    def step(self) -> None:
        pipe, g, device = self.pipe, self.generator, self.device
        dtype = pipe.unet.dtype
        rows, own = self._drawn()
        pixels = torch.stack([_pixels(path) for path, _ in rows])
        with torch.no_grad():
            posterior = pipe.vae.encode(pixels.to(device, dtype)).latent_dist
        mean, std = posterior.mean.float(), posterior.std.float()
        z = (mean + std * torch.randn(mean.shape, generator=g).to(device)) * pipe.vae.config.scaling_factor
        eps = torch.randn(z.shape, generator=g).to(device)
        t = torch.randint(self.timesteps, (len(z),), generator=g).to(device)
        z_t, target = pipe.scheduler.add_noise(z, eps, t), eps
        if pipe.scheduler.config.prediction_type == "v_prediction":
            target = pipe.scheduler.get_velocity(z, eps, t)
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
            words = self._words([caption for _, caption in rows])
            prediction = pipe.unet(z_t.to(dtype), t, words).sample.float()
        loss = F.mse_loss(prediction[:own], target[:own])
        if own < len(rows):
            loss = loss + self.config.data.prior_weight * F.mse_loss(prediction[own:], target[own:])
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.parameters, self.config.train.max_grad_norm)
        self.optimizer.step()
        self.rate.step()
        self.optimizer.zero_grad()
        self.losses.append(loss.item())

    def write(self, folder: Path) -> Path:
        """-> the file that the script leaves, in diffusers' own spelling."""
        said: dict[str, Any] = {}
        for name, model in self.parts.items():
            layers = peft.get_peft_model_state_dict(model)
            said[f"{name}_lora_layers"] = convert_state_dict_to_diffusers(layers)
            said[f"{name}_lora_adapter_metadata"] = model.peft_config["default"].to_dict()
        StableDiffusionPipeline.save_lora_weights(folder, **said)
        return folder / "pytorch_lora_weights.safetensors"

    def close(self) -> None:
        pass

    def _attach(self) -> dict[str, Any]:
        lora = self.config.lora
        torch.manual_seed(self.config.seed)  # PEFT's beginning is drawn from torch's own generator
        wanted: dict[str, Any] = {
            "r": lora.rank,
            "lora_alpha": lora.rank if lora.alpha is None else lora.alpha,
            "use_dora": lora.variant == "dora",
            "init_lora_weights": "gaussian",
        }
        pipe = self.pipe
        pipe.unet.add_adapter(peft.LoraConfig(target_modules=["to_q", "to_k", "to_v", "to_out.0"], **wanted))
        parts = {"unet": pipe.unet}
        if self.config.train.trains_text_encoder:
            # by PEFT itself: transformers' own add_adapter may ask for another PEFT than is installed
            words = peft.LoraConfig(target_modules=["q_proj", "k_proj", "v_proj", "out_proj"], **wanted)
            peft.inject_adapter_in_model(words, pipe.text_encoder)
            parts["text_encoder"] = pipe.text_encoder
        return parts

    def _drawn(self) -> tuple[list[Shown], int]:
        """The next batch as the script's data loader has it, and how many of it are of the subject: an epoch is as long
        as the longer of the two lists, shuffled, with the shorter one over and over."""
        longest = max(len(self.instances), len(self.classes))
        if not self.waiting:
            self.waiting = self.shuffled.sample(range(longest), longest)
        size = self.config.train.batch_size
        turn, self.waiting = self.waiting[:size], self.waiting[size:]
        rows = [shown[i % len(shown)] for shown in (self.instances, self.classes) if shown for i in turn]
        return rows, len(turn)

    def _words(self, captions: list[str]) -> Tensor:
        tokenizer, encoder = self.pipe.tokenizer, self.pipe.text_encoder
        ids = tokenizer(
            captions,
            padding="max_length",
            max_length=tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        ).input_ids.to(self.device)
        with torch.set_grad_enabled(self.config.train.trains_text_encoder):
            hidden: Tensor = encoder(ids)[0]
        return hidden.to(self.pipe.unet.dtype)


def write_first_lora(
    models: dict[str, Any], wanted: LoraConfig | dict[str, LoraConfig], file: Path, *, seed: int
) -> None:
    """What both sides can begin from."""
    form = attach(models, wanted, generator=torch.Generator().manual_seed(seed))
    write_adapter(collect(form), file, spelling="kohya")
    detach(form)


def _shown(folder: Path | None, prompt: str | None) -> list[Shown]:
    """The folder's pictures with their captions, or else the prompt."""
    assert folder is not None
    found = []
    for path in sorted(folder.glob("*.png")):
        beside = path.with_suffix(".txt")
        words = beside.read_text(encoding="utf-8").strip() if beside.exists() else prompt
        assert words is not None
        found.append((path, words))
    return found


def _pixels(path: Path) -> Tensor:
    """-> (3, h, w) in -1..1, at the picture's own size."""
    with Image.open(path) as picture:
        pixels = torch.from_numpy(np.array(picture.convert("RGB")))
    return pixels.permute(2, 0, 1).float() / 127.5 - 1


def _begin_as(parts: dict[str, Any], file: Path) -> None:
    for path, delta in read_adapter(file).deltas.items():
        component, _, inside = path.partition(".")
        model, tensors = parts[component], delta.tensors()
        if not hasattr(model, "text_model"):
            inside = inside.removeprefix("text_model.")
        layer = model.get_submodule(inside)
        with torch.no_grad():
            layer.lora_A["default"].weight.copy_(tensors["down"])
            layer.lora_B["default"].weight.copy_(tensors["up"])
            if "magnitude" in tensors:
                layer.lora_magnitude_vector["default"].weight.copy_(tensors["magnitude"].flatten())
