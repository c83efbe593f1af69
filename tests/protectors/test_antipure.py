"""AntiPure: its losses against the equations, its tiles and patches, and what its fields do.

What every method must do (budget, seeds, any size, frozen model) is in the contract test.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.fft import dct, dctn
from torch import Tensor

from protectors import antipure
from protectors.antipure import AntiPure, AntiPureConfig, TileDraws, timestep_guidance
from protectors.frequency import DctNorm, PatchFrequencies, dct_matrix
from protectors.model_files import ModelError
from protectors.pixel import PixelModel, load_pixel_model
from protectors.randomness import streams
from tests.protectors.tiny import save_tiny_pixel_model

SIDE = 32
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> PixelModel:
    return load_pixel_model(str(save_tiny_pixel_model(tmp_path_factory.mktemp("pixel") / "tiny", side=SIDE)))


def method(model: PixelModel, **fields: Any) -> AntiPure:
    return AntiPure(AntiPureConfig.from_dict(fields), model)


def picture(height: int = 40, width: int = 44, seed: int = 0) -> Tensor:
    """Without black and white, so that no clipping hides a step."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(1, 3, height, width, generator=generator) * 150 + 50).round() / 255


def tile_draws(count: int = 4, start: tuple[int, int] = (0, 0), seed: int = 0) -> TileDraws:
    generator = torch.Generator().manual_seed(seed)
    return TileDraws(
        t=torch.arange(count),
        noise=torch.randn(count, 3, SIDE, SIDE, generator=generator),
        starts=torch.tensor([start]).expand(count, 2),
        patched=torch.ones(count),
    )


# --- The equations, once more


def high_mean(tile: np.ndarray, start: tuple[int, int], size: int, norm: str, form: str) -> float:
    """Mean over patches and channels of (4 / s^2) times the sum over the kept quarter, by scipy in float64."""
    values = []
    for channel in tile:
        for top in range(start[0], tile.shape[1] - size + 1, size):
            for left in range(start[1], tile.shape[2] - size + 1, size):
                patch = channel[top : top + size, left : left + size]
                kept = dctn(patch, norm=None if norm == "none" else norm)[size // 2 :, size // 2 :]
                kept = {"signed": kept, "abs": np.abs(kept), "energy": kept**2}[form]
                values.append(4 / size**2 * kept.sum())
    return float(np.mean(values))


def recomputed_objective(model: PixelModel, config: AntiPureConfig, image: Tensor, seed: int) -> float:
    """J of one image from the equations in float64; only the draws are those of the method."""
    (generator,) = streams([seed], "antipure/evaluation")
    pixels = image[0].double().numpy() * 2 - 1
    height, width, half = *pixels.shape[1:], SIDE // 2
    tops = [*range(0, height - SIDE, half), height - SIDE]
    lefts = [*range(0, width - SIDE, half), width - SIDE]
    tiles = [(pixels[:, y : y + SIDE, x : x + SIDE], (-y % 8, -x % 8), True) for y in tops for x in lefts]
    ends = [*range(half), *range(-half, 0)]
    corners = pixels[:, ends][:, :, ends]
    tiles.append((corners, (0, 0), height % 8 == 0 and width % 8 == 0))
    unet = model.unet.double()
    losses = []
    for _ in range(config.eval_draws):
        times = torch.randint(config.tp, (len(tiles),), generator=generator)
        noises = torch.randn(len(tiles), 3, SIDE, SIDE, generator=generator).double().numpy()
        for (tile, start, patched), t, noise in zip(tiles, times.tolist(), noises, strict=True):
            abar = np.prod(1 - np.linspace(1e-4, 0.02, 1000)[: t + 1])
            noisy = math.sqrt(abar) * tile + math.sqrt(1 - abar) * noise
            with torch.no_grad():
                right, wrong = (
                    unet(torch.from_numpy(noisy)[None], torch.tensor([index])).sample[0, :3].numpy()
                    for index in (t, config.t_err - 1)
                )
            clean = (noisy - math.sqrt(1 - abar) * right) / math.sqrt(abar)
            if config.clip_xhat0:
                clean = clean.clip(-1, 1)
            if config.color == "luma":
                clean = np.tensordot([0.299, 0.587, 0.114], clean, axes=1)[None]
            statistic = high_mean(clean, start, 8, config.dct_norm, config.pfg_form)
            frequency = math.exp(abar - 1) / (1 + math.exp(-statistic)) if patched else 0.0
            confusion = math.exp(-((wrong - right) ** 2).mean())
            losses.append(((noise - right) ** 2).mean() + config.lambda1 * frequency + config.lambda2 * confusion)
    model.unet.float()
    return float(np.mean(losses))


@pytest.mark.parametrize("size", [(40, 44), (48, 32)])
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"pfg_form": "abs", "dct_norm": "none", "lambda1": 2.0},
        {"pfg_form": "energy", "color": "luma", "clip_xhat0": True, "t_err": 500, "tp": 40},
    ],
)
def test_the_objective_is_that_of_the_equations(
    fields: dict[str, Any], size: tuple[int, int], model: PixelModel
) -> None:
    image = picture(*size)
    protector = method(model, eval_draws=2, **fields)
    found = protector.objective(image, originals=image, seeds=[7])
    assert float(found[0]) == pytest.approx(recomputed_objective(model, protector.config, image, 7), rel=1e-4)


