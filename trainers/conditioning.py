"""Prompts -> what the UNet is conditioned on, exactly as diffusers' pipelines make it.

SD 1.x and 2.x: the text encoder's last hidden state. SDXL: the last but one of both encoders side by side,
the second's pooled projection, and six numbers about the crop (`View.time_ids`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trainers.sending import sent

TOKENIZERS = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}


@dataclass(frozen=True)
class CutPrompt:
    """A prompt longer than its encoder reads, and the words it does not read."""

    prompt: str
    component: str
    reads: int
    unread: str

    def __str__(self) -> str:
        return f'{self.component} reads {self.reads} tokens; of "{self.prompt}" it does not see: "{self.unread}".'


@dataclass(frozen=True)
class Tokens:
    """`ids` by text encoder, each (N, 77) int64 on the CPU; `cut` names what did not fit."""

    ids: dict[str, Tensor]
    cut: tuple[CutPrompt, ...]


@dataclass(frozen=True)
class Conditioning:
    """`hidden` (N, 77, D) for cross attention; `pooled` (N, P) in SDXL."""

    hidden: Tensor
    pooled: Tensor | None = None

    def __len__(self) -> int:
        return len(self.hidden)

    def at(self, rows: Sequence[int] | Tensor) -> Conditioning:
        """Those rows, in that order."""
        index = torch.as_tensor(rows, device=self.hidden.device)
        return Conditioning(self.hidden[index], None if self.pooled is None else self.pooled[index])

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Conditioning:
        pooled = None if self.pooled is None else self.pooled.to(device, dtype)
        return Conditioning(self.hidden.to(device, dtype), pooled)


def tokenize(pipeline: Any, prompts: Sequence[str]) -> Tokens:
    """Prompts -> token ids for every text encoder of the pipeline, padded and cut to what it reads."""
    ids: dict[str, Tensor] = {}
    cut: list[CutPrompt] = []
    for component, name in TOKENIZERS.items():
        tokenizer = getattr(pipeline, name, None)
        if tokenizer is None:
            continue
        # A textual inversion may stand for several tokens; pipelines spell them out first.
        spelled = [pipeline.maybe_convert_prompt(prompt, tokenizer) for prompt in prompts]
        length = tokenizer.model_max_length
        ids[component] = tokenizer(
            spelled, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        ).input_ids
        places = tokenizer(spelled, return_offsets_mapping=True, verbose=False).offset_mapping
        for prompt, text, offsets in zip(prompts, spelled, places, strict=True):
            if len(offsets) > length:  # the place of the first unread token is taken by the end mark
                cut.append(CutPrompt(prompt, component, length, text[offsets[length - 1][0] :].strip()))
    return Tokens(ids, tuple(cut))


def lengths(pipeline: Any, prompts: Sequence[str]) -> list[int]:
    """Tokens of each prompt with both end marks, uncut; of the encoder that makes the most of it."""
    counts = []
    for name in TOKENIZERS.values():
        if (tokenizer := getattr(pipeline, name, None)) is not None:
            spelled = [pipeline.maybe_convert_prompt(prompt, tokenizer) for prompt in prompts]
            counts.append([len(ids) for ids in tokenizer(spelled, verbose=False).input_ids])
    return [max(each) for each in zip(*counts, strict=True)]


def encode(components: Mapping[str, Any], ids: Mapping[str, Tensor]) -> Conditioning:
    """Token ids -> conditioning, on the encoders' device and in their dtype; gradients flow.

    `components` is `pipeline.components` or any mapping that has the encoders `ids` names.
    """
    return joined([encode_alone(components[c], c, tokens, both=len(ids) > 1) for c, tokens in ids.items()])


def encode_alone(encoder: Any, component: str, ids: Tensor, *, both: bool) -> Conditioning:
    """What one text encoder contributes; `both`: whether it is one of SDXL's two."""
    output = encoder(sent(ids, encoder.device), output_hidden_states=both)
    # SDXL was trained on the layer before the last, without the final norm; SD on the last, with it.
    hidden = output.hidden_states[-2] if both else output.last_hidden_state
    return Conditioning(hidden, output.text_embeds if both and component == "text_encoder_2" else None)


def joined(parts: Sequence[Conditioning]) -> Conditioning:
    """The encoders' contributions side by side, in their order."""
    pooled = [part.pooled for part in parts if part.pooled is not None]
    return Conditioning(torch.cat([part.hidden for part in parts], dim=-1), pooled[0] if pooled else None)


def added_conditions(conditioning: Conditioning, time_ids: Tensor) -> dict[str, Tensor] | None:
    """The UNet's `added_cond_kwargs`: pooled text (N, P) and time ids (N, 6), fp32; None before SDXL."""
    if conditioning.pooled is None:
        return None
    pooled = conditioning.pooled
    if time_ids.shape != (len(pooled), 6):
        raise ValueError(
            f"{len(pooled)} prompts need as many rows of 6 time ids; found {tuple(time_ids.shape)}"
        )
    return {"text_embeds": pooled, "time_ids": time_ids.to(pooled.device)}
