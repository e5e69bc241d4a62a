"""Prompts -> conditioning for the steps: by the encoders that train, and from memory for those that do not.

A frozen encoder is asked once for each prompt, alone: its bits never depend on what stood beside it in a batch, so a
run with kept embeddings is bit for bit the run without. Prompts that can be counted are all encoded before the first
step and kept on disk, and the encoder leaves the device. Where tags are shuffled there is no end of them: they are kept
in memory, the oldest making room, and the encoder stays.
"""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_core.errors import NotFinite, SaveFailed
from lora_core.train_form import LoraForm
from trainers.captions import possible, with_trigger
from trainers.conditioning import Conditioning, CutPrompt, encode_alone, joined, tokenize
from trainers.dataset import Example
from trainers.kept_tensors import FillReport, KeptTensors, all_finite, tensors_identity, weights_identity
from trainers.sending import fetched, sent

FORMAT = "text 1"
COUNTABLE = 4096  # prompts of a run; more are not encoded beforehand
MEMORY_BYTES = 512_000_000  # of embeddings; one of SDXL's in fp32 has 635 kB


def prompts(examples: Sequence[Example]) -> tuple[list[str], bool]:
    """Prompts of a dataset, sorted, and whether these are all there can be; where they are not, one of each caption."""
    found: set[str] = set()
    complete = True
    for lines, settings in dict.fromkeys(
        (e.lines, None if e.kind == "class" else e.source.settings) for e in examples
    ):
        mine = list(lines) if settings is None else possible(lines, settings, COUNTABLE)
        complete = complete and mine is not None
        if mine is None:
            assert settings is not None
            mine = [with_trigger(line, settings.trigger) for line in lines]
        found.update(mine)
    return sorted(found), complete and len(found) <= COUNTABLE


