"""Words that a text encoder does not know: rows beside its vocabulary (textual inversion, arXiv 2208.01618).

The table of the base is neither written to nor made larger. A word gets a number behind the tokenizer's own, in a copy
of the tokenizer that stands in the pipeline for as long as there are such words; two hooks on the encoder see to it:

    the encoder       gets a known token's number in the word's place, so that all that looks at the numbers stays right
                      (CLIP finds the end of a prompt as its largest number; a larger one would be taken for it)
    its embeddings    get the word's row where that place is

Without words the pipeline has its own tokenizer object again and the encoder no hook. A word of n vectors is n tokens,
"<fox>", "<fox>_1", ...: diffusers' pipelines spell the first one out.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tokenizers import AddedToken
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lora_core.adapter import live_path, weight_of
from lora_core.errors import ConfigError, LoraError, WrongFamily

TOKENIZERS = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}
PLACEHOLDER = 0  # "!": no mark of beginning or end

Embeddings = Mapping[str, Mapping[str, Tensor]]  # word -> component -> rows (n, width)


class NewTokens:
    """The words that have been added to one pipeline, by whoever added them."""

    def __init__(self, pipeline: Any, models: Mapping[str, nn.Module]) -> None:
        self._encoders = {
            component: _Encoder(pipeline, component, models[component])
            for component in TOKENIZERS
            if component in models and getattr(pipeline, TOKENIZERS[component], None) is not None
        }

    def words(self) -> dict[str, str]:
        """Word -> who added it."""
        return {one.word: one.owner for encoder in self._encoders.values() for one in encoder.worn}

    def check(self, owner: str, embeddings: Embeddings) -> None:
        """Raise ConfigError for a word that means something already (but for what `owner` added), WrongFamily for rows
        of another width or for other encoders. Changes nothing."""
        taken = {word: whose for word, whose in self.words().items() if whose != owner}
        for word, rows in embeddings.items():
            check_word(word)
            if word in taken:
                raise ConfigError(
                    f'"{word}" of "{owner}" is a new word of "{taken[word]}" already, and can mean one thing only. '
                    f'Delete "{taken[word]}" first.'
                )
            if set(rows) != set(self._encoders):
                raise WrongFamily(
                    f'"{word}" of "{owner}" has rows for {_joined(rows)}; this model has {_joined(self._encoders)}. '
                    "Load it on the family of models it was trained on."
                )
        for component, encoder in self._encoders.items():
            encoder.check([_Word(word, owner, rows[component]) for word, rows in embeddings.items()])

    def add(self, owner: str, embeddings: Embeddings) -> None:
        """Words that prompts may use from now on, in place of what `owner` had added. Raises as `check` does, with
        nothing changed. Rows may be parameters: gradients reach them."""
        self.check(owner, embeddings)
        for component, encoder in self._encoders.items():
            kept = [one for one in encoder.worn if one.owner != owner]
            encoder.wear(kept + [_Word(word, owner, rows[component]) for word, rows in embeddings.items()])

    def remove(self, *owners: str) -> None:
        for encoder in self._encoders.values():
            encoder.wear([one for one in encoder.worn if one.owner not in owners])


def check_word(word: str) -> None:
    """Raise ConfigError for what can be no new word of a prompt, or of a file's keys."""
    if not word or word != word.strip() or any(c.isspace() or c == "." or not c.isprintable() for c in word):
        raise ConfigError(
            f"{word!r} cannot be a new word: it must be without spaces and dots. Write it as <fox>, or as zxq."
        )


@dataclass(frozen=True, eq=False)
class _Word:
    word: str
    owner: str
    rows: Tensor  # (n, width)

    @property
    def tokens(self) -> list[str]:
        return tokens_of(self.word, len(self.rows))


def tokens_of(word: str, vectors: int) -> list[str]:
    return [word, *(f"{word}_{i}" for i in range(1, vectors))]


def knowing(tokenizer: Any, tokens: Sequence[str]) -> Any:
    """A copy of the tokenizer that takes each of these for one token, as it stands, whatever its case; a plain word is
    not found inside another."""
    found = copy.deepcopy(tokenizer)
    found.add_tokens(
        [AddedToken(t, normalized=False, single_word=t[0].isalnum() and t[-1].isalnum()) for t in tokens]
    )
    return found


