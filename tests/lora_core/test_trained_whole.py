"""Biases and whole modules in training, and LoRA+, beside PEFT: the same steps give the same model."""

from __future__ import annotations

import copy
from typing import Any

import peft
import pytest
import torch
from peft.optimizers import create_loraplus_optimizer
from torch import Tensor, nn

from lora_core import LoraConfig, attach, collect, detach
from lora_core.adapter import Adapter
from lora_core.deltas.bias import WithBias
from lora_core.deltas.full import Full
from lora_core.deltas.low_rank import LowRank
from lora_core.errors import ConfigError
from lora_core.train_form import LoraForm
from lora_core.trainable.layer import TrainableLayer
from lora_core.trainable.low_rank import TrainableEmbedding, TrainableLowRank


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(12, 12)
        self.second = nn.Linear(12, 12, bias=False)


class Toy(nn.Module):
    """Every type of module that can be trained whole, and a container of two."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.words = nn.Embedding(17, 12)
        self.norm = nn.LayerNorm(12)
        self.query = nn.Linear(12, 10)
        self.value = nn.Linear(10, 12, bias=False)
        self.conv = nn.Conv2d(3, 12, 3, padding=1, stride=2)
        self.group = nn.GroupNorm(4, 12)
        self.last = nn.Conv2d(12, 6, 1)
        self.inner = Inner()

    def forward(self, ids: Tensor, image: Tensor) -> Tensor:
        x = self.norm(self.words(ids))
        x = self.value(torch.tanh(self.query(x)))
        x = self.inner.second(torch.tanh(self.inner.first(x))).mean(1)
        y = torch.tanh(self.group(self.conv(image))) + x[:, :, None, None]
        found: Tensor = self.last(y)
        return found


def inputs() -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(8)
    return torch.randint(0, 17, (4, 5), generator=g), torch.randn(4, 3, 8, 8, generator=g)


TARGETS = ("query", "value")
WHOLE = ("words", "norm", "conv", "group", "inner")
OPTIONS: list[dict[str, Any]] = [
    {"bias": "none"},
    {"bias": "all"},
    {"bias": "lora_only"},
    {"modules_to_save": WHOLE},
    {"modules_to_save": ("inner.first", "last"), "bias": "all"},
    {"bias": "all", "variant": "dora"},
]


def pair(options: dict[str, Any]) -> tuple[Toy, LoraForm, peft.PeftModel]:
    """The same toy under both, with equal factors. PEFT's biases and saved modules are copies that it trains."""
    toy = Toy()
    words = {k: list(v) if isinstance(v, tuple) else v for k, v in options.items() if k != "variant"}
    theirs = peft.get_peft_model(
        copy.deepcopy(toy),
        peft.LoraConfig(
            r=3,
            lora_alpha=5,
            target_modules=list(TARGETS),
            use_dora=options.get("variant") == "dora",
            **words,
        ),
    )
    form = attach(toy, LoraConfig(rank=3, alpha=5, targets=TARGETS, **options))
    for layer in form.layers:
        assert isinstance(layer, TrainableLayer)
        if isinstance(layer.factors, TrainableLowRank):
            their_layer = theirs.base_model.model.get_submodule(layer.site.path)
            with torch.no_grad():
                layer.factors.down.normal_(std=0.3)
                layer.factors.up.normal_(std=0.3)
                their_layer.lora_A["default"].weight.copy_(layer.factors.down)
                their_layer.lora_B["default"].weight.copy_(layer.factors.up)
    return toy, form, theirs


def trained(parameters: Any, model: nn.Module, *, steps: int = 4) -> Tensor:
    """The output after some steps of plain gradient descent, which sees a change and a copy alike."""
    optimizer = torch.optim.SGD(parameters, lr=0.3)
    for _ in range(steps):
        optimizer.zero_grad()
        model(*inputs()).square().mean().backward()
        optimizer.step()
    with torch.no_grad():
        found: Tensor = model(*inputs())
    return found


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_training_equals_peft(options: dict[str, Any]) -> None:
    toy, form, theirs = pair(options)
    before = {n: t.clone() for n, t in toy.state_dict().items()}
    with torch.no_grad():
        untrained = toy(*inputs())
    ours = trained(form.parameters(), toy)
    reference = trained([p for p in theirs.parameters() if p.requires_grad], theirs)
    torch.testing.assert_close(ours, reference, rtol=1e-5, atol=1e-5)
    assert (ours - untrained).abs().max() > 1e-2
    theirs_count = sum(p.numel() for p in theirs.parameters() if p.requires_grad)
    counts = form.counts()
    assert counts.trained == theirs_count
    assert counts.base == sum(p.numel() for p in Toy().parameters())
    assert counts.share == pytest.approx(theirs_count / (theirs_count + counts.base))
    assert f"{counts.share:.2%}" in str(counts)
    detach(form)
    assert all(torch.equal(t, before[n]) for n, t in toy.state_dict().items())


def added(model: Toy, adapter: Adapter) -> Toy:
    """A copy with every change added to its own weights and biases."""
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for path, delta in adapter.deltas.items():
            layer: Any = copied.get_submodule(path.removeprefix("unet."))
            layer.weight += delta.delta(layer.weight.clone())
            if isinstance(delta, WithBias):
                layer.bias += delta.bias
    return copied


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_what_is_collected_is_what_was_trained(options: dict[str, Any]) -> None:
    toy, form, _ = pair(options)
    live = trained(form.parameters(), toy)
    adapter = collect(form)
    detach(form)
    with torch.no_grad():
        torch.testing.assert_close(added(toy, adapter)(*inputs()), live, rtol=1e-5, atol=1e-5)
    again = attach(toy, LoraConfig(rank=3, alpha=8, targets=TARGETS, **options), start=adapter)
    with torch.no_grad():
        torch.testing.assert_close(toy(*inputs()), live, rtol=1e-5, atol=1e-5)
    detach(again)


