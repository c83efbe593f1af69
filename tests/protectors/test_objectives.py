"""Losses against a float64 recomputation from the equations; only the networks are shared."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

from protectors.diffusion import DiffusionModel, load_model
from protectors.objectives import Draws, denoising_loss, draw, draw_for, encoder_distance, mean_denoising_loss
from protectors.randomness import streams
from tests.protectors.tiny import save_tiny_model


@pytest.fixture(scope="module", params=["epsilon", "v_prediction"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> DiffusionModel:
    folder: Path = tmp_path_factory.mktemp("model")
    return load_model(str(save_tiny_model(folder / "tiny", prediction_type=request.param)))


def exact_loss(model: DiffusionModel, image: torch.Tensor, context: torch.Tensor, one: Draws) -> float:
    """mean (f(z_t, t, c) - target)^2 for one image, betas and all, in float64."""
    vae, unet = copy.deepcopy(model.vae).double(), copy.deepcopy(model.unet).double()
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    abar = torch.prod(1 - betas[: int(one.t) + 1])
    moments = vae.quant_conv(vae.encoder(2 * image.double() - 1))
    mu, logvar = moments.chunk(2, dim=1)
    z = vae.config.scaling_factor * (mu + torch.exp(0.5 * logvar) * one.posterior.double())
    n = one.noise.double()
    noisy = torch.sqrt(abar) * z + torch.sqrt(1 - abar) * n
    wanted = n if model.prediction_type == "epsilon" else torch.sqrt(abar) * n - torch.sqrt(1 - abar) * z
    return float(((unet(noisy, one.t, context.double()).sample - wanted) ** 2).mean())


@torch.no_grad()
def test_denoising_loss(model: DiffusionModel) -> None:
    images = torch.rand(3, 3, 16, 24)
    context = model.embed_prompts(["a", "b", "a photo"])
    draws = draw(model, images, streams([1, 2, 3], "test"))
    losses = denoising_loss(model, images, context, draws)
    for k in range(3):
        one = Draws(t=draws.t[k : k + 1], noise=draws.noise[k : k + 1], posterior=draws.posterior[k : k + 1])
        expected = exact_loss(model, images[k : k + 1], context[k : k + 1], one)
        assert losses[k].item() == pytest.approx(expected, rel=1e-4)


@torch.no_grad()
def test_encoder_distance(model: DiffusionModel) -> None:
    images = torch.rand(2, 3, 16, 24)
    vae = copy.deepcopy(model.vae).double()
    mu = vae.quant_conv(vae.encoder(2 * images.double() - 1)).chunk(2, dim=1)[0]
    expected = [(mu[k] ** 2).sum().sqrt().item() for k in range(2)]
    assert encoder_distance(model, images).tolist() == pytest.approx(expected, rel=1e-4)


def test_draws_cover_the_schedule_and_follow_the_image(model: DiffusionModel) -> None:
    images = torch.rand(300, 3, 4, 4)
    draws = draw(model, images, streams(range(300), "test"))
    assert draws.t.min() < 20
    assert draws.t.max() > 980
    alone = draw(model, images[:1], streams([7], "test"))
    assert torch.equal(alone.noise[0], draws.noise[7])
    assert torch.equal(alone.posterior[0], draws.posterior[7])


def test_draws_can_be_kept_to_a_part_of_the_schedule(model: DiffusionModel) -> None:
    generators = streams([1, 2], "test")
    times = torch.cat([draw_for(model, (4, 2, 2), generators, t_range=(3, 5)).t for _ in range(30)])
    assert set(times.tolist()) == {3, 4, 5}


@torch.no_grad()
def test_mean_loss_is_that_of_the_draws_in_turn(model: DiffusionModel) -> None:
    images, context = torch.rand(2, 3, 16, 24), model.embed_prompts(["a", "b"])
    generators = streams([1, 2], "test")
    losses = [denoising_loss(model, images, context, draw(model, images, generators)) for _ in range(3)]
    found = mean_denoising_loss(model, images, context, streams([1, 2], "test"), 3)
    torch.testing.assert_close(found, sum(losses, torch.zeros(2)) / 3)


@pytest.mark.parametrize("direction", [1, -1])
def test_one_small_step_moves_the_loss_as_asked(model: DiffusionModel, direction: int) -> None:
    """Fixed t, n and posterior: ascent raises J and descent lowers it."""
    images = (torch.rand(2, 3, 16, 16) * 0.6 + 0.2).requires_grad_()
    context = model.embed_prompts(["a", "a"])
    draws = draw(model, images, streams([1, 2], "test"))
    losses = denoising_loss(model, images, context, draws)
    (gradient,) = torch.autograd.grad(losses.sum(), images)
    with torch.no_grad():
        moved = denoising_loss(model, images + direction * 0.1 / 255 * gradient.sign(), context, draws)
    assert ((moved - losses) * direction > 0).all()
