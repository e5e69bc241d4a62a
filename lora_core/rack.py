"""The rack: all active LoRAs of a layer as one stacked low-rank update.

    y = base(x) + ((x A_catᵀ) * w) B_catᵀ              three kernels for any number of LoRAs

A_cat (R, in) and B_cat (out, R) hold the factors of every loaded LoRA, s = alpha/rank folded into B; w (rows, R)
repeats each LoRA's user weight over its rank slots. Every layer's w is a view of its component's ONE contiguous buffer,
so a slider is one small copy and never touches a module. Kinds that are more than factors add terms (see worn.py), one
slot of w each.

Images of one batch may differ: row i of w serves every batch row congruent to i; with classifier-free guidance, where
a batch is [unconditional..., conditional...], there are as many rows as the batch has.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_core.adapter import COMPONENTS, Adapter
from lora_core.errors import LoraError
from lora_core.layer_rack import LayerRack
from lora_core.mix import AdapterWeight, Mix
from lora_core.worn import wear


class Rack:
    """The live form of a Mix on a model. No module is added; a layer worn by no LoRA carries no hook."""

    def __init__(self) -> None:
        self.layers: dict[str, LayerRack] = {}
        self._enabled = True
        self._entries: list[tuple[str, LayerRack]] = []  # (LoRA, layer) in the order of the slots
        self._groups: list[_Group] = []  # one per component and device
        self._looking_up: list[LayerRack] = []  # embeddings
        self._alive: list[bool] = []
        self._shown: tuple[Sequence[Mix], float, bool] = ([{}], 0.0, False)
        self._lay_out()

    def load(self, name: str, adapter: Adapter, layers: Mapping[str, nn.Module]) -> None:
        """Put `adapter` on `layers` (adapter path -> module), none of which is fused, in place of what has its name.

        Everything that can fail comes first: an error leaves the rack as it was.
        """
        deaf = {s.component for s in self.layers.values() if s.armed}
        missed = [p for p in layers if p not in self.layers and p.split(".", 1)[0] in deaf]
        if missed:
            raise LoraError(
                f'"{name}" has {len(missed)} layers ({missed[0]}, ...) for which the compiled model was not armed, and '
                "which it would ignore. Disarm, load it, and compile again."
            )
        ready = {p: wear(name, adapter.deltas[p], layer, p) for p, layer in layers.items()}
        fresh = {p: LayerRack(layer, p) for p, layer in layers.items() if p not in self.layers}
        for path, worn in ready.items():
            slot = self.layers.get(path) or fresh[path]
            slot.reserve(sum(slot.ranks) + worn.rank)
        for path, slot in list(self.layers.items()):
            slot.drop(name)
            if not slot.worn and path not in ready:
                self._take_off(path)
        for path, worn in ready.items():
            if path in fresh:
                self._hang(fresh[path])
            self.layers[path].put(worn)
        self._lay_out()

    @property
    def enabled(self) -> bool:
        """Off while the mix is fused: then no layer carries a hook, but for those that a compiled model knows."""
        return self._enabled

    @enabled.setter
    def enabled(self, on: bool) -> None:
        self._enabled = on
        for slot in self.layers.values():
            if on and slot.handle is None:
                self._hang(slot)
            elif not on and slot.handle is not None and not slot.armed:
                slot.handle.remove()
                slot.handle = None

    def _hang(self, slot: LayerRack) -> LayerRack:
        self.layers[slot.path] = slot
        slot.handle = slot.layer.register_forward_hook(self._hook(slot))
        return slot

    def _take_off(self, path: str) -> None:
        slot = self.layers[path]
        if slot.armed:
            return
        if slot.handle is not None:
            slot.handle.remove()
        del self.layers[path]

    def delete(self, *names: str) -> None:
        for path, slot in list(self.layers.items()):
            if all(w.name in names for w in slot.worn) and not slot.armed:
                self._take_off(path)  # without moving anything in buffers that are about to go
                continue
            for name in names:
                slot.drop(name)
            slot.reserve(sum(slot.ranks))
        self._lay_out()

    def arm(self, layers: Mapping[str, nn.Module], rank: int) -> None:
        """Hooks on all of `layers` and buffers for `rank` slots: before a model is compiled."""
        for path, layer in layers.items():
            slot = self.layers.get(path) or self._hang(LayerRack(layer, path))
            slot.armed = True
            slot.reserve(max(rank, sum(slot.ranks), 1))
            slot.view()
        self._lay_out()

    def disarm(self) -> None:
        for path, slot in list(self.layers.items()):
            slot.armed = False
            slot.reserve(sum(slot.ranks))
            slot.view()
            if not slot.worn:
                self._take_off(path)
        self._lay_out()

    # --- the weights ---

    def set_mixes(self, mixes: Sequence[Mix], *, progress: float = 0.0, guided: bool = False) -> None:
        """One Mix for all images of a batch, or one per image: one small copy per component.

        `progress` 0..1 of the denoising, for curves; `guided`: the batch has an unconditional half in front.
        """
        self._shown = (mixes, progress, guided)
        values = self._values(mixes, progress, guided)  # (rows, entries)
        for group in self._groups:
            group.write(values)
        for slot in self._looking_up:
            slot.images = len(mixes)
        alive = (values != 0).any(0).tolist()
        if alive != self._alive:
            self._alive = alive
            worn_by: dict[str, bool] = {}
            for (_, slot), lives in zip(self._entries, alive, strict=True):
                worn_by[slot.path] = worn_by.get(slot.path, False) or lives
            for path, slot in self.layers.items():
                slot.idle = not worn_by.get(path, False)

    def _values(self, mixes: Sequence[Mix], progress: float, guided: bool) -> Tensor:
        """(rows, entries): the weight of each LoRA in each layer, for each row of the batch."""
        kept = [self._row(mix, progress) for mix in mixes]
        if not guided or (len(mixes) == 1 and not any(w.half == "conditional" for w in mixes[0].values())):
            return torch.stack(kept)
        unguided = []
        for mix, row in zip(mixes, kept, strict=True):
            silent = [
                mix[name].half == "conditional" and slot.component == "unet" for name, slot in self._entries
            ]
            unguided.append(torch.where(torch.tensor(silent, dtype=torch.bool), 0.0, row))
        return torch.stack(unguided + kept)

    def _row(self, mix: Mix, progress: float) -> Tensor:
        """Component weights by one look-up for all entries; weights per block by path."""
        table = [getattr(mix.get(n, _SILENT), c) for n in self._names for c in COMPONENTS]
        row = torch.tensor(table, dtype=torch.float32)[self._code] if table else torch.empty(0)
        special = {n for n, w in mix.items() if w.blocks or w.curve}
        if special:
            for i, (name, slot) in enumerate(self._entries):
                if name in special:
                    row[i] = mix[name].at(slot.path, progress=progress)
        return row

    def _lay_out(self) -> None:
        """After any change of what is worn: which slot belongs to which LoRA, and one buffer per component."""
        self._entries, self._groups, self._alive = [], [], []
        self._looking_up = [slot for slot in self.layers.values() if slot.looks_up]
        counts: dict[tuple[str, torch.device], tuple[list[LayerRack], list[int], list[int]]] = {}
        for slot in self.layers.values():
            slots, owners, sizes = counts.setdefault((slot.component, slot.place.device), ([], [], []))
            slots.append(slot)
            entries = slot.entries
            spare = slot.slots - sum(n for _, n in entries)  # the zeroed rest of an armed bucket
            ranks = len([r for r in slot.ranks if r])
            if spare and not ranks:
                owners.append(-1)
                sizes.append(spare)
            for i, (name, size) in enumerate(entries):
                owners.append(len(self._entries))
                sizes.append(size + (spare if i == ranks - 1 else 0))
                self._entries.append((name, slot))
        self._names = sorted({name for name, _ in self._entries})
        at = {name: 3 * i for i, name in enumerate(self._names)}
        self._code = torch.tensor(
            [at[name] + COMPONENTS.index(slot.component) for name, slot in self._entries], dtype=torch.long
        )
        for (_, device), (slots, owners, sizes) in counts.items():
            self._groups.append(_Group(device, slots, owners, sizes))
        self.set_mixes(*self._still_worn())

    def _still_worn(self) -> tuple[Sequence[Mix]]:
        """What was shown, without what has gone and with what has come at weight 0: the caller sets it next."""
        return ([{n: mix.get(n, _SILENT) for n in self._names} for mix in self._shown[0]],)

    def follow(self, slot: LayerRack, x: Tensor) -> None:
        """Called from a hook whose input `x` lies elsewhere: the whole component has moved, or shows its dtype now."""
        shown = self._shown
        for other in self.layers.values():
            if other is slot or (other.component == slot.component and other.place == slot.place):
                other.move(x.device, other.place.dtype or x.dtype)
        self._lay_out()
        self.set_mixes(shown[0], progress=shown[1], guided=shown[2])

    def _hook(self, slot: LayerRack) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor | None]:
        def add(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            if not self._enabled or (not slot.armed and slot.idle):
                return None
            x = inputs[0]
            if slot.place.dtype is None or slot.place.device != x.device:
                self.follow(
                    slot, x if x.is_floating_point() else output
                )  # words are numbers of no such dtype
            return slot.forward(x, output)

        return add


_SILENT = AdapterWeight.parse("silent", 0.0)


class _Group:
    """The slots of one component on one device, and the one buffer their weights are views of."""

    def __init__(
        self, device: torch.device, slots: list[LayerRack], owners: list[int], sizes: list[int]
    ) -> None:
        self.device, self.slots = device, slots
        self.owner = torch.repeat_interleave(torch.tensor(owners), torch.tensor(sizes))  # slot -> entry
        self.ends = [0, *accumulate(slot.slots for slot in slots)]
        self.buffer: Tensor | None = None

    def write(self, values: Tensor) -> None:
        """values (rows, entries)."""
        padded = F.pad(values, (0, 1))  # owner -1, the slots that nobody has: weight 0
        rows = padded[:, self.owner]
        if self.buffer is not None and self.buffer.shape == rows.shape:
            self.buffer.copy_(rows)
            return
        self.buffer = rows.to(self.device)
        for slot, start, end in zip(self.slots, self.ends, self.ends[1:], strict=False):
            slot.weigh(self.buffer[:, start:end])
