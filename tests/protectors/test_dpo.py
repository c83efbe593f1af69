"""The preference loss: values, gradients and signs from its equations."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from protectors.diffusion import DiffusionModel
from protectors.dpo import PairErrors, Reduction, dpo_loss, preference_margin, squared_error
from protectors.objectives import Draws, latent_denoising_loss
from tests.protectors.model_runs import small_model, squared_error64, unet64

REDUCTIONS: tuple[Reduction, ...] = ("element", "sample_mean", "sample_sum")
SHAPE = (2, 4, 8, 8)


def errors(seed: int, *, grad: bool = False) -> PairErrors:
    generator = torch.Generator().manual_seed(seed)
    positive, negative = (torch.rand(SHAPE, generator=generator).requires_grad_(grad) for _ in range(2))
    return PairErrors(positive=positive, negative=negative)


def detached(pair: PairErrors) -> PairErrors:
    return PairErrors(positive=pair.positive.detach(), negative=pair.negative.detach())


@pytest.mark.parametrize("beta", [0.1, 1.0, 100.0])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_at_the_reference_it_is_log_two_and_pulls_the_errors_apart(reduction: Reduction, beta: float) -> None:
    trained = errors(0, grad=True)
    loss = dpo_loss(preference_margin(trained, detached(trained)), beta=beta, reduction=reduction)
    assert loss.item() == pytest.approx(math.log(2), rel=1e-6)
    up, down = torch.autograd.grad(loss, [trained.positive, trained.negative])
    share = beta / 2 / (SHAPE[0] if reduction == "sample_sum" else trained.positive.numel())
    torch.testing.assert_close(up, torch.full(SHAPE, share))
    torch.testing.assert_close(down, torch.full(SHAPE, -share))


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_value_and_gradient_agree_with_the_equation_in_float64(reduction: Reduction) -> None:
    trained, reference, beta = errors(1, grad=True), errors(2), 3.0
    loss = dpo_loss(preference_margin(trained, reference), beta=beta, reduction=reduction)
    exact = [side.detach().double().requires_grad_() for side in (trained.positive, trained.negative)]
    margin = (exact[0] - reference.positive.double()) - (exact[1] - reference.negative.double())
    if reduction == "sample_mean":
        margin = margin.mean((1, 2, 3))
    if reduction == "sample_sum":
        margin = margin.sum((1, 2, 3))
    expected = -torch.log(1 / (1 + torch.exp(beta * margin))).mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    found = torch.autograd.grad(loss, [trained.positive, trained.negative])
    for part, wanted in zip(found, torch.autograd.grad(expected, exact), strict=True):
        torch.testing.assert_close(part.double(), wanted, rtol=1e-4, atol=1e-9)


def test_swapping_the_pair_turns_the_gradient_around() -> None:
    trained = errors(0, grad=True)
    leaves = [trained.positive, trained.negative]
    swapped = PairErrors(positive=trained.negative, negative=trained.positive)
    ways = []
    for pair in (trained, swapped):
        loss = dpo_loss(preference_margin(pair, detached(pair)), beta=1.0, reduction="element")
        ways.append(torch.autograd.grad(loss, leaves))
    for one, other in zip(*ways, strict=True):
        assert torch.equal(one, -other)


def test_it_stays_above_zero_and_finite_for_any_margin() -> None:
    margins = torch.tensor([-1e4, -80.0, 0.0, 80.0, 1e4]).view(-1, 1, 1, 1)
    losses = [dpo_loss(margin, beta=1.0, reduction="sample_sum").item() for margin in margins]
    assert losses == sorted(losses)
    assert min(losses) >= 0
    assert losses[-1] == pytest.approx(1e4)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_squared_error_agrees_with_float64(tmp_path: Path, prediction_type: str) -> None:
    model = small_model(tmp_path, prediction_type=prediction_type)
    latents, embeddings, draws = rows(model)
    found = squared_error(model, latents, embeddings, draws)
    exact = squared_error64(model, unet64(model), latents, embeddings, draws)
    torch.testing.assert_close(found.double(), exact.detach(), rtol=1e-4, atol=1e-5)
    mean = latent_denoising_loss(model, latents, embeddings, draws)
    torch.testing.assert_close(found.flatten(1).mean(1), mean)


def rows(model: DiffusionModel) -> tuple[Tensor, Tensor, Draws]:
    generator = torch.Generator().manual_seed(0)
    latents, noise = (torch.randn(SHAPE, generator=generator) for _ in range(2))
    draws = Draws(t=torch.tensor([10, 900]), noise=noise, posterior=noise)
    return latents, model.embed_prompts(["a photo", "a dog"]), draws


def test_on_quadratic_losses_the_naive_objective_runs_away_and_this_one_does_not() -> None:
    """Curvature 1 for subject and positive, 0.5 for the class: its weight of 1 is too small for the naive objective."""
    subject, positive, general = torch.tensor([1.0]), torch.tensor([-1.0]), torch.tensor([-1.5])

    def naive(theta: Tensor) -> Tensor:
        return -(theta - subject).square() + 0.5 * (theta - general).square()

    def preference(theta: Tensor) -> Tensor:
        start = torch.zeros(1)
        trained, reference = (
            PairErrors(positive=(at - positive).square().view(1, 1), negative=(at - subject).square().view(1, 1))
            for at in (theta, start)
        )
        loss = dpo_loss(preference_margin(trained, reference), beta=1.0, reduction="element")
        return loss + 0.5 * (theta - general).square().sum()

    ends = {}
    for loss in (naive, preference):
        theta = torch.zeros(1, requires_grad=True)
        for _ in range(1000):
            (gradient,) = torch.autograd.grad(loss(theta).sum(), theta)
            theta = (theta - 0.01 * gradient).detach().requires_grad_()
        ends[loss] = abs(theta.item())
    assert ends[naive] > 1000
    assert ends[preference] < 5
