"""The trainable form: attach a LoRA to models, train it, collect it, detach it.

The trainable tensors live in ONE module outside the base's tree, reached by forward hooks: fp8 casting,
accelerate's offload and gradient checkpointing never see them, and DDP wraps that module. (Children of the
frozen layers were tried: they turned fp8 or meta behind one's back.)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from lora_core import algebra
from lora_core.adapter import Adapter, file_path, weight_of
from lora_core.config import LoraConfig
from lora_core.deltas import Delta
from lora_core.deltas.low_rank import LowRank
from lora_core.deltas.magnitude import WithMagnitude
from lora_core.errors import ConfigError, LoraError
from lora_core.init import INITIALISERS
from lora_core.targets import Layer, find_targets


class TrainableLayer(nn.Module):
    """One layer's A, B and, for DoRA, m. Called by the hook with the layer's input and output.

    LoRA:  y = base(x) + s B A x
    DoRA:  y = base(x) + (g - 1) (base(x) - bias) + g s B A x,  g = m / |V|, |V| a constant for the gradient
           (arXiv 2402.09353 §4.3). With dropout the low-rank part sees the dropped-out input, the base part the
           full one; PEFT recomputes the base on the dropped-out input there.
    """

    magnitude: nn.Parameter | None

    def __init__(
        self, layer: Layer, config: LoraConfig, path: str, generator: torch.Generator | None
    ) -> None:
        super().__init__()
        self._layer = (layer,)  # in a tuple, so that the frozen layer is not registered as a child
        weight, rank = weight_of(layer), config.rank_at(path)
        out, *inner = weight.shape
        self.rank, self.alpha = rank, config.alpha_at(path)
        self.rank_stabilized = config.rank_stabilized
        self.down = nn.Parameter(torch.empty(rank, *inner, dtype=torch.float32, device=weight.device))
        up_shape = (out, rank, *[1] * (weight.dim() - 2))
        self.up = nn.Parameter(torch.empty(up_shape, dtype=torch.float32, device=weight.device))
        INITIALISERS[config.init](self.down, self.up, generator)
        self.dropout = nn.Dropout(config.dropout)
        self._n0: Tensor | None = None
        self._norm: tuple[tuple[int, int], Tensor] | None = None
        self.magnitude = None
        if config.variant == "dora":
            self.magnitude = nn.Parameter(self._row_norms().clone())

    @property
    def scale(self) -> float:
        return algebra.lora_scale(alpha=self.alpha, rank=self.rank, rank_stabilized=self.rank_stabilized)

    def forward(self, x: Tensor, base_out: Tensor) -> Tensor:
        (layer,) = self._layer
        x = self.dropout(x.to(self.down.dtype))
        if isinstance(layer, nn.Conv2d):
            low = F.conv2d(layer._conv_forward(x, self.down, None), self.up)  # the base's stride and padding
        else:
            low = F.linear(F.linear(x, self.down), self.up)
        if self.magnitude is None:
            return base_out + (low * self.scale).to(base_out.dtype)
        gain = _along_outputs(self.magnitude / self._row_norms(), layer)
        plain = base_out if layer.bias is None else base_out - _along_outputs(layer.bias, layer)
        return base_out + ((gain - 1) * plain + gain * (low * self.scale)).to(base_out.dtype)

    @torch.no_grad()
    def _row_norms(self) -> Tensor:
        """|V| per output, recomputed only after an optimizer step has touched A or B."""
        versions = (self.down._version, self.up._version)
        if self._norm is None or self._norm[0] != versions or self._norm[1].device != self.down.device:
            weight = weight_of(self._layer[0]).to(self.down.device)
            if self._n0 is None or self._n0.device != self.down.device:
                self._n0 = algebra.row_norms_squared(weight)
            norm = algebra.row_norms(weight, self.down, self.up, scale=self.scale, n0=self._n0)
            self._norm = (versions, norm)
        return self._norm[1]

    def collect(self) -> Delta:
        # rsLoRA is stored as alpha * sqrt(r): readers that know only alpha/r then compute the same ΔW
        alpha = self.alpha * self.rank**0.5 if self.rank_stabilized else self.alpha
        low = LowRank(self.down.detach().cpu().clone(), self.up.detach().cpu().clone(), alpha)
        if self.magnitude is None:
            return low
        column = self.magnitude.detach().cpu().clone().reshape(-1, *[1] * (self.up.dim() - 1))
        return WithMagnitude(low, column)

    @torch.no_grad()
    def load(self, delta: Delta, path: str) -> None:
        """Begin from an existing delta of the same rank; its scale is folded so that ΔW is the same."""
        inner = delta.inner if isinstance(delta, WithMagnitude) else delta
        if not isinstance(inner, LowRank) or inner.rank != self.rank:
            found = inner.rank if isinstance(inner, LowRank) else type(inner).__name__
            raise ConfigError(
                f"{path}: the file to start from has rank {found}, this training rank {self.rank}. Set rank = {found}."
            )
        if isinstance(delta, WithMagnitude) != (self.magnitude is not None):
            kind = "dora" if isinstance(delta, WithMagnitude) else "lora"
            raise ConfigError(
                f'{path}: the file to start from is of variant "{kind}". Set variant = "{kind}".'
            )
        self.down.copy_(inner.down.reshape(self.down.shape))
        self.up.copy_(inner.up.reshape(self.up.shape) * (inner.scale / self.scale))
        if isinstance(delta, WithMagnitude) and self.magnitude is not None:
            if algebra.magnitude_axis(delta.magnitude, weight_of(self._layer[0]).shape) != 0:
                raise ConfigError(
                    f"{path}: this DoRA scales input columns; training continues only output-axis DoRAs."
                )
            self.magnitude.copy_(delta.magnitude.reshape(-1))


def _along_outputs(vector: Tensor, layer: nn.Module) -> Tensor:
    """(out,) shaped to multiply the layer's output: (..., out) or (N, out, h, w)."""
    return vector.reshape(-1, 1, 1) if isinstance(layer, nn.Conv2d) else vector


