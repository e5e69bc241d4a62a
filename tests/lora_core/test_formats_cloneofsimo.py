"""Layers that have numbers for names are found by a walk through real modules, in December 2022's order."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from lora_core import GenerationRequest, LivePipeline
from lora_core.adapter import file_path, resolve, weight_of
from lora_core.deltas.low_rank import LowRank
from lora_core.errors import FileRefused, NotFinite
from lora_core.formats import describe_adapter, read_adapter
from lora_core.new_tokens import NewTokens
from lora_core.safe_files import save_tensors
from tests.lora_core.full_size import models_of
from tests.small_models import small_pipeline

REAL = Path(__file__).resolve().parents[3] / "shared" / "data" / "loras" / "lora_disney.safetensors"
OLD, NEW = ("attn1", "ff", "attn2"), ("attn1", "attn2", "ff")
UNET = {"CrossAttention", "Attention", "GEGLU"}
EXTENDED = {"ResnetBlock2D", *UNET}


def walked(component: str, model: nn.Module, classes: set[str], order: tuple[str, ...]) -> list[str]:
    """The trainer's own search, said naively: below each module of these classes, every linear and convolution layer.
    Today's diffusers has another order inside a transformer block, and Attention for CrossAttention."""
    wanted = {"Attention" if name == "CrossAttention" else name for name in classes}

    def modules(path: str, module: nn.Module) -> list[tuple[str, nn.Module]]:
        children = list(module.named_children())
        if type(module).__name__ == "BasicTransformerBlock":
            children.sort(key=lambda child: order.index(child[0]) if child[0] in order else -1)
        below = [found for name, child in children for found in modules(f"{path}.{name}".strip("."), child)]
        return [(path, module), *below]

    return [
        file_path(component, path)
        for above, parent in modules("", model)
        if type(parent).__name__ in wanted
        for path, module in modules(above, parent)
        if isinstance(module, nn.Linear | nn.Conv2d)
    ]


def numbered(component: str, model: nn.Module, paths: list[str], rank: int = 1) -> dict[str, Tensor]:
    """A pair of factors for each; `up` holds its number."""
    tensors: dict[str, Tensor] = {}
    for i, layer in enumerate(resolve(paths, {component: model}).values()):
        out, *rest = weight_of(layer).shape
        tensors[f"{component}:{i}:up"] = torch.full((out, rank, *[1] * len(rest[1:])), 0.001 * i)
        tensors[f"{component}:{i}:down"] = torch.full((rank, *rest), 0.01)
    return tensors


def metadata(**classes: set[str]) -> dict[str, str]:
    return {component: json.dumps(sorted(names)) for component, names in classes.items()}


CASES = {
    "default": (UNET, OLD),
    "today's order": (UNET, NEW),
    "attention alone": ({"CrossAttention"}, OLD),
    "feed-forward alone": ({"GEGLU"}, OLD),
    "extended": (EXTENDED, OLD),
    "extended, today's order": (EXTENDED, NEW),
    "resnets alone": ({"ResnetBlock2D"}, OLD),
}


@pytest.mark.parametrize("family", ["sd1", "sd2"])
@pytest.mark.parametrize("case", CASES)
def test_numbers_are_the_layers_that_a_walk_through_the_real_model_meets(
    case: str, family: str, tmp_path: Path
) -> None:
    classes, order = CASES[case]
    unet = models_of(family)["unet"]
    paths = walked("unet", unet, classes, order)
    assert len(paths) == len(set(paths)) >= 16
    tensors = numbered("unet", unet, paths)
    save_tensors(tmp_path / "x.safetensors", tensors, metadata(unet=classes))
    read = read_adapter(tmp_path / "x.safetensors")
    assert read.unused == ()
    assert set(read.deltas) == set(paths)
    layers = resolve(read.deltas, {"unet": unet})
    for number, path in enumerate(paths):
        delta = read.deltas[path]
        assert isinstance(delta, LowRank)
        assert torch.equal(delta.up, tensors[f"unet:{number}:up"])
        assert (delta.rank, delta.alpha) == (1, 1.0)
        assert delta.fits(tuple(weight_of(layers[path]).shape))
    if case in ("default", "today's order"):
        assert (len(paths), read.family) == (144, family)


