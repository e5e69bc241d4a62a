"""LivePipeline: a diffusers pipeline whose Mix changes between (and during) generations."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from lora_core.adapter import COMPONENTS
from lora_core.baking import Baked, Loras, bake
from lora_core.config import LoraConfig
from lora_core.denoise import OnLatents, OnStep, denoise
from lora_core.errors import LoraError
from lora_core.families import family_of_unet
from lora_core.generation import GeneratedImage, GenerationRequest, Steps, Weights, parameters_text, settled
from lora_core.measured_mix import MeasuredMix
from lora_core.mix import Mix
from lora_core.models import OpenedBase, open_base
from lora_core.new_tokens import NewTokens
from lora_core.prompt_tags import split_tags
from lora_core.samplers import sampler_name
from lora_core.storages import refuse_lost
from lora_core.targets import find_targets


class LivePipeline(MeasuredMix):
    """Wraps any StableDiffusion(XL)Pipeline: a mix on its models, and pictures."""

    def __init__(self, pipeline: Any, *, opened: OpenedBase | None = None) -> None:
        models = {c: getattr(pipeline, c) for c in COMPONENTS if getattr(pipeline, c, None) is not None}
        super().__init__(
            models,
            opened.family if opened else family_of_unet(models["unet"]),
            opened.name if opened else type(pipeline).__name__,
            others={"vae": pipeline.vae},
            checkpoint=opened.checkpoint_tensors if opened else None,
        )
        self.pipeline = pipeline
        self.opened = opened
        self._words = NewTokens(pipeline, models)
        self._generating = threading.RLock()  # one generation at a time; taken before the turnstile
        self._run: _Run | None = None

    @classmethod
    def open(
        cls,
        source: str | Path,
        *,
        device: Any = None,
        dtype: torch.dtype | None = None,
        quantize: str | None = None,
        prediction: str | None = None,
    ) -> LivePipeline:
        """`source`: "demo", a diffusers folder, a single .safetensors checkpoint, or a hub id. `quantize`: "nf4",
        "int8" or "fp8" keep the base in fewer bits. `prediction`: "epsilon" or "v_prediction", against what the base
        says of itself."""
        opened = open_base(source, device=device, dtype=dtype, quantize=quantize, prediction=prediction)
        return cls(opened.pipeline, opened=opened)

    @property
    def resolution(self) -> int:
        """Side of the pictures the model was made for, in pixels."""
        return int(self.pipeline.unet.config.sample_size) * int(self.pipeline.vae_scale_factor)

    def generate(
        self,
        request: GenerationRequest,
        *,
        on_step: OnStep | None = None,
        on_latents: OnLatents | None = None,
    ) -> list[GeneratedImage]:
        """Image i uses seed + i; with `mixes` (one weights-dict per image) all share the seed, to be compared.

        After each denoising step `on_latents` sees the latents (for a preview; not to be changed), then
        `on_step(step, steps)` is called; returning False raises `Stopped`. Changes of the mix that another thread
        asked for meanwhile are made then, and act from the next step on.

        <lora:NAME:0.8> in the prompt (prompt_tags) weighs a loaded LoRA for these pictures alone; a fused mix goes
        back to the rack first, as with any change.
        """
        prompt, tags = split_tags(request.prompt)
        request = replace(request, prompt=prompt)
        for component, model in self.models.items():
            for path, layer in model.named_modules():
                refuse_lost(layer, f"{component}.{path}")
        with self._generating, self._lock, torch.no_grad():
            first = settled(request.seed)
            if request.mixes and self.fused:
                raise LoraError(
                    "The LoRAs are fused into the model, which makes every picture of a batch alike; a mix per picture "
                    "needs them live. Unfuse first."
                )
            for weights in (tags, *(request.mixes or ())):
                self._changed(weights, only=False)  # an unknown name is said before anything begins
            number = len(request.mixes) if request.mixes else request.count
            seeds = [first] * number if request.mixes else [first + i for i in range(number)]
            seeds = list(request.seeds or seeds)
            self._run = _Run(self, tags, request.mixes, number, request.guidance > 1)
            try:
                if tags:
                    self._unfuse()
                pictures, histories = denoise(self.pipeline, request, seeds, self._run, on_step, on_latents)
            finally:
                self._run = None
                self._show()
                self._touched()
            return [
                GeneratedImage(
                    picture,
                    seed,
                    self._parameters(request, picture.size, seed, history),
                    history[-1][1],
                    history,
                )
                for picture, seed, history in zip(pictures, seeds, histories, strict=True)
            ]

    def arm(self, rank: int = 64) -> None:
        """Before compiling: hooks on every layer a LoRA may have (attention, feed-forward, their projections), on
        zeroed buffers for `rank` slots in all. LoRAs that fit into them come and go without a recompilation."""
        with self._lock:
            config = LoraConfig(targets=("attention", "feed-forward"))
            layers = {f"unet.{path}": module for path, module in find_targets(self.models["unet"], config)}
            self._rack.arm(layers, rank)
            self._show()

    def disarm(self) -> None:
        """The hooks of layers that wear nothing leave, and with them what was compiled is to be thrown away."""
        with self._lock:
            self._rack.disarm()
            self._show()

    def bake(
        self, out: str | Path, *, dtype: torch.dtype | None = None, metadata: Mapping[str, str] | None = None
    ) -> Baked:
        """Write a standalone model with the mix in it (PEFT's merge and unload): see baking.bake. This one is
        not changed; a model that was given from memory is unfused meanwhile."""
        with self._lock:
            self._refuse_fusing(self._mix)
            loras = [(replace(a, name=name), self._mix[name]) for name, a in self._adapters.items()]
            if self.opened is None:
                return self._bake_from_memory(loras, out, dtype, metadata)
        return bake(self.opened, loras, out, dtype=dtype, metadata=metadata)  # from its files

    def _bake_from_memory(
        self, loras: Loras, out: str | Path, dtype: torch.dtype | None, metadata: Mapping[str, str] | None
    ) -> Baked:
        fused = self.fused
        self._unfuse()
        try:
            return bake(self.pipeline, loras, out, dtype=dtype, metadata=metadata)
        finally:
            if fused:
                self._fuse()

    def stop(self) -> None:
        """From another thread: the running generation ends after its step, with `Stopped`."""
        run = self._run
        if run is not None:
            run.stopping = True

    def _parameters(
        self, request: GenerationRequest, size: tuple[int, int], seed: int, history: Steps
    ) -> str:
        hashes = {
            n: a.metadata["sshs_model_hash"][:12]
            for n, a in self._adapters.items()
            if "sshs_model_hash" in a.metadata
        }
        return parameters_text(
            request,
            seed=seed,
            size=size,
            sampler=sampler_name(request.sampler, self.pipeline.scheduler),
            model=self.base_name,
            model_hash=self.opened.model_hash if self.opened else None,
            weights=history[-1][1],
            history=history,
            lora_hashes=hashes,
        )


class _Run:
    """The generation that runs: `denoise` asks it what is worn, and the mix tells it what has changed."""

    def __init__(
        self,
        live: LivePipeline,
        tags: Weights,
        asked: Sequence[Weights] | None,
        number: int,
        guided: bool,
    ) -> None:
        self.live, self.tags, self.asked, self.number, self.guided = live, tags, asked, number, guided
        self.own_weights = bool(tags or asked)
        self.progress = 0.0
        self.stopping = False

    def lend(self) -> None:
        self.live._lock.lend()

    def stopped(self) -> bool:
        return self.stopping

    def mixes(self) -> Sequence[Mix]:
        """The prompt's weights over the mix's, a picture's own over both. A LoRA that was taken off meanwhile is left
        out."""
        here = self.live._mix
        each = [
            self.live._changed({n: w for n, w in {**self.tags, **own}.items() if n in here}, only=False)
            for own in self.asked or [{}]
        ]
        each = [self.live._heard(mix) for mix in each]
        return each if self.asked else each * self.number

    def show(self, progress: float) -> None:
        self.progress = progress
        mixes = self.mixes()
        alike = not self.asked and all(w.half == "both" for w in mixes[0].values())
        self.live._rack.set_mixes(mixes[:1] if alike else mixes, progress=progress, guided=self.guided)