class LoraForm(nn.Module):
    """What `attach` returns: only trainable tensors. `paths[i]` is the adapter path of `layers[i]`."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList()
        self.paths: list[str] = []
        self.enabled = True
        self._handles: list[RemovableHandle] = []
        self._frozen: list[nn.Parameter] = []  # base parameters that were trainable before attach
        self._models: dict[str, nn.Module] = {}

    def by_component(self) -> dict[str, list[nn.Parameter]]:
        """Trainable parameters by component, for per-component learning rates."""
        groups: dict[str, list[nn.Parameter]] = {}
        for path, layer in zip(self.paths, self.layers, strict=True):
            groups.setdefault(path.split(".", 1)[0], []).extend(layer.parameters())
        return groups

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Inside, the models answer as the base does."""
        before, self.enabled = self.enabled, False
        try:
            yield
        finally:
            self.enabled = before

    def _hook(self, own: TrainableLayer, layer: nn.Module) -> None:
        def add(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            return own(inputs[0], output) if self.enabled else None

        self._handles.append(layer.register_forward_hook(add))


Models = nn.Module | Mapping[str, nn.Module]


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
) -> LoraForm:
    """Freeze `models` (a module, or component -> module) and give their targets a trainable fp32 LoRA.

    `config` may differ by component. `start` is an adapter to begin from; it must name exactly the layers that
    are trained. On any error the models are left as they were.
    """
    form, parts = LoraForm(), by_name(models)
    configs = dict(config) if isinstance(config, Mapping) else dict.fromkeys(parts, config)
    plan = [
        (c, path, layer, configs[c]) for c, m in parts.items() for path, layer in find_targets(m, configs[c])
    ]
    for component, path, layer, layer_config in plan:
        form.paths.append(file_path(component, path))
        form.layers.append(TrainableLayer(layer, layer_config, path, generator))
    if start is not None:
        _start_from(form, start)
    for (_, _, layer, _), own in zip(plan, form.layers, strict=True):
        assert isinstance(own, TrainableLayer)
        form._hook(own, layer)
    form._models = parts
    form._frozen = [p for m in parts.values() for p in m.parameters() if p.requires_grad]
    for p in form._frozen:
        p.requires_grad_(False)
    return form


def _start_from(form: LoraForm, start: Adapter) -> None:
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
        layer.load(start.deltas[path], path)


def collect(
    form: LoraForm, *, metadata: Mapping[str, str] | None = None, family: str | None = None, name: str = ""
) -> Adapter:
    """The trained tensors as an Adapter, on the CPU, in fp32; the form can go on training."""
    deltas = {
        path: layer.collect()
        for path, layer in zip(form.paths, form.layers, strict=True)
        if isinstance(layer, TrainableLayer)
    }
    return Adapter(deltas, dict(metadata or {}), family, name)


def detach(form: LoraForm) -> None:
    """The models are again what they were before `attach`: no hook, the same `requires_grad`."""
    if not form._models:
        raise LoraError("This LoRA is not attached to a model: it was detached before.")
    for handle in form._handles:
        handle.remove()
    for p in form._frozen:
        p.requires_grad_(True)
    form._handles, form._frozen, form._models = [], [], {}
