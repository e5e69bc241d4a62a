"""New words in training: their rows of the text encoders' tables, beside a LoRA (pivotal tuning) or by themselves.

Rows are e = the word's n vectors of each encoder, trained where prompts name the word (textual inversion, arXiv
2208.01618; together with a LoRA 2106.05744). The table itself stays as it is: see new_tokens.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lora_core.adapter import Adapter, live_path
from lora_core.errors import ConfigError
from lora_core.new_tokens import TOKENIZERS, NewTokens, check_word
from lora_core.train_form import LoraForm
from lora_core.worn import original_weight

OWNER = "the training"
MOST = 32  # vectors of one word; prompts have 75 places


class TrainableWords(nn.Module):
    """fp32 rows of each word in each encoder, under "<component>:<word>"."""

    def __init__(self, pipeline: Any, rows: Mapping[str, Mapping[str, Tensor]]) -> None:
        super().__init__()
        self.rows = nn.ParameterDict(
            {f"{c}:{word}": nn.Parameter(t) for word, parts in rows.items() for c, t in parts.items()}
        )
        models = {c: getattr(pipeline, c) for c in TOKENIZERS if getattr(pipeline, c, None) is not None}
        self._tokens = NewTokens(pipeline, models)
        self._tokens.add(OWNER, self._by_word())

    def group(self, learning_rate: float) -> dict[str, Any]:
        """For an optimizer, beside `LoraForm.parameter_groups`. No decay: it would pull a word towards nothing, which
        is no word's meaning."""
        return {"params": list(self.rows.values()), "lr": learning_rate, "name": "words", "weight_decay": 0.0}

    def collect(self) -> dict[str, dict[str, Tensor]]:
        return {
            word: {c: p.detach().cpu().clone() for c, p in parts.items()}
            for word, parts in self._by_word().items()
        }

    def remove(self) -> None:
        """The pipeline has its own tokenizers again, and no hook is left."""
        self._tokens.remove(OWNER)

    def _by_word(self) -> dict[str, dict[str, Tensor]]:
        words: dict[str, dict[str, Tensor]] = {}
        for key, p in self.rows.items():
            component, _, word = key.partition(":")
            words.setdefault(word, {})[component] = p
        return words


def learn_words(
    form: LoraForm,
    pipeline: Any,
    wanted: Mapping[str, str | int],
    *,
    start: Adapter | None = None,
    generator: torch.Generator | None = None,
) -> TrainableWords:
    """Train new words of `pipeline` together with an attached form; `collect` and `detach` then see to them as well.

    `wanted`: word -> the words it begins as ("animal": as many vectors as those have tokens), or a number of vectors,
    drawn around the mean of the table. `start`: an adapter whose words to go on from; it must have exactly these.
    Raises ConfigError for a word that cannot be one or is known already; nothing is changed then.
    """
    if start is not None and set(start.embeddings) != set(wanted):
        raise ConfigError(
            f"The file to start from has the new words {_listed(start.embeddings)}, this training {_listed(wanted)}. "
            "Train the same ones."
        )
    rows: dict[str, dict[str, Tensor]] = {}
    for word, beginning in wanted.items():
        check_word(word)
        rows[word] = {
            component: _first_rows(pipeline, component, word, beginning, generator)
            if start is None
            else start.embeddings[word][component].float().clone()
            for component in TOKENIZERS
            if getattr(pipeline, component, None) is not None
        }
    form.words = TrainableWords(pipeline, rows)
    return form.words


def _first_rows(
    pipeline: Any, component: str, word: str, beginning: str | int, generator: torch.Generator | None
) -> Tensor:
    """(n, width), fp32, where the table is."""
    model = getattr(pipeline, component)
    path = live_path("text_model.embeddings.token_embedding", model)
    table = original_weight(model.get_submodule(path), f"{component}.{path}")
    if isinstance(beginning, str):
        ids = getattr(pipeline, TOKENIZERS[component])(beginning, add_special_tokens=False).input_ids
    else:
        ids = [0] * beginning
    if not 1 <= len(ids) <= MOST:
        raise ConfigError(
            f'new_tokens: "{word}" = {beginning!r} makes {len(ids)} vectors; 1 to {MOST} were expected. Name a word it '
            "begins as, or a number of vectors."
        )
    if isinstance(beginning, str):
        return table[torch.tensor(ids, device=table.device)].float().clone()
    wide = table.float()
    noise = torch.randn(len(ids), wide.shape[1], generator=generator).to(wide.device)
    return wide.mean(0) + wide.std(0) * noise


def _listed(words: Mapping[str, Any]) -> str:
    return ", ".join(sorted(words)) or "none"
