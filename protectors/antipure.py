"""AntiPure (Yang et al., ICCV 2025, https://arxiv.org/abs/2509.13922)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar, Literal

import torch
from torch import Tensor

from protectors.base import Batch
from protectors.config import SearchConfig, require
from protectors.frequency import DctNorm, PatchFrequencies
from protectors.model_files import ModelError
from protectors.pgd import SCHEDULES, PgdPlan, Places, Plateau, Progress, pgd, start_of
from protectors.pixel import PixelModel
from protectors.randomness import normal, streams
from protectors.search import PgdProtector
from protectors.tiles import Piece, cut, pad_reflect, tile_pieces

# Pixels in one call of the UNet with its backward pass: 128 tiles of 64, 8 of 256.
_PIXELS_TOGETHER = 2**19


@dataclass(frozen=True, slots=True, kw_only=True)
class AntiPureConfig(SearchConfig):
    """What the paper publishes (lambda1, lambda2, tp) and what it leaves open (the rest); timesteps count from 1."""

    # Length of one sign step in 8-bit levels. None: a tenth of eps_levels, at any budget.
    step_levels: float | None = None
    # Start at a uniform random point of the budget (True) or at the original (False).
    random_start: bool = False
    # Draws of (timestep, noise) per tile and step, whose gradients are averaged. Time grows in proportion.
    n_eot: int = 1
    # Draws for the objective that is measured before and after: each costs forward passes, never pixels.
    eval_draws: int = 4
    # Weight of the patch-wise frequency guidance; 0 leaves it out.
    lambda1: float = 0.5
    # Weight of the erroneous timestep guidance; 0 leaves it out, and half of the cost with it.
    lambda2: float = 0.5
    # Deepest timestep that is attacked: the purifier's depth per iteration.
    tp: int = 10
    # The wrong timestep that the UNet should not tell from the right one; above tp.
    t_err: int = 100
    # One timestep for every tile, or one per step for all tiles of an image (noisier).
    t_sampling: Literal["tile", "step"] = "tile"
    # Side of a DCT patch in pixels: even, a divisor of half a tile. 8 is JPEG's block.
    patch_size: int = 8
    # Another offset of the patches for every draw: no longer one fixed grid, which a blur of one pixel would find.
    patch_shift: bool = False
    # What is averaged over upper coefficients: themselves (published), magnitudes or squares.
    pfg_form: Literal["signed", "abs", "energy"] = "signed"
    # Scale of the DCT. "none" multiplies coefficients by up to 2 patch_size, which saturates the sigmoid.
    dct_norm: DctNorm = "ortho"
    # DCT of every channel, or of luminance.
    color: Literal["rgb", "luma"] = "rgb"
    # Clip the estimate of the clean image, as purifiers do; where it clips there is no gradient.
    clip_xhat0: bool = False
    # Which of the two predictions the timestep guidance moves.
    etg_grad: Literal["both", "t", "t_err"] = "both"
    # GrIDPure's windows and its tile of the four corners, or the windows alone.
    tile_layout: Literal["gridpure", "grid"] = "gridpure"

    def check(self) -> None:
        SearchConfig.check(self)
        for field in ("n_eot", "tp"):
            require(getattr(self, field) >= 1, field, getattr(self, field), "use 1 or more")
        step = self.step_levels
        require(step is None or 0 < step <= 255, "step_levels", step, "use more than 0 (8-bit levels), or none")
        for field in ("lambda1", "lambda2"):
            require(getattr(self, field) >= 0, field, getattr(self, field), "use 0 or more")
        require(self.t_err > self.tp, "t_err", self.t_err, f"use more than tp = {self.tp}")
        size = self.patch_size
        require(size >= 2 and size % 2 == 0, "patch_size", size, "use an even number of pixels")


@dataclass(frozen=True, slots=True)
class TileDraws:
    """Everything that is random or particular in the losses of N tiles."""

    t: Tensor
    """Timesteps as the network counts them, from 0: ``(N,)`` int64."""
    noise: Tensor
    """Diffusion noise ``(N, 3, S, S)``."""
    starts: Tensor
    """Row and column of the tile's first whole DCT patch, ``(N, 2)`` int64."""
    patched: Tensor
    """1 for tiles that take part in the frequency guidance, else 0: ``(N,)``."""

    def parts(self, size: int) -> Iterator[tuple[slice, TileDraws]]:
        """Slices of at most `size` tiles, and the draws of each."""
        for first in range(0, len(self.t), size):
            part = slice(first, first + size)
            yield part, TileDraws(self.t[part], self.noise[part], self.starts[part], self.patched[part])


