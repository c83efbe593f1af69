"""SDS against a float64 recomputation of its gradient, its signs, SDST's single pass, and the traps of v models."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from protectors.diffusion import DiffusionModel, load_model
from protectors.mist import checkerboard
from protectors.objectives import Draws, draw
from protectors.randomness import streams
from protectors.sds import SDS, SDSConfig, noise_error
from tests.protectors.spies import attack_loss
from tests.protectors.tiny import save_tiny_model


@pytest.fixture(scope="module", params=["epsilon", "v_prediction"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> DiffusionModel:
    folder: Path = tmp_path_factory.mktemp("model")
    return load_model(str(save_tiny_model(folder / "tiny", prediction_type=request.param)))


@pytest.fixture
def images() -> Tensor:
    return (torch.rand(2, 3, 16, 24, generator=torch.Generator().manual_seed(0)) * 127 + 64).round() / 255


class Exact:
    """The equations in float64; only the networks are shared."""

    def __init__(self, model: DiffusionModel) -> None:
        self.vae, self.unet = copy.deepcopy(model.vae).double(), copy.deepcopy(model.unet).double()
        self.abar = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2, 0)
        self.predicts_v = model.prediction_type == "v_prediction"

    def latents(self, image: Tensor, noise: Tensor) -> Tensor:
        mu, logvar = self.vae.quant_conv(self.vae.encoder(2 * image.double() - 1)).chunk(2, dim=1)
        z: Tensor = self.vae.config.scaling_factor * (mu + torch.exp(logvar / 2) * noise.double())
        return z

    def score(self, z: Tensor, context: Tensor, one: Draws) -> Tensor:
        a, n = self.abar[one.t].view(-1, 1, 1, 1), one.noise.double()
        noisy = a.sqrt() * z + (1 - a).sqrt() * n
        output: Tensor = self.unet(noisy, one.t, context.double()).sample
        return (a.sqrt() * output + (1 - a).sqrt() * noisy if self.predicts_v else output) - n


@pytest.mark.parametrize(("sign", "direction"), [("-", -1), ("+", 1)])
@pytest.mark.parametrize("weight", [0.0, 0.2])
def test_gradient(
    sign: str, direction: int, weight: float, model: DiffusionModel, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """s J_E^T (eps - n) - w grad || z - z_y ||^2, the two terms back-propagated apart."""
    config = SDSConfig.from_dict({"sign": sign, "target_weight": weight, "eval_draws": 1})
    loss = attack_loss(SDS(config, model), images, monkeypatch)
    given = images.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(given, [0, 1]).sum(), given)

    exact, context = Exact(model), model.embed_prompts(["a photo"])
    draws = draw(model, images, streams([5, 6], "sds/attack"))
    for k in range(2):
        one = Draws(t=draws.t[k : k + 1], noise=draws.noise[k : k + 1], posterior=draws.posterior[k : k + 1])
        x = images[k : k + 1].double().requires_grad_()
        z = exact.latents(x, one.posterior)
        with torch.no_grad():
            score = exact.score(z, context, one)
            aim = exact.latents(checkerboard(16, 24, 4), torch.zeros_like(one.posterior))
        (along,) = torch.autograd.grad(z, x, score, retain_graph=True)
        (towards,) = torch.autograd.grad((z - aim).square().sum(), x)
        expected = direction * along - weight * towards
        assert float((gradient[k] - expected[0]).norm() / expected.norm()) < 1e-4


@torch.no_grad()
def test_objective(model: DiffusionModel, images: Tensor) -> None:
    exact, context = Exact(model), model.embed_prompts(["a photo"])
    config = SDSConfig(target_weight=0.2, eval_draws=2)
    values = SDS(config, model).objective(images, originals=images, seeds=[5, 6])
    generators = streams([5, 6], "sds/evaluation")
    rounds = [draw(model, images, generators) for _ in range(2)]
    for k in range(2):
        expected = 0.0
        for draws in rounds:
            one = Draws(t=draws.t[k : k + 1], noise=draws.noise[k : k + 1], posterior=draws.posterior[k : k + 1])
            z = exact.latents(images[k : k + 1], one.posterior)
            aim = exact.latents(checkerboard(16, 24, 4), torch.zeros_like(one.posterior))
            expected -= float(exact.score(z, context, one).square().mean() / 2 + 0.2 * (z - aim).square().mean())
        assert float(values[k]) == pytest.approx(expected / 2, rel=1e-4)


def test_perfect_v_prediction_has_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A v model that is right about everything must give g = 0: v itself, taken for noise, would not."""
    model = load_model(str(save_tiny_model(tmp_path / "v", prediction_type="v_prediction")))
    latents, noise, posterior = torch.randn(3, 2, 4, 3, 3)
    draws = Draws(t=torch.tensor([100, 900]), noise=noise, posterior=posterior)
    v = model.target(latents, noise, draws.t)
    monkeypatch.setattr(model, "predict", lambda noisy, t, embeddings: v)
    found = noise_error(model, latents, model.embed_prompts(["", ""]), draws)
    assert found.abs().max() < 1e-5
    assert (v - noise).abs().max() > 0.1


