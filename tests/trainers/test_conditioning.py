"""Conditioning is what diffusers' own pipelines make of the same prompts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.small_models import FAMILIES, small_pipeline
from trainers.buckets import View, plan_crop
from trainers.conditioning import Conditioning, added_conditions, encode, tokenize

LONG = "a red dog on a striped blue background, " * 12 + "zebra"
PROMPTS = ["a dog on a red background", "", "a photo of sks cat, ünïcode 🐶", LONG]


def by_diffusers(pipe: Any, prompts: list[str]) -> tuple[Tensor, Tensor | None]:
    """-> hidden, pooled."""
    made = pipe.encode_prompt(
        prompts, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False
    )
    return made[0], made[2] if len(made) > 2 else None


@pytest.mark.parametrize("family", FAMILIES)
def test_as_the_pipeline_encodes(family: str) -> None:
    pipe = small_pipeline(family)
    with torch.no_grad():
        found = encode(pipe.components, tokenize(pipe, PROMPTS).ids)
        hidden, pooled = by_diffusers(pipe, PROMPTS)
    assert torch.equal(found.hidden, hidden)
    assert found.hidden.shape == (4, 77, pipe.unet.config.cross_attention_dim)
    assert not torch.equal(hidden[0], hidden[2])
    if family == "sdxl":
        assert pooled is not None
        assert torch.equal(found.pooled, pooled)
    else:
        assert found.pooled is None


def test_rows_can_be_taken_in_any_order() -> None:
    pipe = small_pipeline("sdxl")
    with torch.no_grad():
        found = encode(pipe.components, tokenize(pipe, PROMPTS).ids)
    picked = found.at([2, 0, 2]).to("cpu", torch.bfloat16)
    assert len(picked) == 3
    assert torch.equal(picked.hidden, found.hidden[[2, 0, 2]].bfloat16())
    assert picked.pooled is not None
    assert found.pooled is not None
    assert torch.equal(picked.pooled, found.pooled[[2, 0, 2]].bfloat16())
    assert Conditioning(found.hidden).at(torch.tensor([1])).pooled is None


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_cut_is_reported_word_for_word(family: str) -> None:
    pipe = small_pipeline(family)
    tokens = tokenize(pipe, PROMPTS)
    encoders = [name for name in ("text_encoder", "text_encoder_2") if name in pipe.components]
    assert list(tokens.ids) == encoders
    assert [(cut.prompt, cut.component) for cut in tokens.cut] == [(LONG, name) for name in encoders]
    for cut in tokens.cut:
        assert LONG.endswith(cut.unread)
        assert cut.unread in str(cut)
    # what is kept and what is unread are the whole prompt, nothing lost between them
    kept = pipe.tokenizer.decode(tokens.ids["text_encoder"][3], skip_special_tokens=True)
    assert (kept + tokens.cut[0].unread).replace(" ", "") == LONG.replace(" ", "")


def test_letters_of_several_bytes_are_cut_at_the_right_place() -> None:
    pipe = small_pipeline("sd1")
    (cut,) = tokenize(pipe, ["ünï 🐶 dog " * 20 + "Zebra ü"]).cut
    again = tokenize(pipe, ["ünï 🐶 dog " * 20 + "Zebra ü", cut.unread]).ids["text_encoder"]
    whole = pipe.tokenizer("ünï 🐶 dog " * 20 + "Zebra ü", verbose=False).input_ids
    assert cut.unread.endswith("dog Zebra ü")
    assert again[0, :-1].tolist() + pipe.tokenizer(cut.unread).input_ids[1:] == whole


def test_a_prompt_of_exactly_77_tokens_is_not_cut() -> None:
    pipe = small_pipeline("sd1")
    full = " ".join(["dog"] * 75)
    tokens = tokenize(pipe, [full, full + " dog"])
    assert [cut.prompt for cut in tokens.cut] == [full + " dog"]
    assert tokens.cut[0].unread == "dog"
    assert torch.equal(tokens.ids["text_encoder"][0], tokens.ids["text_encoder"][1])


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_reach_every_encoder(family: str) -> None:
    pipe = small_pipeline(family)
    ids = tokenize(pipe, PROMPTS[:1]).ids
    layers = []
    for name in ids:
        first = (
            getattr(pipe, name)
            .get_submodule("text_model" if name == "text_encoder_2" else "")
            .encoder.layers[0]
        )
        layers.append(first.self_attn.q_proj.weight.requires_grad_(True))
    found = encode(pipe.components, ids)
    found.hidden.square().sum().backward()
    assert all(weight.grad is not None and weight.grad.abs().sum() > 0 for weight in layers)


def test_added_conditions_are_the_pipelines() -> None:
    pipe = small_pipeline("sdxl")
    with torch.no_grad():
        conditioning = encode(pipe.components, tokenize(pipe, PROMPTS[:2]).ids)
    sizes = [(160, 96), (1023, 511)]
    views = [View(plan_crop(size, (64, 64))) for size in sizes]
    time_ids = torch.tensor([v.time_ids(s) for v, s in zip(views, sizes, strict=True)]).float()
    added = added_conditions(conditioning, time_ids)
    assert added is not None
    for row, (view, (width, height)) in enumerate(zip(views, sizes, strict=True)):
        expected = pipe._get_add_time_ids(
            (height, width),
            (view.plan.box[1], view.plan.box[0]),
            (64, 64),
            torch.float32,
            text_encoder_projection_dim=pipe.text_encoder_2.config.projection_dim,
        )
        assert torch.equal(added["time_ids"][row], expected[0])
    assert added["text_embeds"] is conditioning.pooled


def test_added_conditions_go_through_a_half_precision_unet_unrounded() -> None:
    pipe = small_pipeline("sdxl", dtype=torch.bfloat16)
    with torch.no_grad():
        conditioning = encode(pipe.components, tokenize(pipe, PROMPTS[:1]).ids)
        added = added_conditions(conditioning, torch.tensor([(1023.0, 511, 0, 3, 64, 64)]))
        assert added is not None
        assert added["time_ids"].tolist() == [[1023, 511, 0, 3, 64, 64]]
        z = torch.zeros(1, 4, 16, 16, dtype=torch.bfloat16)
        out = pipe.unet(z, 10, conditioning.hidden, added_cond_kwargs=added).sample
    assert out.dtype == torch.bfloat16


def test_families_without_pooled_text_have_none_and_missing_rows_are_named() -> None:
    pipe = small_pipeline("sd2")
    with torch.no_grad():
        conditioning = encode(pipe.components, tokenize(pipe, PROMPTS[:2]).ids)
    assert added_conditions(conditioning, torch.zeros(0, 6)) is None
    with pytest.raises(ValueError, match=r"2 prompts need as many rows .* found \(1, 6\)"):
        added_conditions(Conditioning(conditioning.hidden, torch.zeros(2, 8)), torch.zeros(1, 6))