class Words:
    """Prompts -> conditioning, on `device`.

    words = Words(pipeline, device)
    words.freeze("text_encoder", known)        # from now on it is asked once for each prompt
    words(["a zxq cat", ...])                  # with gradients to the encoders that are not frozen
    """

    def __init__(
        self,
        pipeline: Any,
        device: torch.device,
        *,
        form: LoraForm | None = None,
        folder: Path | None = None,
    ) -> None:
        """`form`: what is trained about the encoders, if anything; `folder`: where embeddings are kept, None: nowhere,
        and nothing is kept in memory either."""
        self._pipeline, self._device, self._form, self._folder = pipeline, device, form, folder
        self.components = [
            c for c in ("text_encoder", "text_encoder_2") if getattr(pipeline, c, None) is not None
        ]
        self._identities: dict[str, str] = {}  # of the frozen ones
        self._ids: dict[str, dict[str, Tensor]] = {}
        self._kept: OrderedDict[tuple[str, str], Conditioning] = OrderedDict()
        self._bytes = 0
        self._files: KeptTensors | None = None

    @property
    def frozen(self) -> tuple[str, ...]:
        return tuple(self._identities)

    def cut(self, texts: Sequence[str]) -> tuple[CutPrompt, ...]:
        """What of these does not fit into 77 tokens."""
        return tokenize(self._pipeline, texts).cut

    def ids(self, component: str, texts: Sequence[str]) -> Tensor:
        """(N, 77) int64, on the CPU: what the encoder is given for these."""
        return torch.stack([self._tokens(text)[component] for text in texts])

    def freeze(
        self,
        component: str,
        known: Sequence[str] | None = None,
        check: Callable[[], None] = lambda: None,
    ) -> FillReport:
        """The encoder is as it will stay, with what was trained about it; it is never run with gradients again.

        `known` are all prompts there can be: they are encoded now, and the encoder may leave the device; None: there is
        no end of them. `check()` before each. Raises NotFinite for an encoder that overflows.
        """
        trained = {} if self._form is None else trained_of(self._form, component)
        weights = weights_identity(getattr(self._pipeline, component))
        self._identities[component] = f"{weights} {tensors_identity(trained)}"
        report = FillReport()
        if known is None or self._folder is None:
            return report
        self._files = self._files or KeptTensors(self._folder)
        for text in known:
            check()
            self._have(component, text, report)
        return report

    def __call__(self, captions: Sequence[str]) -> Conditioning:
        """-> conditioning of each caption, with gradients where the encoders train."""
        parts = []
        for component in self.components:
            if component in self._identities:
                rows = [self._sent(self._have(component, text, FillReport())) for text in captions]
                pooled = [row.pooled for row in rows if row.pooled is not None]
                part = Conditioning(
                    torch.cat([row.hidden for row in rows]), torch.cat(pooled) if pooled else None
                )
            else:
                encoder, ids = getattr(self._pipeline, component), self.ids(component, captions)
                part = encode_alone(encoder, component, ids, both=len(self.components) > 1)
            parts.append(self._sent(part))
        return joined(parts)

    def _sent(self, part: Conditioning) -> Conditioning:
        pooled = None if part.pooled is None else sent(part.pooled, self._device)
        return Conditioning(sent(part.hidden, self._device), pooled)

    def _tokens(self, text: str) -> dict[str, Tensor]:
        if text not in self._ids:
            if len(self._ids) >= COUNTABLE:
                self._ids.clear()
            self._ids[text] = {c: ids[0] for c, ids in tokenize(self._pipeline, [text]).ids.items()}
        return self._ids[text]

    def _have(self, component: str, text: str, report: FillReport) -> Conditioning:
        """From memory, from disk, or from the encoder."""
        if (kept := self._kept.get((component, text))) is not None:
            self._kept.move_to_end((component, text))
            report.found += 1
            return kept
        if self._files is None:
            report.built += 1
            return self._remember(component, text, self.encode(component, text))
        key = self._key(component, text)
        tensors = self._files.load(key)
        if tensors is not None and tensors.keys() - {"pooled"} == {"hidden"}:
            report.found += 1
            return self._remember(component, text, Conditioning(**tensors))
        if self._files.path(key).exists():
            report.rebuilt.append(text)
        made = self.encode(component, text)
        report.built += 1
        try:
            self._files.save(key, _tensors(made))
        except SaveFailed as problem:  # the training goes on from memory; the next run encodes again
            report.unsaved[text] = str(problem)
        return self._remember(component, text, made)

    def _remember(self, component: str, text: str, made: Conditioning) -> Conditioning:
        if self._folder is not None:
            self._kept[component, text] = made
            self._bytes += _size(made)
            while self._bytes > MEMORY_BYTES and len(self._kept) > 1:
                self._bytes -= _size(self._kept.popitem(last=False)[1])
        return made

    def encode(self, component: str, text: str) -> Conditioning:
        encoder, ids = getattr(self._pipeline, component), self._tokens(text)[component][None]
        with torch.no_grad(), torch.autocast(encoder.device.type, enabled=False), _no_dropout(self._form):
            made = encode_alone(encoder, component, ids, both=len(self.components) > 1)
        if self._files is None:  # in the middle of a step, which would have to wait: NaN is found in its loss
            return Conditioning(**{name: fetched(t) for name, t in _tensors(made).items()})
        made = made.to("cpu")
        if not all_finite(_tensors(made)):
            raise NotFinite(
                f'{component} makes NaN or Inf of "{text}" in {encoder.dtype}. Set train.base_dtype = "fp32" or "bf16".'
            )
        return made

    def _key(self, component: str, text: str) -> str:
        """SHA-256 of all that decides an embedding; the tokens, for these are what the encoder is given."""
        ids = self._tokens(text)[component].tolist()
        facts = [FORMAT, self._identities[component], component, len(self.components), ids]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def trained_of(form: LoraForm, component: str) -> dict[str, Tensor]:
    """What is trained about one model, and new words."""
    found = {
        f"{path}.{name}": p.detach()
        for path, layer in zip(form.paths, form.layers, strict=True)
        if path.split(".", 1)[0] == component
        for name, p in layer.named_parameters()
    }
    if form.words is not None:
        found |= {f"words.{name}": p.detach() for name, p in form.words.named_parameters()}
    return found


@contextmanager
def _no_dropout(form: LoraForm | None) -> Iterator[None]:
    training = form is not None and form.training
    if form is not None:
        form.eval()
    try:
        yield
    finally:
        if form is not None:
            form.train(training)


def _tensors(made: Conditioning) -> Mapping[str, Tensor]:
    return {"hidden": made.hidden} | ({} if made.pooled is None else {"pooled": made.pooled})


def _size(made: Conditioning) -> int:
    return sum(t.numel() * t.element_size() for t in _tensors(made).values())
