"""DiffPure and GrIDPure: the geometry of their tiles, and the facts that their papers and code state."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pipeline.verify.attack_models import AttackModels, ModelKind
from pipeline.verify.purifiers import diffpure, gridpure
from pipeline.verify.purifiers.ddpm import diffuse_and_denoise
from pipeline.verify.purifiers.diffpure import DiffPure, ResizeOnly
from pipeline.verify.purifiers.gridpure import GrIDPure
from protectors.randomness import streams
from protectors.tiles import coverage, cut, join, mirrored_border, pad_reflect, tile_pieces
from tests.pipeline.verify_purifiers.models import TILE, save_pixel_model


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> AttackModels:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("pixel")
    save_pixel_model(folder)
    return AttackModels({ModelKind.PIXEL: str(folder)})


@dataclass
class Output:
    sample: Tensor


@dataclass
class Oracle:
    """Stands in for a DDPMPipeline whose network knows that every clean pixel is `value` in [-1, 1]."""

    value: float = 0.0
    scheduler: DDPMScheduler = field(default_factory=lambda: DDPMScheduler(beta_start=1e-4, beta_end=0.02))
    seen: list[tuple[int, Tensor]] = field(default_factory=list)

    def unet(self, noisy: Tensor, t: int) -> Output:
        self.seen.append((t, noisy))
        abar = self.scheduler.alphas_cumprod[t]
        return Output((noisy - abar.sqrt() * self.value) / (1 - abar).sqrt())


def identity(pipeline: Any, tiles: Tensor, t: int, generators: Sequence[torch.Generator], **options: Any) -> Tensor:
    return tiles


# --- Geometry


def test_the_tiles_of_the_paper() -> None:
    """512 x 512 in tiles of 256: nine windows and the corners; no pixel in one tile only."""
    pieces = tile_pieces(512, 512, 256, corners=True)
    assert pieces[-1].tile + 1 == 10
    count = coverage(pieces, 512, 512)
    assert count.unique().tolist() == [2, 4]
    assert (count[:128] == 2).all()
    assert (count[:, -128:] == 2).all()
    assert (count[128:-128, 128:-128] == 4).all()
    assert coverage(tile_pieces(512, 512, 256, corners=False), 512, 512)[0, 0] == 1


@settings(max_examples=40, deadline=None)
@given(st.integers(16, 70), st.integers(16, 70), st.booleans())
def test_what_is_cut_and_joined_is_the_same(height: int, width: int, corners: bool) -> None:
    images = torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(height * width))
    pieces = tile_pieces(height, width, 16, corners=corners)
    tiles = cut(images, pieces, 16)
    assert tiles.isfinite().all()
    assert torch.allclose(join(tiles, pieces, height, width), images, atol=1e-6)
    count = coverage(pieces, height, width)
    assert count.min() >= 1
    if corners and not {height, width} & {16}:
        assert [count[y, x].item() >= 2 for y in (0, -1) for x in (0, -1)] == [True] * 4


def test_the_tile_of_corners_holds_the_corners() -> None:
    image = torch.arange(40.0 * 50).view(1, 1, 40, 50)
    tile = cut(image, tile_pieces(40, 50, 16, corners=True), 16)[0, -1, 0]
    rows, columns = [*range(8), *range(32, 40)], [*range(8), *range(42, 50)]
    assert torch.equal(tile, image[0, 0][rows][:, columns])


def test_an_image_below_a_tile_is_refused() -> None:
    with pytest.raises(ValueError, match="15 x 40 holds no tile of 16"):
        tile_pieces(15, 40, 16, corners=False)


@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 20))
def test_mirroring_is_that_of_numpy(height: int, width: int, more: int) -> None:
    pixels = np.arange(height * width, dtype=np.float32).reshape(height, width)
    right = pad_reflect(torch.from_numpy(pixels), height + more, width + more).numpy()
    np.testing.assert_array_equal(right, np.pad(pixels, ((0, more), (0, more)), mode="reflect"))
    around = mirrored_border(torch.from_numpy(pixels), more).numpy()
    np.testing.assert_array_equal(around, np.pad(pixels, more, mode="reflect"))


# --- The chain


@pytest.mark.parametrize(("t", "levels"), [(10, 5.6), (50, 22.0), (100, 43.2), (150, 66.1)])
def test_noise_of_the_published_levels_and_every_timestep(t: int, levels: float) -> None:
    """The specification's table: noise relative to the image, in 8-bit levels; timesteps are not respaced."""
    oracle = Oracle()
    grey = torch.full((1, 3, 64, 64), 0.5)
    purified = diffuse_and_denoise(oracle, grey, t, streams([0], "test"))
    assert [step for step, _ in oracle.seen] == list(range(t - 1, -1, -1))
    signal = oracle.scheduler.alphas_cumprod[t - 1].sqrt()
    assert float(oracle.seen[0][1].std() / signal * 127.5) == pytest.approx(levels, rel=0.03)
    assert (purified - grey).abs().max() < 1e-3


