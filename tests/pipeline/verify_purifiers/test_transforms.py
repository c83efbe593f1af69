"""What the plain purifiers do to pixels, and residual averaging over a set."""

from __future__ import annotations

import io
import math

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from pipeline.verify.attack_models import AttackModels
from pipeline.verify.purifiers import PURIFIERS
from pipeline.verify.purifiers.adverse_cleaner import AdverseCleaner, bilateral
from pipeline.verify.purifiers.averaging import PERIODS, average_copies, average_residual, residual, subtract
from pipeline.verify.purifiers.base import Purifier
from pipeline.verify.purifiers.transforms import BitDepth, Chain, GaussianBlur, Jpeg, Median, Noise, Resample, Shift

NOTHING = AttackModels({})


def purify(purifier: Purifier | str, images: Tensor) -> Tensor:
    chosen = PURIFIERS[purifier] if isinstance(purifier, str) else purifier
    return chosen.purify(images, seeds=range(len(images)), models=NOTHING)


def board(low: tuple[int, int, int], high: tuple[int, int, int], size: int = 48) -> Tensor:
    """A chessboard of single pixels in two colours."""
    odd = ((torch.arange(size)[:, None] + torch.arange(size)) % 2).bool()
    colours = torch.tensor([low, high], dtype=torch.uint8)
    return torch.where(odd, colours[1].view(3, 1, 1), colours[0].view(3, 1, 1))[None]


def photo(height: int = 64, width: int = 64, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, 3, 6, 6, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic").clamp(0, 1)
    return (smooth * 255).round().to(torch.uint8)


def test_jpeg_halves_the_colours_and_keeps_the_brightness() -> None:
    """4:2:0: red and green of one brightness become one colour even at quality 95; black and white stay apart."""
    colours = purify("jpeg95", board((180, 60, 100), (60, 121, 100))).float()
    assert colours[0, 0].std() < 8
    grey = purify("jpeg95", board((60, 60, 60), (180, 180, 180))).float()
    assert grey[0, 0].std() > 50


@pytest.mark.parametrize("quality", [95, 85, 75, 65, 50])
def test_jpeg_is_that_of_pillow(quality: int) -> None:
    pixels = photo()[0].permute(1, 2, 0).numpy()
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=quality, subsampling="4:2:0")
    expected = torch.from_numpy(np.asarray(Image.open(file)).copy()).permute(2, 0, 1)[None]
    assert torch.equal(purify(f"jpeg{quality}", photo()), expected)


def test_half_size_removes_what_half_the_size_cannot_hold() -> None:
    halved = purify("half-size", board((100, 100, 100), (140, 140, 140)))
    assert (halved.int() - 120).abs().max() <= 5
    assert (purify("half-size", photo()).int() - photo().int()).abs().float().mean() < 2


def test_the_chain_is_its_two_steps() -> None:
    images = photo()
    assert torch.equal(purify(Chain(), images), purify("half-size", purify("jpeg75", images)))
    assert not torch.equal(purify(Chain(), images), purify(Chain(quality=50), images))


def test_three_quarters_keep_more_than_half() -> None:
    rough = torch.randint(0, 256, (1, 3, 48, 48), dtype=torch.uint8)
    kept, less = (purify(name, rough).float() - rough.float() for name in ("three-quarter-size", "half-size"))
    assert kept.square().mean() < 0.7 * less.square().mean()
    assert isinstance(PURIFIERS["half-size"], Resample)


def test_a_shift_moves_every_pixel_by_one() -> None:
    images = photo()
    moved = purify(Shift(pixels=1), images)
    assert torch.equal(moved[..., 1:, 1:], images[..., :-1, :-1])
    assert torch.equal(moved[..., 0, 1:], images[..., 0, :-1])


def test_a_crop_enlarges_the_middle() -> None:
    """100 pixels lose 5 at either end: what was at 5 comes to the border, and the middle stays."""
    ramp = (torch.arange(100, dtype=torch.float32) * 2).to(torch.uint8).expand(1, 3, 100, 100)
    cropped = purify("crop", ramp)[0, 0, 50].int()
    assert (cropped[0] - 10).abs() <= 2
    assert (cropped[-1] - 188).abs() <= 2
    assert (cropped[50] - 100).abs() <= 2


