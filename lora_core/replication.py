"""Layer replication: a longer (or shorter) stack of a model's own layers, weights shared, each with a LoRA of its own.

    {"text_encoder.text_model.encoder.layers": [[0, 4], [2, 5]]}

of layers 0 1 2 3 4 makes the stack 0 1 2 3 2 3 4 (PEFT's `layer_replication`; SOLAR's depth up-scaling, arXiv
2312.15166). Places of the stack are counted anew from 0, and that is what paths in such a LoRA say: `layers.5` is the
sixth place, which holds layer 3.

The model's own list is left alone. The stack holds copies of its layers that share their parameters, and stands in the
list's place only while the module that runs it is called: between calls tree, names and weights are the base model's.
"""

from __future__ import annotations

import copy
import json
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from lora_core.adapter import COMPONENTS, live_path
from lora_core.errors import ConfigError, LoraError

KEY = "lora_loom.layer_replication"  # metadata of a file: JSON, path of a list -> ranges
_CHECKPOINTING = {"gradient_checkpointing", "_gradient_checkpointing_func"}  # how transformers switches it on
MOST = 256  # layers of a stack

Ranges = tuple[tuple[int, int], ...]  # (start, end), end not included, as PEFT
Map = dict[str, Ranges]  # adapter path of a list of layers -> ranges


def read_map(metadata: Mapping[str, str]) -> Map:
    """Of a LoRA file; {} for the most. Raises LoraError for one that cannot be read."""
    try:
        found = json.loads(metadata.get(KEY, "{}"))
        return {str(path): checked(str(path), ranges) for path, ranges in found.items()}
    except (ValueError, TypeError, AttributeError, RecursionError) as problem:
        raise LoraError(
            f"This LoRA is for replicated layers, and its map of them is damaged ({problem}). Get the file again."
        ) from problem


def written(found: Map) -> dict[str, str]:
    """The metadata that `read_map` reads."""
    return (
        {KEY: json.dumps({path: [list(r) for r in ranges] for path, ranges in found.items()})}
        if found
        else {}
    )


def checked(path: str, ranges: Sequence[Sequence[int]]) -> Ranges:
    """Raise ConfigError for what are no ranges."""
    pairs = tuple(tuple(pair) for pair in ranges)
    if not pairs or any(
        len(p) != 2 or not all(type(n) is int for n in p) or not 0 <= p[0] < p[1] for p in pairs
    ):
        raise ConfigError(
            f"layer_replication of {path} is {str(ranges)[:80]}; pairs (start, end) with 0 <= start < end were "
            "expected, such as ((0, 4), (2, 5))."
        )
    if sum(end - start for start, end in pairs) > MOST:
        raise ConfigError(f"layer_replication of {path} makes more than {MOST} layers. Use shorter ranges.")
    return tuple((start, end) for start, end in pairs)


def not_replicated(paths: Iterable[str], metadata: Mapping[str, str]) -> list[str]:
    """The layers outside replicated lists: those whose numbers say something about the model."""
    inside = tuple(f"{path}." for path in read_map(metadata))
    return [path for path in paths if not path.startswith(inside)]


def map_of(component: str, model: nn.Module, wanted: Any) -> Map:
    """What LoraConfig.layer_replication says of one model. Raises ConfigError for a list that is not there."""
    if not wanted:
        return {}
    lists = lists_in({component: model})
    if not isinstance(wanted, Mapping):
        if len(lists) != 1:
            raise ConfigError(
                f"layer_replication does not say of which of {len(lists)} lists of layers in {component}. Write "
                f'{{"{lists[0].partition(".")[2] if lists else "encoder.layers"}": ((0, 1), (0, 1))}}.'
            )
        return {lists[0]: checked(lists[0], wanted)}
    found: Map = {}
    for name, ranges in wanted.items():
        hits = [path for path in lists if path.partition(".")[2] == name or path.endswith(f".{name}")]
        if not hits:
            raise ConfigError(
                f"layer_replication names {name}, which is none of the lists of layers in {component} "
                f"({', '.join(path.partition('.')[2] for path in lists[:3])}, ...). Correct it."
            )
        found |= {path: checked(path, ranges) for path in hits}
    return found


