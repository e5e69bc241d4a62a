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
from torch.utils.hooks import RemovableHandle

from lora_core.adapter import Adapter, file_path
from lora_core.config import LoraConfig
from lora_core.errors import ConfigError, LoraError
from lora_core.targets import find_targets
from lora_core.trainable import Site
from lora_core.trainable.layer import TrainableLayer


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
        form.layers.append(TrainableLayer(Site(layer, path, layer_config, generator)))
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
