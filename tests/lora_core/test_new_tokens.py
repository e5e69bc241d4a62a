"""New words: what diffusers makes of the same rows, stored beside the LoRA, and gone without a trace."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lora_core import (
    Adapter,
    LivePipeline,
    LoraConfig,
    attach,
    bake,
    collect,
    combine,
    detach,
    read_adapter,
    write_adapter,
)
from lora_core.adapter import weight_of
from lora_core.errors import ConfigError, FileRefused, LoraError, NotFinite, WrongFamily
from lora_core.formats import describe_adapter
from lora_core.new_tokens import NewTokens
from lora_core.trainable.words import learn_words
from tests.lora_core.test_pipeline import bits, random_adapter, same_bits, tree
from tests.small_models import FAMILIES, small_pipeline

PROMPT = "a red <fox> on grass"


def rows_for(pipe: Any, count: int = 2, seed: int = 0) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {
        c: torch.randn(count, getattr(pipe, c).config.hidden_size, generator=g)
        for c in ("text_encoder", "text_encoder_2")
        if getattr(pipe, c, None) is not None
    }


@torch.no_grad()
def encoded(pipe: Any, prompt: str) -> list[Tensor]:
    made = pipe.encode_prompt(
        prompt, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=True, negative_prompt="dog"
    )
    return [t for t in made if t is not None]


def worn(pipe: Any, words: dict[str, dict[str, Tensor]]) -> NewTokens:
    models = {
        c: getattr(pipe, c) for c in ("text_encoder", "text_encoder_2") if getattr(pipe, c, None) is not None
    }
    tokens = NewTokens(pipe, models)
    tokens.add("ink", words)
    return tokens


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_prompt_reads_as_with_the_textual_inversion_of_diffusers(family: str, count: int) -> None:
    ours, theirs = small_pipeline(family), small_pipeline(family)
    rows = rows_for(ours, count)
    plain = encoded(ours, "a red cat on grass")
    worn(ours, {"<fox>": rows})
    for component, name in (("text_encoder", "tokenizer"), ("text_encoder_2", "tokenizer_2")):
        if component in rows:  # a tokenizer of its own for each encoder, as real models have it
            setattr(theirs, name, copy.deepcopy(getattr(theirs, name)))
            theirs.load_textual_inversion(
                rows[component],
                token="<fox>",
                text_encoder=getattr(theirs, component),
                tokenizer=getattr(theirs, name),
            )
    for a, b in zip(encoded(ours, PROMPT), encoded(theirs, PROMPT), strict=True):
        assert torch.allclose(a, b, atol=1e-5)
    for a, b in zip(encoded(ours, "a red cat on grass"), plain, strict=True):
        assert torch.equal(a, b)


def test_the_end_of_a_prompt_is_found_where_the_largest_number_marks_it() -> None:
    """CLIP as most repositories have it, eos_token_id = 2: the place of the largest number is read."""
    pipe = small_pipeline("sdxl")
    rows = rows_for(pipe, 1)
    # a word whose row is that of "dog" says what "dog" says
    for component, name in (("text_encoder", "tokenizer"), ("text_encoder_2", "tokenizer_2")):
        (number,) = getattr(pipe, name)("dog", add_special_tokens=False).input_ids
        table = getattr(pipe, component).get_input_embeddings()
        rows[component] = weight_of(table)[number : number + 1].clone()
    pipe.text_encoder_2.text_model.eos_token_id = 2
    expected = encoded(pipe, "a red dog on grass")
    worn(pipe, {"<fox>": rows})
    for a, b in zip(encoded(pipe, PROMPT), expected, strict=True):
        assert torch.equal(a, b)


def with_words(live: LivePipeline, seed: int = 1, word: str = "<fox>") -> Adapter:
    plain = random_adapter(live, seed)
    return Adapter(
        plain.deltas, {}, live.family.key, "ink", embeddings={word: rows_for(live.pipeline, 2, seed)}
    )


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_words_come_with_a_lora_and_leave_with_it(family: str, tmp_path: Path) -> None:
    live = LivePipeline(small_pipeline(family))
    own = [getattr(live.pipeline, n, None) for n in ("tokenizer", "tokenizer_2")]
    vocabulary = [t.get_vocab() for t in own if t]
    apart = encoded(live.pipeline, PROMPT)  # transformers hangs hooks of its own at the first call
    before, modules = bits(live), tree(live)
    ink = with_words(live)
    file = write_adapter(ink, tmp_path / "ink")
    covered = live.load(file, "ink", 0.0)
    assert covered.words == ("<fox>",)
    assert str(covered).endswith("; new words: <fox>")
    read = encoded(live.pipeline, PROMPT)
    assert not torch.equal(read[0], apart[0])
    oracle = small_pipeline(family)
    worn(oracle, ink.embeddings)
    assert all(torch.equal(a, b) for a, b in zip(read, encoded(oracle, PROMPT), strict=True))
    live.set_weights({"ink": 0.7})
    live.fuse()
    assert all(t.get_vocab() == v for t, v in zip(filter(None, own), vocabulary, strict=True))
    assert live.unfuse() is None
    assert live.verify_base()
    live.delete("ink")
    assert [getattr(live.pipeline, n, None) for n in ("tokenizer", "tokenizer_2")] == own
    assert same_bits(live, before)
    assert tree(live) == modules
    assert all(torch.equal(a, b) for a, b in zip(encoded(live.pipeline, PROMPT), apart, strict=True))


def test_a_word_means_one_thing_and_what_is_refused_changes_nothing() -> None:
    live = LivePipeline(small_pipeline("sd1"))
    live.load(with_words(live), "ink")
    now, read = live.pipeline.tokenizer, encoded(live.pipeline, PROMPT)
    width = live.pipeline.text_encoder.config.hidden_size

    def refused(error: type[LoraError], said: str, embeddings: dict[str, dict[str, Tensor]]) -> None:
        adapter = Adapter(random_adapter(live, 2).deltas, {}, "sd1", "cat", embeddings=embeddings)
        with pytest.raises(error, match=said):
            live.load(adapter)
        assert list(live.loaded) == ["ink"]
        assert live.pipeline.tokenizer is now
        assert torch.equal(encoded(live.pipeline, PROMPT)[0], read[0])

    one = torch.ones(1, width)
    refused(ConfigError, 'new word of "ink" already', {"<fox>": {"text_encoder": one}})
    refused(ConfigError, "a word of the model already", {"dog": {"text_encoder": one}})
    refused(ConfigError, "a word of the model already", {"<fox>_1": {"text_encoder": one}})
    refused(ConfigError, "without spaces and dots", {"a fox": {"text_encoder": one}})
    refused(WrongFamily, r"rows of shape \(1, 9\)", {"<cat>": {"text_encoder": torch.ones(1, 9)}})
    refused(WrongFamily, "text_encoder_2", {"<cat>": {"text_encoder": one, "text_encoder_2": one}})
    refused(NotFinite, "<cat>", {"<cat>": {"text_encoder": one * float("nan")}})
    # its own word anew, and another beside it
    live.load(with_words(live, 3), "ink")
    assert not torch.equal(encoded(live.pipeline, PROMPT)[0], read[0])
    live.load(with_words(live, 4, "zxq"), "cat")
    assert live.pipeline.tokenizer.tokenize("zxq <fox> zxqa")[:2] == ["zxq", "<fox>"]
    assert "zxq" not in live.pipeline.tokenizer.tokenize("zxqa")
    live.unload()
    assert live.verify_base()


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_the_file_has_the_keys_that_a1111_reads(family: str, tmp_path: Path) -> None:
    live = LivePipeline(small_pipeline(family))
    ink = with_words(live)
    file = write_adapter(ink, tmp_path / "ink", dtype=torch.float16)
    names = {"sd1": {"string_to_param.*"}, "sdxl": {"clip_l", "clip_g"}}[family]
    stored = load_file(file)
    assert {k for k in stored if k.startswith("bundle")} == {f"bundle_emb.<fox>.{name}" for name in names}
    back = read_adapter(file)
    assert back.unused == ()
    assert set(back.deltas) == set(ink.deltas)
    for component, rows in ink.embeddings["<fox>"].items():
        assert torch.equal(back.embeddings["<fox>"][component], rows.half())
    told = describe_adapter(file).embeddings["<fox>"]
    assert {c: t.shape for c, t in told.items()} == {c: t.shape for c, t in ink.embeddings["<fox>"].items()}
    for spelling in ("diffusers", "peft"):
        with pytest.raises(ConfigError, match="new words"):
            write_adapter(ink, tmp_path / spelling, spelling=spelling)
        assert not (tmp_path / spelling).exists()


@pytest.mark.parametrize(
    ("tensors", "word", "family"),
    [
        ({"emb_params": torch.ones(3, 768)}, "my_style", "sd1"),
        ({"string_to_param.*": torch.ones(2, 1024)}, "my_style", "sd2"),
        ({"clip_l": torch.ones(1, 768), "clip_g": torch.ones(1, 1280)}, "my_style", "sdxl"),
        ({"<cat-toy>": torch.ones(768)}, "<cat-toy>", "sd1"),
    ],
)
def test_files_of_a_word_alone(tensors: dict[str, Tensor], word: str, family: str, tmp_path: Path) -> None:
    save_file(tensors, tmp_path / "my style.safetensors")
    read = read_adapter(tmp_path / "my style.safetensors")
    assert (read.deltas, read.unused, read.family) == ({}, (), family)
    assert list(read.embeddings) == [word]
    stored = sorted(t.numel() for t in tensors.values())
    assert sorted(rows.numel() for rows in read.embeddings[word].values()) == stored
    assert all(rows.dim() == 2 for rows in read.embeddings[word].values())


def test_a_word_alone_is_loaded_and_a_damaged_bundle_is_refused(tmp_path: Path) -> None:
    live = LivePipeline(small_pipeline("sd1"))
    save_file({"emb_params": rows_for(live.pipeline, 2)["text_encoder"]}, tmp_path / "neg.safetensors")
    assert str(live.load(tmp_path / "neg.safetensors")) == "new words: neg"
    assert live.pipeline.tokenizer.tokenize("a neg")[-1] == "neg"
    live.unload()
    save_file({"bundle_emb.a b.emb_params": torch.ones(1, 4)}, tmp_path / "x.safetensors")
    with pytest.raises(FileRefused, match="without spaces"):
        read_adapter(tmp_path / "x.safetensors")
    save_file({"bundle_emb.ab.emb_params": torch.ones(1, 4, 4)}, tmp_path / "x.safetensors")
    with pytest.raises(FileRefused, match="no rows"):
        read_adapter(tmp_path / "x.safetensors")


def test_combining_keeps_words_and_baking_refuses_them(tmp_path: Path) -> None:
    live = LivePipeline(small_pipeline("sd1"))
    ink, cat, other = with_words(live), with_words(live, 2, "<cat>"), with_words(live, 3)
    assert set(combine([(ink, 0.5), (cat, 1.0)]).embeddings) == {"<fox>", "<cat>"}
    with pytest.raises(ConfigError, match="two of these LoRAs"):
        combine([(ink, 0.5), (other, 1.0)])
    with pytest.raises(LoraError, match="has new words"):
        bake(live.pipeline, [(ink, 1.0)], tmp_path / "new")


# --- training ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_words_begin_as_other_words_and_gradients_reach_their_rows_alone(family: str) -> None:
    pipe = small_pipeline(family)
    models = {
        c: m for c, m in pipe.components.items() if c in ("unet", "text_encoder", "text_encoder_2") and m
    }
    own = pipe.tokenizer
    plain = encoded(pipe, "a red dog on grass")
    form = attach(models, LoraConfig(rank=2, alpha=3))
    learn_words(form, pipe, {"<fox>": "dog", "<style>": 3}, generator=torch.Generator().manual_seed(0))
    # an identity: LoRAs begin as nothing, and the word as the word it was made of
    assert all(torch.equal(a, b) for a, b in zip(encoded(pipe, PROMPT), plain, strict=True))
    prompts = pipe.maybe_convert_prompt(PROMPT, pipe.tokenizer)
    ids = pipe.tokenizer(prompts, return_tensors="pt").input_ids
    pipe.text_encoder(ids).last_hidden_state.square().sum().backward()
    assert form.words is not None
    found = form.words.rows["text_encoder:<fox>"].grad
    assert form.words.rows["text_encoder:<style>"].grad.abs().sum() == 0
    assert all(p.grad is None for m in models.values() for p in m.parameters())
    # autograd through the table itself, where the word stands as "dog"
    naive = small_pipeline(family)
    table = weight_of(naive.text_encoder.get_input_embeddings()).requires_grad_(True)
    twin = naive.tokenizer("a red dog on grass", return_tensors="pt").input_ids
    naive.text_encoder(twin).last_hidden_state.square().sum().backward()
    (number,) = naive.tokenizer("dog", add_special_tokens=False).input_ids
    assert torch.allclose(found[0], table.grad[number], rtol=1e-4, atol=1e-6)
    # one step moves the words; the file and the base say so
    optimizer = torch.optim.AdamW([*form.parameter_groups(1e-3), form.words.group(1e-2)])
    optimizer.step()
    adapter = collect(form, family=family)
    assert set(adapter.embeddings) == {"<fox>", "<style>"}
    assert len(adapter.embeddings["<style>"]["text_encoder"]) == 3
    moved = adapter.embeddings["<fox>"]["text_encoder"][0] - table[number]
    assert torch.allclose(moved.abs(), torch.full_like(moved, 1e-2), rtol=0.05)
    read = encoded(pipe, PROMPT)
    detach(form)
    assert pipe.tokenizer is own
    assert all(torch.equal(a, b) for a, b in zip(encoded(pipe, "a red dog on grass"), plain, strict=True))
    live = LivePipeline(pipe)
    live.load(adapter, "ink")
    for a, b in zip(encoded(pipe, PROMPT), read, strict=True):
        assert torch.allclose(a, b, atol=1e-5)


def test_training_goes_on_from_words_and_refuses_what_is_none() -> None:
    pipe = small_pipeline("sd1")
    start = with_words(LivePipeline(small_pipeline("sd1")))
    own = pipe.tokenizer
    form = attach({"text_encoder": pipe.text_encoder}, LoraConfig(rank=2, alpha=3))
    for wanted, said in (
        ({"<fox>": ""}, "makes 0 vectors"),
        ({"<fox>": 99}, "makes 99 vectors"),
        ({"<fox>": "dog", "cat": "dog"}, '"cat" of "the training" is a word'),
        ({"a fox": "dog"}, "without spaces"),
    ):
        with pytest.raises(ConfigError, match=said):
            learn_words(form, pipe, wanted)
        assert pipe.tokenizer is own
        assert form.words is None
    with pytest.raises(ConfigError, match="new words <fox>, this training <cat>"):
        learn_words(form, pipe, {"<cat>": "dog"}, start=start)
    learn_words(form, pipe, {"<fox>": "dog"}, start=start)
    kept = collect(form).embeddings["<fox>"]["text_encoder"]
    assert torch.equal(kept, start.embeddings["<fox>"]["text_encoder"])
    detach(form)
    assert pipe.tokenizer is own
