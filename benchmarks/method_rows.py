"""The rows of benchmarks.method. PEFT is the peer throughout."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import peft
import torch
from peft.tuners.lora import LoraModel
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import swap_models
from benchmarks.measure import Action, Row, compared, extra, interleaved, median_seconds, seconds
from benchmarks.swap_rows import Wrong
from lora_core import Adapter, LoraConfig, attach, combine, detach
from lora_core.adapter import file_path
from lora_core.deltas.low_rank import LowRank

RANK, ALPHA = 16, 8
TOKENS = (256, 2048)


@dataclass(frozen=True)
class Setting:
    tiny: bool
    dtype: torch.dtype
    repeats: int


class Sided(nn.Module):
    """One layer under a name that both sides can aim at."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.layer(x)
        return found


def layers(setting: Setting) -> Iterator[tuple[str, nn.Module, dict[int, Tensor]]]:
    """-> title, frozen layer, its input by number of tokens: the shapes of SDXL, and SD 1's first convolutions."""
    shapes = ((64, 64),) if setting.tiny else ((1280, 1280), (5120, 1280), (10240, 1280))
    for out, inn in shapes:
        linear = nn.Linear(inn, out, bias=False, dtype=setting.dtype)
        yield f"{out}×{inn}", linear, {n: torch.randn(1, n, inn, dtype=setting.dtype) for n in TOKENS}
    width = 16 if setting.tiny else 320
    conv = nn.Conv2d(width, width, 3, padding=1, dtype=setting.dtype)
    inputs = {n: torch.randn(1, width, 16, n // 16, dtype=setting.dtype) for n in TOKENS}
    yield f"{width}×{width} 3×3 convolution", conv, inputs


def trained(layer: nn.Module, variant: str, side: str) -> tuple[nn.Module, list[nn.Parameter]]:
    """-> a model around a layer that shares `layer`'s weights, and its trainable parameters."""
    shared = {id(t): t for t in layer.parameters()}
    model = Sided(copy.deepcopy(layer, shared))
    if side == "ours":
        form = attach(
            {"unet": model}, LoraConfig(rank=RANK, alpha=ALPHA, targets=("layer",), variant=variant)
        )
        return model, list(form.parameters())
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["layer"], use_dora=variant == "dora")
    wrapped = LoraModel(model, config, "default")
    return wrapped, [p for p in wrapped.parameters() if p.requires_grad]


def one_step(model: nn.Module, parameters: list[nn.Parameter], x: Tensor) -> Action:
    """Forward and backward; then every parameter is written to, as an optimizer does: a norm that is kept from step to
    step gains nothing here."""

    def run() -> None:
        model(x).float().square().mean().backward()
        _written_to(parameters)

    return run


@torch.no_grad()
def _written_to(parameters: list[nn.Parameter]) -> None:
    for p in parameters:
        assert p.grad is not None
        p.add_(p.grad, alpha=-1e-6)
        p.grad = None


def dora(setting: Setting) -> Iterator[Row]:
    for title, layer, inputs in layers(setting):
        layer.requires_grad_(False)
        for tokens, x in inputs.items():
            x = x.clone().requires_grad_()  # as in the middle of a model
            actions = {
                f"{side} {variant}": one_step(*trained(layer, variant, side), x)
                for side in ("ours", "peer")
                for variant in ("lora", "dora")
            }
            n = setting.repeats
            if not setting.tiny:  # a millisecond of a short step is lost in the noise of a few rounds
                n = max(n, min(60, round(1.0 / seconds(actions["ours lora"]))))
            times = interleaved(actions, n)
            ours, theirs = (extra(times, f"{side} dora", f"{side} lora") for side in ("ours", "peer"))
            plain = [statistics.median(times[f"{side} lora"]) * 1e3 for side in ("ours", "peer")]
            yield compared(
                "dora",
                f"DoRA's extra over LoRA, forward and backward, {title}, {tokens} tokens",
                ours,
                theirs,
                repeats=n,
                at_most=0.3,
                note=f"LoRA itself {plain[0]:.3g} and {plain[1]:.3g} ms",
            )


class Largest(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Elements of the largest tensor that any operation made."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor) and not func.is_view:
                self.elements = max(self.elements, tensor.numel())
        return out


def memory(setting: Setting) -> Iterator[Row]:
    """One token, so that only what is as large as the weight can be large."""
    for title, layer, _ in layers(setting):
        layer.requires_grad_(False)
        if not isinstance(layer, nn.Linear):
            continue
        x, found = torch.randn(1, 1, layer.in_features, dtype=setting.dtype), []
        for side in ("ours", "peer"):
            run = one_step(*trained(layer, "dora", side), x)
            run()
            with Largest() as largest:
                run()
            found.append(largest.elements)
        whole, own = layer.weight.numel(), RANK * max(layer.weight.shape)
        yield Row(
            "memory",
            f"elements of DoRA's largest tensor, {title}",
            float(found[0]),
            float(found[1]),
            goal="no out×in",
            met=found[0] <= own,
            note=f"the weight has {whole:,}, the larger factor {own:,}",
        )


def step(setting: Setting) -> Iterator[Row]:
    """Forward and backward of a whole UNet at 256 px, batch 1, attention layers."""
    pipe = swap_models.base("tiny" if setting.tiny else "sd15", setting.dtype)
    given = swap_models.unet_inputs(pipe, 1)
    actions: dict[str, Action] = {}
    for variant in ("lora", "dora"):
        unet = swap_models.twin(pipe).unet
        parameters = list(attach(unet, LoraConfig(rank=RANK, alpha=ALPHA, variant=variant)).parameters())
        actions[variant] = _unet_step(unet, parameters, given)
    n = min(setting.repeats, 3)
    times = interleaved(actions, n)
    row = compared(
        "step",
        "a training step of SD 1.5's size, DoRA",
        statistics.median(times["dora"]),
        statistics.median(times["lora"]),
        repeats=n,
        note="second figure: ours, LoRA",
    )
    met = None if row.ratio is None else row.ratio <= 1.1
    yield Row(row.name, row.what, row.ours, row.peer, "ms", "≤ 1.1 × LoRA", met, n, row.note)


def _unet_step(unet: Any, parameters: list[nn.Parameter], given: dict[str, Any]) -> Action:
    def run() -> None:
        unet(**given).sample.float().square().mean().backward()
        _written_to(parameters)

    return run


def combine_by_svd(setting: Setting) -> Iterator[Row]:
    """Two LoRAs of rank 32 into one, beside PEFT's add_weighted_adapter(combination_type="svd") as it comes."""
    rank, side, count = (4, 32, 2) if setting.tiny else (32, 1280, 12)
    model = nn.ModuleDict({f"layer{i}": nn.Linear(side, side, bias=False) for i in range(count)})
    config = peft.LoraConfig(
        r=rank, lora_alpha=rank // 2, target_modules=list(model), init_lora_weights=False
    )
    theirs = LoraModel(copy.deepcopy(model), config, "a")
    theirs.peft_config["b"] = config
    theirs.inject_adapter(theirs.model, "b")
    weights = {"a": 0.7, "b": 0.4}
    loras = {name: Adapter(_as_ours(theirs, name, rank), {}, None, name) for name in weights}
    mine: list[Adapter] = []

    def ours() -> None:
        mine[:] = [combine([(loras[n], w) for n, w in weights.items()], method="svd", rank=rank)]

    def peer() -> None:
        theirs.add_weighted_adapter(list(weights), list(weights.values()), "both", "svd", svd_rank=rank)

    taken, peer_taken = median_seconds(ours, setting.repeats), seconds(peer)
    errors = [0.0, 0.0]
    for path, delta in mine[0].deltas.items():
        empty = torch.zeros(side, side)
        exact = torch.stack([w * loras[n].deltas[path].delta(empty) for n, w in weights.items()]).sum(0)
        module = theirs.model.get_submodule(path.split(".", 1)[1])
        both = delta.delta(empty), module.get_delta_weight("both")
        errors = [e + float((got - exact).square().sum()) for e, got in zip(errors, both, strict=True)]
    if errors[0] > errors[1] * 1.001 + 1e-9:
        raise Wrong(f"squared errors {errors}: ours is not the best of that rank")
    note = f"squared errors {errors[0]:.6g} and {errors[1]:.6g}"
    what = f"combine two LoRAs of rank {rank} by SVD, {count} layers {side}×{side}"
    yield compared("combine", what, taken, peer_taken, repeats=setting.repeats, at_most=1 / 50, note=note)

    pair = [(_whole_sdxl(setting, rank, seed), 0.5) for seed in (1, 2)]
    whole = seconds(lambda: combine(pair, method="svd", rank=rank))
    what = f"the same, every linear layer of an SDXL ({len(pair[0][0].deltas)})"
    yield Row("combine", what, whole, None, "s", "< 60 s", whole < 60)


def _as_ours(model: Any, name: str, rank: int) -> dict[str, Any]:
    found = {}
    for path, module in model.model.named_modules():
        if hasattr(module, "lora_A"):
            down, up = (getattr(module, f"lora_{f}")[name].weight.detach().clone() for f in "AB")
            found[f"unet.{path}"] = LowRank(down, up, rank / 2)
    return found


def _whole_sdxl(setting: Setting, rank: int, seed: int) -> Adapter:
    generator, deltas = torch.Generator().manual_seed(seed), {}
    with torch.device("meta"):
        unet = swap_models.sdxl_unet()
    for path, layer in unet.named_modules():
        if isinstance(layer, nn.Linear) and ".transformer_blocks." in path:
            down = torch.randn(rank, layer.in_features, generator=generator)
            up = torch.randn(layer.out_features, rank, generator=generator)
            deltas[file_path("unet", path)] = LowRank(down, up, rank / 2)
            if setting.tiny and len(deltas) == 4:
                break
    return Adapter(dict(deltas), {}, "sdxl", f"random{seed}")


def attach_to_unet(setting: Setting) -> Iterator[Row]:
    pipe = swap_models.base("tiny" if setting.tiny else "sd15", setting.dtype)
    ours_unet, peer_unet = (swap_models.twin(pipe).unet for _ in range(2))
    config = LoraConfig(rank=RANK, alpha=ALPHA)
    forms: list[Any] = []
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    ours = median_seconds(
        lambda: forms.append(attach(ours_unet, config)), setting.repeats, after=lambda: detach(forms.pop())
    )
    theirs: list[Any] = []

    def peer() -> None:
        given = peft.LoraConfig(
            r=RANK, lora_alpha=ALPHA, target_modules=targets, init_lora_weights="gaussian"
        )
        theirs.append(LoraModel(peer_unet, given, "default"))

    peer_taken = median_seconds(peer, setting.repeats, after=lambda: theirs.pop().unload())
    count = sum(1 for path, _ in peer_unet.named_modules() if path.endswith(tuple(targets)))
    what = f"attach a LoRA to {count} layers of a UNet"
    yield compared("attach", what, ours, peer_taken, repeats=setting.repeats, at_most=0.2)
