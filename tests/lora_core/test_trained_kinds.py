"""The laws of training over every kind, layer, magnitude and precision, and the kinds against LyCORIS and PEFT."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from lycoris.functional import factorization
from torch import Tensor, nn
from torch.nn import functional as F

from lora_core import LoraConfig, algebra, attach, collect, detach
from lora_core.errors import ConfigError
from lora_core.train_form import LoraForm
from lora_core.trainable.kronecker import TrainableKronecker, split
from lora_core.trainable.layer import TrainableLayer


class Model(nn.Module):
    """One layer between fixed ends, so that every layer kind is trained and run in the same way."""

    def __init__(self, which: str) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.which = which
        self.layer: nn.Module = {
            "linear": lambda: nn.Linear(12, 20),
            "conv 1x1": lambda: nn.Conv2d(12, 20, 1, bias=False),
            "conv 3x3": lambda: nn.Conv2d(12, 20, 3, padding=1, stride=2),
            "embedding": lambda: nn.Embedding(30, 12),
        }[which]()

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.layer(x).float())

    def inputs(self, dtype: torch.dtype = torch.float32) -> Tensor:
        g = torch.Generator().manual_seed(11)
        if self.which == "embedding":
            return torch.randint(0, 30, (4, 5), generator=g)
        shape = (5, 7, 12) if self.which == "linear" else (2, 12, 6, 8)
        return torch.randn(shape, generator=g).to(dtype)


LAYERS = ("linear", "conv 1x1", "conv 3x3", "embedding")
KINDS: dict[str, dict[str, Any]] = {
    "lora": {"kind": "lora"},
    "lora rs": {"kind": "lora", "rank_stabilized": True},
    "loha": {"kind": "loha"},
    "loha dense": {"kind": "loha", "rank": 6, "alpha": 4.0},
    "lokr": {"kind": "lokr", "rank": 1},
    "lokr both": {"kind": "lokr", "factor": 4, "rank": 1, "decompose_both": True, "rank_stabilized": True},
    "lokr whole": {"kind": "lokr", "factor": 4, "rank": 8},
}
CASES = [
    (kind, layer, dora)
    for kind in KINDS
    for layer in LAYERS
    for dora in (False, True)
    if layer != "embedding" or kind.startswith("lora")
]


def config(kind: str, *, dora: bool = False, **more: Any) -> LoraConfig:
    options = {"rank": 3, "alpha": 5.0, "targets": ("layer",), **KINDS[kind], **more}
    return LoraConfig(variant="dora" if dora else "lora", **options)


def own(form: LoraForm) -> TrainableLayer:
    (layer,) = form.layers
    assert isinstance(layer, TrainableLayer)
    return layer


@torch.no_grad()
def stir(form: LoraForm) -> None:
    """Factors, magnitudes and biases that are no longer at their beginning."""
    g = torch.Generator().manual_seed(5)
    for name, p in form.named_parameters():
        noise = torch.randn(p.shape, generator=g)
        p.copy_(p * (1 + 0.2 * noise.abs()) if name.endswith("magnitude") else 0.4 * noise)


def dense(layer: nn.Module, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if isinstance(layer, nn.Embedding):
        return F.embedding(x, weight)
    if isinstance(layer, nn.Conv2d):
        return F.conv2d(x, weight, bias, layer.stride, layer.padding)
    return F.linear(x, weight, bias)


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    found: torch.dtype = request.param
    return found


@pytest.mark.parametrize(("kind", "layer", "dora"), CASES)
def test_laws(kind: str, layer: str, dora: bool, dtype: torch.dtype) -> None:
    model = Model(layer).to(dtype)
    x = model.inputs(dtype)
    with torch.no_grad():
        bare = model(x)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    tree = [name for name, _ in model.named_modules()]

    form = attach(model, config(kind, dora=dora))
    with torch.no_grad():
        # no-op at the beginning
        torch.testing.assert_close(model(x), bare, rtol=0, atol=0 if not dora else 1e-6)
    assert all(p.dtype == torch.float32 for p in form.parameters())

    optimizer = torch.optim.SGD(form.parameters(), lr=0.1)
    for _ in range(2):
        model(x).square().sum().backward()
        optimizer.step()
    with torch.no_grad():
        assert not torch.equal(model(x), bare)
    stir(form)
    with torch.no_grad():
        live = model(x)
    adapter = collect(form)
    detach(form)

    # the base is bit-equal, the tree and the flags as before
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert [name for name, _ in model.named_modules()] == tree
    assert not model.layer._forward_hooks

    # live == dense, from the collected delta
    (delta,) = adapter.deltas.values()
    weight = model.layer.weight.detach().float()
    bias = getattr(model.layer, "bias", None)
    wide = x.float() if x.is_floating_point() else x
    expected = torch.tanh(
        dense(model.layer, wide, weight + delta.delta(weight), None if bias is None else bias.float())
    )
    loose = 1e-5 if dtype == torch.float32 else 0.05
    torch.testing.assert_close(live, expected.detach(), rtol=loose, atol=loose)
    assert (live - bare).abs().max() > 0.1

    # what was collected can be gone on with, whatever the alpha
    form = attach(model, config(kind, dora=dora, alpha=7.0), start=adapter)
    with torch.no_grad():
        torch.testing.assert_close(model(x), live, rtol=loose, atol=loose)
    detach(form)


@pytest.mark.parametrize(("kind", "layer", "dora"), CASES)
def test_gradient_is_autograd_through_the_dense_formula(kind: str, layer: str, dora: bool) -> None:
    """With the norm of a DoRA a constant (arXiv 2402.09353 §4.3)."""
    model = Model(layer)
    x = model.inputs()
    form = attach(model, config(kind, dora=dora))
    stir(form)
    model(x).square().sum().backward()
    trained = own(form)
    ours = {name: p.grad.clone() for name, p in trained.named_parameters() if p.grad is not None}
    assert len(ours) == len(list(trained.parameters()))

    trained.zero_grad()
    change = dense_change(trained)
    weight = model.layer.weight
    weight = weight.T if layer == "embedding" else weight
    v = weight + change
    if trained.magnitude is not None:
        norm = v.detach().flatten(1).norm(dim=1)
        v = (trained.magnitude / norm).reshape(-1, *[1] * (v.dim() - 1)) * v
    v = v.T if layer == "embedding" else v
    torch.tanh(dense(model.layer, x, v, getattr(model.layer, "bias", None))).square().sum().backward()
    for name, p in trained.named_parameters():
        assert p.grad is not None
        torch.testing.assert_close(ours[name], p.grad, rtol=1e-4, atol=1e-5 * float(p.grad.abs().max()))


def dense_change(trained: TrainableLayer) -> Tensor:
    """ΔW by the papers, out of plain products."""
    f: Any = trained.factors
    config = trained.site.config
    root = config.rank**0.5 if config.rank_stabilized else config.rank
    assert config.alpha is not None
    scale = config.alpha / root
    if config.kind == "lora":
        return scale * torch.einsum("or,r...->o...", f.up.flatten(1), f.down)
    if config.kind == "loha":
        first, second = (torch.einsum("or,r...->o...", a, b) for a, b in ((f.w1_a, f.w1_b), (f.w2_a, f.w2_b)))
        return scale * first * second
    w1, w2 = (
        side[0] if len(side) == 1 else torch.einsum("or,r...->o...", side[0], side[1])
        for side in (f.w1, f.w2)
    )
    scale = 1.0 if len(f.w1) == len(f.w2) == 1 else scale
    out, inn, *kernel = trained.site.shape
    return scale * torch.einsum("ab,cd...->acbd...", w1, w2).reshape(out, inn, *kernel)


# ---------------------------------------------------------------- against LyCORIS and PEFT


@pytest.mark.parametrize("layer", ["linear", "conv 1x1", "conv 3x3"])
@pytest.mark.parametrize("kind", [k for k in KINDS if k.startswith("lo") and "lora" not in k])
def test_forward_and_gradients_equal_lycoris(kind: str, layer: str) -> None:
    """Its modules with our factors put in: one forward, one backward."""
    from lycoris.modules.loha import LohaModule  # noqa: PLC0415
    from lycoris.modules.lokr import LokrModule  # noqa: PLC0415

    model, wanted = Model(layer), config(kind)
    form = attach(model, wanted)
    stir(form)
    f: Any = own(form).factors
    twin = Model(layer)
    options: dict[str, Any] = {
        "lora_dim": wanted.rank,
        "alpha": wanted.alpha,
        "rs_lora": wanted.rank_stabilized,
    }
    if wanted.kind == "loha":
        theirs: Any = LohaModule("m", twin.layer, **options)
        names = {n: (getattr(theirs, f"hada_{n}"), getattr(f, n)) for n in ("w1_a", "w1_b", "w2_a", "w2_b")}
    else:
        theirs = LokrModule(
            "m", twin.layer, factor=wanted.factor, decompose_both=wanted.decompose_both, **options
        )
        names = {}
        for side, own_side in (("w1", f.w1), ("w2", f.w2)):
            ends = ("",) if len(own_side) == 1 else ("_a", "_b")
            names |= {
                side + end: (getattr(theirs, f"lokr_{side}{end}"), p)
                for end, p in zip(ends, own_side, strict=True)
            }
    with torch.no_grad():
        for theirs_p, ours_p in names.values():
            theirs_p.copy_(ours_p.reshape(theirs_p.shape))
    theirs.apply_to()
    x = model.inputs()
    ours, reference = model(x), twin(x)
    torch.testing.assert_close(ours, reference, rtol=1e-5, atol=1e-5)
    ours.square().sum().backward()
    reference.square().sum().backward()
    for theirs_p, ours_p in names.values():
        torch.testing.assert_close(ours_p.grad.reshape(theirs_p.shape), theirs_p.grad, rtol=1e-4, atol=1e-5)


def test_beginnings_are_those_of_lycoris() -> None:
    """Spreads of the factors, measured on a wide layer."""
    wide = nn.Sequential(nn.Linear(600, 400))
    form = attach(wide, LoraConfig(kind="loha", rank=8, alpha=3, targets="all-linear"))
    f: Any = own(form).factors
    spread = {n: float(p.detach().std()) for n, p in f.named_parameters()}
    assert spread == pytest.approx({"w1_a": 0.1, "w1_b": 1.0, "w2_a": 0.0, "w2_b": 1.0}, rel=0.05)
    detach(form)
    form = attach(wide, LoraConfig(kind="lokr", rank=8, alpha=3, factor=8, targets="all-linear"))
    lokr = own(form).factors
    assert isinstance(lokr, TrainableKronecker)
    assert [tuple(p.shape) for p in (*lokr.w1, *lokr.w2)] == [(8, 8), (50, 8), (8, 75)]
    assert [bool(p.any()) for p in (*lokr.w1, *lokr.w2)] == [True, True, False]
    assert float(lokr.w2[0].detach().abs().max()) <= (1 / 8) ** 0.5


@pytest.mark.parametrize("factor", [-1, 1, 2, 3, 4, 5, 8, 12, 16, 24, 64])
def test_split_is_lycoris_factorization(factor: int) -> None:
    sizes = (1, 2, 4, 7, 12, 20, 24, 36, 64, 77, 96, 127, 250, 320, 360, 640, 768, 1280, 2560, 10240)
    assert [split(n, factor) for n in sizes] == [tuple(factorization(n, factor)) for n in sizes]


def embedding_pair(*, dora: bool, rank_stabilized: bool) -> tuple[Model, LoraForm, peft.PeftModel]:
    model = Model("embedding")
    theirs = peft.get_peft_model(
        Model("embedding"),
        peft.LoraConfig(
            r=3, lora_alpha=5, target_modules=["layer"], use_dora=dora, use_rslora=rank_stabilized
        ),
    )
    form = attach(model, config("lora rs" if rank_stabilized else "lora", dora=dora))
    return model, form, theirs


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("rank_stabilized", [False, True])
def test_embedding_equals_peft(dora: bool, rank_stabilized: bool) -> None:
    model, form, theirs = embedding_pair(dora=dora, rank_stabilized=rank_stabilized)
    layer: Any = theirs.base_model.model.layer
    down, up = layer.lora_embedding_A["default"], layer.lora_embedding_B["default"]
    f: Any = own(form).factors
    assert not f.down.any()
    assert not down.any()  # as they begin: A = 0
    assert float(f.up.detach().std()) == pytest.approx(1.0, rel=0.4)
    stir(form)
    with torch.no_grad():
        down.copy_(f.down)
        up.copy_(f.up)
        if dora:
            theirs_m = layer.lora_magnitude_vector["default"].weight
            theirs_m.copy_(own(form).magnitude.reshape(theirs_m.shape))
    x = model.inputs()
    ours, reference = model(x), theirs(x)
    torch.testing.assert_close(ours, reference, rtol=1e-5, atol=1e-5)
    ours.square().sum().backward()
    reference.square().sum().backward()
    pairs = [(f.down, down), (f.up, up)] + ([(own(form).magnitude, theirs_m)] if dora else [])
    for ours_p, theirs_p in pairs:
        torch.testing.assert_close(ours_p.grad.reshape(theirs_p.shape), theirs_p.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["loha", "lokr"])
def test_a_kind_without_a_form_for_embeddings_is_refused(kind: str) -> None:
    model = Model("embedding")
    with pytest.raises(ConfigError, match=f'kind = "{kind}" has no form for layer, a Embedding'):
        attach(model, config(kind))
    assert not model.layer._forward_hooks


def test_a_tucker_file_is_gone_on_with() -> None:
    """Its cores are composed: the same ΔW at the start of training."""
    from lora_core.adapter import Adapter  # noqa: PLC0415
    from lora_core.deltas.hadamard import Hadamard  # noqa: PLC0415

    model, g = Model("conv 3x3"), torch.Generator().manual_seed(2)
    t1, t2 = (torch.randn(3, 3, 3, 3, generator=g) for _ in range(2))
    a1, a2, b1, b2 = (torch.randn(3, n, generator=g) for n in (20, 20, 12, 12))
    delta = Hadamard(a1, b1, a2, b2, 2.0, t1, t2)
    form = attach(model, config("loha"), start=Adapter({"unet.layer": delta}))
    weight = model.layer.weight.detach()
    (found,) = collect(form).deltas.values()
    torch.testing.assert_close(found.delta(weight), delta.delta(weight), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("found", "wanted", "sentence"),
    [
        (config("loha"), config("lora"), "holds a Hadamard there"),
        (config("loha"), config("loha", rank=2), "rank 3, this training rank 2. Set rank = 3"),
        (config("lokr"), config("lokr", factor=2), "Set rank, factor and decompose_both"),
        (config("lokr both"), config("lokr", factor=4), "Set rank, factor and decompose_both"),
        (config("lora", bias="lora_only"), config("lora"), "changes the bias there, this training does not"),
        (config("lora"), config("lora", bias="lora_only"), "changes no bias there, this training does"),
    ],
)
def test_another_start_is_refused(found: LoraConfig, wanted: LoraConfig, sentence: str) -> None:
    model = Model("linear")
    form = attach(model, found)
    adapter = collect(form)
    detach(form)
    with pytest.raises(ConfigError, match="file to start from") as problem:
        attach(model, wanted, start=adapter)
    assert sentence in str(problem.value)
    assert not model.layer._forward_hooks
    assert model.layer.weight.requires_grad


# ---------------------------------------------------------------- the norm of a Kronecker product


@pytest.mark.parametrize("kernel", [(), (3, 3)])
@pytest.mark.parametrize("on_gpu", [False, True])
def test_kronecker_row_norms_are_the_dense_ones(
    kernel: tuple[int, ...], on_gpu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if on_gpu:  # as it is computed there
        monkeypatch.setattr(algebra, "_with_dense", algebra._with_nearest_dense)
    g = torch.Generator().manual_seed(1)
    left, right = torch.randn(3, 2, generator=g), torch.randn(5, 4, *kernel, generator=g)
    weight = torch.randn(15, 8, *kernel, generator=g)
    weight[4] = -algebra.kronecker(left, right, scale=1.0)[4] * (1 + 1e-4)  # nearly cancelled
    got = algebra.kronecker_row_norms(weight, left, right, n0=algebra.row_norms_squared(weight))
    whole = weight.double() + torch.kron(left.reshape(3, 2, *[1] * len(kernel)), right).double()
    torch.testing.assert_close(got.double(), whole.flatten(1).norm(dim=1), rtol=2e-4, atol=0)
    ordinary = [i for i in range(15) if i != 4]
    torch.testing.assert_close(
        got.double()[ordinary], whole.flatten(1).norm(dim=1)[ordinary], rtol=2e-6, atol=0
    )


@pytest.mark.parametrize("fused", [False, True])
def test_a_dora_sees_what_an_optimizer_wrote(fused: bool) -> None:
    """A fused optimizer writes without autograd counting it: the norms that are kept from call to call must follow."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"layer": nn.Linear(8, 6)})
    form = attach({"unet": model}, LoraConfig(rank=2, targets=("layer",), variant="dora", init="random"))
    optimizer = torch.optim.AdamW(form.parameters(), lr=0.5, fused=fused)
    x = torch.randn(3, 8)
    for _ in range(2):
        model["layer"](x).square().sum().backward()
        optimizer.step()
    kept = model["layer"](x)
    own = form.layers[0]
    own._norm = None
    assert torch.equal(model["layer"](x), kept)
    detach(form)