class AntiPure(PgdProtector[AntiPureConfig, PixelModel]):
    """Makes a pixel-space purifier work badly: raises its error, its high frequencies and its timestep confusion.

    "Towards Robust Defense against Customization via Protective Perturbation Resistant to Diffusion-based
    Purification", https://arxiv.org/abs/2509.13922. J = E over t <= tp, n of [ mean (e(x_t, t) - n)^2
    + lambda1 exp(abar_t - 1) sigmoid(mean over patches of (4 / s^2) sum of DCT(xhat0)_mn, m and n from s / 2 on)
    + lambda2 exp(-mean (e(x_t, t_err) - e(x_t, t))^2) ], maximised; per tile of GrIDPure's layout, then the mean
    over tiles and draws. The reverse chain of the purifier is never run.

    Distance: l_inf, ``config.eps_levels`` 8-bit levels of the saved pixels.

    Args:
        config: ``AntiPureConfig``. "paper" reads the published 16/255 on [0, 1]: 16 levels. "common" is for
            comparisons: 8 levels, which is also what 16/255 on [-1, 1] gives; "anti_db" is 0.05 on [-1, 1].
        model: ``PixelModel``, the purifier's; its side S is the tile's.

    Shape: images ``(N, 3, H, W)`` float32 in [0, 1] sRGB, any H and W (mirrored inside to at least S); the output
        has the same shape.

    Returns:
        ``ProtectResult``; the objective is J over ``eval_draws`` fixed draws.

    Raises:
        ValueError: bad input or configuration. ModelError: the model is no ``PixelModel``, or its tiles or its
            schedule do not fit the configuration.

    Cost: per step and draw two UNet passes per tile, forward and backward; 10 tiles for an image of 2 S x 2 S. Tiles
        and both timesteps go through the UNet together, in parts that bound memory.

    Differs from the paper: nothing known; step length, patch size, t_err and number of steps are not published, nor
        is code. Formulas and weights are from a public reading of the paper. Of what that leaves open, not offered:
        momentum, a sum in place of the mean (mse_reduction), transforms of the image in the loop, a random t_err, and
        layouts of random crops or of the whole image at the tile's size.
    """

    name = "antipure"
    version = "1"
    config_type = AntiPureConfig
    model_type = PixelModel
    presets: ClassVar[Mapping[str, AntiPureConfig]] = {
        "paper": AntiPureConfig(eps_levels=16.0),
        "common": AntiPureConfig(eps_levels=8.0),
        "anti_db": AntiPureConfig(eps_levels=0.05 * 127.5),
        "fast": AntiPureConfig(eps_levels=8.0, steps=20, eval_draws=2),
        "strong": AntiPureConfig(eps_levels=16.0, step_levels=0.8, steps=200, n_eot=2),
    }

    def __init__(self, config: AntiPureConfig, model: PixelModel) -> None:
        super().__init__(config, model)
        side, longest = model.base_size, model.schedule.timesteps
        if side % (2 * config.patch_size):
            raise ModelError(f"patches of {config.patch_size} do not divide half of the model's tile of {side} pixels")
        if config.t_err > longest:
            raise ModelError(f"t_err={config.t_err}: the model has {longest} timesteps")

    def _climb(self, batch: Batch, progress: Progress, plateau: Plateau | None) -> Tensor:
        config, generators = self.config, streams(batch.seeds, "antipure/attack")
        start = start_of(config, batch.originals, generators)
        plan = PgdPlan(
            eps_levels=config.eps_levels,
            step_levels=config.eps_levels / 10 if config.step_levels is None else config.step_levels,
            steps=config.steps,
            ascend=True,
            schedule=SCHEDULES[config.schedule],
        )

        def loss(images: Tensor, places: Places) -> Tensor:
            return self._slope(images, [generators[place] for place in places])

        return pgd(loss, batch.originals, plan, start=start, masks=batch.masks, progress=progress, plateau=plateau)

    def _objective(self, images: Tensor, batch: Batch) -> Tensor:
        generators = streams(batch.seeds, "antipure/evaluation")
        tiles, pieces = self._tiles(images)
        flat = tiles.flatten(0, 1)
        total = images.new_zeros(len(flat))
        for _ in range(self.config.eval_draws):
            for part, draws in self._draw(images, pieces, generators).parts(self._together):
                total[part] += self.tile_losses(flat[part], draws)
        return total.view(tiles.shape[:2]).mean(1) / self.config.eval_draws

    def _slope(self, images: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        """A linear function per image, ``(B,)``, whose gradient is that of the objective up to a positive factor.

        The graph of one part of the tiles is freed before the next is built: memory does not grow with the image.
        """
        tiles, pieces = self._tiles(images)
        flat = tiles.detach().flatten(0, 1)
        slope = torch.zeros_like(flat)
        for _ in range(self.config.n_eot):
            for part, draws in self._draw(images, pieces, generators).parts(self._together):
                leaf = flat[part].requires_grad_()
                slope[part] += torch.autograd.grad(self.tile_losses(leaf, draws).sum(), leaf)[0]
        return (tiles * slope.view(tiles.shape)).flatten(1).sum(1)

    def tile_losses(self, tiles: Tensor, draws: TileDraws) -> Tensor:
        """J of every tile at one draw, ``(N,)``; tiles ``(N, 3, S, S)`` in [-1, 1]."""
        config, model, t = self.config, self.model, draws.t
        noisy = model.add_noise(tiles, draws.noise, t)
        if config.lambda2:
            both = torch.cat([t, torch.full_like(t, config.t_err - 1)])
            right, wrong = model.predict_noise(torch.cat([noisy, noisy]), both).chunk(2)
        else:
            right = model.predict_noise(noisy, t)
        loss = _mse(right, draws.noise)
        if config.lambda1:
            clean = model.predict_x0(noisy, right, t)
            weight = config.lambda1 * (model.alphas_cumprod[t] - 1).exp() * draws.patched
            loss = loss + weight * self.frequency_statistic(clean, draws.starts).sigmoid()
        if config.lambda2:
            loss = loss + config.lambda2 * timestep_guidance(right, wrong, config.etg_grad)
        return loss

    def frequency_statistic(self, clean: Tensor, starts: Tensor) -> Tensor:
        """What the sigmoid of the frequency guidance is taken of, ``(N,)``: the mean over kept coefficients."""
        if self.config.clip_xhat0:
            clean = clean.clamp(-1, 1)
        if self.config.color == "luma":
            from kornia.color import rgb_to_grayscale  # costs a second to import, and few configurations use it

            clean = rgb_to_grayscale(clean)
        frequencies = _frequencies(self.model.base_size, self.config.patch_size, self.config.dct_norm, clean.device)
        values = frequencies.coefficients(clean, starts)
        if self.config.pfg_form == "abs":
            values = values.abs()
        elif self.config.pfg_form == "energy":
            values = values.square()
        return values.flatten(1).sum(1) / frequencies.count(clean.shape[1], starts)

    @property
    def _together(self) -> int:
        """Tiles in one call of the UNet, each of them at up to two timesteps."""
        return max(1, _PIXELS_TOGETHER // (2 * self.model.base_size**2))

    def _tiles(self, images: Tensor) -> tuple[Tensor, list[Piece]]:
        """The purifier's tiles ``(B, K, 3, S, S)`` in [-1, 1], and where they lie."""
        side = self.model.base_size
        padded = pad_reflect(images, side, side)
        height, width = padded.shape[-2:]
        pieces = tile_pieces(height, width, side, corners=self.config.tile_layout == "gridpure")
        return cut(self.model.encode(padded), pieces, side), pieces

    def _draw(self, images: Tensor, pieces: Sequence[Piece], generators: Sequence[torch.Generator]) -> TileDraws:
        """The next draws of each image's own generator, for all its tiles."""
        config, side = self.config, self.model.base_size
        count = pieces[-1].tile + 1
        own = count if config.t_sampling == "tile" else 1
        t = torch.stack([torch.randint(config.tp, (own,), generator=generator) for generator in generators])
        noise = normal(generators, (count, 3, side, side)).flatten(0, 1)
        shift = torch.zeros(len(images), 1, 2, dtype=torch.int64)
        if config.patch_shift:
            draws = [torch.randint(config.patch_size, (1, 2), generator=generator) for generator in generators]
            shift = torch.stack(draws)
        starts, patched = self._grid(pieces, shift)
        device = images.device
        return TileDraws(
            t=t.expand(-1, count).flatten().to(device),
            noise=noise.to(device),
            starts=starts.flatten(0, 1).to(device),
            patched=patched.repeat(len(images)).to(device),
        )

    def _grid(self, pieces: Sequence[Piece], shift: Tensor) -> tuple[Tensor, Tensor]:
        """Where one grid of patches over the whole image starts in every tile ``(B, K, 2)``, and which tiles have it.

        In the tile of corners the grid must go on across its seams: it does where all corners begin on a patch.
        """
        size, windows = self.config.patch_size, [piece for piece in pieces if piece.height == self.model.base_size]
        origins = [(piece.top, piece.left) for piece in windows]
        patched = [1.0] * len(windows)
        corners = [piece for piece in pieces if piece.height < self.model.base_size]
        if corners:
            whole = all(piece.top % size == 0 and piece.left % size == 0 for piece in corners)
            origins.append((0, 0))
            patched.append(float(whole and not self.config.patch_shift))
        return (shift - torch.tensor(origins)) % size, torch.tensor(patched)


# By device: a model can be moved.
_frequencies = lru_cache(maxsize=4)(PatchFrequencies)


def timestep_guidance(right: Tensor, wrong: Tensor, moved: Literal["both", "t", "t_err"] = "both") -> Tensor:
    """exp of minus the mean squared difference of the predictions at t and at t_err, ``(N,)`` in (0, 1]."""
    if moved == "t":
        wrong = wrong.detach()
    elif moved == "t_err":
        right = right.detach()
    return (-_mse(wrong, right)).exp()


def _mse(first: Tensor, second: Tensor) -> Tensor:
    return (first - second).square().flatten(1).mean(1)
