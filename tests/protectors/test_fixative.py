"""The method of our own: its loss, how the steps see the image, and where the change goes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from protectors.bilateral import bilateral
from protectors.diffusion import DiffusionModel, load_model
from protectors.fixative import Fixative, FixativeConfig, View, round_trip, visibility
from tests.protectors.tiny import save_tiny_model

PLAIN = {"chance": 0.0, "steps": 5, "eval_draws": 4}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> DiffusionModel:
    return load_model(str(save_tiny_model(tmp_path_factory.mktemp("tiny"))))


def protector(model: DiffusionModel, **settings: Any) -> Fixative:
    return Fixative(FixativeConfig(**{**PLAIN, **settings}), model)


def picture() -> Tensor:
    """Flat on the left, loud on the right; whole levels."""
    image = torch.full((1, 3, 32, 32), 128 / 255)
    noise = torch.randint(0, 256, (1, 3, 32, 16), generator=torch.Generator().manual_seed(0)) / 255
    image[..., 16:] = noise
    return image


def test_without_transforms_the_objective_is_the_distance_of_scaled_mean_latents(model: DiffusionModel) -> None:
    # Whole levels: originals are rounded to them.
    originals, images = torch.randint(0, 256, (2, 2, 3, 32, 32), generator=torch.Generator().manual_seed(1)) / 255

    def latents(pictures: Tensor) -> Tensor:
        with torch.no_grad():
            mean = model.vae.encode(pictures * 2 - 1).latent_dist.mean.double()
            return mean * model.vae.config.scaling_factor

    def returned(pictures: Tensor) -> Tensor:
        with torch.no_grad():
            return (model.vae.decode(model.vae.encode(pictures * 2 - 1).latent_dist.mean).sample / 2 + 0.5).clamp(0, 1)

    apart = [(latents(picture) - latents(originals)).square().mean((1, 2, 3)) for picture in (images, returned(images))]
    views: tuple[View, ...] = ("vae", "transforms")
    ours = protector(model, views=views).objective(images, originals=originals, seeds=[1, 2])
    torch.testing.assert_close(ours.double(), (apart[0] + apart[1]) / 2, rtol=1e-4, atol=1e-8)
    smooth = bilateral(bilateral(images * 255, 5, 20.0, 8.0), 5, 20.0, 8.0) / 255
    settings: dict[str, Any] = {"views": ("smoothing",), "smooth_rounds": 2, "smooth_levels": 20.0}
    ours = protector(model, **settings).objective(images, originals=originals, seeds=[1, 2])
    expected = (latents(smooth) - latents(originals)).square().mean((1, 2, 3))
    torch.testing.assert_close(ours.double(), expected, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize(
    ("views", "of_five_steps", "of_four_draws"),
    [
        (("vae",), 5, 4),
        (("vae", "transforms"), 3, 2),
        (("vae", "transforms", "smoothing"), 2, 2),
        (("smoothing",), 0, 0),
    ],
)
def test_views_take_turns(
    model: DiffusionModel,
    monkeypatch: pytest.MonkeyPatch,
    views: tuple[View, ...],
    of_five_steps: int,
    of_four_draws: int,
) -> None:
    passed: list[int] = []

    def counted(model: DiffusionModel, images: Tensor) -> Tensor:
        passed.append(len(images))
        return round_trip(model, images)

    monkeypatch.setattr("protectors.fixative.round_trip", counted)
    protector(model, views=views).protect(picture(), seeds=[1])
    assert len(passed) == of_five_steps + 2 * of_four_draws  # the objective is taken before and after


def test_round_trip_is_the_vae_and_has_a_gradient(model: DiffusionModel) -> None:
    images = torch.rand(1, 3, 30, 33, generator=torch.Generator().manual_seed(2)).requires_grad_()
    back = round_trip(model, images)
    assert back.shape == images.shape
    with torch.no_grad():
        padded = torch.nn.functional.pad(images, (0, 3, 0, 2), mode="replicate")
        mean = model.vae.encode(padded * 2 - 1).latent_dist.mean
        expected = (model.vae.decode(mean).sample / 2 + 0.5).clamp(0, 1)[..., :30, :33]
    torch.testing.assert_close(back, expected, rtol=1e-4, atol=1e-5)
    (gradient,) = torch.autograd.grad(back.sum(), images)
    assert gradient.abs().sum() > 0


def test_flat_areas_get_their_share_of_the_budget(model: DiffusionModel) -> None:
    share = visibility(picture(), 0.5)
    assert share.shape == (1, 1, 32, 32)
    torch.testing.assert_close(share[..., :10], torch.full((1, 1, 32, 10), 0.5))
    torch.testing.assert_close(share[..., 20:], torch.ones(1, 1, 32, 12))
    output = protector(model, flat_share=0.5, step_levels=8.0).protect(picture(), seeds=[1]).images
    change = ((output - picture()) * 255).round().abs()
    assert change[..., :10].max() == 4
    assert change[..., 20:].max() == 8


@pytest.mark.parametrize(
    "settings",
    [
        {"views": ()},
        {"smooth_rounds": 0},
        {"smooth_levels": 0.0},
        {"flat_share": 0.0},
        {"jpeg_low": 0},
        {"resize_low": 0.01},
    ],
)
def test_values_that_cannot_work_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="|".join(settings)):
        FixativeConfig(**settings)