def test_fewer_steps_keep_both_ends() -> None:
    oracle = Oracle()
    diffuse_and_denoise(oracle, torch.rand(1, 3, 8, 8), 100, streams([0], "test"), steps=10)
    assert [step for step, _ in oracle.seen] == [99, 88, 77, 66, 55, 44, 33, 22, 11, 0]


def test_the_estimate_is_clipped_whatever_the_folder_says() -> None:
    """A network that names a value far outside [-1, 1] ends at white, with a scheduler that would not clip."""
    oracle = Oracle(value=3.0, scheduler=DDPMScheduler(beta_start=1e-4, beta_end=0.02, clip_sample=False))
    purified = diffuse_and_denoise(oracle, torch.full((1, 3, 8, 8), 0.5), 50, streams([0], "test"))
    assert torch.equal(purified, torch.ones_like(purified))
    assert oracle.seen[-1][1].max() < 1.2


@pytest.mark.parametrize(("t", "steps"), [(0, None), (1001, None), (5, 6), (5, 0)])
def test_timesteps_out_of_range_are_refused(t: int, steps: int | None) -> None:
    with pytest.raises(ValueError, match="t must be 1 to 1000"):
        diffuse_and_denoise(Oracle(), torch.rand(1, 3, 8, 8), t, streams([0], "test"), steps=steps)


