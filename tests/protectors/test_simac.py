"""What is particular to SimAC: the timesteps of each image and the loss on features."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from protectors.diffusion import DiffusionModel, load_model
from protectors.objectives import Draws, denoising_loss, draw
from protectors.pgd import pgd
from protectors.randomness import streams
from protectors.simac import SimAC, SimACConfig, late_features
from tests.protectors.tiny import save_tiny_model

SMALL = {
    "pgd_steps": 2,
    "rounds": 2,
    "clean_steps": 1,
    "perturbed_steps": 1,
    "selection_rounds": 2,
    "step_levels": 2.0,
    "eval_draws": 1,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> DiffusionModel:
    return load_model(str(save_tiny_model(tmp_path_factory.mktemp("tiny"))))


def pictures(count: int, seed: int = 0) -> Tensor:
    images = torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    return (images * 127 + 64).round() / 255


def simac(model: DiffusionModel, **changes: Any) -> SimAC:
    return SimAC(SimACConfig.from_dict({**SMALL, **changes}), model)


@dataclass
class Selection:
    """What one image's selection did, as seen from outside."""

    calls: list[tuple[Tensor, Tensor, Draws]] = field(default_factory=list)
    kept: list[Tensor] = field(default_factory=list)
    drawn: list[Tensor] = field(default_factory=list)


@pytest.fixture
def selection(monkeypatch: pytest.MonkeyPatch) -> Selection:
    from protectors.simac import _one_of_each

    seen = Selection()

    def spy_loss(model: DiffusionModel, images: Tensor, embeddings: Tensor, draws: Draws) -> Tensor:
        seen.calls.append((images.detach().clone(), embeddings, draws))
        return denoising_loss(model, images, embeddings, draws)

    def spy_draw(timesteps: list[Tensor], generators: list[torch.Generator]) -> Tensor:
        seen.kept = timesteps
        seen.drawn.append(_one_of_each(timesteps, generators))
        return seen.drawn[-1]

    monkeypatch.setattr("protectors.simac.denoising_loss", spy_loss)
    monkeypatch.setattr("protectors.simac._one_of_each", spy_draw)
    return seen


def test_presets(model: DiffusionModel) -> None:
    paper = SimAC.presets["paper"]
    assert (paper.eps_levels, paper.step_levels) == pytest.approx((16 / 255 * 127.5, 0.005 * 127.5))
    assert (paper.rounds, paper.clean_steps, paper.pgd_steps, paper.perturbed_steps) == (50, 3, 6, 3)
    assert (paper.selection_rounds, paper.kept_timesteps, paper.reference) == (50, 100, "clean")
    assert (paper.surrogate, paper.learning_rate, paper.prior_images) == ("full", 5e-7, 200)
    for config in SimAC.presets.values():
        short = config.replace(**{**SMALL, "rounds": 1, "pgd_steps": 1, "step_levels": 20.0, "prior_images": 0})
        result = SimAC(short, model).protect(pictures(1), seeds=[1])
        assert result.facts[0].linf_levels == math.floor(config.eps_levels)


def test_selection_strikes_off_what_has_the_smallest_gradient(model: DiffusionModel, selection: Selection) -> None:
    simac(model, rounds=1).protect(pictures(1), seeds=[1])
    assert [len(draws.t) for _, _, draws in selection.calls] == [5, 1, 5, 1]
    allowed = torch.ones(1000, dtype=torch.bool)
    for (images, embeddings, draws), (_, _, ascent) in zip(selection.calls[::2], selection.calls[1::2], strict=True):
        assert allowed[draws.t].all()
        assert len(set(draws.t.tolist())) == 5
        images.requires_grad_()
        (gradient,) = torch.autograd.grad(denoising_loss(model, images, embeddings, draws).sum(), images)
        sizes = gradient.abs().sum((1, 2, 3))
        assert ascent.t.tolist() == [int(draws.t[sizes.argmax()])]
        middle = min(max(int(draws.t[sizes.argmin()]), 20), 980)
        allowed[middle - 20 : middle + 20] = False
    assert torch.equal(selection.kept[0], allowed.nonzero().flatten())


def test_selection_moves_the_image_one_step_and_forgets_it(
    model: DiffusionModel, selection: Selection, monkeypatch: pytest.MonkeyPatch
) -> None:
    starts: list[Tensor] = []

    def spy(*given: Any, **options: Any) -> Tensor:
        starts.append(options["start"])
        return pgd(*given, **options)

    monkeypatch.setattr("protectors.subject.pgd", spy)
    images = pictures(1)
    simac(model).protect(images, seeds=[1])
    first, _, second, _ = (call[0] for call in selection.calls)
    assert (first == images).all()
    assert ((second - images).abs() * 255).amax() == pytest.approx(2.0, abs=1e-3)
    assert starts[0].count_nonzero() == 0


def test_selection_ends_when_enough_are_struck_off(model: DiffusionModel, selection: Selection) -> None:
    simac(model, rounds=1, selection_rounds=50, kept_timesteps=900).protect(pictures(1), seeds=[1])
    assert 860 <= len(selection.kept[0]) <= 900
    assert len(selection.calls) < 2 * 10


def test_long_lists_are_kept_and_every_image_has_its_own(model: DiffusionModel, selection: Selection) -> None:
    """The public code drops images that have more than 100 timesteps left, and fails later."""
    result = simac(model, selection_rounds=1).protect(pictures(2), seeds=[1, 2])
    assert all(fact.failed is None and fact.linf_levels == 8 for fact in result.facts)
    assert all(len(kept) >= 960 for kept in selection.kept)
    assert not torch.equal(selection.kept[0], selection.kept[1])