def test_the_median_removes_single_pixels() -> None:
    image = torch.full((1, 3, 20, 20), 90, dtype=torch.uint8)
    image[..., 10, 10] = 255
    assert purify(Median(), image).unique().tolist() == [90]


def test_blur_is_a_gaussian_of_its_sigma() -> None:
    impulse = torch.zeros(1, 3, 21, 21, dtype=torch.uint8)
    impulse[..., 10, 10] = 255
    blurred = purify(GaussianBlur(size=7, sigma=1.0), impulse)[0, 0].float()
    assert blurred[10, 10] == round(255 / (2 * math.pi))
    assert blurred[10, 11] / blurred[10, 10] == pytest.approx(math.exp(-0.5), abs=0.02)
    assert blurred[:, :7].sum() + blurred[:, 14:].sum() == 0  # not further than the window
    assert purify("blur", torch.full((1, 3, 9, 9), 77, dtype=torch.uint8)).unique().tolist() == [77]


def test_noise_has_its_standard_deviation_and_every_image_its_own() -> None:
    images = torch.full((2, 3, 64, 64), 128, dtype=torch.uint8)
    added = purify(Noise(), images).float() - 128
    assert added.std() == pytest.approx(0.05 * 255, rel=0.02)
    assert abs(float((added[0] * added[1]).mean())) < 3
    assert abs(float((added[0, 0] * added[0, 1]).mean())) < 5


@pytest.mark.parametrize("bits", [1, 3, 5, 8])
def test_bit_depth_leaves_so_many_values(bits: int) -> None:
    values = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 3, 16, 16)
    reduced = purify(BitDepth(bits=bits), values)
    assert len(reduced.unique()) == 2**bits
    assert (reduced.min(), reduced.max()) == (0, 255)
    assert (reduced.int() - values.int()).abs().max() <= math.ceil(255 / (2**bits - 1) / 2)


def test_total_variation_falls_and_edges_stay() -> None:
    step = torch.full((1, 3, 40, 40), 60, dtype=torch.uint8)
    step[..., 20:] = 200
    noisy = purify(Noise(sigma=0.03), step)
    smooth = purify("total-variation", noisy).float()
    assert smooth[..., 4:16].std() < 0.4 * noisy[..., 4:16].float().std()
    assert smooth[..., 21].mean() - smooth[..., 18].mean() > 100


# --- AdverseCleaner


def test_the_bilateral_filter_by_its_definition() -> None:
    image = torch.rand(1, 3, 7, 8, generator=torch.Generator().manual_seed(0)) * 40
    found = bilateral(image, 5, 8.0, 8.0)
    padded = np.pad(image[0].numpy(), ((0, 0), (2, 2), (2, 2)), mode="reflect")
    for y, x in ((0, 0), (3, 4), (6, 7)):
        total, weights = np.zeros(3), 0.0
        for i in range(-2, 3):
            for j in range(-2, 3):
                if i * i + j * j > 4:
                    continue
                other, here = padded[:, y + 2 + i, x + 2 + j], padded[:, y + 2, x + 2]
                colour = np.abs(other - here).sum()
                weight = np.exp(-(colour**2) / (2 * 64)) * np.exp(-(i * i + j * j) / (2 * 64))
                total, weights = total + weight * other, weights + weight
        np.testing.assert_allclose(found[0, :, y, x].numpy(), total / weights, rtol=1e-4)


def test_weak_patterns_vanish_and_edges_stay() -> None:
    image = torch.full((1, 3, 40, 40), 60.0)
    image[..., 20:] = 200
    pattern = torch.where(board((0, 0, 0), (1, 1, 1), 40) > 0, 1.0, -1.0)
    attacked = (image + pattern).to(torch.uint8)
    cleaned = purify(AdverseCleaner(bilateral_rounds=32), attacked).float()
    assert (cleaned - image).abs()[..., 3:-3].mean() < 0.35
    assert cleaned[..., 20].mean() - cleaned[..., 19].mean() > 135