def test_each_module_is_collected_as_what_it_is() -> None:
    _, form, _ = pair({"bias": "all", "modules_to_save": ("words", "norm")})
    found = {
        path.removeprefix("unet."): (type(d.inner if isinstance(d, WithBias) else d), isinstance(d, WithBias))
        for path, d in collect(form).deltas.items()
    }
    assert found == {
        "words": (Full, False),
        "norm": (Full, True),
        "query": (LowRank, True),
        "value": (LowRank, False),
        "conv": (type(None), True),
        "group": (type(None), True),
        "last": (type(None), True),
        "inner.first": (type(None), True),
    }


def test_a_half_precision_base_begins_as_it_is() -> None:
    """In bf16 a copy of a weight would be rounded; the change is not."""
    toy = Toy().bfloat16()
    ids, image = inputs()
    with torch.no_grad():
        bare = toy(ids, image.bfloat16())
    form = attach(toy, LoraConfig(rank=3, alpha=5, targets=TARGETS, modules_to_save=WHOLE, bias="all"))
    with torch.no_grad():
        assert torch.equal(toy(ids, image.bfloat16()), bare)
    assert {p.dtype for p in form.parameters()} == {torch.float32}
    toy(ids, image.bfloat16()).float().square().mean().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in form.parameters())


def test_dropout_falls_on_no_whole_module_and_no_look_up() -> None:
    toy = Toy()
    form = attach(
        toy,
        LoraConfig(
            rank=3, alpha=5, targets=("words",), modules_to_save=("query",), dropout=0.9, init="random"
        ),
    )
    assert torch.equal(toy(*inputs()), toy(*inputs()))
    detach(form)


# ---------------------------------------------------------------- LoRA+


@pytest.mark.parametrize("variant", ["lora", "dora"])
def test_lora_plus_rates_are_pefts(variant: str) -> None:
    toy, form, theirs = pair({"bias": "lora_only", "variant": variant})
    reference = create_loraplus_optimizer(theirs, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16)
    rate_of = {id(p): group["lr"] for group in reference.param_groups for p in group["params"]}
    groups = form.parameter_groups(1e-3, ratio=16)
    ours = {id(p): group["lr"] for group in groups for p in group["params"]}
    assert len(ours) == len(list(form.parameters()))
    compared = 0
    for layer in form.layers:
        assert isinstance(layer, TrainableLayer)
        f, their_layer = layer.factors, theirs.base_model.model.get_submodule(layer.site.path)
        assert isinstance(f, TrainableLowRank)
        pairs = [
            (f.down, their_layer.lora_A["default"].weight),
            (f.up, their_layer.lora_B["default"].weight),
        ]
        if layer.bias is not None:
            pairs.append((layer.bias, their_layer.base_layer.bias))
        if layer.magnitude is not None:
            pairs.append((layer.magnitude, their_layer.lora_magnitude_vector["default"].weight))
        for own, their in pairs:
            assert ours[id(own)] == pytest.approx(rate_of[id(their)])
            compared += 1
    assert compared == len(ours)
    assert set(ours.values()) == {1e-3, 16e-3}
    detach(form)
    assert toy.query.weight.requires_grad


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD, torch.optim.Adagrad])
def test_groups_go_into_any_optimizer(optimizer: type[torch.optim.Optimizer]) -> None:
    models = {"unet": Toy(), "text_encoder": Toy()}
    form = attach(models, LoraConfig(rank=3, alpha=5, targets=("query", "words")))
    groups = form.parameter_groups({"unet": 1e-2, "text_encoder": 1e-3}, ratio=4)
    rates = {group["name"]: group["lr"] for group in groups}
    assert rates == pytest.approx(
        {"unet": 1e-2, "text_encoder": 1e-3, "unet.fast": 4e-2, "text_encoder.fast": 4e-3}
    )
    fast = {id(p) for group in groups if group["name"].endswith("fast") for p in group["params"]}
    for layer in form.layers:  # an embedding's factors have the plain rate
        assert isinstance(layer, TrainableLayer)
        assert isinstance(layer.factors, TrainableLowRank | TrainableEmbedding)
        assert (id(layer.factors.up) in fast) == isinstance(layer.factors, TrainableLowRank)
        assert id(layer.factors.down) not in fast
    before = [p.detach().clone() for p in form.parameters()]
    made = optimizer(groups)  # type: ignore[call-arg]
    loss = sum(model(*inputs()).square().mean() for model in models.values())
    loss.backward()
    made.step()
    assert any(not torch.equal(a, b) for a, b in zip(before, form.parameters(), strict=True))


def test_without_a_ratio_there_is_a_group_for_each_component() -> None:
    form = attach({"unet": Toy(), "text_encoder": Toy()}, LoraConfig(rank=3, alpha=5, targets=TARGETS))
    groups = form.parameter_groups(2e-4)
    assert [(g["name"], g["lr"]) for g in groups] == [("unet", 2e-4), ("text_encoder", 2e-4)]
    assert [p for g in groups for p in g["params"]] == list(form.parameters())


def test_a_ratio_without_a_b_is_refused() -> None:
    form = attach(Toy(), LoraConfig(rank=2, alpha=5, targets=TARGETS, kind="loha"))
    with pytest.raises(ConfigError, match=r'query: a ratio .* kind = "loha"'):
        form.parameter_groups(1e-3, ratio=16)
    with pytest.raises(ConfigError, match=r"ratio = 0\.5 must be at least 1"):
        form.parameter_groups(1e-3, ratio=0.5)
    assert len(form.parameter_groups(1e-3)) == 1
