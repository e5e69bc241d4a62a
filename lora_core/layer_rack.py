"""Everything that one layer wears, stacked: two buffers of a bucket's size, the terms beside them, and the call.

y = base(x) + ((x A_catᵀ) * w) B_catᵀ + the extras' terms          (see rack.py)
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from lora_core.terms import Shift, through
from lora_core.worn import Place, Worn, weight_shape

BUCKETS = (0, 16, 64, 128, 256)  # then multiples of 128: a compiled model sees few shapes


def bucket(rank: int) -> int:
    """The smallest bucket that holds `rank` slots."""
    return next((b for b in BUCKETS if b >= rank), -(-rank // 128) * 128)


class LayerRack:
    """Everything worn by one layer, stacked in buffers of a bucket's size: a new LoRA is copied into its own slots."""

    def __init__(self, layer: nn.Module, path: str) -> None:
        self.layer, self.path, self.place = layer, path, Place.of(layer)
        self.component = path.split(".", 1)[0]
        self.conv = isinstance(layer, nn.Conv2d)
        self.looks_up = isinstance(layer, nn.Embedding)
        self.images = 1  # of a batch, where they wear different things; kept for what looks up alone
        self.out, self.shape = weight_shape(layer)
        self.worn: list[Worn] = []  # with empty factors: those lie in the buffers
        self.ranks: list[int] = []
        self.downs = self._empty(0, *self.shape)  # (capacity, in[, k, k])
        self.ups = self._empty(0, self.out)  # (capacity, out): Bᵀ
        self.handle: RemovableHandle | None = None
        self.rank = 0
        self.weigh(torch.empty(0, 0))
        self.idle = (
            True  # every weight is 0: the hook returns at once, and the output is the base's, bit for bit
        )
        self.armed = (
            False  # for a compiled model: the whole bucket is used, and nothing branches on what is worn
        )
        self.view()

    # --- what is worn ---

    def reserve(self, rank: int) -> None:
        """Room for `rank` slots; what is worn stays. The only thing here that can run out of memory.

        Room that is left is given back only where three quarters of it are free: LoRAs that come and go move nothing.
        """
        used, size, room = sum(self.ranks), bucket(rank), len(self.downs)
        if size <= room and (self.armed or room < 4 * size or room == size):
            return
        downs, ups = self._empty(size, *self.shape), self._empty(size, self.out)
        downs[:used], ups[:used] = self.downs[:used], self.ups[:used]
        downs[used:], ups[used:] = 0, 0
        self.downs, self.ups = downs, ups
        self.view()

    def put(self, worn: Worn) -> None:
        start = sum(self.ranks)
        self.downs[start : start + worn.rank].copy_(worn.down)
        self.ups[start : start + worn.rank].copy_(worn.up.T)
        terms = worn.extras if worn.bias is None else (*worn.extras, Shift(worn.bias))
        extras = tuple(e.to(self.place.device, self.place.dtype) for e in terms)
        self.worn.append(Worn(worn.name, worn.down[:0], worn.up[:, :0], extras))
        self.ranks.append(worn.rank)
        self.view()

    def drop(self, name: str) -> None:
        """Those behind it move up; `reserve` shrinks the buffer to its bucket."""
        at = next((i for i, w in enumerate(self.worn) if w.name == name), None)
        if at is None:
            return
        start, used, rank = sum(self.ranks[:at]), sum(self.ranks), self.ranks[at]
        for buffer in (self.downs, self.ups):
            buffer[start : used - rank] = buffer[start + rank : used].clone()
            buffer[used - rank : used] = 0
        del self.worn[at], self.ranks[at]
        self.view()

    def _empty(self, *shape: int) -> Tensor:
        return torch.empty(*shape, device=self.place.device, dtype=self.place.dtype or torch.float32)

    def view(self) -> None:
        """The used part of the buffers, as the kernels want it: made here, so that a call makes nothing."""
        used = len(self.downs) if self.armed else sum(self.ranks)
        self.rank = used
        self.extras = [e for w in self.worn for e in w.extras]
        self.down, self.up = self.downs[:used], self.ups[:used]  # (R, in[, k, k]), (R, out)
        if self.conv:
            self.up_conv = self.up.T[:, :, None, None].contiguous()

    def move(self, device: torch.device, dtype: torch.dtype) -> None:
        """The layer has been found to compute elsewhere (offloading) or in another dtype (casting, quantisation)."""
        self.place = Place(device, dtype)
        self.downs, self.ups = self.downs.to(device, dtype), self.ups.to(device, dtype)
        self.worn = [
            Worn(w.name, w.down, w.up, tuple(e.to(device, dtype) for e in w.extras)) for w in self.worn
        ]
        self.view()

    @property
    def entries(self) -> list[tuple[str, int]]:
        """(LoRA, slots), in the order of the slots: the ranks of all, then the extras of all."""
        ranks = [(w.name, r) for w, r in zip(self.worn, self.ranks, strict=True) if r]
        return ranks + [(w.name, 1) for w in self.worn for _ in w.extras]

    @property
    def slots(self) -> int:
        return self.rank + len(self.extras)

    # --- the call ---

    def weigh(self, weights: Tensor) -> None:
        """`weights` (rows, slots), a view of the rack's buffer, which is written to in place. Cut here into what a call
        takes: a slice costs a small layer a third of its own call."""
        self.weights = weights
        self.shared = len(weights) == 1  # one row for every image
        self.rank_weights = weights[:, : self.rank]

    def forward(self, x: Tensor, base_out: Tensor) -> Tensor:
        """Writes into `base_out`, which the layer has just made, and returns it."""
        if base_out.requires_grad:  # what bitsandbytes made cannot be written into where a gradient is wanted
            base_out = base_out.clone()
        if self.looks_up:
            x, base_out = self._for_each_image(x, base_out)
        elif x.dtype is not self.downs.dtype:  # autocast: the layer's own dtype
            x = x.to(self.downs.dtype)
        added = self._extra_terms(x, base_out) if self.extras else None
        if self.rank:
            base_out = self._factors(x, base_out)
        return base_out if added is None else base_out.add_(added)

    def _extra_terms(self, x: Tensor, base_out: Tensor) -> Tensor | None:
        weights, added = self._rows(self.weights, x.shape[0]), None
        for i, extra in enumerate(self.extras, self.rank):
            term = extra.term(self.layer, x, base_out).to(base_out.dtype)
            term = term * weights[:, i].to(base_out.dtype).reshape(-1, *[1] * (base_out.dim() - 1))
            added = term if added is None else added + term
        return added

    def _factors(self, x: Tensor, base_out: Tensor) -> Tensor:
        w = self.rank_weights if self.shared else self._rows(self.rank_weights, x.shape[0])
        if self.conv:
            low = through(self.layer, x, self.down)
            low.mul_(w[:, :, None, None])
            return base_out.add_(F.conv2d(low, self.up_conv))
        if self.looks_up:  # a word's row of up (num, R), times down (R, dim)
            low = F.embedding(x, self.up.T)
            w = w.reshape(len(w), *[1] * (low.dim() - 2), self.rank)
            return base_out.add_((low * w.to(low.dtype)) @ self.down)
        low = F.linear(x, self.down)  # (N, ..., R)
        if not self.shared:
            w = w.reshape(len(w), *[1] * (x.dim() - 2), self.rank)
        low.mul_(w)  # fp32 times the layer's dtype, rounded once
        if not base_out.is_contiguous() or base_out.dtype is not low.dtype:
            return base_out.add_(low @ self.up)
        if x.dim() == 2:
            return base_out.addmm_(low, self.up)
        base_out.view(-1, self.out).addmm_(low.view(-1, self.rank), self.up)
        return base_out

    def _for_each_image(self, words: Tensor, base_out: Tensor) -> tuple[Tensor, Tensor]:
        """Positions come once for a whole batch: where its images wear different things, once for each of them."""
        if self.shared or words.shape[0] > 1 or self.images == 1:
            return words, base_out
        return words.expand(self.images, -1), base_out.expand(self.images, -1, -1).clone()

    @staticmethod
    def _rows(weights: Tensor, batch: int) -> Tensor:
        """One row for all, or one for each of the batch."""
        rows = len(weights)
        if rows in (1, batch):
            return weights
        if rows > batch:  # a text encoder, which sees no unconditional half
            return weights[rows - batch :]
        return weights.repeat(batch // rows, 1)
