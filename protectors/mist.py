"""Mist, fused mode (Liang & Wu, https://arxiv.org/abs/2305.12683)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from protectors.base import Batch
from protectors.config import PgdConfig, require
from protectors.diffusion import DiffusionModel
from protectors.objectives import Draws, draw, embed_prompts, latent_denoising_loss
from protectors.pgd import PgdPlan, Places, Plateau, Progress, pgd, start_of
from protectors.randomness import streams
from protectors.search import PgdProtector


@dataclass(frozen=True, slots=True, kw_only=True)
class MistConfig(PgdConfig):
    """Fields of ``PgdConfig``, the weight of the denoising loss, the target's pattern and the prompt."""

    # lambda with both terms as means over latent elements. The published 10^4 is for a sum over 4 x 64 x 64
    # elements: 1e4 / 16384. A mean makes the balance independent of the image's size.
    denoising_weight: float = 0.61
    # Side in pixels of one square of the target, at any image size. Which pattern harms most depends on the encoder:
    # of the colours, stripes and checks that were tried on nano-sd, this one moved its latents furthest.
    cell: int = 4
    # Text for images that come without one.
    prompt: str = "a photo"

    def check(self) -> None:
        PgdConfig.check(self)
        require(self.denoising_weight >= 0, "denoising_weight", self.denoising_weight, "use 0 or more")
        require(self.cell >= 1, "cell", self.cell, "use 1 or more (pixels)")


class Mist(PgdProtector[MistConfig, DiffusionModel]):
    """Pulls the latents towards those of a loud pattern and at once raises the denoising loss.

    "Mist: Towards Improved Adversarial Examples for Diffusion Models", https://arxiv.org/abs/2305.12683, fused
    mode. J = mean (z(x) - z(y))^2 - lambda E over t, n of || eps_theta(z_t, t, c) - n ||^2, minimised; z(x)
    is a sample of the posterior, z(y) the mean of the pattern's, both scaled as the UNet sees them; lambda 0 is the
    "textural" mode.

    Distance: l_inf, ``config.eps_levels`` 8-bit levels of the saved pixels.

    Args:
        config: ``MistConfig``. The published 16 and 1, scaled by 2/255 on [-1, 1], are 16 levels and 1 level.
        model: ``DiffusionModel``.

    Shape: images ``(N, 3, H, W)`` float32 in [0, 1] sRGB, any H and W (padded inside to the model's stride);
        the output has the same shape.

    Returns:
        ``ProtectResult``; the objective is minus J, over ``eval_draws`` fixed draws.

    Raises:
        ValueError: bad input or configuration. ModelError: the model is no ``DiffusionModel``.

    Cost: per step one encoder and one UNet pass, forward and backward: both terms share the encoder's.

    Differs from the paper: means instead of sums (see ``MistConfig``); the target is a checkerboard; the whole image
        is attacked, where the public code crops 512 pixels.
    """

    name = "mist"
    version = "2"
    config_type = MistConfig
    model_type = DiffusionModel
    presets: ClassVar[Mapping[str, MistConfig]] = {
        "paper": MistConfig(eps_levels=16.0, step_levels=1.0, steps=100),
        "fast": MistConfig(eps_levels=8.0, step_levels=1.0, steps=30),
        "strong": MistConfig(eps_levels=16.0, step_levels=0.5, steps=300),
    }

    def _climb(self, batch: Batch, progress: Progress, plateau: Plateau | None) -> Tensor:
        generators = streams(batch.seeds, "mist/attack")
        embeddings = embed_prompts(self.model, batch, self.config.prompt)
        target = pattern_latents(self.model, batch.originals, self.config.cell)
        start = start_of(self.config, batch.originals, generators)

        def loss(images: Tensor, places: Places) -> Tensor:
            draws = draw(self.model, images, [generators[place] for place in places])
            return self._loss(self.model.encode_moments(images), target, embeddings[places], draws)

        plan = PgdPlan.of(self.config, ascend=False)
        return pgd(loss, batch.originals, plan, start=start, masks=batch.masks, progress=progress, plateau=plateau)

    def _objective(self, images: Tensor, batch: Batch) -> Tensor:
        generators = streams(batch.seeds, "mist/evaluation")
        embeddings = embed_prompts(self.model, batch, self.config.prompt)
        target = pattern_latents(self.model, images, self.config.cell)
        moments = self.model.encode_moments(images)
        losses = [
            self._loss(moments, target, embeddings, draw(self.model, images, generators))
            for _ in range(self.config.eval_draws)
        ]
        return -torch.stack(losses).mean(0)

    def _loss(self, moments: tuple[Tensor, Tensor], target: Tensor, embeddings: Tensor, draws: Draws) -> Tensor:
        latents = self.model.latents(moments, draws.posterior)
        textural = (latents - target).square().flatten(1).mean(1)
        if self.config.denoising_weight == 0:
            return textural
        semantic = latent_denoising_loss(self.model, latents, embeddings, draws)
        return textural - self.config.denoising_weight * semantic


@torch.no_grad()
def pattern_latents(model: DiffusionModel, images: Tensor, cell: int) -> Tensor:
    """Scaled mean latents ``(1, C, h, w)`` of the checkerboard at the images' size: where they are pulled to."""
    pattern = checkerboard(images.shape[-2], images.shape[-1], cell).to(images)
    return model.mean_latents(pattern)


def checkerboard(height: int, width: int, cell: int) -> Tensor:
    """Black and white squares ``(1, 3, H, W)`` in {0, 1} with a side of `cell` pixels."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return ((rows // cell + columns // cell) % 2).float().expand(1, 3, height, width)