def test_the_guide_brings_the_perturbation_back() -> None:
    """The author's remark, and why the bilateral filter is run alone as well: a ramp takes the guide's pattern over."""
    ramp = 60 + 2 * torch.arange(40).expand(1, 3, 40, 40)
    pattern = board((0, 0, 0), (1, 1, 1), 40).int() * 2 - 1
    attacked = (ramp + pattern).to(torch.uint8)
    kept = [
        float((purify(AdverseCleaner(bilateral_rounds=16, guided_rounds=rounds), attacked) * pattern).float().mean())
        for rounds in (0, 4)
    ]
    assert abs(kept[0]) < 0.2
    assert kept[1] > 0.4


# --- Averaging


def planted(period: int, count: int = 12, levels: float = 4.0) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Photos, the same photos with one pattern added, and the pattern, which a median of 3 sees as residual."""
    tile = torch.zeros(3, period, period)
    tile[:, 1, 2] = levels
    tile[:, period - 1, 0] = -levels
    photos = [
        (photo(70, 90, seed).int() + torch.randint(-2, 3, (1, 3, 70, 90))).clamp(10, 245)[0] for seed in range(count)
    ]
    marked = [image + tile.repeat(1, 70 // period + 1, 90 // period + 1)[:, :70, :90].int() for image in photos]
    return [image.to(torch.uint8) for image in photos], [image.to(torch.uint8) for image in marked], tile


@pytest.mark.parametrize("period", PERIODS[:3])
def test_a_common_pattern_is_found_and_taken_off(period: int) -> None:
    torch.manual_seed(0)
    photos, marked, tile = planted(period)
    clean, found = average_residual(photos, period), average_residual(marked, period)
    assert found.period == period
    assert found.folded_energy > 3 * clean.folded_energy
    assert 0.7 < found.strength < 1.3
    assert abs(clean.strength) < 0.4
    assert float((found.tile * tile).sum() / (found.tile.norm() * tile.norm())) > 0.7
    left = [subtract(image, found, bound=4) for image in marked]
    sources = torch.stack(photos).float()
    before, after = ((torch.stack(images).float() - sources).square().mean() for images in (marked, left))
    assert after < 0.5 * before
    assert all((a.int() - b.int()).abs().max() <= 4 for a, b in zip(left, marked, strict=True))


def test_the_residual_is_what_a_median_takes_away() -> None:
    image = torch.full((3, 9, 9), 50, dtype=torch.uint8)
    image[:, 4, 4] = 60
    assert residual(image).nonzero().tolist() == [[channel, 4, 4] for channel in range(3)]
    assert residual(image)[0, 4, 4] == 10


def test_sets_that_tell_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="give at least two"):
        average_residual([photo()[0]], 8)
    with pytest.raises(ValueError, match="sides at least 64"):
        average_residual([photo()[0], photo(32, 80)[0]], 64)
    with pytest.raises(ValueError, match="align them first"):
        average_copies([photo()[0], photo(32, 32)[0]])


@pytest.mark.parametrize("count", [2, 4, 8])
def test_averaged_copies_lose_what_they_do_not_share(count: int) -> None:
    torch.manual_seed(0)
    base = photo()[0].clamp(20, 230)
    signs = [8 * (torch.randint(0, 2, base.shape) * 2 - 1) for _ in range(count)]
    left = average_copies([(base.int() + sign).to(torch.uint8) for sign in signs]).float() - base.float()
    assert left.std() == pytest.approx(8 / math.sqrt(count), rel=0.05)
    shared = average_copies([(base.int() + signs[0]).to(torch.uint8)] * count)
    assert torch.equal(shared.int() - base.int(), signs[0])


def test_registered_qualities_are_what_their_names_say() -> None:
    for name, purifier in PURIFIERS.items():
        if isinstance(purifier, Jpeg):
            assert name == f"jpeg{purifier.quality}"
