"""GrIDPure: many rounds of a little diffusion on overlapping tiles."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from pipeline.verify.attack_models import AttackModels, ModelKind
from pipeline.verify.purifiers.base import Purifier
from pipeline.verify.purifiers.ddpm import diffuse_and_denoise
from protectors.tiles import cut, join, pad_reflect, tile_pieces


@dataclass(frozen=True, kw_only=True)
class GrIDPure(Purifier):
    """Repeats a weak DiffPure on overlapping tiles of the full-size image (GrIDPure).

    Can Protective Perturbation Safeguard Personal Data from Being Exploited by Stable Diffusion?,
    https://arxiv.org/abs/2312.00084.

    Works at: the image's own size, in tiles of the model's side S at stride S / 2, the last flush with the border,
    and one tile of the four corners; each pixel is the mean over its tiles. Images below S are mirrored.
    Differs from the paper: nothing. From the released code: floats are kept between iterations, see `upstream`.
    """

    needs: ClassVar[ModelKind | None] = ModelKind.PIXEL

    # Timesteps of noise per iteration.
    t: int = 10
    iterations: int = 20
    # Share of the previous iteration's image that is kept.
    gamma: float = 0.1
    # Truncates to 8 bit after every iteration, as the released code does; darkens by half a level each time.
    upstream: bool = False

    @property
    def randomised(self) -> bool:
        return True

    def _purify(self, images: Tensor, generators: Sequence[torch.Generator], models: AttackModels) -> Tensor:
        pipeline = models.get(ModelKind.PIXEL)
        side = int(pipeline.unet.config.sample_size)
        current = pad_reflect(images, side, side).to(pipeline.device)
        height, width = current.shape[-2:]
        pieces = tile_pieces(height, width, side, corners=True)
        draws = [generator for generator in generators for _ in range(pieces[-1].tile + 1)]
        for _ in range(self.iterations):
            tiles = cut(current, pieces, side)
            clean = diffuse_and_denoise(pipeline, tiles.flatten(0, 1), self.t, draws)
            merged = join(clean.view(tiles.shape), pieces, height, width)
            current = (1 - self.gamma) * merged + self.gamma * current
            if self.upstream:
                current = (current * 255).floor() / 255
        return current[..., : images.shape[-2], : images.shape[-1]]