class Stack:
    """One list of layers and the stack that stands for it."""

    def __init__(self, models: Mapping[str, nn.Module], path: str, ranges: Ranges) -> None:
        component, _, inside = path.partition(".")
        if component not in COMPONENTS or component not in models:
            raise ConfigError(
                f"layer_replication names {path}, of which this model has no part. Correct the path."
            )
        model = models[component]
        owner, _, self._name = live_path(inside, model).rpartition(".")
        try:
            self._owner = model.get_submodule(owner)
            own = getattr(self._owner, self._name)
        except AttributeError:
            own = None
        if not isinstance(own, nn.ModuleList):
            raise ConfigError(
                f"layer_replication names {path}, which is no list of layers in this model. Lists are such as "
                f"{', '.join(lists_in(models)[:3])}."
            )
        if max(end for _, end in ranges) > len(own):
            raise ConfigError(
                f"layer_replication of {path} reaches to {max(end for _, end in ranges)}; there are {len(own)} layers "
                f"in this model. End every range at {len(own)} or before."
            )
        self.path, self.ranges, self._own = path, ranges, own
        self._sources = [own[i] for start, end in ranges for i in range(start, end)]
        self.layers = nn.ModuleList(_shared(layer) for layer in self._sources)
        self._handles: list[RemovableHandle] = []

    @contextmanager
    def standing(self) -> Iterator[None]:
        """Inside, the tree has the stack in the list's place: to find layers in it."""
        self._owner._modules[self._name] = self.layers
        try:
            yield
        finally:
            self._owner._modules[self._name] = self._own

    def run(self) -> None:
        """From now on the model runs the stack."""
        self._handles = [
            self._owner.register_forward_pre_hook(self._enter, with_kwargs=True),
            self._owner.register_forward_hook(self._leave, always_call=True),
        ]

    def stop(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _enter(self, *_: Any) -> None:
        for source, layer in zip(self._sources, self.layers, strict=True):
            for theirs, ours in zip(source.modules(), layer.modules(), strict=True):
                ours.training = theirs.training
                for name in _CHECKPOINTING & vars(theirs).keys():
                    setattr(ours, name, getattr(theirs, name))
                for number, hook in theirs._forward_hooks.items():  # what libraries have hung there meanwhile
                    ours._forward_hooks.setdefault(number, hook)
        self._owner._modules[self._name] = self.layers

    def _leave(self, *_: Any) -> None:
        self._owner._modules[self._name] = self._own


def lists_in(models: Mapping[str, nn.Module]) -> list[str]:
    """The lists that can be replicated, by adapter path: a text encoder's layers, a UNet's transformer blocks."""
    found = []
    for component, model in models.items():
        for path, module in model.named_modules():
            if isinstance(module, nn.ModuleList) and path.endswith(("encoder.layers", "transformer_blocks")):
                prefix = "" if component == "unet" or path.startswith("text_model.") else "text_model."
                found.append(f"{component}.{prefix}{path}")
    return found


@contextmanager
def all_standing(stacks: Sequence[Stack]) -> Iterator[None]:
    with ExitStack() as both:
        for stack in stacks:
            both.enter_context(stack.standing())
        yield


class Stacks:
    """The stacks that loaded LoRAs have asked for, on one set of models."""

    def __init__(self, models: Mapping[str, nn.Module]) -> None:
        self._models = dict(models)
        self._worn: dict[str, Map] = {}  # LoRA -> its map
        self._paths: dict[str, tuple[str, ...]] = {}  # LoRA -> its layers
        self._running: dict[str, Stack] = {}

    def __bool__(self) -> bool:
        return bool(self._running)

    def wanted(self, name: str, metadata: Mapping[str, str], paths: Sequence[str]) -> list[Stack]:
        """Those that a LoRA needs, running ones where there are. Raises LoraError, with nothing changed, where a loaded
        LoRA with layers in the same list is made for another stack, ConfigError for a map that does not fit."""
        own = read_map(metadata)
        if self._worn.get(name, own) != own:
            raise LoraError(
                f'"{name}" is loaded already, for another stack of layers than this file is made for. Delete it first.'
            )
        for other, theirs in self._worn.items():
            if other == name:
                continue
            for path in {*own, *theirs}:
                inside = f"{path}."
                touches = path in own or any(p.startswith(inside) for p in paths)
                touched = path in theirs or any(p.startswith(inside) for p in self._paths[other])
                if touches and touched and own.get(path) != theirs.get(path):
                    raise LoraError(
                        f'"{name}" is made for {_said(own.get(path))} of {path}, and "{other}" for '
                        f"{_said(theirs.get(path))}: they cannot be worn together. Delete one of them first."
                    )
        return [self._running.get(path) or Stack(self._models, path, ranges) for path, ranges in own.items()]

    def wear(
        self, name: str, metadata: Mapping[str, str], paths: Sequence[str], stacks: Sequence[Stack]
    ) -> None:
        self._worn[name], self._paths[name] = read_map(metadata), tuple(paths)
        for stack in stacks:
            if stack.path not in self._running:
                self._running[stack.path] = stack
                stack.run()
        self._settle()

    def forget(self, *names: str) -> None:
        for name in names:
            self._worn.pop(name, None)
            self._paths.pop(name, None)
        self._settle()

    def _settle(self) -> None:
        needed = {path for own in self._worn.values() for path in own}
        for path in set(self._running) - needed:
            self._running.pop(path).stop()


def _shared(layer: nn.Module) -> nn.Module:
    """A copy that has the same parameters and buffers, and no hook."""
    if any(hasattr(module, "_hf_hook") for module in layer.modules()):
        raise LoraError(
            "A model whose layers are offloaded cannot be replicated. Open it without offloading."
        )
    tensors = [*layer.parameters(), *layer.buffers()]
    if any(not p.is_floating_point() or p.element_size() < 2 for p in layer.parameters()):
        raise LoraError(
            "A model that is quantised or cast to 8 bits cannot be replicated. Open it in fp16, bf16 or fp32."
        )
    twin = copy.deepcopy(layer, {id(t): t for t in tensors})
    for module in twin.modules():
        module._forward_hooks, module._forward_pre_hooks = OrderedDict(), OrderedDict()
    return twin


def _said(ranges: Ranges | None) -> str:
    return "the list as it is" if ranges is None else f"the stack {[list(r) for r in ranges]}"
