"""Embeddings that are kept are those the encoders give, bit for bit; whatever happens to a file is found."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lora_core import LoraConfig, attach
from lora_core.errors import NotFinite
from lora_core.safe_files import save_tensors
from lora_core.train_form import LoraForm
from tests.small_models import small_pipeline
from trainers import words as words_module
from trainers.conditioning import Conditioning, encode, tokenize
from trainers.kept_tensors import KeptTensors, tensors_identity
from trainers.words import Words

PROMPTS = ["a zxq cat", "", "a photo of a dog on a beach"]
CPU = torch.device("cpu")


def by_hand(pipe: Any, text: str) -> Conditioning:
    with torch.no_grad():
        return encode(pipe.components, tokenize(pipe, [text]).ids)


def same(found: Conditioning, row: int, expected: Conditioning) -> bool:
    pooled = (
        found.pooled is None or expected.pooled is None or torch.equal(found.pooled[row], expected.pooled[0])
    )
    return torch.equal(found.hidden[row], expected.hidden[0]) and pooled


def frozen(pipe: Any, folder: Path | None, known: list[str] | None = PROMPTS) -> Words:
    words = Words(pipe, CPU, folder=folder)
    for component in words.components:
        words.freeze(component, known)
    return words


def counted(pipe: Any) -> list[int]:
    """Grows by one with each call of the first text encoder."""
    calls: list[int] = []
    pipe.text_encoder.register_forward_hook(lambda *_: calls.append(1))
    return calls


def named(form: LoraForm) -> list[tuple[str, nn.Parameter]]:
    layers = zip(form.paths, form.layers, strict=True)
    return [(f"{path}.{name}", p) for path, layer in layers for name, p in layer.named_parameters()]


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
@pytest.mark.parametrize("kept", [True, False])
def test_a_frozen_encoder_gives_each_prompt_what_it_gives_it_alone(
    tmp_path: Path, family: str, kept: bool
) -> None:
    pipe = small_pipeline(family)
    words = frozen(pipe, tmp_path if kept else None)
    found = words([PROMPTS[2], PROMPTS[0], PROMPTS[2]])
    for row, text in enumerate([PROMPTS[2], PROMPTS[0], PROMPTS[2]]):
        assert same(found, row, by_hand(pipe, text))
    assert not found.hidden.requires_grad


def test_on_disk_they_are_found_again_and_the_encoder_is_not_asked(tmp_path: Path) -> None:
    frozen(small_pipeline("sdxl"), tmp_path)
    pipe = small_pipeline("sdxl")
    calls = counted(pipe)
    words = Words(pipe, CPU, folder=tmp_path)
    report = words.freeze("text_encoder", PROMPTS)
    assert (report.found, report.built, report.rebuilt) == (3, 0, [])
    assert calls == []
    with torch.no_grad():
        pipe.text_encoder_2.text_projection.weight[0, 0] += 1e-3
    assert words.freeze("text_encoder_2", PROMPTS).built == 3  # another encoder
    calls.clear()
    assert same(words([PROMPTS[0]]), 0, by_hand(pipe, PROMPTS[0]))


def test_another_precision_and_another_place_are_other_embeddings(tmp_path: Path) -> None:
    """SDXL takes of its first encoder what SD does not."""
    frozen(small_pipeline("sdxl"), tmp_path)
    for dtype, built in ((torch.float32, 0), (torch.bfloat16, 3)):
        words = Words(small_pipeline("sdxl", dtype=dtype), CPU, folder=tmp_path)
        assert words.freeze("text_encoder", PROMPTS).built == built
    alone = small_pipeline("sdxl")
    alone.text_encoder_2 = None
    words = Words(alone, CPU, folder=tmp_path)
    assert words.freeze("text_encoder", PROMPTS).built == 3


def test_what_has_no_end_is_kept_in_a_bounded_memory_and_not_on_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = small_pipeline("sd1")
    one = 77 * 32 * 4
    monkeypatch.setattr(words_module, "MEMORY_BYTES", 3 * one)
    words, calls = frozen(pipe, tmp_path, None), counted(pipe)
    texts = [f"a {colour} cat" for colour in ("red", "blue", "green", "black", "white")]
    for text in texts:
        words([text, text])
    assert len(calls) == 5
    assert len(words._kept) == 3
    words(texts[2:])
    assert len(calls) == 5
    assert same(words(texts[:1]), 0, by_hand(pipe, texts[0]))
    assert not list(tmp_path.glob("*.safetensors"))


def test_frozen_in_the_middle_of_a_run(tmp_path: Path) -> None:
    """With its LoRA as it then is and without dropout; gradients go on to the other encoder."""
    pipe = small_pipeline("sdxl")
    models = {c: getattr(pipe, c) for c in ("text_encoder", "text_encoder_2")}
    form = attach(models, LoraConfig(rank=2, alpha=3, dropout=0.5, init="random"))
    words = Words(pipe, CPU, form=form, folder=tmp_path)
    assert words(PROMPTS[:1]).hidden.requires_grad
    report = words.freeze("text_encoder", PROMPTS)
    assert report.built == 3
    assert form.training
    words(PROMPTS[:1]).hidden.square().sum().backward()
    trained = {c: [p for n, p in named(form) if n.startswith(f"{c}.")] for c in models}
    assert all(p.grad is None for p in trained["text_encoder"])
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in trained["text_encoder_2"])
    form.eval()
    assert torch.equal(words(PROMPTS[:1]).hidden, by_hand(pipe, PROMPTS[0]).hidden)
    with torch.no_grad():
        for p in trained["text_encoder_2"]:
            p.add_(0.1)
    assert Words(pipe, CPU, form=form, folder=tmp_path).freeze("text_encoder", PROMPTS).found == 3
    with torch.no_grad():
        for p in trained["text_encoder"]:
            p.add_(0.1)
    assert Words(pipe, CPU, form=form, folder=tmp_path).freeze("text_encoder", PROMPTS).built == 3


def test_damage_and_nan_are_found_and_made_anew(tmp_path: Path) -> None:
    whole = frozen(small_pipeline("sd1"), tmp_path)(PROMPTS).hidden
    files = sorted(tmp_path.glob("*.safetensors"))
    data = bytearray(files[0].read_bytes())
    data[-9] ^= 16
    files[0].write_bytes(bytes(data))
    poisoned = {"hidden": torch.full((1, 77, 32), float("nan"))}
    key = files[1].stem
    KeptTensors(tmp_path).save(key, poisoned)  # whole, with the right checksum
    pipe = small_pipeline("sd1")
    words = Words(pipe, CPU, folder=tmp_path)
    report = words.freeze("text_encoder", PROMPTS)
    assert (len(report.rebuilt), report.built, report.found) == (2, 2, 1)
    assert torch.equal(words(PROMPTS).hidden, whole)


def test_flipped_bits_are_all_found(tmp_path: Path) -> None:
    frozen(small_pipeline("sd1"), tmp_path, PROMPTS[:1])
    (path,) = tmp_path.glob("*.safetensors")
    files, data, rng = KeptTensors(tmp_path), path.read_bytes(), random.Random(0)
    assert files.load(path.stem) is not None
    header = 8 + int.from_bytes(data[:8], "little")
    missed = []
    for i in range(1000):
        bit = rng.randrange(8 * (header if i % 2 else len(data)))
        hurt = bytearray(data)
        hurt[bit // 8] ^= 1 << bit % 8
        path.write_bytes(bytes(hurt))
        if files.load(path.stem) is not None:
            missed.append(bit)
    assert missed == []


def test_a_foreign_file_under_a_key_of_ours_is_none(tmp_path: Path) -> None:
    tensors: dict[str, Tensor] = {"other": torch.zeros(2)}
    files = KeptTensors(tmp_path)
    save_tensors(files.path("key"), tensors, {"sha256": tensors_identity(tensors)})
    assert files.load("key") is None
    files.save("key", tensors)
    assert files.load("key") is not None
    frozen(small_pipeline("sd1"), tmp_path / "b", PROMPTS[:1])
    (path,) = (tmp_path / "b").glob("*.safetensors")
    KeptTensors(tmp_path / "b").save(path.stem, tensors)
    report = Words(small_pipeline("sd1"), CPU, folder=tmp_path / "b").freeze("text_encoder", PROMPTS[:1])
    assert report.rebuilt == PROMPTS[:1]


def test_an_encoder_that_overflows_is_named_with_the_remedy(tmp_path: Path) -> None:
    pipe = small_pipeline("sd1")
    with torch.no_grad():
        pipe.text_encoder.final_layer_norm.bias[0] = float("inf")
    with pytest.raises(NotFinite, match=r'text_encoder makes NaN or Inf of "a zxq cat" .* train.base_dtype'):
        frozen(pipe, tmp_path)
