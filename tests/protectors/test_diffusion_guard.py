"""DiffusionGuard and the inpainting wrapper under it: masks, blanked input, timestep, and J in float64."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import PNDMScheduler
from scipy.ndimage import distance_transform_cdt, label
from torch import Tensor

from protectors.base import Batch
from protectors.diffusion import DiffusionModel, LatentParts, load_model
from protectors.diffusion_guard import (
    DiffusionGuard,
    DiffusionGuardConfig,
    KeptAreas,
    bounding_box,
    depth,
    first_timestep,
    spread_peaks,
)
from protectors.inpainting import InpaintingModel, load_inpainting_model
from protectors.model_files import ModelError
from protectors.randomness import normal, streams
from tests.protectors.spies import attack_loss
from tests.protectors.tiny import save_tiny_inpainting_model, save_tiny_model

SHORT = DiffusionGuardConfig(eval_draws=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_inpainting_model(tmp_path_factory.mktemp("model") / "epsilon")


@pytest.fixture(scope="module")
def model(folder: Path) -> InpaintingModel:
    return load_inpainting_model(str(folder))


@pytest.fixture
def images() -> Tensor:
    return (torch.rand(2, 3, 24, 30, generator=torch.Generator().manual_seed(0)) * 127 + 64).round() / 255


@pytest.fixture
def masks() -> Tensor:
    """An ellipse, and a square beside a thin bar."""
    rows, columns = torch.meshgrid(torch.arange(24), torch.arange(30), indexing="ij")
    ellipse = ((rows - 11) / 9) ** 2 + ((columns - 14) / 12) ** 2 <= 1
    parts = ((rows - 8).abs() < 6) & ((columns - 8).abs() < 6) | (columns == 25)
    return torch.stack([ellipse, parts])[:, None].float()


def batch_of(images: Tensor, masks: Tensor | None) -> Batch:
    return Batch(originals=images, seeds=tuple(range(len(images))), masks=masks)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_loss(kind: str, images: Tensor, masks: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """|| eps(z_T, 751, [m', E(blanked x)]) ||_2 in float64; only the networks and the draws are shared."""
    model = load_inpainting_model(str(save_tiny_inpainting_model(tmp_path / kind, prediction_type=kind)))
    loss = attack_loss(DiffusionGuard(SHORT, model), images, monkeypatch, masks)
    with torch.no_grad():
        values = loss(images, [0, 1])
    generators = streams([5, 6], "diffusion_guard/attack")
    kept = KeptAreas(batch_of(images, masks)).draw(generators)
    noise, posterior = (normal(generators, (4, 12, 16)).double() for _ in range(2))
    vae, unet = copy.deepcopy(model.vae).double(), copy.deepcopy(model.unet).double()
    context = model.embed_prompts([""]).double()
    abar = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2, 0)[751]
    for k in range(2):
        blanked = (2 * images[k].double() - 1) * kept[k]
        padded = torch.nn.functional.pad(blanked[None], (0, 2, 0, 0), mode="replicate")
        mu, logvar = vae.quant_conv(vae.encoder(padded)).chunk(2, dim=1)
        z = vae.config.scaling_factor * (mu + torch.exp(logvar / 2) * posterior[k])
        # 30 columns are padded to 32: the last two repeat the one before, like the picture.
        repaint = 1 - kept[k : k + 1, :, ::2][..., [*range(0, 30, 2), 29]].double()
        with torch.no_grad():
            output = unet(torch.cat([noise[k : k + 1], repaint, z], dim=1), 751, context).sample
        if kind == "v_prediction":
            output = abar.sqrt() * output + (1 - abar).sqrt() * noise[k : k + 1]
        assert float(values[k]) == pytest.approx(float((output**2).sum().sqrt()), rel=1e-4)


def test_first_timestep_is_that_of_the_published_sampler() -> None:
    """751, not 999: PNDM with four steps, as SD's folders configure it."""
    for steps in (1, 4, 10, 50):
        scheduler = PNDMScheduler(num_train_timesteps=1000, skip_prk_steps=True, steps_offset=1)
        scheduler.set_timesteps(steps)
        assert first_timestep(1000, steps) == int(scheduler.timesteps[0])
    assert first_timestep(1000, 4) == 751
    assert first_timestep(10, 10) == 9


def test_every_step_starts_from_new_noise_alone(
    model: InpaintingModel, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[Tensor, Tensor]] = []
    predict = model.predict

    def spy(noisy: Tensor, condition: Tensor, t: Tensor, embeddings: Tensor) -> Tensor:
        calls.append((noisy, t))
        return predict(noisy, condition, t, embeddings)

    loss = attack_loss(DiffusionGuard(SHORT, model), images, monkeypatch)
    monkeypatch.setattr(model, "predict", spy)
    loss(images, [0, 1])
    loss(images * 0.5, [0, 1])
    generators = streams([5, 6], "diffusion_guard/attack")
    areas = KeptAreas(batch_of(images, None))
    for noisy, t in calls:
        areas.draw(generators)
        assert torch.equal(noisy, normal(generators, (4, 12, 16)))
        normal(generators, (4, 12, 16))
        assert t.tolist() == [751, 751]


def test_no_gradient_where_the_attacker_repaints(
    model: InpaintingModel, images: Tensor, masks: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    loss = attack_loss(DiffusionGuard(SHORT, model), images, monkeypatch, masks)
    kept = KeptAreas(batch_of(images, masks)).draw(streams([5, 6], "diffusion_guard/attack"))
    given = images.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(given, [0, 1]).sum(), given)
    outside = (kept == 0).expand_as(images)
    assert (gradient[outside] == 0).all()
    assert (gradient[~outside] != 0).float().mean() > 0.9


def test_drawn_areas_lie_inside_the_mask_and_keep_every_part(images: Tensor, masks: Tensor) -> None:
    areas = KeptAreas(batch_of(images, masks))
    draws = torch.stack([areas.draw(streams([seed, seed], "test")) for seed in range(200)])
    assert ((draws == 0) | (draws == 1)).all()
    assert (draws <= masks).all()
    assert draws[:, 0].flatten(1).any(1).all()
    square, bar = draws[:, 1, :, :, :20], draws[:, 1, :, :, 20:]
    assert square.flatten(1).any(1).all()
    assert bar.flatten(1).any(1).all()
    shares = draws[:, 0].flatten(1).sum(1) / masks[0].sum()
    assert shares.min() < 0.4
    assert shares.max() > 0.9
    assert len({tuple(draw.flatten().tolist()) for draw in draws[:, 0]}) > 150


def test_depth_and_peaks_against_scipy(masks: Tensor) -> None:
    depths = depth(masks)
    peaks = spread_peaks(depths)
    for k in range(2):
        area = masks[k, 0].numpy()
        exact = distance_transform_cdt(np.pad(area, 1), metric="chessboard")[1:-1, 1:-1]
        assert np.array_equal(depths[k, 0].numpy(), exact)
        parts, count = label(area, structure=np.ones((3, 3)))
        assert count == k + 1
        for number in range(1, count + 1):
            inside = parts == number
            assert (peaks[k, 0].numpy()[inside] == exact[inside].max()).all()
    assert (peaks[masks == 0] == 0).all()


def test_the_way_to_the_deepest_point_is_limited() -> None:
    """A snake of one pixel with a head of three: its far end does not hear of the head, and no point is lost."""
    mask = torch.zeros(1, 1, 21, 21)
    mask[..., ::4, :] = 1
    for number, row in enumerate(range(1, 20, 4)):
        mask[..., row : row + 3, 0 if number % 2 else 20] = 1
    mask[..., :3, :3] = 1
    depths = depth(mask)
    peaks = spread_peaks(depths)
    assert depths.max() == 2
    assert (peaks >= depths).all()
    assert (peaks[0, 0, 0] == 2).all()
    assert peaks[0, 0, 20, 0] == 1


def test_a_small_area_is_as_various_as_a_large_one() -> None:
    """The random field lies over the area, not over the picture, where a small area would be shrunk evenly."""
    mask = torch.zeros(1, 1, 128, 128)
    mask[..., 90:108, 20:38] = 1
    assert bounding_box(mask[0]) == (slice(None), slice(90, 108), slice(20, 38))
    areas = KeptAreas(batch_of(torch.zeros(1, 3, 128, 128), mask))
    alone = KeptAreas(batch_of(torch.zeros(1, 3, 18, 18), torch.ones(1, 1, 18, 18)))
    for seed in range(5):
        cut = areas.draw(streams([seed], "test"))[..., 90:108, 20:38]
        assert torch.equal(cut, alone.draw(streams([seed], "test")))


def test_masks_are_measured_once(
    model: InpaintingModel, images: Tensor, masks: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[Tensor] = []
    monkeypatch.setattr("protectors.diffusion_guard.depth", lambda given: measured.append(given) or depth(given))
    protector = DiffusionGuard(DiffusionGuardConfig(steps=1, eval_draws=1), model)
    for calls in (1, 2):
        protector.protect(images, masks=masks, seeds=[1, 2])
        assert len(measured) == calls
    assert len(protector._known) == 0


def test_boxes_without_masks_cover_the_image_in_time(images: Tensor) -> None:
    areas, generators = KeptAreas(batch_of(images, None)), streams([1, 2], "test")
    draws = torch.stack([areas.draw(generators) for _ in range(50)])
    assert draws.shape == (50, 2, 1, 24, 30)
    assert draws.mean((2, 3, 4)).min() >= 0.25
    assert draws.sum(0).min() > 0
    assert not torch.equal(draws[:, 0], draws[:, 1])
    alone = KeptAreas(batch_of(images[1:], None)).draw(streams([2], "test"))
    assert torch.equal(alone[0], draws[0, 1])


def test_empty_and_full_masks(model: InpaintingModel, images: Tensor) -> None:
    masks = torch.stack([torch.zeros(1, 24, 30), torch.ones(1, 24, 30)])
    config = DiffusionGuardConfig(steps=3, eval_draws=1)
    result = DiffusionGuard(config, model).protect(images, masks=masks, seeds=[1, 2])
    assert torch.equal(result.images[0], images[0])
    assert not torch.equal(result.images[1], images[1])
    assert [fact.failed for fact in result.facts] == [None, None]


def test_norm_rises_for_every_image(model: InpaintingModel, images: Tensor, masks: Tensor) -> None:
    config = DiffusionGuardConfig(steps=6, step_levels=4.0, eval_draws=4)
    for given in (masks, None):
        for fact in DiffusionGuard(config, model).protect(images, masks=given, seeds=[1, 2]).facts:
            assert fact.objective_after > fact.objective_before + 0.5


def test_presets_are_the_published_numbers() -> None:
    paper = DiffusionGuard.presets["paper"]
    assert (paper.eps_levels, paper.step_levels, paper.steps) == (16 / 2, 1 / 2, 800)
    assert (paper.random_start, paper.schedule_steps, paper.prompt) == (False, 4, "")
    with pytest.raises(ValueError, match="schedule_steps"):
        DiffusionGuardConfig(schedule_steps=0)


def test_models_of_the_other_kind_are_refused(folder: Path, model: InpaintingModel, tmp_path: Path) -> None:
    plain = load_model(str(save_tiny_model(tmp_path / "plain")))
    with pytest.raises(ModelError, match="latent inpainting model, and this needs a latent text-to-image"):
        load_model(str(folder))
    with pytest.raises(ModelError, match="text-to-image model, and this needs a latent inpainting"):
        load_inpainting_model(str(tmp_path / "plain"))
    with pytest.raises(ModelError, match=r"takes 9 channels .* inpainting and depth models are not supported"):
        DiffusionModel(parts_of(model), model.schedule, digest="x")
    with pytest.raises(ModelError, match=r"takes 4 channels .* an inpainting model takes 9"):
        InpaintingModel(parts_of(plain), plain.schedule, digest="x")


def parts_of(model: DiffusionModel | InpaintingModel) -> LatentParts:
    return LatentParts(vae=model.vae, unet=model.unet, text_encoder=model.text_encoder, tokenizer=model.tokenizer)