def test_the_orders_differ_in_64_shapes_of_144() -> None:
    unet = models_of("sd1")["unet"]
    old, new = (walked("unet", unet, UNET, order) for order in (OLD, NEW))
    layers = resolve(old, {"unet": unet})
    shapes = [(weight_of(layers[a]).shape, weight_of(layers[b]).shape) for a, b in zip(old, new, strict=True)]
    assert sum(a != b for a, b in shapes) == 64


@pytest.mark.parametrize("classes", [{"CLIPAttention"}, {"CLIPAttention", "CLIPMLP"}, {"CLIPMLP"}])
def test_numbers_of_a_text_encoder(classes: set[str], tmp_path: Path) -> None:
    model = models_of("sd2")["text_encoder"]
    paths = walked("text_encoder", model, classes, OLD)
    tensors = numbered("text_encoder", model, paths, rank=4)
    save_tensors(tmp_path / "x.safetensors", tensors, metadata(text_encoder=classes))
    read = read_adapter(tmp_path / "x.safetensors")
    for number, path in enumerate(paths):
        assert torch.equal(read.deltas[path].tensors()["up"], tensors[f"text_encoder:{number}:up"])
    assert len(read.deltas) == len(paths)


@functools.cache
def small_file() -> tuple[dict[str, Tensor], dict[str, str]]:
    """As the trainer wrote the real one, for a narrow SD 1: every default layer of both parts, and two words."""
    torch.manual_seed(5)
    pipe = small_pipeline("sd1")
    tensors = {"<s1>": torch.randn(32), "<s2>": torch.randn(32)}
    for component, classes in (("unet", UNET), ("text_encoder", {"CLIPAttention"})):
        model = getattr(pipe, component)
        made = numbered(component, model, walked(component, model, classes, OLD), rank=2)
        tensors |= {key: 0.3 * torch.randn_like(tensor) for key, tensor in made.items()}
    said = metadata(unet=UNET, text_encoder={"CLIPAttention"})
    return tensors, {**said, "<s1>": "<embed>", "<s2>": "<embed>"}


def test_a_whole_file_with_words_is_worn(tmp_path: Path) -> None:
    save_tensors(tmp_path / "disney.safetensors", *small_file())
    live = LivePipeline(small_pipeline("sd1"))
    coverage = live.load(tmp_path / "disney.safetensors")
    assert (coverage.matched, coverage.total, coverage.unused) == (144 + 8, 144 + 8, ())
    assert coverage.words == ("<s1>", "<s2>")
    asked = [GenerationRequest(prompt=p, seed=1, steps=2) for p in ("a <s1>", "a <s2>", "a cat")]
    worn = [live.generate(request)[0].image.tobytes() for request in asked]
    assert len(set(worn)) == 3
    live.set_weights({"disney": 0.0})
    assert live.generate(asked[2])[0].image.tobytes() != worn[2]
    live.unload()
    assert live.verify_base()


@pytest.mark.skipif(not REAL.is_file(), reason=f"{REAL.name} is not in {REAL.parent}")
def test_the_real_file_is_used_to_the_last_tensor() -> None:
    for look in (read_adapter, describe_adapter):
        adapter = look(REAL)
        assert (adapter.unused, adapter.family, len(adapter.deltas)) == ((), "sd1", 192)
        assert list(adapter.embeddings) == ["<s1>", "<s2>"]
        models = models_of("sd1")
        layers = resolve(adapter.deltas, models)
        assert len(layers) == 192
        for path, layer in layers.items():
            assert adapter.deltas[path].fits(tuple(weight_of(layer).shape))
        walk = walked("unet", models["unet"], UNET, OLD)
        walk += walked("text_encoder", models["text_encoder"], {"CLIPAttention"}, OLD)
        assert set(adapter.deltas) == set(walk)


