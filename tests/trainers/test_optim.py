"""Learning rates, steps and averages beside diffusers', torch's and PEFT's own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from trainers import optim
from trainers.average import Average


def rates_of_diffusers(name: str, steps: int, warmup: int) -> list[float]:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=steps)
    found = []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return found


@pytest.mark.parametrize("schedule", sorted(optim.SCHEDULES))
@pytest.mark.parametrize(("steps", "warmup"), [(10, 0), (10, 3), (10, 9), (1, 0)])
def test_rates_are_diffusers_without_the_step_at_rate_zero(schedule: str, steps: int, warmup: int) -> None:
    """diffusers' first step of a warm-up has rate 0 and learns nothing: ours is the second of one step more."""
    ours = [optim.rate_factor(schedule, step, steps=steps, warmup=warmup) for step in range(steps)]
    name = "constant_with_warmup" if schedule == "constant" else schedule
    assert ours == pytest.approx(rates_of_diffusers(name, steps + 1, warmup + 1)[1:])
    if not warmup:
        assert ours == pytest.approx(rates_of_diffusers(schedule, steps, 0))


@pytest.mark.parametrize("left_out", [(), (3, 4)])
def test_steps_are_plain_adamws_with_a_decay_of_the_groups_own(left_out: tuple[int, ...]) -> None:
    """Beside AdamW written out (arXiv 1711.05101); a step on NaN moves neither weights nor moments."""
    g = torch.Generator().manual_seed(0)
    start = [torch.randn(3, 2, generator=g), torch.randn(2, generator=g)]
    mine = [nn.Parameter(t.clone()) for t in start]
    groups: list[dict[str, Any]] = [
        {"params": mine[:1], "lr": 1e-2},
        {"params": mine[1:], "lr": 3e-2, "weight_decay": 0.0},
    ]
    optimizer = optim.adamw(groups, weight_decay=0.1)
    plain = [t.double() for t in start]
    moments = [(torch.zeros_like(t), torch.zeros_like(t)) for t in plain]
    taken = 0
    for step in range(6):
        factor = optim.rate_factor("cosine", step, steps=6, warmup=1)
        optim.set_rate(optimizer, factor)
        slopes = [torch.randn(t.shape, generator=g) for t in start]
        for p, slope in zip(mine, slopes, strict=True):
            p.grad = slope.clone() if step not in left_out else torch.full_like(p, float("nan"))
        optim.leave_out_if(optimizer, torch.tensor(step in left_out))
        optimizer.step()
        if step in left_out:
            continue
        taken += 1
        for i, (rate, decay) in enumerate(((1e-2, 0.1), (3e-2, 0.0))):
            m, v = (
                b * old + (1 - b) * new
                for b, old, new in (
                    (0.9, moments[i][0], slopes[i].double()),
                    (0.999, moments[i][1], slopes[i].double() ** 2),
                )
            )
            moments[i] = m, v
            change = m / (1 - 0.9**taken) / ((v / (1 - 0.999**taken)).sqrt() + 1e-8)
            plain[i] = plain[i] * (1 - factor * rate * decay) - factor * rate * change
    for p, expected in zip(mine, plain, strict=True):
        torch.testing.assert_close(p.detach().double(), expected, rtol=1e-5, atol=1e-7)


def walk(steps: int) -> list[Tensor]:
    g = torch.Generator().manual_seed(1)
    return [torch.randn(4, 3, generator=g) for _ in range(steps)]


def test_an_average_is_diffusers_which_begins_a_step_later() -> None:
    """EMAModel takes the first step's weights whole, and is then at our decays of one step before."""
    model, places = nn.Linear(3, 4, bias=False), walk(40)
    theirs = EMAModel(model.parameters(), decay=0.7)
    for place in places:
        model.weight.data.copy_(place)
        theirs.step(model.parameters())
    model.weight.data.copy_(places[0])
    ours = Average(model, 0.7)
    for step, place in enumerate(places[1:], 1):
        model.weight.data.copy_(place)
        ours.follow(step)
    torch.testing.assert_close(ours.tensors["weight"], theirs.shadow_params[0], rtol=1e-6, atol=1e-7)


def test_once_warm_an_average_is_torchs() -> None:
    model, places = nn.Linear(3, 4, bias=False), walk(20)
    model.weight.data.copy_(places[0])
    theirs = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.6)
    )
    theirs.update_parameters(model)
    ours = Average(model, 0.6)
    for step, place in enumerate(places[1:], 1000):  # (1 + n) / (10 + n) is long above 0.6
        model.weight.data.copy_(place)
        theirs.update_parameters(model)
        ours.follow(step)
    torch.testing.assert_close(ours.tensors["weight"], theirs.module.weight.detach(), rtol=1e-6, atol=1e-7)
