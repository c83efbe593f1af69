"""What is particular to single methods."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from protectors.advdm import AdvDM, AdvDMConfig
from protectors.diffusion import DiffusionModel, load_model
from protectors.mist import Mist, MistConfig, checkerboard
from protectors.objectives import Draws, draw_for
from protectors.pgd import SCHEDULES
from protectors.photoguard import PhotoGuard, PhotoGuardConfig
from tests.protectors.tiny import save_tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> DiffusionModel:
    folder: Path = tmp_path_factory.mktemp("model")
    return load_model(str(save_tiny_model(folder / "tiny")))


@pytest.mark.parametrize("preset", ["paper", "fast", "strong"])
@pytest.mark.parametrize("method", [AdvDM, Mist, PhotoGuard])
def test_presets_keep_whole_levels(method: type[AdvDM | Mist | PhotoGuard], preset: str, model: DiffusionModel) -> None:
    """The budget of every preset, at its own step length but few steps."""
    config = method.presets[preset].replace(steps=3, eval_draws=1)
    images = torch.rand(1, 3, 16, 16)
    result = method(config, model).protect(images, seeds=[1])  # type: ignore[arg-type]
    assert result.facts[0].linf_levels == math.floor(config.eps_levels)


def test_paper_presets_convert_the_published_numbers() -> None:
    photoguard, advdm = PhotoGuard.presets["paper"], AdvDM.presets["paper"]
    assert (photoguard.eps_levels, photoguard.step_levels) == pytest.approx((0.06 * 127.5, 0.02 * 127.5))
    assert (photoguard.steps, photoguard.random_start) == (1000, True)
    assert (advdm.eps_levels, advdm.step_levels, advdm.steps, advdm.random_start) == (16, 1, 100, True)
    assert (advdm.sign, advdm.prompt) == ("+", "a photo")
    mist = Mist.presets["paper"]
    assert (mist.eps_levels, mist.step_levels, mist.steps, mist.random_start) == (16, 1, 100, True)
    assert mist.denoising_weight == pytest.approx(1e4 / (4 * 64 * 64), abs=1e-3)  # a sum over SD's latents, as a mean


def test_photoguard_steps_shrink_to_a_hundredth() -> None:
    schedule = SCHEDULES[PhotoGuard.presets["paper"].schedule]
    assert schedule(0, 1000) == 1
    assert schedule(999, 1000) == pytest.approx(0.011, abs=1e-3)


def test_photoguard_without_random_start_ignores_the_seed(model: DiffusionModel) -> None:
    images = torch.rand(1, 3, 16, 16).expand(2, -1, -1, -1)
    config = PhotoGuardConfig(steps=3, random_start=False)
    output = PhotoGuard(config, model).protect(images, seeds=[1, 2]).images
    assert torch.equal(output[0], output[1])


def test_advdm_signs_go_opposite_ways(model: DiffusionModel) -> None:
    """One step from the original with the same draws: the second perturbation is the first, negated."""
    images = (torch.rand(1, 3, 16, 16) * 127 + 64).round() / 255
    changes = {}
    for sign in ("+", "-"):
        config = AdvDMConfig.from_dict({"sign": sign, "steps": 1, "random_start": False})
        changes[sign] = AdvDM(config, model).protect(images, seeds=[1]).images - images
    assert changes["+"].abs().max() > 0
    assert torch.allclose(changes["+"], -changes["-"], atol=1e-6)


def test_advdm_uses_the_prompt_of_each_image(model: DiffusionModel) -> None:
    images = torch.rand(2, 3, 16, 16)
    protector = AdvDM(AdvDMConfig(steps=1, eval_draws=1), model)
    default = protector.objective(images, originals=images, seeds=[1, 1])
    named = protector.objective(images, originals=images, prompts=["a photo", "xyz"], seeds=[1, 1])
    assert default[0] == named[0]
    assert default[1] != named[1]


def test_advdm_evaluates_at_other_draws_than_it_attacks(model: DiffusionModel, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Draws] = []

    def spy(*given: object) -> Draws:
        seen.append(draw_for(*given))  # type: ignore[arg-type]
        return seen[-1]

    monkeypatch.setattr("protectors.objectives.draw_for", spy)
    images = torch.rand(1, 3, 8, 8)
    AdvDM(AdvDMConfig(steps=2, eval_draws=2), model).protect(images, seeds=[1])
    before, attack, after = seen[:2], seen[2:4], seen[4:]
    assert all(torch.equal(a.noise, b.noise) for a, b in zip(before, after, strict=True))
    assert not any(torch.equal(a.noise, b.noise) for a in before for b in attack)
    assert not torch.equal(attack[0].noise, attack[1].noise)


def test_advdm_objective_is_negated_for_minus(model: DiffusionModel) -> None:
    images = torch.rand(1, 3, 8, 8)
    values = [
        AdvDM(AdvDMConfig.from_dict({"sign": sign}), model).objective(images, originals=images, seeds=[4])
        for sign in ("+", "-")
    ]
    assert values[0] == -values[1]


def test_mist_without_denoising_weight_goes_straight_for_the_pattern(model: DiffusionModel) -> None:
    images = torch.rand(1, 3, 32, 32)
    protector = Mist(MistConfig(steps=20, denoising_weight=0.0, cell=4, random_start=False), model)
    result = protector.protect(images, seeds=[1])
    with torch.no_grad():
        pattern, before, after = (
            model.encode_moments(x)[0] for x in (checkerboard(32, 32, 4), (images * 255).round() / 255, result.images)
        )
    assert (after - pattern).square().mean() < (before - pattern).square().mean()
    # Posterior noise is the only other part of the loss, so the objective is about minus the distance.
    scale = model.scaling_factor
    distance = ((after - pattern) * scale).square().mean() + (model.encode_moments(result.images)[1].exp()).mean()
    assert -result.facts[0].objective_after == pytest.approx(float(distance), rel=0.2)


def test_mist_raises_the_denoising_loss_as_well(tmp_path: Path) -> None:
    """With a large weight the loss at fixed draws ends higher than when only the pattern is aimed at."""
    # With random weights an epsilon model's loss hardly depends on the image; v has the image in its target.
    model = load_model(str(save_tiny_model(tmp_path / "v", prediction_type="v_prediction")))
    images = (torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 255).round() / 255
    judge = AdvDM(AdvDMConfig(eval_draws=16), model)
    losses = []
    for weight in (50.0, 0.0):
        output = Mist(MistConfig(steps=20, denoising_weight=weight), model).protect(images, seeds=[1, 2]).images
        losses.append(judge.objective(output, originals=images, seeds=[1, 2]).mean())
    assert losses[0] > losses[1]


def test_mist_pattern() -> None:
    pattern = checkerboard(6, 8, 2)
    assert pattern.shape == (1, 3, 6, 8)
    assert pattern[0, 0, 0].tolist() == [0, 0, 1, 1, 0, 0, 1, 1]
    assert torch.equal(pattern[0, 0, 1], pattern[0, 0, 0])
    assert pattern[0, 0, 2].tolist() == [1, 1, 0, 0, 1, 1, 0, 0]
    assert torch.equal(pattern[:, 0], pattern[:, 2])


def test_mist_refuses_impossible_values() -> None:
    with pytest.raises(ValueError, match="denoising_weight"):
        MistConfig(denoising_weight=-1.0)
    with pytest.raises(ValueError, match="cell"):
        MistConfig(cell=0)
