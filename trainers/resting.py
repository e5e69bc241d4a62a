"""Parts of the base that the steps do without leave the device; pictures call them back.

A part that nothing has changed is dropped, and read from its file again when it is wanted: on a machine without a card
the device's memory is all there is. One that a LoRA was trained on, or a base in fewer bits, waits in main memory. Of a
text encoder that trains to the end, the token table keeps the rows that the run's prompts ask for: it is a third of an
SD 1.5's encoder, and 200 MB of SDXL's two in half precision.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trainers.held_out import drift_prompts

if TYPE_CHECKING:
    from trainers.bench import Bench


def rest(bench: Bench, component: str) -> None:
    trained = {path.partition(".")[0] for path in bench.form.paths}
    if component in trained or bench.opened.quantised is not None:
        _of(bench, component).to("cpu")
    else:
        bench.opened.offload(component)


def narrow_tables(bench: Bench) -> None:
    """Leave out the rows of words that no step asks for, where the prompts can be counted. An encoder that stops in
    mid-run is judged by all of its weights then, and a new word is a row that is trained: these stay whole."""
    if bench.prompts is None or bench.form.words is not None or bench.opened.quantised is not None:
        return
    texts = sorted({*bench.prompts, *drift_prompts(bench.config)})
    done = {*bench.words.frozen, *_narrowed(bench)}
    for component in bench.words.components:
        table = _of(bench, component).get_input_embeddings()
        trained = any(layer.site.layer is table for layer in bench.form.of(component))
        if component not in done and not trained and bench.config.train.stop_of(component) is None:
            _narrow(table, bench.words.ids(component, texts))


def _narrow(table: nn.Embedding, ids: Tensor) -> None:
    """`ids` (N, 77): what can be asked for."""
    rows = torch.unique(ids).to(table.weight.device)
    place = torch.full((len(table.weight),), -1, device=rows.device)  # of any other word: an error
    place[rows] = torch.arange(len(rows), device=rows.device)
    table.weight = nn.Parameter(table.weight.detach()[rows], requires_grad=False)
    table.forward = partial(_look_up, table, place)  # type: ignore[method-assign]


def _look_up(table: nn.Embedding, place: Tensor, ids: Tensor) -> Tensor:
    return F.embedding(place[ids], table.weight)


def _widen(bench: Bench, component: str) -> None:
    model = _of(bench, component)
    table = model.get_input_embeddings()
    name = next(name for name, module in model.named_modules() if module is table)
    whole = bench.opened.reread(component, f"{name}.weight").to(table.weight.device, table.weight.dtype)
    table.weight = nn.Parameter(whole, requires_grad=False)
    del table.forward


def _narrowed(bench: Bench) -> list[str]:
    return [c for c in bench.words.components if "forward" in _of(bench, c).get_input_embeddings().__dict__]


@contextmanager
def awake(bench: Bench) -> Iterator[None]:
    """Inside, everything is on the device. Raises FileRefused where the base's files are no longer what they were."""
    # by their types: "cuda", as a device is asked for, and "cuda:0", as it answers, are not equal
    resting = [c for c in ("vae", *bench.live.models) if _of(bench, c).device.type != bench.device.type]
    narrowed = _narrowed(bench)
    try:
        for component in narrowed:
            _widen(bench, component)
        for component in resting:
            if _of(bench, component).device.type == "meta":
                bench.opened.reload(component, bench.device)
            else:
                _of(bench, component).to(bench.device)
        yield
    finally:
        for component in resting:
            rest(bench, component)
        narrow_tables(bench)
        give_back()


def give_back() -> None:
    """What was freed goes back to the system: glibc would keep hundreds of megabytes of main memory that opening a base
    and filling the caches have needed once, and torch as much of the card's."""
    torch.cuda.empty_cache()  # nothing on a machine without a card
    with suppress(AttributeError, OSError, TypeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def _of(bench: Bench, component: str) -> Any:
    return getattr(bench.live.pipeline, component)
