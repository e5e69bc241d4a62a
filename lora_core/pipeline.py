"""LivePipeline: a diffusers pipeline whose Mix changes between generations, and the way back to the base model."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lora_core.adapter import COMPONENTS, Adapter, Coverage, resolve
from lora_core.base_weights import BaseReport, BaseWeights
from lora_core.errors import LoraError, NotLoaded, Stopped, did_you_mean
from lora_core.families import Family, check_belongs, family_of_unet
from lora_core.formats import read_adapter
from lora_core.generation import GeneratedImage, GenerationRequest, parameters_text
from lora_core.mix import AdapterWeight, Mix, WeightValue
from lora_core.models import OpenedBase, open_base
from lora_core.rack import Rack
from lora_core.samplers import sampler_name, scheduler_for

OnStep = Callable[[int, int], bool | None]  # step, steps -> False asks to stop
OnLatents = Callable[[Tensor], None]  # (images, channels, h, w), after each step


class LivePipeline:
    """Wraps any StableDiffusion(XL)Pipeline. Loading, weighing, fusing and undoing LoRAs never alters the base
    for good: on the rack it is not written to, and fused layers are copied back from pristine originals."""

    def __init__(self, pipeline: Any, *, opened: OpenedBase | None = None) -> None:
        self.pipeline = pipeline
        self.opened = opened
        self.models: dict[str, nn.Module] = {
            c: getattr(pipeline, c) for c in COMPONENTS if getattr(pipeline, c, None) is not None
        }
        self.family: Family = opened.family if opened else family_of_unet(self.models["unet"])
        self.base_name: str = opened.name if opened else type(pipeline).__name__
        self._adapters: dict[str, Adapter] = {}
        self._layers: dict[str, dict[str, nn.Module]] = {}  # name -> adapter path -> layer
        self._mix: Mix = {}
        self._rack = Rack()
        proved = {**self.models, "vae": pipeline.vae}
        self._base = BaseWeights(proved, opened.checkpoint_tensors if opened else None)
        self._lock = threading.RLock()  # guards mix, rack, base weights and the running generation

    @classmethod
    def open(
        cls, source: str | Path, *, device: Any = None, dtype: torch.dtype | None = None
    ) -> LivePipeline:
        """`source`: "demo", a diffusers folder, a single .safetensors checkpoint, or a hub id."""
        opened = open_base(source, device=device, dtype=dtype)
        return cls(opened.pipeline, opened=opened)

    # --- the mix -------------------------------------------------------------------------------------------

    def load(
        self, source: str | Path | Adapter, name: str | None = None, weight: WeightValue = 1.0
    ) -> Coverage:
        """Put a LoRA on the rack. Wrong family, wrong shapes or non-finite values raise and change nothing."""
        adapter = source if isinstance(source, Adapter) else read_adapter(Path(source))
        name = name or adapter.name or "lora"
        parsed = AdapterWeight.parse(name, weight)
        adapter.check_finite()
        with self._lock:
            check_belongs(adapter, self.models, self.family)
            layers = resolve(adapter.deltas, self.models)
            coverage = _coverage(adapter, layers)
            if not layers:
                raise LoraError(
                    f'None of the {coverage.total} layers of "{name}" exist in {self.base_name}: nothing was loaded.'
                )
            self._unfuse()
            if name in self._adapters:
                self._forget(name)
            self._rack.load(name, adapter, layers, {})
            self._adapters[name], self._layers[name] = adapter, layers
            self._mix[name] = parsed
            self._rack.set_mixes([self._mix])
        return coverage

    def set_weights(self, weights: Mapping[str, WeightValue], *, only: bool = False) -> None:
        """Change the weights of loaded LoRAs; the others keep theirs, or go to 0 with `only`.

        A number weighs the whole LoRA; a dict {"unet", "text_encoder", "text_encoder_2", "blocks"} changes what it
        names. A fused mix goes back to the rack first.
        """
        with self._lock:
            mix = self._changed(weights, only=only)
            self._unfuse()
            self._mix = mix
            self._rack.set_mixes([mix])

    def _changed(self, weights: Mapping[str, WeightValue], *, only: bool) -> Mix:
        for name in weights:
            self._require(name)
        mix = {n: AdapterWeight.parse(n, 0.0) for n in self._mix} if only else dict(self._mix)
        for name, value in weights.items():
            mix[name] = AdapterWeight.parse(name, value, self._mix[name])
        return mix

    def _require(self, name: str) -> None:
        if name not in self._adapters:
            hint = did_you_mean(name, self._adapters) if self._adapters else " None is loaded."
            raise NotLoaded(f'No LoRA named "{name}" is loaded.{hint}')

    @property
    def weights(self) -> dict[str, float | dict[str, Any]]:
        return {name: weight.plain for name, weight in self._mix.items()}

    @property
    def loaded(self) -> dict[str, Adapter]:
        return dict(self._adapters)

    @property
    def resolution(self) -> int:
        """Side of the pictures the model was made for, in pixels."""
        return int(self.pipeline.unet.config.sample_size) * int(self.pipeline.vae_scale_factor)

    @property
    def fused(self) -> bool:
        return self._base.fused

    def fuse(self) -> None:
        """Fold the mix into the base weights, from pristine originals with one rounding. Undone by any change."""
        with self._lock:
            changes: dict[str, list[tuple[float, Any]]] = {}
            layers: dict[str, nn.Module] = {}
            for name, own in self._layers.items():
                for path, layer in own.items():
                    weight = self._mix[name].at(path)
                    if weight:
                        changes.setdefault(path, []).append((weight, self._adapters[name].deltas[path]))
                        layers[path] = layer
            self._base.restore()
            self._base.fuse(layers, changes)
            self._rack.enabled = not self._base.fused

    def unfuse(self) -> None:
        """The base weights again, bit for bit, and the mix live on the rack."""
        with self._lock:
            self._unfuse()

    def _unfuse(self) -> None:
        self._base.restore()
        self._rack.enabled = True

    def delete(self, name: str) -> None:
        """Forget one LoRA."""
        with self._lock:
            self._require(name)
            self._unfuse()
            self._forget(name)
            self._rack.set_mixes([self._mix])

    def _forget(self, name: str) -> None:
        self._rack.delete(name)
        del self._adapters[name], self._layers[name], self._mix[name]

    def unload(self) -> None:
        """Forget every LoRA: the base model again, and a module tree without a trace of them."""
        with self._lock:
            self._unfuse()
            for name in list(self._adapters):
                self._forget(name)
            self._rack.set_mixes([{}])

    def verify_base(self) -> BaseReport:
        """Every parameter against the checkpoint on disk, or, for a wrapped pipeline, as it was when wrapped."""
        with self._lock:
            return self._base.verify()

    # --- pictures ------------------------------------------------------------------------------------------

    def generate(
        self,
        request: GenerationRequest,
        *,
        on_step: OnStep | None = None,
        on_latents: OnLatents | None = None,
    ) -> list[GeneratedImage]:
        """Image i uses seed + i; with `mixes` (one weights-dict per image) all share the seed, to be compared.

        After each denoising step `on_latents` sees the latents (for a preview; not to be changed), then
        `on_step(step, steps)` is called; returning False raises `Stopped`.
        """
        with self._lock, torch.no_grad():
            first = random.randrange(2**32) if request.seed is None or request.seed < 0 else request.seed
            if request.mixes:
                mixes = [self._changed(weights, only=False) for weights in request.mixes]
                seeds = [first] * len(mixes)
                was_fused = self.fused
                self._unfuse()
                self._rack.set_mixes(mixes)
                try:
                    pictures = self._denoise(request, seeds, on_step, on_latents)
                finally:
                    self._rack.set_mixes([self._mix])
                    if was_fused:
                        self.fuse()
            else:
                seeds = [first + i for i in range(request.count)]
                mixes = [self._mix] * request.count
                pictures = self._denoise(request, seeds, on_step, on_latents)
        return [
            GeneratedImage(
                picture,
                seed,
                self._parameters(request, picture.size, seed, mix),
                {n: w.plain for n, w in mix.items()},
            )
            for picture, seed, mix in zip(pictures, seeds, mixes, strict=True)
        ]

    def _denoise(
        self,
        request: GenerationRequest,
        seeds: Sequence[int],
        on_step: OnStep | None,
        on_latents: OnLatents | None,
    ) -> list[Any]:
        def after_step(_: Any, step: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
            if on_latents is not None:
                on_latents(kwargs["latents"])
            if on_step is not None and on_step(step + 1, request.steps) is False:
                raise Stopped(f"Stopped after step {step + 1} of {request.steps}.")
            return kwargs

        self.pipeline.set_progress_bar_config(disable=True)
        # noise drawn on the CPU, one generator per image: the same seed is the same picture on every device
        generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
        own = self.pipeline.scheduler
        self.pipeline.scheduler = scheduler_for(request.sampler, own)
        try:
            result = self.pipeline(
                prompt=[request.prompt] * len(seeds),
                negative_prompt=[request.negative_prompt] * len(seeds),
                num_inference_steps=request.steps,
                guidance_scale=request.guidance,
                width=request.width,
                height=request.height,
                generator=generators,
                callback_on_step_end=after_step,
            )
        finally:
            self.pipeline.scheduler = own
        return list(result.images)

    def _parameters(self, request: GenerationRequest, size: tuple[int, int], seed: int, mix: Mix) -> str:
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
            weights={n: w.plain for n, w in mix.items()},
            lora_hashes=hashes,
        )


def _coverage(adapter: Adapter, layers: Mapping[str, nn.Module]) -> Coverage:
    counts: dict[str, tuple[int, int]] = {}
    for path in adapter.deltas:
        component = path.split(".", 1)[0]
        matched, total = counts.get(component, (0, 0))
        counts[component] = (matched + (path in layers), total + 1)
    absent = tuple(path for path in adapter.deltas if path not in layers)
    return Coverage(len(layers), len(adapter.deltas), (*adapter.unused, *absent), adapter.family, counts)
