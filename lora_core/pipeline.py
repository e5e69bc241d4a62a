"""LivePipeline: a diffusers pipeline whose Mix changes between generations, and the way back to the base model."""

from __future__ import annotations

import random
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from lora_core.adapter import COMPONENTS, Adapter, Coverage, resolve
from lora_core.base_weights import BaseReport, BaseWeights
from lora_core.config import LoraConfig
from lora_core.deltas import Delta
from lora_core.denoise import OnLatents, OnStep, denoise
from lora_core.errors import ConfigError, LoraError, NotLoaded, did_you_mean
from lora_core.families import Family, check_belongs, family_of_unet
from lora_core.formats import read_adapter
from lora_core.generation import GeneratedImage, GenerationRequest, Steps, Weights, parameters_text
from lora_core.mix import AdapterWeight, Mix, WeightValue, check_blocks
from lora_core.models import OpenedBase, open_base
from lora_core.rack import Rack
from lora_core.samplers import sampler_name
from lora_core.targets import find_targets
from lora_core.turnstile import Turnstile

Mode = Literal["live", "fused", "auto"]
MODES = ("live", "fused", "auto")
STILL_S = 2.0  # seconds without a change after which "auto" fuses
TOLERABLE_LOSS = 0.1  # of the LoRAs, rounded away: more than that, and "auto" stays live


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
        self._unet_paths = [f"unet.{n}" for n, _ in self.models["unet"].named_modules()]
        self._lock = (
            Turnstile()
        )  # guards mix, rack, base weights and the running generation: see docs/engine.md
        self._generating = threading.RLock()  # one generation at a time; taken before the turnstile
        self._run: _Run | None = None
        self._mode: Mode = "live"
        self._still: threading.Timer | None = None
        self.fusing_note = ""  # in auto: why the mix stays live, or what fusing said

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
            self._check_blocks(name, parsed)
            layers = resolve(adapter.deltas, self.models)
            coverage = _coverage(adapter, layers)
            if not layers:
                raise LoraError(
                    f'None of the {coverage.total} layers of "{name}" exist in {self.base_name}: nothing was loaded.'
                )
            self._unfuse()
            self._rack.load(name, adapter, layers)
            self._adapters[name], self._layers[name] = adapter, layers
            self._mix[name] = parsed
            self._show()
            self._touched()
        return coverage

    def set_weights(self, weights: Mapping[str, WeightValue], *, only: bool = False) -> None:
        """Change the weights of loaded LoRAs; the others keep theirs, or go to 0 with `only`.

        A number weighs the whole LoRA; a dict {"unet", "text_encoder", "text_encoder_2", "blocks", "curve", "half"}
        changes what it names. A fused mix goes back to the rack first. While a picture is being made, from another
        thread, it acts from the next step on.
        """
        with self._lock:
            self._mix = self._changed(weights, only=only)
            self._unfuse()
            self._show()
            self._touched()

    def _show(self) -> None:
        """The mix onto the rack; inside a run, as it is at this point of the run."""
        if self._run is not None:
            self._run.show(self._run.progress)
        else:
            self._rack.set_mixes([self._mix])

    def _check_blocks(self, name: str, weight: AdapterWeight) -> None:
        check_blocks(name, weight, self._unet_paths)

    def _changed(self, weights: Mapping[str, WeightValue], *, only: bool) -> Mix:
        for name in weights:
            self._require(name)
        mix = {n: AdapterWeight.parse(n, 0.0) for n in self._mix} if only else dict(self._mix)
        for name, value in weights.items():
            mix[name] = AdapterWeight.parse(name, value, self._mix[name])
            self._check_blocks(name, mix[name])
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

    def fuse(self) -> str:
        """Fold the mix into the base weights, from pristine originals with one rounding -> a sentence about it.

        Undone by any change. Raises LoraError for a mix or a layer that has no fused form; then nothing is changed.
        """
        with self._lock:
            return self._fuse()

    def _fuse(self) -> str:
        self._refuse_fusing()
        self._unfuse()
        said = self._base.fuse(*self._changes())
        self._rack.enabled = not self._base.fused
        return said

    def _changes(self) -> tuple[dict[str, nn.Module], dict[str, list[tuple[float, Delta]]]]:
        """-> layers, and what the mix adds to each, by adapter path."""
        layers: dict[str, nn.Module] = {}
        changes: dict[str, list[tuple[float, Delta]]] = {}
        for name, own in self._layers.items():
            for path, layer in own.items():
                weight = self._mix[name].at(path)
                if weight:
                    changes.setdefault(path, []).append((weight, self._adapters[name].deltas[path]))
                    layers[path] = layer
        return layers, changes

    def _refuse_fusing(self) -> None:
        for name, weight in self._mix.items():
            if weight.moving or weight.half != "both":
                what = "a curve over the steps" if weight.moving else "the prompt's half alone"
                raise LoraError(
                    f'"{name}" is set to {what}, which fused weights cannot follow. Leave it live, or set it plainly.'
                )
        if self._run is not None and self._run.asked:
            raise LoraError(
                "Pictures with a mix each are being made, and fusing would make them alike. Fuse when they are done."
            )

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

    @property
    def mode(self) -> Mode:
        """ "live": on the rack unless `fuse()` was called. "fused": every change is fused again. "auto": on the rack
        while weights move, fused once they have stood still for two seconds and no picture is being made, unless
        fusing would lose something; then `fusing_note` says what."""
        return self._mode

    @mode.setter
    def mode(self, mode: Mode) -> None:
        if mode not in MODES:
            raise ConfigError(f'mode = "{mode}" is unknown.{did_you_mean(mode, MODES)}')
        with self._lock:
            if mode == "live":
                self._unfuse()
            elif mode == "fused" and self._adapters:
                self._fuse()
            self._mode = mode
            self._touched()

    def _touched(self) -> None:
        """After every change of the mix, and after every generation."""
        if self._still is not None:
            self._still.cancel()
            self._still = None
        if self._mode == "fused" and self._adapters and not self.fused:
            self._fuse()
        elif self._mode == "auto" and self._adapters and not self.fused and self._run is None:
            self._still = threading.Timer(STILL_S, self._fuse_in_the_background)
            self._still.daemon = True
            self._still.start()

    def _fuse_in_the_background(self) -> None:
        mine = threading.current_thread()
        with self._lock:
            if self._still is not mine or self._run is not None or self._mode != "auto":
                return
            try:
                self._refuse_fusing()
                lost = self._base.lost(*self._changes())
                if lost > TOLERABLE_LOSS:
                    self.fusing_note = (
                        f"live: fused, {lost:.0%} of these LoRAs would be lost to the rounding of the weights"
                    )
                    return
                self.fusing_note = self._fuse()
            except LoraError as reason:
                self.fusing_note = f"live: {reason}"

    def unfuse(self) -> None:
        """The base weights again, bit for bit, and the mix live on the rack."""
        with self._lock:
            self._unfuse()
            self._touched()

    def _unfuse(self) -> None:
        self._base.restore()
        self._rack.enabled = True

    def delete(self, name: str) -> None:
        """Forget one LoRA."""
        with self._lock:
            self._require(name)
            self._forget(name)

    def unload(self) -> None:
        """Forget every LoRA: the base model again, and a module tree without a trace of them."""
        with self._lock:
            self._forget(*self._adapters)

    def _forget(self, *names: str) -> None:
        self._unfuse()
        self._rack.delete(*names)
        for name in names:
            del self._adapters[name], self._layers[name], self._mix[name]
        self._show()
        self._touched()

    def verify_base(self) -> BaseReport:
        """Every parameter against the checkpoint on disk, or, for a wrapped pipeline, as it was when wrapped."""
        with self._lock:
            return self._base.verify()

    def heal(self) -> BaseReport:
        """Copy every parameter that differs from the checkpoint back from it; unfuses first."""
        with self._lock:
            self._unfuse()
            return self._base.heal()

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
        `on_step(step, steps)` is called; returning False raises `Stopped`. Changes of the mix that another thread
        asked for meanwhile are made then, and act from the next step on.
        """
        with self._generating, self._lock, torch.no_grad():
            first = random.randrange(2**32) if request.seed is None or request.seed < 0 else request.seed
            if request.mixes and self.fused:
                raise LoraError(
                    "The LoRAs are fused into the model, which makes every picture of a batch alike; a mix per picture "
                    "needs them live. Unfuse first."
                )
            for weights in request.mixes or ():
                self._changed(weights, only=False)  # an unknown name is said before anything begins
            number = len(request.mixes) if request.mixes else request.count
            seeds = [first] * number if request.mixes else [first + i for i in range(number)]
            self._run = _Run(self, request.mixes, number, request.guidance > 1)
            try:
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
            lora_hashes=hashes,
        )


class _Run:
    """The generation that runs: its `Wardrobe`."""

    def __init__(
        self, live: LivePipeline, asked: Sequence[Weights] | None, number: int, guided: bool
    ) -> None:
        self.live, self.asked, self.number, self.guided = live, asked, number, guided
        self.progress = 0.0
        self.stopping = False

    def lend(self) -> None:
        self.live._lock.lend()

    def stopped(self) -> bool:
        return self.stopping

    def mixes(self) -> Sequence[Mix]:
        """A LoRA that was taken off meanwhile is left out of the mixes asked for."""
        here = self.live._mix
        if not self.asked:
            return [here] * self.number
        return [
            self.live._changed({n: w for n, w in weights.items() if n in here}, only=False)
            for weights in self.asked
        ]

    def show(self, progress: float) -> None:
        self.progress = progress
        mixes = self.mixes()
        alike = not self.asked and all(w.half == "both" for w in mixes[0].values())
        self.live._rack.set_mixes(mixes[:1] if alike else mixes, progress=progress, guided=self.guided)


def _coverage(adapter: Adapter, layers: Mapping[str, nn.Module]) -> Coverage:
    counts: dict[str, tuple[int, int]] = {}
    for path in adapter.deltas:
        component = path.split(".", 1)[0]
        matched, total = counts.get(component, (0, 0))
        counts[component] = (matched + (path in layers), total + 1)
    absent = tuple(path for path in adapter.deltas if path not in layers)
    return Coverage(len(layers), len(adapter.deltas), (*adapter.unused, *absent), adapter.family, counts)