@pytest.mark.skipif(not REAL.is_file(), reason=f"{REAL.name} is not in {REAL.parent}")
def test_the_words_of_the_real_file_are_read_by_an_encoder_of_its_width() -> None:
    adapter = read_adapter(REAL)
    pipe = small_pipeline("sd1")
    shape = CLIPTextConfig(
        hidden_size=768, num_hidden_layers=1, num_attention_heads=12, vocab_size=len(pipe.tokenizer)
    )
    pipe.text_encoder = CLIPTextModel(shape)
    words = NewTokens(pipe, {"text_encoder": pipe.text_encoder})
    words.add("disney", adapter.embeddings)
    seen: list[Tensor] = []
    embeddings = pipe.text_encoder.get_submodule("embeddings")
    embeddings.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    pipe.text_encoder(pipe.tokenizer("<s2> <s1>", return_tensors="pt").input_ids)
    for place, word in ((1, "<s2>"), (2, "<s1>")):
        assert torch.equal(seen[0][0, place], adapter.embeddings[word]["text_encoder"][0])


def changed(change: dict[str, Tensor | None], **said: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    tensors, metadata = small_file()
    merged = {**tensors, **change}
    return {k: v for k, v in merged.items() if v is not None}, {**metadata, **said}


WRONG: dict[str, tuple[tuple[dict[str, Tensor], dict[str, str]], str]] = {
    "one less": (
        changed({"unet:143:up": None, "unet:143:down": None}),
        "143 up to 142 were found where .* have 144",
    ),
    "one more": (
        changed({"text_encoder:8:up": torch.ones(32, 1), "text_encoder:8:down": torch.ones(1, 32)}),
        "9 up to 8 were found where .* have 12",
    ),
    "a hole": (changed({"unet:7:up": None, "unet:7:down": None}), "143 up to 143"),
    "half a pair": (changed({"unet:7:up": None}), "unet:7:down without its up factor"),
    "another shape": (
        changed({"unet:4:up": torch.ones(64, 2)}),
        r"unet:4 changes a weight of shape \(64, 32\), which .*ff.net.0.proj has in no model",
    ),
    "a kernel": (
        changed({"unet:0:up": torch.ones(32, 1, 1, 1), "unet:0:down": torch.ones(1, 32, 3, 3)}),
        r"unet:0 changes a weight of shape \(32, 32, 3, 3\)",
    ),
    "ranks": (changed({"unet:0:up": torch.ones(32, 3)}), "its rank is 2"),
    "unknown class": (
        changed({}, unet='["Transformer2DModel"]'),
        "below Transformer2DModel in the unet, a class",
    ),
    "no list": (changed({}, unet="all"), 'metadata "unet" should list'),
    "a word of two dots": (
        changed({"a.b": torch.ones(32)}, **{"a.b": "<embed>"}),
        "cannot be a new word",
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_cannot_be_counted_is_refused(what: str, tmp_path: Path) -> None:
    (tensors, said), why = WRONG[what]
    save_tensors(tmp_path / "x.safetensors", tensors, said)
    for look in (read_adapter, describe_adapter):
        with pytest.raises(FileRefused, match=rf"x\.safetensors.*{why}"):
            look(tmp_path / "x.safetensors")


def test_without_metadata_the_classes_are_the_trainers_own(tmp_path: Path) -> None:
    tensors = {key: tensor for key, tensor in small_file()[0].items() if ":" in key}
    save_tensors(tmp_path / "x.safetensors", tensors)
    assert len(read_adapter(tmp_path / "x.safetensors").deltas) == 152


@pytest.mark.parametrize("key", ["unet:9:up", "<s2>"])
def test_not_finite_is_named(key: str, tmp_path: Path) -> None:
    tensors, said = small_file()
    save_tensors(
        tmp_path / "x.safetensors", {**tensors, key: torch.full_like(tensors[key], float("nan"))}, said
    )
    with pytest.raises(NotFinite, match="<s2>" if key == "<s2>" else "up"):
        read_adapter(tmp_path / "x.safetensors")