def test_parts_of_a_batch_do_not_change_the_noise(models: AttackModels, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline, tiles = models.get(ModelKind.PIXEL), torch.rand(5, 3, TILE, TILE)
    with torch.no_grad():
        whole = diffuse_and_denoise(pipeline, tiles, 3, streams([3] * 5, "test"))
        monkeypatch.setattr("pipeline.verify.purifiers.ddpm._PIXELS_TOGETHER", 2 * TILE * TILE)
        parts = diffuse_and_denoise(pipeline, tiles, 3, streams([3] * 5, "test"))
    assert torch.allclose(whole, parts, atol=1e-4)


# --- GrIDPure


def test_no_drift_with_an_identity_denoiser(models: AttackModels, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gridpure, "diffuse_and_denoise", identity)
    images = torch.randint(0, 256, (2, 3, 71, 90), dtype=torch.uint8)
    assert torch.equal(GrIDPure(iterations=40).purify(images, seeds=[0, 1], models=models), images)


@pytest.mark.parametrize(("iterations", "levels"), [(10, 4.9), (20, 9.7), (40, 19.1)])
def test_the_drift_of_the_released_code(
    models: AttackModels, monkeypatch: pytest.MonkeyPatch, iterations: int, levels: float
) -> None:
    """The specification's measurement: an identity with noise of one level darkens by half a level per iteration."""

    def noisy(pipeline: Any, tiles: Tensor, t: int, generators: Sequence[torch.Generator]) -> Tensor:
        return tiles + torch.randn(tiles.shape, generator=generators[0]) / 255

    monkeypatch.setattr(gridpure, "diffuse_and_denoise", noisy)
    grey = torch.full((1, 3, 96, 96), 128, dtype=torch.uint8)
    for upstream, expected in ((True, levels), (False, 0.0)):
        purifier = GrIDPure(iterations=iterations, upstream=upstream)
        purified = purifier.purify(grey, seeds=[0], models=models)
        # Half a level per iteration; the specification's image had dark pixels that could not fall further.
        assert 128 - float(purified.float().mean()) == pytest.approx(expected, rel=0.05, abs=0.05)


def test_the_previous_image_is_blended_in(models: AttackModels, monkeypatch: pytest.MonkeyPatch) -> None:
    def white(pipeline: Any, tiles: Tensor, t: int, generators: Sequence[torch.Generator]) -> Tensor:
        return torch.ones_like(tiles)

    monkeypatch.setattr(gridpure, "diffuse_and_denoise", white)
    black = torch.zeros(1, 3, 40, 40, dtype=torch.uint8)
    purified = GrIDPure(iterations=3, gamma=0.5).purify(black, seeds=[0], models=models)
    assert purified.unique().tolist() == [round(255 * 7 / 8)]


def test_the_cost_of_a_round(models: AttackModels, monkeypatch: pytest.MonkeyPatch) -> None:
    """2,000 calls per round on an image of two by two tiles: 10 tiles, 10 timesteps, 20 iterations."""
    calls = 0
    unet = models.get(ModelKind.PIXEL).unet

    def count(module: Any, inputs: tuple[Tensor, ...], output: Any) -> None:
        nonlocal calls
        calls += len(inputs[0])

    hook = unet.register_forward_hook(count)
    image = torch.randint(0, 256, (1, 3, 2 * TILE, 2 * TILE), dtype=torch.uint8)
    short = replace(GrIDPure(), t=5, iterations=4)
    short.purify(image, seeds=[0], models=models)
    hook.remove()
    assert calls * (GrIDPure().t // short.t) * (GrIDPure().iterations // short.iterations) == 2000


# --- DiffPure


def test_diffpure_without_diffusion_is_its_control(models: AttackModels, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diffpure, "diffuse_and_denoise", identity)
    for size in ((64, 64), (100, 70), (20, 90)):
        images = torch.randint(0, 256, (1, 3, *size), dtype=torch.uint8)
        control = ResizeOnly().purify(images, seeds=[0], models=models)
        only_tiles = DiffPure(t=50).purify(images, seeds=[0], models=models)
        assert (control.int() - only_tiles.int()).abs().max() <= 1
        assert torch.equal(control, images) is (min(size) <= TILE)


def test_the_control_removes_fine_detail_and_keeps_the_rest(models: AttackModels) -> None:
    board = (torch.arange(64)[:, None] + torch.arange(64)) % 2 * 40 + 100
    control = ResizeOnly().purify(board.to(torch.uint8).expand(1, 3, 64, 64), seeds=[0], models=models)
    assert (control[..., 8:-8, 8:-8].int() - 120).abs().max() <= 3
    ramp = torch.arange(0, 256, 4, dtype=torch.uint8).expand(1, 3, 64, 64)
    kept = ResizeOnly().purify(ramp, seeds=[0], models=models)
    assert (kept.int() - ramp.int())[..., 6:-6].abs().max() <= 2


def test_more_noise_changes_more(tmp_path: Path, models: AttackModels) -> None:
    image = torch.full((1, 3, TILE, TILE), 120, dtype=torch.uint8)
    changes = [(DiffPure(t=t).purify(image, seeds=[0], models=models).float() - 120).std().item() for t in (3, 12, 40)]
    assert changes == sorted(changes)
    assert changes[0] < changes[-1] / 2
