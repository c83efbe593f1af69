"""PID against a float64 recomputation of every target, and why it must not start at the original."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from protectors.diffusion import DiffusionModel, load_model
from protectors.pgd import Loss, PgdPlan
from protectors.pid import PID, PIDConfig, PidTarget, posterior_distance
from tests.protectors.tiny import save_tiny_model

TARGETS: list[PidTarget] = ["add-log", "mean", "var", "kl"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> DiffusionModel:
    folder: Path = tmp_path_factory.mktemp("model")
    return load_model(str(save_tiny_model(folder / "tiny")))


@pytest.fixture
def images() -> Tensor:
    return (torch.rand(2, 3, 16, 24, generator=torch.Generator().manual_seed(0)) * 255).round() / 255


def expected(target: PidTarget, moved: Tensor, clean: Tensor) -> float:
    (mu, logvar), (mu0, logvar0) = (x.chunk(2, dim=1) for x in (moved, clean))
    std, std0 = logvar.exp() ** 0.5, logvar0.exp() ** 0.5
    return float(
        {
            "add-log": ((mu - mu0) ** 2).mean() + ((logvar - logvar0) ** 2).mean(),
            "mean": ((mu - mu0) ** 2).mean(),
            "var": ((std - std0) ** 2).mean(),
            "kl": kl_divergence(Normal(mu, std), Normal(mu0, std0)).mean(),
        }[target]
    )


@pytest.mark.parametrize("target", TARGETS)
@torch.no_grad()
def test_objective(target: PidTarget, model: DiffusionModel, images: Tensor) -> None:
    moved = (images + 0.1 * torch.randn(images.shape, generator=torch.Generator().manual_seed(1))).clamp(0, 1)
    values = PID(PIDConfig(target=target), model).objective(moved, originals=images, seeds=[1, 2])
    vae = copy.deepcopy(model.vae).double()
    parts = [vae.quant_conv(vae.encoder(2 * x.double() - 1)) for x in (moved, images)]
    for k in range(2):
        assert float(values[k]) == pytest.approx(expected(target, *(x[k : k + 1] for x in parts)), rel=1e-4)


@pytest.mark.parametrize("target", TARGETS)
def test_the_attack_starts_where_there_is_a_gradient(
    target: PidTarget, model: DiffusionModel, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the original, where other methods may start, the loss that PID climbs has none."""
    sizes: list[float] = []

    def spy(loss: Loss, originals: Tensor, plan: PgdPlan, *, start: Tensor, **others: Any) -> Tensor:
        for given in (originals.clone().requires_grad_(), (originals + start).requires_grad_()):
            (gradient,) = torch.autograd.grad(loss(given, [0, 1]).sum(), given)
            sizes.append(float(gradient.abs().max()))
        return originals

    monkeypatch.setattr("protectors.pid.pgd", spy)
    PID(PIDConfig(target=target), model).protect(images, seeds=[1, 2])
    assert sizes[0] == 0
    assert sizes[1] > 0


def test_a_start_at_the_original_is_refused() -> None:
    with pytest.raises(ValueError, match="random_start=False: use true"):
        PIDConfig(random_start=False)


@pytest.mark.parametrize("target", TARGETS)
def test_every_target_is_raised(target: PidTarget, model: DiffusionModel, images: Tensor) -> None:
    """Beyond what the random start alone gives."""
    config = PIDConfig(steps=8, step_levels=2.0, target=target)
    output = PID(config, model).protect(images, seeds=[1, 2])
    still = PID(config.replace(steps=1, step_levels=1e-6), model).protect(images, seeds=[1, 2])
    for attacked, started in zip(output.facts, still.facts, strict=True):
        assert attacked.objective_before == 0
        assert attacked.objective_after > 1.5 * started.objective_after > 0


def test_only_the_encoder_runs_and_the_original_is_encoded_once(
    model: DiffusionModel, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode = model.encode_moments
    graphs: list[bool] = []

    def spy(given: Tensor) -> tuple[Tensor, Tensor]:
        graphs.append(given.requires_grad)
        return encode(given)

    monkeypatch.setattr(model, "encode_moments", spy)
    for name in ("predict", "embed_prompts"):
        monkeypatch.setattr(model, name, None)
    PID(PIDConfig(steps=5), model).protect(images, prompts=["a", "b"], seeds=[1, 2])
    # Two for each of the two measured objectives, one for the cached original, and one with a graph per step.
    assert (graphs.count(True), graphs.count(False)) == (5, 5)


def test_clamped_log_variances_give_no_gradient(model: DiffusionModel, images: Tensor) -> None:
    flat = copy.deepcopy(model)
    with torch.no_grad():
        flat.vae.quant_conv.bias[4:] += 1000
        clean = flat.encode_moments(images)
    assert (clean[1] == 20).all()
    given = (images * 0.9).requires_grad_()
    (gradient,) = torch.autograd.grad(posterior_distance(flat.encode_moments(given), clean, "var").sum(), given)
    assert (gradient == 0).all()


def test_presets_are_the_published_numbers() -> None:
    paper = PID.presets["paper"]
    assert (paper.eps_levels, paper.step_levels, paper.steps, paper.random_start) == (12.75, 1, 1000, True)
    assert paper.target == "add-log"
