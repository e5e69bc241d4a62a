"""LiveMix: the LoRAs that models wear, their weights, and the way back to the base (docs/engine.md)."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Protocol

from torch import nn

from lora_core.adapter import Adapter
from lora_core.base_weights import BaseWeights, Reference
from lora_core.deltas import Delta
from lora_core.errors import ConfigError, LoraError, NotLoaded, did_you_mean
from lora_core.facts import Coverage
from lora_core.families import Family, check_belongs
from lora_core.mix import AdapterWeight, Mix, WeightValue, check_blocks, muted
from lora_core.new_tokens import NewTokens
from lora_core.rack import Rack
from lora_core.replication import Stacks, all_standing
from lora_core.shelf import Shelf
from lora_core.turnstile import Turnstile

Mode = Literal["live", "fused", "auto"]
MODES = ("live", "fused", "auto")
STILL_S = 2.0  # seconds without a change after which "auto" fuses
TOLERABLE_LOSS = 0.1  # of the LoRAs, rounded away: more than that, and "auto" stays live


class Run(Protocol):
    """A generation that is going on."""

    own_weights: bool  # by mixes per picture or by the prompt
    progress: float  # 0..1

    def show(self, progress: float) -> None: ...  # the mix of this progress onto the rack


class LiveMix:
    """Loading, weighing, fusing and undoing LoRAs never alters the base for good: on the rack it is not written to,
    and fused layers are copied back from pristine originals. Every method may be called from any thread."""

    def __init__(
        self,
        models: Mapping[str, nn.Module],
        family: Family,
        base_name: str,
        *,
        others: Mapping[str, nn.Module],
        checkpoint: Reference | None = None,
    ) -> None:
        """`models` by component; `others` wear nothing and are verified all the same, as is the VAE."""
        self.models, self.family, self.base_name = dict(models), family, base_name
        self._adapters: dict[str, Adapter] = {}
        self._layers: dict[str, dict[str, nn.Module]] = {}  # name -> adapter path -> layer
        self._mix: Mix = {}
        self._rack = Rack()
        self._shelf = Shelf()
        self._stacks = Stacks(self.models)
        self._words = NewTokens(None, {})  # a pipeline has tokenizers for them
        self._base = BaseWeights({**models, **others}, checkpoint)
        self.unet_paths = [f"unet.{n}" for n, _ in self.models["unet"].named_modules()]
        self._lock = Turnstile()  # guards all of this, and the generation that runs
        self._run: Run | None = None
        self._mode: Mode = "live"
        self._still: threading.Timer | None = None
        self._bypassed = False
        self.fusing_note = ""  # in auto: why the mix stays live, or what fusing said

    def load(
        self, source: str | Path | Adapter, name: str | None = None, weight: WeightValue = 1.0
    ) -> Coverage:
        """Put a LoRA on the rack, and its new words into prompts' reach. Wrong family, wrong shapes, words that mean
        something already or non-finite values raise and change nothing; `coverage_on` tells beforehand."""
        if isinstance(source, Adapter):
            adapter = source
            adapter.check_finite()
        else:
            adapter = self._shelf.get(source)  # which refuses what is not finite
        name = name or adapter.name or "lora"
        parsed = AdapterWeight.parse(name, weight)
        with self._lock:
            stacks = self._stacks.wanted(name, adapter.metadata, list(adapter.deltas))
            with all_standing(stacks):
                layers = check_belongs(adapter, self.models, self.family)
            check_blocks(name, parsed, self.unet_paths)
            self._refuse_unfusable({**self._mix, name: parsed}, shared=bool(stacks))
            file = None if isinstance(source, Adapter) else Path(source)
            coverage = Coverage.of(adapter, layers, file=file, not_finite=())  # else it had been refused
            if not layers and not adapter.embeddings:
                raise LoraError(
                    f'None of the {coverage.total} layers of "{name}" exist in {self.base_name}: nothing was loaded.'
                )
            self._words.check(name, adapter.embeddings)
            self._unfuse()
            self._rack.load(name, adapter, layers)
            self._words.add(name, adapter.embeddings)
            self._stacks.wear(name, adapter.metadata, list(adapter.deltas), stacks)
            self._adapters[name], self._layers[name] = adapter, layers
            self._mix[name] = parsed
            self._show()
            self._touched()
        return coverage

    def prefetch(self, *sources: str | Path) -> None:
        """Read these LoRAs on a thread, so that `load` finds them in memory; what was used longest ago makes room."""
        self._shelf.prefetch(*sources)

    def set_weights(self, weights: Mapping[str, WeightValue], *, only: bool = False) -> None:
        """Change the weights of loaded LoRAs; the others keep theirs, or go to 0 with `only`.

        A number weighs the whole LoRA; a dict {"unet", "text_encoder", "text_encoder_2", "blocks", "curve", "half"}
        changes what it names. A fused mix goes back to the rack first. While a picture is being made, from another
        thread, it acts from the next step on.
        """
        with self._lock:
            mix = self._changed(weights, only=only)
            self._refuse_unfusable(mix)
            self._mix = mix
            self._unfuse()
            self._show()
            self._touched()

    def _show(self) -> None:
        """The mix onto the rack; inside a run, as it is at this point of the run."""
        if self._run is not None:
            self._run.show(self._run.progress)
        else:
            self._rack.set_mixes([self._heard(self._mix)])

    @property
    def bypassed(self) -> bool:
        """All off: the base model answers, whatever the mix, the prompt or a picture's own mix says. These stay as they
        are, and sound again when it is False. Acts at the next step of a running generation; unfuses."""
        return self._bypassed

    @bypassed.setter
    def bypassed(self, off: bool) -> None:
        with self._lock:
            self._bypassed = off
            self._unfuse()
            self._show()
            self._touched()

    def _heard(self, mix: Mix) -> Mix:
        return muted(mix, mix) if self._bypassed else mix

    def _changed(self, weights: Mapping[str, WeightValue], *, only: bool) -> Mix:
        for name in weights:
            self._require(name)
        mix = {n: AdapterWeight.parse(n, 0.0) for n in self._mix} if only else dict(self._mix)
        for name, value in weights.items():
            mix[name] = AdapterWeight.parse(name, value, self._mix[name])
            check_blocks(name, mix[name], self.unet_paths)
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
    def fused(self) -> bool:
        return self._base.fused

    # --- live or fused -------------------------------------------------------------------------------------

    def fuse(self) -> str:
        """Fold the mix into the base weights, from pristine originals with one rounding -> a sentence about it.

        Undone by any change. Raises LoraError for a mix or a layer that has no fused form; then nothing is changed.
        """
        with self._lock:
            return self._fuse()

    def _fuse(self) -> str:
        self._refuse_fusing(self._mix)
        self._unfuse()
        said = self._base.fuse(*self._changes())
        self._rack.enabled = not self._base.fused
        return said

    def _changes(
        self, progress: float = 0.0
    ) -> tuple[dict[str, nn.Module], dict[str, list[tuple[float, Delta]]]]:
        """-> layers, and what the mix adds to each at this point of the denoising, by adapter path."""
        layers: dict[str, nn.Module] = {}
        changes: dict[str, list[tuple[float, Delta]]] = {}
        for name, own in self._layers.items():
            for path, layer in own.items():
                weight = self._mix[name].at(path, progress=progress)
                if weight:
                    changes.setdefault(path, []).append((weight, self._adapters[name].deltas[path]))
                    layers[path] = layer
        return layers, changes

    def _refuse_unfusable(self, mix: Mix, *, shared: bool = False) -> None:
        """In "fused" a mix that has no fused form is refused before anything has changed."""
        if self._mode == "fused" and not self._bypassed:
            self._refuse_fusing(mix, shared=shared)

    def _refuse_fusing(self, mix: Mix, *, shared: bool = False) -> None:
        if self._bypassed:
            raise LoraError(
                "All LoRAs are switched off (bypassed): there is nothing to fuse. Switch them on first."
            )
        if shared or self._stacks:
            raise LoraError(
                "A LoRA is made for replicated layers: one weight stands in several places, each with a change of its "
                "own, and cannot be all of them. Leave it live."
            )
        for name, weight in mix.items():
            if weight.moving or weight.half != "both":
                what = "a curve over the steps" if weight.moving else "the prompt's half alone"
                raise LoraError(
                    f'"{name}" is set to {what}, which fused weights cannot follow. Leave it live, or set it plainly.'
                )
        if self._run is not None and self._run.own_weights:
            raise LoraError(
                "The pictures being made have weights of their own, which fusing would take from them. Fuse when they "
                "are done."
            )

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
            elif mode == "fused" and self._adapters and not self._bypassed:
                self._fuse()
            self._mode = mode
            self._touched()

    def _touched(self) -> None:
        """After every change of the mix, and after every generation."""
        if self._still is not None:
            self._still.cancel()
            self._still = None
        kept_live = self._bypassed or (self._run is not None and self._run.own_weights)
        if self._mode == "fused" and self._adapters and not self.fused and not kept_live:
            self._fuse()
        elif (
            self._mode == "auto" and self._adapters and not (self.fused or kept_live or self._run is not None)
        ):
            self._still = threading.Timer(STILL_S, self._fuse_in_the_background)
            self._still.daemon = True
            self._still.start()

    def _fuse_in_the_background(self) -> None:
        mine = threading.current_thread()
        with self._lock:
            if self._still is not mine or self._run is not None or self._mode != "auto":
                return
            try:
                self._refuse_fusing(self._mix)
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
        self._words.remove(*names)
        self._stacks.forget(*names)
        for name in names:
            del self._adapters[name], self._layers[name], self._mix[name]
        self._base.release()
        self._show()
        self._touched()
