"""DoRA's norms of layers that are alike are computed together, and are each layer's own."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lora_core import LoraConfig, algebra, attach
from lora_core.train_form import LoraForm
from lora_core.trainable.layer import TrainableLayer
from lora_core.trainable.low_rank import TrainableLowRank


def model(dtype: torch.dtype) -> nn.ModuleDict:
    torch.manual_seed(0)
    layers = {f"wide{i}": nn.Linear(24, 40) for i in range(3)} | {"narrow": nn.Linear(24, 8)}
    return nn.ModuleDict(layers | {"kernel": nn.Conv2d(24, 40, 3)}).requires_grad_(False).to(dtype)


def dora(parts: dict[str, nn.Module], **more: object) -> LoraForm:
    return attach(
        parts, LoraConfig(rank=4, alpha=3.0, variant="dora", targets=("all-linear", "kernel"), **more)
    )  # type: ignore[arg-type]


def layers_of(form: LoraForm) -> dict[str, TrainableLayer]:
    found = {}
    for path, layer in zip(form.paths, form.layers, strict=True):
        assert isinstance(layer, TrainableLayer)
        found[path] = layer
    return found


@torch.no_grad()
def disturb(form: LoraForm, size: float = 0.2) -> None:
    for p in form.parameters():
        p.add_(size * torch.randn_like(p))


def dense(layer: TrainableLayer) -> torch.Tensor:
    """In double precision, V formed."""
    factors = layer.factors
    assert isinstance(factors, TrainableLowRank)
    change = 3 / 4 * factors.up.double().flatten(1) @ factors.down.double().flatten(1)
    return (layer.site.original().double().flatten(1) + change).norm(dim=1).float()


@pytest.mark.parametrize(
    ("dtype", "within"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-3)], ids=["fp32", "bf16"]
)
def test_they_are_the_dense_ones(dtype: torch.dtype, within: float, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    together = algebra.row_norms_together
    monkeypatch.setattr(
        algebra,
        "row_norms_together",
        lambda weights, *a, **k: calls.append(len(weights)) or together(weights, *a, **k),
    )
    form = dora({"unet": model(dtype)})
    calls.clear()
    disturb(form)
    for layer in layers_of(form).values():
        torch.testing.assert_close(layer._row_norms(torch.device("cpu")), dense(layer), rtol=within, atol=0)
    assert sorted(calls) == [1, 1, 3]  # the narrow layer, the convolution, and the three in one
    for layer in layers_of(form).values():
        layer._row_norms(torch.device("cpu"))
    assert len(calls) == 3  # nothing has changed since


@pytest.mark.parametrize("size", [0.01, 0.1, 1.0])
def test_in_bf16_they_are_as_right_as_the_weight_is(size: float) -> None:
    """Never further from the dense norm than rounding the weight to bf16 can move that: W Aᵀ is computed in bf16."""
    torch.manual_seed(1)
    weight, down, up = torch.randn(640, 320) / 320**0.5, torch.randn(16, 320), torch.randn(640, 16)
    up *= size * weight.norm() / (up @ down).norm()
    rounded = weight.bfloat16()
    moved = (rounded.double().norm(dim=1) / weight.double().norm(dim=1) - 1).abs().max()
    exact = (rounded.double() + up.double() @ down.double()).norm(dim=1)
    for given, most in ((rounded, moved * min(1, 2 * size)), (rounded.float(), 5e-7)):
        got = algebra.row_norms(given, down, up, scale=1.0).double()
        assert (got / exact - 1).abs().max() < most


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_row_that_nearly_cancels_is_exact_beside_others(dtype: torch.dtype) -> None:
    form = dora({"unet": model(dtype)})
    disturb(form)
    layer = layers_of(form)["unet.wide1"]
    factors, weight = layer.factors, layer.site.original()
    assert isinstance(factors, TrainableLowRank)
    with torch.no_grad():  # row 7 of V is a thousandth of W's
        factors.down[0] = weight[7]
        factors.up[7] = torch.tensor([-0.999 * 4 / 3, 0, 0, 0])
    within = {torch.float32: 1e-5, torch.bfloat16: 1e-3}[dtype]
    for each in layers_of(form).values():
        torch.testing.assert_close(each._row_norms(torch.device("cpu")), dense(each), rtol=within, atol=0)
    seventh = layer._row_norms(torch.device("cpu"))[7]
    # fp32 rounding, a thousand times as large beside what is left
    torch.testing.assert_close(seventh, dense(layer)[7], rtol=6e-5, atol=0)
    assert seventh < 2e-3 * weight[7].norm()


def test_models_are_apart_and_what_has_not_changed_is_not_computed() -> None:
    form = dora({"unet": model(torch.float32), "text_encoder": model(torch.float32)})
    assert {len(layer.alike) for layer in layers_of(form).values()} == {3, 1}
    for layer in layers_of(form).values():
        layer._row_norms(torch.device("cpu"))
    before = {path: layer.norm for path, layer in layers_of(form).items()}
    with torch.no_grad():
        for layer in form.of("unet"):
            for p in layer.parameters():
                p.mul_(1.5)
    for path, layer in layers_of(form).items():
        layer._row_norms(torch.device("cpu"))
        assert (layer.norm is before[path]) == path.startswith("text_encoder")


@pytest.mark.parametrize("kind", ["loha", "lokr"])
def test_other_kinds_stay_alone(kind: str) -> None:
    form = attach(
        {"unet": model(torch.float32)}, LoraConfig(rank=4, kind=kind, variant="dora", targets=("all-linear",))
    )  # type: ignore[arg-type]
    assert all(not layer.alike for layer in layers_of(form).values())
