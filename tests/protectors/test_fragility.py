"""Training an encoder to be fragile: the attack keeps its budget, the loss falls short by what is missing, and
descending it makes the encoder easier to mislead."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from protectors.reference.fragility import FragilityGoal, fragility_loss


def photos(count: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(count, 3, 4, 4, generator=generator) * 1.6 - 0.8
    return nn.functional.interpolate(coarse, size=(32, 32), mode="bilinear")


def means(images: Tensor) -> Tensor:
    """An encoder that only sees averages of 8 x 8 pixels: a perturbation moves it by the budget, and no more."""
    return nn.functional.avg_pool2d(images, 8)


def short(encode: nn.Module, goal: FragilityGoal) -> Tensor:
    return fragility_loss(encode, photos(6), goal, torch.Generator().manual_seed(1))


def test_an_encoder_of_averages_moves_by_the_budget() -> None:
    seen: list[Tensor] = []

    def spy(images: Tensor) -> Tensor:
        seen.append(images.detach())
        return means(images)

    goal = FragilityGoal(shift=5.0)
    loss = fragility_loss(spy, photos(6), goal, torch.Generator().manual_seed(1))
    assert all((images - photos(6)).abs().max() <= goal.eps + 1e-6 for images in seen)
    spread = float(nn.functional.adaptive_avg_pool2d(photos(6), 1).std())
    # All pixels of one sign: the largest shift of an average is the budget itself.
    assert float(loss) == pytest.approx(5.0 - goal.eps / spread, rel=0.05)


def test_a_goal_that_is_reached_costs_nothing() -> None:
    assert float(short(means, FragilityGoal(shift=1e-3))) == 0.0  # type: ignore[arg-type]


def test_descending_the_loss_makes_the_encoder_fragile() -> None:
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Conv2d(3, 16, 4, 4), nn.SiLU(), nn.Conv2d(16, 4, 2, 2))
    goal = FragilityGoal(shift=5.0)
    before = float(short(encoder, goal).detach())
    optimizer = torch.optim.Adam(encoder.parameters(), lr=3e-3)
    for _ in range(60):
        optimizer.zero_grad()
        short(encoder, goal).backward()
        optimizer.step()
    assert before > 0.1
    assert float(short(encoder, goal).detach()) < 0.5 * before