@pytest.mark.parametrize("norm", ["ortho", "none"])
def test_the_transform_is_that_of_scipy(norm: DctNorm) -> None:
    patch = np.random.default_rng(0).normal(size=(8, 8))
    matrix = dct_matrix(8, norm).numpy()
    coefficients = matrix @ patch @ matrix.T
    np.testing.assert_allclose(coefficients, dctn(patch, norm=None if norm == "none" else norm), atol=1e-12)
    if norm == "ortho":
        assert (coefficients**2).sum() == pytest.approx((patch**2).sum())


# --- Frequency guidance


class Silent(PixelModel):
    """Predicts no noise, so that the estimate of the clean tile is linear in the tile."""

    def predict_noise(self, noisy: Tensor, t: Tensor) -> Tensor:
        return noisy * 0


def ascent_patch(size: int) -> np.ndarray:
    """p p^T, with p the sum of the upper rows of the DCT: what raises the signed statistic of a patch."""
    rows = np.stack([dct(row, norm="ortho") for row in np.eye(size)], axis=1)[size // 2 :].sum(0)
    return np.outer(rows, rows)


def test_the_gradient_of_the_guidance_is_one_grid_whatever_the_image(model: PixelModel) -> None:
    protector = method(Silent(model.unet, model.schedule, digest=""), lambda2=0)
    gradients = []
    for seed in (0, 1):
        tiles = torch.rand(4, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed)).requires_grad_()
        loss = protector.tile_losses(tiles, tile_draws()).sum()
        gradients.append(torch.autograd.grad(loss, tiles)[0].double())
    pattern = torch.from_numpy(np.tile(ascent_patch(8), (4, 4)))
    for gradient in gradients:
        scale = (gradient * pattern).sum((2, 3), keepdim=True) / pattern.square().sum()
        assert (scale > 0).all()
        assert torch.allclose(gradient, scale * pattern, atol=1e-4 * float(scale.max()))


@pytest.mark.parametrize("form", ["signed", "abs", "energy"])
def test_the_phase_of_a_pattern_matters_to_the_signed_form_alone(form: str, model: PixelModel) -> None:
    protector = method(model, pfg_form=form)
    pattern = torch.from_numpy(np.tile(ascent_patch(8), (4, 4))).float().expand(1, 3, SIDE, SIDE)
    shifted = torch.cat([pattern.roll((y, x), (2, 3)) for y in range(8) for x in range(8)])
    values = protector.frequency_statistic(shifted, torch.zeros(64, 2, dtype=torch.int64))
    aligned, diagonal = values[0], values[9]
    if form == "signed":
        assert abs(float(values.mean())) < 1e-5 * float(aligned)
        assert diagonal < aligned / 2
    else:
        assert values.mean() > 0.1 * aligned


def test_patches_start_anywhere_and_stay_whole() -> None:
    tile = torch.from_numpy(np.random.default_rng(1).normal(size=(3, SIDE, SIDE)))
    frequencies = PatchFrequencies(SIDE, 4, "ortho", CPU)
    for start in ((0, 0), (1, 0), (3, 2)):
        starts = torch.tensor([start])
        mean = frequencies.coefficients(tile[None].float(), starts).sum() / frequencies.count(3, starts)
        assert float(mean) == pytest.approx(high_mean(tile.numpy(), start, 4, "ortho", "signed"), rel=1e-4)


@pytest.mark.parametrize(("height", "width", "corner"), [(48, 40, True), (44, 40, False), (40, 39, False)])
def test_patches_lie_on_the_grid_of_the_image(height: int, width: int, corner: bool, model: PixelModel) -> None:
    """On an image of one repeated patch all windows see the same, wherever they begin."""
    protector = method(model)
    repeated = np.tile(ascent_patch(8), (6, 6))[:height, :width] * 0.2 + 0.5
    image = torch.from_numpy(repeated).float().expand(1, 3, height, width)
    tiles, pieces = protector._tiles(image)
    draws = protector._draw(image, pieces, streams([0], "test"))
    values = protector.frequency_statistic(tiles.flatten(0, 1), draws.starts)
    assert draws.patched.tolist() == [1.0] * (len(values) - 1) + [float(corner)]
    seen = values[draws.patched.bool()]
    assert torch.allclose(seen, seen[:1], rtol=1e-4)
    assert seen[0] > 0