def test_timesteps_come_from_the_images_own_list(model: DiffusionModel, selection: Selection) -> None:
    simac(model, rounds=20, clean_steps=0, perturbed_steps=0, selection_rounds=8).protect(pictures(2), seeds=[1, 2])
    drawn = torch.stack(selection.drawn, 1)
    assert drawn.shape == (2, 40)
    for own, kept in zip(drawn, selection.kept, strict=True):
        assert set(own.tolist()) <= set(kept.tolist())
        assert len(set(own.tolist())) > 20


def gain(model: DiffusionModel, images: Tensor, reference: Tensor, draws: Draws, **changes: Any) -> Tensor:
    embeddings = model.embed_prompts(["a photo of sks person"] * len(images))
    pair = model.encode_moments(images), model.encode_moments(reference)
    return simac(model, **changes)._gain(*pair, embeddings, draws)


def test_feature_loss_has_a_gradient(model: DiffusionModel) -> None:
    """The public code adds it detached, where it changes nothing."""
    clean, images = pictures(1), pictures(1, seed=1).requires_grad_()
    draws = draw(model, clean, streams([1], "test"))
    gradients = [
        torch.autograd.grad(gain(model, images, clean, draws, feature_weight=weight).sum(), images)[0]
        for weight in (0.0, 1.0, 2.0)
    ]
    feature = gradients[1] - gradients[0]
    assert feature.abs().max() > 0.01 * gradients[0].abs().max()
    torch.testing.assert_close(gradients[2] - gradients[0], 2 * feature, rtol=1e-3, atol=1e-5)


def test_gain_is_that_of_the_paper(tmp_path: Any) -> None:
    """Against an own computation in float64 from the same draws."""
    model = load_model(str(save_tiny_model(tmp_path / "model")))
    clean, images = pictures(2), pictures(2, seed=1)
    draws = draw(model, clean, streams([1, 2], "test"))
    embeddings = model.embed_prompts(["a photo of sks person"] * 2).double()
    with torch.no_grad():
        found = gain(model, images, clean, draws, feature_weight=0.5)
        feature_free = gain(model, clean, clean, draws, feature_weight=0.5)
        plain = gain(model, clean, clean, draws, feature_weight=0.0)
    assert torch.equal(feature_free, plain)  # nothing to be away from

    model.vae.double(), model.unet.double()
    outputs: list[Tensor] = []
    for block in model.unet.up_blocks[-1].resnets:
        block.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    abar = model.alphas_cumprod.double()[draws.t].view(-1, 1, 1, 1)
    errors, features = [], []
    for picture in (images, clean):
        with torch.no_grad():
            posterior = model.vae.encode(picture.double() * 2 - 1).latent_dist
            latents = posterior.mean + posterior.std * draws.posterior
            noisy = abar.sqrt() * latents + (1 - abar).sqrt() * draws.noise
            prediction = model.unet(noisy, draws.t, encoder_hidden_states=embeddings).sample
        errors.append(((prediction - draws.noise) ** 2).mean((1, 2, 3)))
        features.append(torch.stack(outputs))
        outputs.clear()
    assert features[0].shape == (2, 2, 8, 4, 4)  # the tiny UNet's last decoder block has two ResNet blocks
    expected = errors[0] + 0.5 * ((features[0] - features[1]) ** 2).mean((0, 2, 3, 4))
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=0)


def test_hooks_are_gone_afterwards(model: DiffusionModel) -> None:
    with pytest.raises(RuntimeError, match="stop"), late_features(model.unet):
        raise RuntimeError("stop")
    simac(model).protect(pictures(1), seeds=[1])
    assert not any(module._forward_hooks for module in model.unet.modules())


def test_reference_is_the_clean_image_or_that_of_the_round(
    model: DiffusionModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which image's moments each step compares with, by the distance of their means from the clean ones."""
    images = pictures(1)
    with torch.no_grad():
        clean = model.encode_moments(images)[0]
    true_gain = SimAC._gain
    for reference, moved in (("clean", [False] * 4), ("previous", [False, False, True, True])):
        seen: list[bool] = []

        def spy(self: SimAC, own: Any, other: Any, *rest: Any, seen: list[bool] = seen) -> Tensor:
            seen.append(not torch.allclose(other[0], clean, atol=1e-5))
            return true_gain(self, own, other, *rest)

        monkeypatch.setattr(SimAC, "_gain", spy)
        simac(model, reference=reference).protect(images, seeds=[1])
        assert seen == [False, *moved, False]  # the first and the last measure the objective


def test_masked_pixels_stay_during_the_selection(model: DiffusionModel, selection: Selection) -> None:
    images, masks = pictures(1), torch.zeros(1, 1, 8, 8)
    masks[..., :4] = 1
    simac(model).protect(images, seeds=[1], masks=masks)
    second = selection.calls[2][0]
    assert torch.equal(second[..., 4:], images.expand(5, -1, -1, -1)[..., 4:])
    assert not torch.equal(second[..., :4], images.expand(5, -1, -1, -1)[..., :4])


@pytest.mark.parametrize(
    "change",
    [{"selection_rounds": -1}, {"kept_timesteps": 39}, {"feature_weight": -1.0}, {"reference": "x"}, {"rounds": 0}],
)
def test_impossible_values_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(change))):
        replace(SimAC.presets["fast"], **change)
