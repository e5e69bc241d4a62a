"""The trainable form: attach a LoRA to models, train it, collect it, detach it.

The trainable tensors live in ONE module outside the base's tree, reached by forward hooks: fp8 casting,
accelerate's offload and gradient checkpointing never see them, and DDP wraps that module. (Children of the
frozen layers were tried: they turned fp8 or meta behind one's back.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.hooks import RemovableHandle

from lora_core.adapter import Adapter, file_path
from lora_core.cast_training import let_gradients_through
from lora_core.config import LoraConfig
from lora_core.errors import ConfigError, LoraError, NothingMatched
from lora_core.lean_layers import keep_less
from lora_core.quantised import count_weights
from lora_core.replication import Stack, all_standing, map_of, read_map, written
from lora_core.storages import Undo
from lora_core.targets import Choice, choose
from lora_core.targets_checked import check_plan
from lora_core.trainable import Factors, Site
from lora_core.trainable.full import TrainableFull
from lora_core.trainable.kinds import factors_for
from lora_core.trainable.layer import TrainableLayer
from lora_core.trainable.norms import group_norms
from lora_core.trainable.rates import fast_names, rate_key

if TYPE_CHECKING:
    from lora_core.trainable.words import TrainableWords


@dataclass(frozen=True)
class Counts:
    """Parameters: trained, and of the models that were attached to."""

    trained: int
    base: int

    @property
    def share(self) -> float:
        """Of all, the trained ones included (PEFT's "trainable%", as a fraction)."""
        return self.trained / (self.trained + self.base)

    def __str__(self) -> str:
        return f"{self.trained:,} trained of {self.trained + self.base:,} parameters ({self.share:.2%})"


class LoraForm(nn.Module):
    """What `attach` returns: only trainable tensors. `paths[i]` is the adapter path of `layers[i]`."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList()
        self.paths: list[str] = []
        self.enabled = True
        self.weight = 1.0
        self._handles: list[RemovableHandle] = []
        self._frozen: list[nn.Parameter] = []  # base parameters that were trainable before attach
        self._models: dict[str, nn.Module] = {}
        self._undo: list[Undo] = []  # of what was done to a quantised base
        self._stacks: list[Stack] = []
        self.words: TrainableWords | None = None  # new ones, from trainable.words.learn_words

    def parameter_groups(
        self, learning_rate: float | Mapping[str, float], *, ratio: float = 1.0
    ) -> list[dict[str, Any]]:
        """-> groups for any torch optimizer: "params", "lr", "name" (the rate's key, or "<key>.fast").

        `learning_rate` may differ by component, and in it by block: {"unet": 1e-4, "unet.down.1": 5e-5,
        "text_encoder": 2e-5, "text_encoder.layers.3": 1e-5}; the longest name that holds for a layer decides. `ratio`
        is LoRA+'s (arXiv 2402.12354): B, and as in its reference code every vector (a magnitude, a bias), learns
        `ratio` times as fast as the rest; 4 to 16 are usual. ConfigError for a ratio with LoHa or LoKr, which have
        no B, NothingMatched for a block that holds no trained layer.
        """
        if not 1 <= ratio < float("inf"):
            raise ConfigError(f"ratio = {ratio} must be at least 1; 1 is plain LoRA, 4 to 16 are usual.")
        components = dict.fromkeys(path.split(".", 1)[0] for path in self.paths)
        rates = (
            learning_rate if isinstance(learning_rate, Mapping) else dict.fromkeys(components, learning_rate)
        )
        keys = {path: rate_key(rates, path) for path in self.paths}
        for key in rates:
            if "." in key and key not in keys.values():
                raise NothingMatched(
                    f'The rate of "{key}" is of no use: no trained layer has it from there. Correct it or take it out.'
                )
        groups: dict[str, dict[str, Any]] = {}
        for path, layer in zip(self.paths, self.layers, strict=True):
            assert isinstance(layer, TrainableLayer)
            names = fast_names(layer) if ratio != 1 else ()
            for name, p in layer.named_parameters():
                key, times, end = keys[path], *((ratio, ".fast") if name in names else (1.0, ""))
                empty = {"params": [], "lr": rates[key] * times, "name": key + end}
                groups.setdefault(key + end, empty)["params"].append(p)
        return sorted(groups.values(), key=lambda group: group["name"].endswith(".fast"))

    def counts(self) -> Counts:
        """How much is trained, and of how much."""
        total = sum(count_weights(model) for model in self._models.values())
        return Counts(sum(p.numel() for p in self.parameters()), total)

    def of(self, component: str) -> list[TrainableLayer]:
        """What is trained about one model."""
        layers = zip(self.paths, self.layers, strict=True)
        own = (layer for path, layer in layers if path.partition(".")[0] == component)
        return [layer for layer in own if isinstance(layer, TrainableLayer)]

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Inside, the models answer as the base does."""
        before, self.enabled = self.enabled, False
        try:
            yield
        finally:
            self.enabled = before

    @contextmanager
    def at_weight(self, weight: float) -> Iterator[None]:
        """Inside, the LoRA is worn at `weight`, as `LivePipeline.set_weights` has it: W + weight · (W' - W)."""
        before, self.weight = self.weight, weight
        try:
            yield
        finally:
            self.weight = before

    def _hook(self, own: TrainableLayer, layer: nn.Module) -> None:
        def add(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            if not self.enabled:
                return None
            changed: Tensor = own(inputs[0], output)
            return changed if self.weight == 1 else torch.lerp(output, changed, self.weight)

        self._handles.append(layer.register_forward_hook(add))


Models = nn.Module | Mapping[str, nn.Module]
Originals = Callable[[str, str], Tensor]  # component, parameter name -> W0


def by_name(models: Models) -> dict[str, nn.Module]:
    """A bare module is told by its class: CLIP text encoders by theirs, everything else is a UNet."""
    if isinstance(models, Mapping):
        return dict(models)
    names = {"CLIPTextModel": "text_encoder", "CLIPTextModelWithProjection": "text_encoder_2"}
    return {names.get(type(models).__name__, "unet"): models}


def attach(
    models: Models,
    config: LoraConfig | Mapping[str, LoraConfig],
    *,
    start: Adapter | None = None,
    generator: torch.Generator | None = None,
    originals: Originals | None = None,
    norm_device: torch.device | str | None = None,
) -> LoraForm:
    """Freeze `models` (a module, or component -> module) and give what `config` names its trainable fp32 form.

    `config` may differ by component. `start` is an adapter to begin from; it must name exactly the layers that
    are trained. Raises NothingMatched for names and patterns that nothing answers to, ConfigError for what does not
    go together, such as a rank larger than a layer's. On any error the models are left as they were.

    `originals(component, parameter name)` gives W0 of a quantised base, for beginnings that are taken from it
    (OpenedBase.original). `norm_device`: where DoRA's norms are computed when the weights lie elsewhere, such as "cuda"
    for a model on the CPU (PEFT's ephemeral_gpu_offload); weights travel there one layer at a time.
    """
    form, parts = LoraForm(), by_name(models)
    configs = dict(config) if isinstance(config, Mapping) else dict.fromkeys(parts, config)
    maps = [map_of(c, model, configs[c].layer_replication) for c, model in parts.items()]
    form._stacks = [Stack(parts, path, ranges) for own in maps for path, ranges in own.items()]
    with all_standing(form._stacks):
        plan = {component: choose(model, configs[component]) for component, model in parts.items()}
        check_plan(plan, configs, parts)
    where = None if norm_device is None else torch.empty(0, device=norm_device).device  # with its number
    try:
        for component, choices in plan.items():
            checkpoint = None if originals is None else partial(originals, component)
            for choice in choices:
                config_here = configs[component]
                site = Site(choice.layer, choice.path, config_here, generator, checkpoint, form._undo, where)
                form.paths.append(file_path(component, choice.path))
                form.layers.append(trainable(choice, site))
            group_norms(form.of(component))
        if start is not None:
            _start_from(form, start)
    except BaseException:
        _take_back(form)
        raise
    form._undo += [*let_gradients_through(parts), *keep_less(parts)]
    for layer in form.layers:
        assert isinstance(layer, TrainableLayer)
        form._hook(layer, layer.site.layer)
    form._handles.append(register_optimizer_step_post_hook(_count_fused_step))
    form._models = parts
    for stack in form._stacks:
        stack.run()
    form._frozen = [p for m in parts.values() for p in m.parameters() if p.requires_grad]
    for p in form._frozen:
        p.requires_grad_(False)
    return form


def _count_fused_step(optimizer: torch.optim.Optimizer, *_: object) -> None:
    """Fused optimizers write to their tensors behind autograd's count of changes, by which a DoRA knows that its norms
    are of yesterday."""
    if optimizer.defaults.get("fused"):
        increment_version([p for group in optimizer.param_groups for p in group["params"]])


def _take_back(form: LoraForm) -> None:
    while form._undo:
        form._undo.pop()()


def trainable(choice: Choice, site: Site) -> TrainableLayer:
    """What is trained about one module of the base, at its beginning."""
    factors: Factors | None = None
    if choice.factors:
        factors = factors_for(site)
    elif choice.whole:
        factors = TrainableFull(site)
    magnitude = choice.factors and site.config.variant == "dora"
    return TrainableLayer(site, factors, magnitude=magnitude, bias=choice.bias)


def _start_from(form: LoraForm, start: Adapter) -> None:
    if read_map(start.metadata) != (trained := {s.path: s.ranges for s in form._stacks}):
        raise ConfigError(
            f"The file to start from is made for layer_replication {read_map(start.metadata)}, this training for "
            f"{trained}. Set the file's own."
        )
    extra, missing = set(start.deltas) - set(form.paths), set(form.paths) - set(start.deltas)
    if extra or missing:
        raise ConfigError(
            f"The file to start from has {len(start.deltas)} layers, this training {len(form.paths)}: "
            + "; ".join(
                f"{len(paths)} {what} (for example {min(paths)})"
                for paths, what in ((extra, "only in the file"), (missing, "only in the training"))
                if paths
            )
            + ". Choose the same targets as the file was trained with."
        )
    for path, layer in zip(form.paths, form.layers, strict=True):
        assert isinstance(layer, TrainableLayer)
        layer.load(start.deltas[path])


def collect(
    form: LoraForm, *, metadata: Mapping[str, str] | None = None, family: str | None = None, name: str = ""
) -> Adapter:
    """The trained tensors as an Adapter, on the CPU, in fp32; the form can go on training."""
    deltas = {
        path: layer.collect()
        for path, layer in zip(form.paths, form.layers, strict=True)
        if isinstance(layer, TrainableLayer)
    }
    words = {} if form.words is None else form.words.collect()
    facts = {**written({s.path: s.ranges for s in form._stacks}), **(metadata or {})}
    return Adapter(deltas, facts, family, name, embeddings=words)


def detach(form: LoraForm) -> None:
    """The models are again what they were before `attach`: no hook, the same `requires_grad`, every weight bit for
    bit."""
    if not form._models:
        raise LoraError("This LoRA is not attached to a model: it was detached before.")
    for handle in form._handles:
        handle.remove()
    for stack in form._stacks:
        stack.stop()
    if form.words is not None:
        form.words.remove()
    for p in form._frozen:
        p.requires_grad_(True)
    _take_back(form)
    form._handles, form._frozen, form._models = [], [], {}