def test_shifted_patches_leave_the_corner_tile_out(model: PixelModel) -> None:
    protector = method(model, patch_shift=True)
    image = picture(48, 48)
    tiles, pieces = protector._tiles(image)
    generators = streams([0], "test")
    drawn = [protector._draw(image, pieces, generators) for _ in range(4)]
    assert [draws.patched[-1].item() for draws in drawn] == [0.0] * 4
    assert len({tuple(draws.starts[0].tolist()) for draws in drawn}) > 1
    for draws in drawn:
        origins = torch.tensor([(piece.top, piece.left) for piece in pieces[: tiles.shape[1] - 1]])
        phase = (origins + draws.starts[:-1]) % 8
        assert (phase == phase[0]).all()


# --- Timestep guidance


def test_equal_predictions_are_the_most_and_move_nothing() -> None:
    prediction = torch.randn(2, 3, 8, 8, requires_grad=True)
    value = timestep_guidance(prediction, prediction.detach().clone())
    (gradient,) = torch.autograd.grad(value.sum(), prediction)
    assert value.tolist() == [1, 1]
    assert not gradient.any()
    other = timestep_guidance(prediction, torch.randn(2, 3, 8, 8))
    assert ((other > 0) & (other < 1)).all()


def test_the_guidance_does_not_underflow_at_the_size_of_a_tile() -> None:
    """A sum in place of the mean, over the 196,608 values of a tile of 256, would be exp(-491): no gradient."""
    right, wrong = torch.zeros(1, 3, 256, 256, requires_grad=True), torch.full((1, 3, 256, 256), 0.05)
    value = timestep_guidance(right, wrong)
    (gradient,) = torch.autograd.grad(value.sum(), right)
    assert value.item() == pytest.approx(math.exp(-0.0025))
    assert (gradient > 0).all()


@pytest.mark.parametrize(("moved", "right_moves", "wrong_moves"), [("both", 1, 1), ("t", 1, 0), ("t_err", 0, 1)])
def test_which_prediction_is_moved(moved: Any, right_moves: int, wrong_moves: int) -> None:
    right, wrong = (torch.randn(1, 3, 8, 8, requires_grad=True) for _ in range(2))
    value = timestep_guidance(right, wrong, moved).sum()
    gradients = torch.autograd.grad(value, (right, wrong), allow_unused=True)
    assert [gradient is not None and bool(gradient.any()) for gradient in gradients] == [right_moves, wrong_moves]


# --- The attack


def plain_denoising_attack(model: PixelModel, image: Tensor, steps: int, seed: int) -> Tensor:
    """Ascends the denoising loss alone, written without the method's machinery; an image of one tile."""
    (generator,) = streams([seed], "antipure/attack")
    delta = torch.zeros_like(image)
    for _ in range(steps):
        images = (image + delta).requires_grad_()
        tile = images * 2 - 1
        t = torch.randint(10, (1,), generator=generator)
        noise = torch.randn(1, 1, 3, SIDE, SIDE, generator=generator)[0]
        loss = (model.predict_noise(model.add_noise(tile, noise, t), t) - noise).square().mean()
        (gradient,) = torch.autograd.grad(loss, images)
        delta = (delta + 0.8 / 255 * gradient.sign()).clamp(-8 / 255, 8 / 255)
        delta = (image + delta).clamp(0, 1) - image
    return ((image + delta) * 255).round() / 255


def test_without_guidance_it_is_a_plain_attack_on_the_denoising_loss(model: PixelModel) -> None:
    image = picture(SIDE, SIDE)
    protector = method(model, lambda1=0, lambda2=0, steps=5, eval_draws=1, tile_layout="grid")
    output = protector.protect(image, seeds=[3]).images
    assert torch.equal(output, plain_denoising_attack(model, image, 5, 3))


def test_every_field_changes_the_pixels(model: PixelModel) -> None:
    """No option is dead: each gives other pixels than the defaults."""
    changes: list[dict[str, Any]] = [
        {},
        {"lambda1": 0.0},
        {"lambda2": 0.0},
        {"tp": 50},
        {"t_err": 900},
        {"n_eot": 2},
        {"random_start": True},
        {"t_sampling": "step"},
        {"patch_size": 4},
        {"patch_shift": True},
        {"pfg_form": "abs"},
        {"pfg_form": "energy"},
        {"dct_norm": "none"},
        {"color": "luma"},
        {"clip_xhat0": True},
        {"etg_grad": "t"},
        {"etg_grad": "t_err"},
        {"tile_layout": "grid"},
        {"step_levels": 0.4},
    ]
    # White and black, so that estimates of the clean image leave the range and clipping matters.
    image = (picture() > 0.5).float() * 0.9 + 0.05
    image = (image * 255).round() / 255
    outputs = [
        method(model, **{"steps": 3, "eval_draws": 1, "lambda1": 20.0, "lambda2": 20.0, **fields})
        .protect(image, seeds=[1])
        .images
        for fields in changes
    ]
    same = [(a, b) for a in range(len(changes)) for b in range(a) if torch.equal(outputs[a], outputs[b])]
    assert [(changes[a], changes[b]) for a, b in same] == []


