"""The two sides of benchmarks.train: our trainer and a loop of diffusers + PEFT, each taking one step when told."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from lora_core import read_adapter
from lora_core.errors import Stopped
from trainers.config import TrainConfig
from trainers.control import StopRequest
from trainers.dreambooth import train
from trainers.events import Step, TrainEvent

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


class Ours:
    """`train` in a thread of its own, held after every step until the next is asked for."""

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        self.losses: list[float] = []
        self._stop = StopRequest()
        self._go, self._done = threading.Semaphore(0), threading.Semaphore(0)
        self._problem: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        self._wait()  # it is ready, and has taken its first step: what is made once is no part of a step

    def step(self) -> None:
        self._go.release()
        self._wait()

    def close(self) -> None:
        self._stop.ask()
        self._go.release()
        self._thread.join()

    def _wait(self) -> None:
        self._done.acquire()
        if self._problem is not None:
            raise RuntimeError("our training ended") from self._problem

    def _run(self) -> None:
        try:
            train(self.config, stop=self._stop, listeners=[self._after])
        except Stopped:
            pass
        except BaseException as problem:
            self._problem = problem
        finally:
            self._done.release()

    def _after(self, event: TrainEvent) -> None:
        if isinstance(event, Step):
            self.losses.append(event.loss)
            self._done.release()
            self._go.acquire()


class Peer:
    """The reference script's loop, written out: what a step needs is made in the step."""

    def __init__(self, config: TrainConfig) -> None:
        self.config, self.losses = config, list[float]()
        dtype = DTYPES[str(config.train.base_dtype)]
        self.pipe: Any = StableDiffusionPipeline.from_pretrained(
            config.base, safety_checker=None, dtype=dtype
        )
        for model in (self.pipe.unet, self.pipe.vae, self.pipe.text_encoder):
            model.requires_grad_(False)
        rank, alpha = config.lora.rank, config.lora.alpha
        wanted: dict[str, Any] = {"r": rank, "lora_alpha": alpha, "use_dora": config.lora.variant == "dora"}
        self.pipe.unet.add_adapter(
            peft.LoraConfig(target_modules=["to_q", "to_k", "to_v", "to_out.0"], **wanted)
        )
        parts = {"unet": self.pipe.unet}
        if config.train.trains_text_encoder:
            # by PEFT itself: transformers' own add_adapter may ask for another PEFT than is installed
            words = peft.LoraConfig(target_modules=["q_proj", "k_proj", "v_proj", "out_proj"], **wanted)
            peft.inject_adapter_in_model(words, self.pipe.text_encoder)
            parts["text_encoder"] = self.pipe.text_encoder
        self.parameters = [p for model in parts.values() for p in model.parameters() if p.requires_grad]
        for p in self.parameters:
            p.data = p.data.float()  # the script's cast_training_params
        assert config.lora.start_from is not None
        _begin_as(parts, config.lora.start_from)
        self.optimizer = torch.optim.AdamW(self.parameters, lr=config.train.learning_rate, weight_decay=1e-2)
        self.abar = self.pipe.scheduler.alphas_cumprod
        self.generator = torch.Generator().manual_seed(config.seed)
        (self.picture,) = sorted(config.datasets[0].images.glob("*.png"))
        self.step()

    def step(self) -> None:
        pipe, g = self.pipe, self.generator
        dtype = pipe.unet.dtype
        pixels = (
            torch.from_numpy(np.array(Image.open(self.picture))).permute(2, 0, 1)[None].float() / 127.5 - 1
        )
        with torch.no_grad():
            posterior = pipe.vae.encode(pixels.to(dtype)).latent_dist
        mean, std = posterior.mean.float(), posterior.std.float()
        z = (mean + std * torch.randn(mean.shape, generator=g)) * pipe.vae.config.scaling_factor
        eps = torch.randn(z.shape, generator=g)
        t = torch.randint(len(self.abar), (1,), generator=g)
        z_t = pipe.scheduler.add_noise(z, eps, t)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            prediction = pipe.unet(z_t.to(dtype), t, self._words()).sample
        loss = F.mse_loss(prediction.float(), eps)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.losses.append(loss.item())

    def _words(self) -> Tensor:
        tokenizer, encoder = self.pipe.tokenizer, self.pipe.text_encoder
        ids = tokenizer(
            [self.config.data.prompt],
            padding="max_length",
            max_length=tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        ).input_ids
        with torch.set_grad_enabled(self.config.train.trains_text_encoder):
            hidden: Tensor = encoder(ids)[0]
        return hidden.to(self.pipe.unet.dtype)

    def close(self) -> None:
        pass


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
