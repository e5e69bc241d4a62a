"""The demo base's words: the captions of its scenes, and a text encoder that keeps every word of a prompt.

A real Stable Diffusion's text encoder comes trained, and stays as it is while the UNet learns to look at it. Here
likewise: trained together with the UNet, two designs of ours collapsed to the colours, which a few hundred steps
teach, and no object ever reached the UNet (6 of 108 told from nine others, which is chance).
"""

from __future__ import annotations

import random
from string import ascii_lowercase

import torch
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from trainers.demo_scenes import training_scenes

# in full, with an odd word, by class word, by class with an odd word, without the background, empty
CAPTION_SHARES = (0.50, 0.12, 0.05, 0.03, 0.20, 0.10)


def caption_ids(tokenizer: CLIPTokenizer, per_thing: int) -> Tensor:
    """-> token ids (scenes, 6, length), a column per share of `CAPTION_SHARES`.

    Two columns have a meaningless word before the noun ("a zxq dog on a red background"): without them the model
    had seen a colour at a few positions only, and an unknown word, which DreamBooth lives on, shifted it to another.
    """
    rng, rows = random.Random("words"), []
    for s in training_scenes(per_thing):
        word = "".join(rng.choices(ascii_lowercase, k=rng.randint(2, 4)))
        odd, odd_kind = s.caption(f"{word} {s.thing.name}"), s.caption(f"{word} {s.thing.kind}")
        rows.append((s.caption(), odd, s.caption(s.thing.kind), odd_kind, s.noun(), ""))
    flat = [caption for row in rows for caption in row]
    length = tokenizer.model_max_length
    ids = tokenizer(
        flat, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
    ).input_ids
    table: Tensor = ids.reshape(len(rows), len(CAPTION_SHARES), length)
    return table


def sample_captions(table: Tensor, rows: Tensor) -> Tensor:
    """One caption per row of `rows` (N,), drawn by `CAPTION_SHARES` -> ids (N, length)."""
    columns = torch.multinomial(torch.tensor(CAPTION_SHARES), len(rows), replacement=True)
    return table[rows, columns]


def random_words(tokenizer: CLIPTokenizer, count: int) -> Tensor:
    """Sequences of 1 to 12 tokens of the whole vocabulary -> ids (count, length): what no caption says."""
    length, specials = tokenizer.model_max_length, 2  # the vocabulary's last two
    ids = torch.full((count, length), tokenizer.eos_token_id)
    ids[:, 0] = tokenizer.bos_token_id
    words = torch.randint(len(tokenizer) - specials, (count, 12))
    kept = torch.arange(12) < torch.randint(1, 13, (count, 1))
    ids[:, 1:13] = torch.where(kept, words, ids[:, 1:13])
    return ids


def bag_of_words(ids: Tensor, vocabulary: int, ignored: Tensor) -> Tensor:
    """At every position, the distinct words read so far as a distribution, (N, length, vocabulary);
    all zero before the first one. `ignored`: tokens that are no words."""
    seen = nn.functional.one_hot(ids, vocabulary).float().cumsum(1).clamp(max=1)
    seen[..., ignored] = 0
    return seen / seen.sum(-1, keepdim=True).clamp(min=1)


def train_words(encoder: CLIPTextModel, tokenizer: CLIPTokenizer, table: Tensor, *, steps: int) -> None:
    """Every position learns to name the words up to it; so the last ones hold the whole prompt, whatever it says."""
    vocabulary = len(tokenizer)
    ignored = torch.tensor([tokenizer.bos_token_id, tokenizer.eos_token_id])
    head = nn.Linear(encoder.config.hidden_size, vocabulary)
    weights = [*encoder.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(weights, lr=2e-3, weight_decay=0.01)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=steps)
    encoder.train()
    for step in range(1, steps + 1):
        rows = torch.randint(len(table), (48,))
        ids = torch.cat([sample_captions(table, rows), random_words(tokenizer, 16)])
        said = head(encoder(ids).last_hidden_state).log_softmax(-1)
        wanted = bag_of_words(ids, vocabulary, ignored)
        # less the target's own entropy: 0 is perfect, whatever the number of words
        loss = (torch.special.xlogy(wanted, wanted) - wanted * said).sum(-1).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        rate.step()
        if step % 100 == 0:
            print(f"words step {step} of {steps}, {loss.item():.4f} nats short of perfect", flush=True)
    encoder.eval().requires_grad_(False)