def test_one_small_step_raises_the_loss(model: PixelModel) -> None:
    protector, draws = method(model), tile_draws()
    tiles = (torch.rand(4, 3, SIDE, SIDE) - 0.5).requires_grad_()
    before = protector.tile_losses(tiles, draws)
    (gradient,) = torch.autograd.grad(before.sum(), tiles)
    with torch.no_grad():
        after = protector.tile_losses(tiles + 1e-3 * gradient.sign(), draws)
    assert (after > before).all()


def test_a_step_is_a_tenth_of_any_budget(model: PixelModel) -> None:
    image = picture()
    for eps, steps, reached in ((8.0, 5, 4), (20.0, 3, 6), (16.0, 40, 16)):
        result = method(model, eps_levels=eps, steps=steps, eval_draws=1, lambda2=0.0).protect(image, seeds=[1])
        assert result.facts[0].linf_levels == reached


def test_parts_of_the_tiles_change_nothing(model: PixelModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory is bounded by parts; gradients and objective are those of one call."""
    image, protector = picture(64, 64), method(model, eval_draws=1)
    results = []
    for pixels in (2**19, 3 * 2 * SIDE**2):
        monkeypatch.setattr(antipure, "_PIXELS_TOGETHER", pixels)
        images = image.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(protector._slope(images, streams([5], "test")).sum(), images)
        results.append((gradient, protector.objective(image, originals=image, seeds=[5])))
    assert protector._together == 3
    assert torch.allclose(results[0][0], results[1][0], rtol=1e-3, atol=1e-6 * float(results[0][0].abs().max()))
    assert torch.allclose(results[0][1], results[1][1], rtol=1e-5)


def test_both_timesteps_of_all_tiles_go_through_the_network_together(
    model: PixelModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[int]] = []
    forward = model.unet.forward
    monkeypatch.setattr(model.unet, "forward", lambda noisy, t: seen.append(t.tolist()) or forward(noisy, t))
    image = picture(48, 48)
    method(model, steps=1, eval_draws=1).protect(image, seeds=[1])
    assert [len(times) for times in seen] == [10, 10, 10]  # before, the step, after: four windows and the corners
    for times in seen:
        assert set(times[:5]) <= set(range(10))
        assert times[5:] == [99] * 5


def test_timesteps_per_tile_or_per_step(model: PixelModel) -> None:
    image = picture(64, 64)
    times: dict[str, list[int]] = {}
    for sampling, distinct in (("tile", True), ("step", False)):
        protector = method(model, t_sampling=sampling)
        _, pieces = protector._tiles(image)
        generators = streams([2], "test")
        drawn = [protector._draw(image, pieces, generators).t.tolist() for _ in range(30)]
        assert any(len(set(each)) > 1 for each in drawn) is distinct
        times[sampling] = [t for each in drawn for t in each]
    assert {t for both in times.values() for t in both} == set(range(10))


def test_presets_convert_the_published_budgets() -> None:
    paper, common, anti_db = (AntiPure.presets[name] for name in ("paper", "common", "anti_db"))
    assert (paper.eps_levels, common.eps_levels) == pytest.approx((0.12549 * 127.5, 0.06275 * 127.5), rel=1e-4)
    assert anti_db.eps_levels == 6.375
    assert (paper.lambda1, paper.lambda2, paper.tp) == (0.5, 0.5, 10)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"t_err": 10}, "t_err=10: use more than tp = 10"),
        ({"patch_size": 5}, "patch_size=5: use an even"),
        ({"lambda1": -1}, "lambda1"),
        ({"lambda2": -0.5}, "lambda2"),
        ({"tp": 0}, "tp=0"),
        ({"steps": 0}, "steps=0"),
        ({"step_levels": 0.0}, "step_levels=0.0"),
        ({"pfg_form": "square"}, "pfg_form"),
    ],
)
def test_impossible_values_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AntiPureConfig.from_dict(fields)


def test_what_does_not_fit_the_model_is_refused(model: PixelModel, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="patches of 32 do not divide half of the model's tile of 32"):
        method(model, patch_size=32)
    with pytest.raises(ModelError, match="t_err=1001: the model has 1000 timesteps"):
        method(model, t_err=1001)