def test_signs_go_opposite_ways_from_the_original(model: DiffusionModel, images: Tensor) -> None:
    changes = {}
    for sign in ("+", "-"):
        config = SDSConfig.from_dict({"sign": sign, "steps": 1, "eval_draws": 1})
        changes[sign] = (SDS(config, model).protect(images, seeds=[1, 2]).images - images) * 255
    assert torch.allclose(changes["+"], -changes["-"], atol=1e-3)
    # One level up or down and nothing between: there is no random start.
    assert set(changes["+"].round().abs().flatten().tolist()) <= {0.0, 1.0}
    assert changes["+"].abs().mean() > 0.9


def test_unet_has_no_graph_and_the_encoder_runs_once_a_step(
    model: DiffusionModel, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    loss = attack_loss(SDS(SDSConfig(target_weight=0.2, eval_draws=1), model), images, monkeypatch)
    graphs: list[bool] = []
    encodings: list[Tensor] = []
    predict, encode = model.predict, model.encode_moments

    def spy_predict(*given: Tensor) -> Tensor:
        graphs.append(torch.is_grad_enabled() or given[0].requires_grad)
        return predict(*given)

    def spy_encode(given: Tensor) -> tuple[Tensor, Tensor]:
        encodings.append(given)
        return encode(given)

    monkeypatch.setattr(model, "predict", spy_predict)
    monkeypatch.setattr(model, "encode_moments", spy_encode)
    given = images.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(given, [0, 1]).sum(), given)
    assert gradient.abs().max() > 0
    assert graphs == [False]
    assert len(encodings) == 1


def test_without_weight_no_target_is_encoded(
    model: DiffusionModel, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("protectors.sds.pattern_latents", None)
    assert SDS(SDSConfig(steps=1, eval_draws=1), model).protect(images, seeds=[1, 2]).facts[0].linf_levels == 1


def test_target_pulls_the_latents(model: DiffusionModel, images: Tensor) -> None:
    distances = []
    for weight in (0.0, 50.0):
        config = SDSConfig(steps=10, eval_draws=1, target_weight=weight)
        output = SDS(config, model).protect(images, seeds=[1, 2]).images
        with torch.no_grad():
            aim, moved = (model.encode_moments(x)[0] for x in (checkerboard(16, 24, 4), output))
        distances.append(float((moved - aim).square().mean()))
    assert distances[1] < distances[0]


def test_presets_are_the_published_numbers() -> None:
    paper = SDS.presets["paper"]
    assert (paper.eps_levels, paper.step_levels, paper.steps, paper.random_start) == (16, 1, 100, False)
    assert (paper.sign, paper.target_weight) == ("-", 0)
    assert SDS.presets["paper-sdst"] == paper.replace(target_weight=1 / 5)


@pytest.mark.parametrize("change", [{"target_weight": -1.0}, {"cell": 0}, {"sign": "x"}])
def test_impossible_values_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(change))):
        SDSConfig(**change)
