"""DiffPure, and its control that only changes the size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from pipeline.verify.attack_models import AttackModels, ModelKind
from pipeline.verify.purifiers.base import Purifier
from pipeline.verify.purifiers.ddpm import diffuse_and_denoise
from pipeline.verify.purifiers.geometry import resize, shrink_to
from protectors.tiles import cut, join, pad_reflect, tile_pieces


@dataclass(frozen=True, kw_only=True)
class DiffPure(Purifier):
    """Adds the noise of t timesteps at a pixel model's own size and denoises (DiffPure).

    Diffusion Models for Adversarial Purification, https://arxiv.org/abs/2205.07460, in its DDPM form.

    Works at: the shorter side brought down to the model's side, then tiles of that side at half a side's stride,
    averaged where they overlap; back to full size in the end. Smaller images are mirrored, not enlarged.
    With few `steps` this is the pixel-space SDEdit that stands in for PDM-Pure where its gated weights are absent.
    Differs from the paper: ancestral steps instead of an SDE solver; images longer than wide need tiles.
    """

    needs: ClassVar[ModelKind | None] = ModelKind.PIXEL

    # Timesteps of noise, of usually 1000; 10/50/100/150 are 5.6/22/43/66 levels on a linear schedule.
    t: int
    # Evenly spread timesteps that are really run; None runs all.
    steps: int | None = None

    @property
    def randomised(self) -> bool:
        return True

    def _purify(self, images: Tensor, generators: Sequence[torch.Generator], models: AttackModels) -> Tensor:
        pipeline = models.get(ModelKind.PIXEL)
        side = int(pipeline.unet.config.sample_size)
        small = shrink_to(images, side).to(pipeline.device)
        padded = pad_reflect(small, side, side)
        height, width = padded.shape[-2:]
        pieces = tile_pieces(height, width, side, corners=False)
        tiles = cut(padded, pieces, side)
        draws = [generator for generator in generators for _ in range(tiles.shape[1])]
        clean = diffuse_and_denoise(pipeline, tiles.flatten(0, 1), self.t, draws, steps=self.steps)
        joined = join(clean.view(tiles.shape), pieces, height, width)
        return resize(joined[..., : small.shape[-2], : small.shape[-1]], *images.shape[-2:])


@dataclass(frozen=True, kw_only=True)
class ResizeOnly(Purifier):
    """Down to a pixel model's size and back, nothing else: the control of DiffPure.

    What this removes, DiffPure's diffusion did not. Images that DiffPure would not shrink stay as they are.
    """

    needs: ClassVar[ModelKind | None] = ModelKind.PIXEL

    def _purify(self, images: Tensor, generators: Sequence[torch.Generator], models: AttackModels) -> Tensor:
        side = int(models.get(ModelKind.PIXEL).unet.config.sample_size)
        return resize(shrink_to(images, side), *images.shape[-2:])