class _Encoder:
    """One text encoder with its tokenizer."""

    def __init__(self, pipeline: Any, component: str, model: nn.Module) -> None:
        self._pipeline, self._component, self._model = pipeline, component, model
        self._embeddings = model.get_submodule(live_path("text_model.embeddings", model))
        self._own: Any = None  # the pipeline's own tokenizer, while a copy stands for it
        self._handles: list[RemovableHandle] = []
        self._row_of = torch.empty(0, dtype=torch.long)  # token number -> row, -1 for the base's own
        self._rows: Tensor | None = None  # of the prompts being encoded: which row stands where, (N, tokens)
        self.worn: list[_Word] = []

    def check(self, words: Sequence[_Word]) -> None:
        """All of one owner."""
        width = weight_of(self._embeddings.get_submodule("token_embedding")).shape[1]
        known = self._known() if words else {}
        owner = words[0].owner if words else ""
        taken = {token for one in self.worn if one.owner != owner for token in one.tokens}
        for one in words:
            if one.rows.dim() != 2 or not len(one.rows) or one.rows.shape[1] != width:
                raise WrongFamily(
                    f'"{one.word}" of "{owner}" has rows of shape {tuple(one.rows.shape)} for {self._component}; '
                    f"(n, {width}) was expected. Load it on the model it was trained on."
                )
            for token in one.tokens:
                if token in known or f"{token}</w>" in known or token in taken:
                    raise ConfigError(
                        f'"{token}" of "{owner}" is a word of the model already. Choose a new one, such as '
                        f"<{token.strip('<>')}-2>."
                    )
            taken |= set(one.tokens)

    def _known(self) -> Mapping[str, int]:
        own = getattr(self._pipeline, TOKENIZERS[self._component]) if self._own is None else self._own
        known: Mapping[str, int] = own.get_vocab()
        return known

    def wear(self, words: list[_Word]) -> None:
        name = TOKENIZERS[self._component]
        if words == self.worn:
            return
        if not words:
            self.worn = []
            setattr(self._pipeline, name, self._own)
            self._own = None
            for handle in self._handles:
                handle.remove()
            self._handles = []
            return
        own = getattr(self._pipeline, name) if self._own is None else self._own
        tokens = [token for one in words for token in one.tokens]
        tokenizer = knowing(own, tokens)
        numbers = tokenizer.convert_tokens_to_ids(tokens)
        if len(set(numbers)) != len(tokens) or min(numbers) < len(own):
            raise LoraError(f"The tokenizer did not take {_joined(tokens)}. Choose other words.")
        self.worn, self._own = words, own
        self._row_of = torch.full((max(numbers) + 1,), -1)
        self._row_of[torch.tensor(numbers)] = torch.arange(len(tokens))
        setattr(self._pipeline, name, tokenizer)
        if not self._handles:
            self._handles = [
                self._model.register_forward_pre_hook(self._hide, with_kwargs=True, prepend=True),
                self._model.register_forward_hook(self._done, always_call=True),
                self._embeddings.register_forward_pre_hook(self._fill, with_kwargs=True),
            ]

    def _hide(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Before the encoder: known tokens in the words' places."""
        ids = args[0] if args else kwargs.get("input_ids")
        if ids is None:
            return None
        table = self._row_of = self._row_of.to(ids.device)
        rows = torch.where(ids < len(table), table[ids.clamp(max=len(table) - 1)], -1)
        # whether there are any is not asked: the answer would have to be waited for
        self._rows = rows.view(-1, rows.shape[-1])
        hidden = torch.where(rows >= 0, PLACEHOLDER, ids)
        return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "input_ids": hidden})

    def _fill(self, embeddings: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Before the embeddings: the rows, among the table's own (which may wear a LoRA themselves)."""
        if self._rows is None:
            return None
        given = {**dict(zip(("input_ids", "position_ids", "inputs_embeds"), args, strict=False)), **kwargs}
        embeds = given.get("inputs_embeds")
        if embeds is None:
            embeds = embeddings.token_embedding(given["input_ids"])
        table = torch.cat([one.rows for one in self.worn]).to(embeds.device, embeds.dtype)
        rows = self._rows.to(embeds.device)[..., None]
        filled = torch.where(rows >= 0, table[rows[..., 0].clamp(min=0)], embeds)
        return (), {**given, "inputs_embeds": filled}

    def _done(self, *_: Any) -> None:
        self._rows = None


def _joined(names: Iterable[str]) -> str:
    return ", ".join(sorted(names)) or "none"
