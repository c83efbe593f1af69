"""Mist, fused mode (Liang & Wu, https://arxiv.org/abs/2305.12683)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from protectors.base import Batch, ImageProtector
from protectors.config import PgdConfig, require
from protectors.diffusion import DiffusionModel
from protectors.objectives import Draws, draw, latent_denoising_loss
from protectors.pgd import PgdPlan, Progress, pgd, uniform_start
from protectors.randomness import streams


@dataclass(frozen=True, slots=True, kw_only=True)
class MistConfig(PgdConfig):
    """Fields of ``PgdConfig``, the weight of the denoising loss, the target's pattern and the prompt."""

    # lambda with both terms as means over latent elements. The published 10^4 is for a sum over 4 x 64 x 64
    # elements: 1e4 / 16384. A mean makes the balance independent of the image's size.
    denoising_weight: float = 0.61
    # Width in pixels of one stripe of the target, at any image size.
    stripe: int = 8
    # Red, green and blue in [0, 1] of a plain target in place of the stripes. Which target harms most depends on the
    # encoder: the paper searched for its own on Stable Diffusion's.
    target_rgb: tuple[float, ...] | None = None
    # Text for images that come without one.
    prompt: str = "a photo"

    def check(self) -> None:
        PgdConfig.check(self)
        require(self.denoising_weight >= 0, "denoising_weight", self.denoising_weight, "use 0 or more")
        require(self.stripe >= 1, "stripe", self.stripe, "use 1 or more (pixels)")
        rgb = self.target_rgb or (0.0, 0.0, 0.0)
        require(len(rgb) == 3 and all(0 <= part <= 1 for part in rgb), "target_rgb", rgb, "use three of 0 to 1")


class Mist(ImageProtector[MistConfig, DiffusionModel]):
    """Pulls the latents towards those of a loud pattern and at once raises the denoising loss.

    "Mist: Towards Improved Adversarial Examples for Diffusion Models", https://arxiv.org/abs/2305.12683, fused
    mode. J = mean (z(x) - z(y))^2 - lambda E over t, n of || eps_theta(z_t, t, c) - n ||^2, minimised; z are
    posterior samples, scaled as the UNet sees them; lambda 0 is the "textural" mode.

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

    Differs from the paper: means instead of sums (see ``MistConfig``); the target is a pattern of diagonal
        stripes of our own, or a plain colour; the whole image is attacked, where the public code crops 512 pixels.
    """

    name = "mist"
    version = "1"
    config_type = MistConfig
    model_type = DiffusionModel
    presets: ClassVar[Mapping[str, MistConfig]] = {
        "paper": MistConfig(eps_levels=16.0, step_levels=1.0, steps=100),
        "fast": MistConfig(eps_levels=8.0, step_levels=1.0, steps=30),
        "strong": MistConfig(eps_levels=16.0, step_levels=0.5, steps=300),
    }

    @property
    def steps(self) -> int:
        return self.config.steps

    def _perturb(self, batch: Batch, progress: Progress | None) -> Tensor:
        generators = streams(batch.seeds, "mist/attack")
        embeddings, target = self._embed(batch), self._target(batch.originals)
        start = None
        if self.config.random_start:
            start = uniform_start(batch.originals, self.config.eps_levels, generators)

        def loss(images: Tensor, step: int) -> Tensor:
            draws = draw(self.model, images, generators)
            return self._loss(self.model.encode_moments(images), target, embeddings, draws)

        plan = PgdPlan(
            eps_levels=self.config.eps_levels,
            step_levels=self.config.step_levels,
            steps=self.config.steps,
            ascend=False,
        )
        return pgd(loss, batch.originals, plan, start=start, masks=batch.masks, progress=progress)

    def _objective(self, images: Tensor, batch: Batch) -> Tensor:
        generators = streams(batch.seeds, "mist/evaluation")
        embeddings, target = self._embed(batch), self._target(images)
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
    def _target(self, images: Tensor) -> Tensor:
        """Scaled mean latents ``(1, C, h, w)`` of the pattern at the images' size."""
        height, width = images.shape[-2:]
        if self.config.target_rgb is None:
            pattern = stripes(height, width, self.config.stripe).to(images)
        else:
            pattern = images.new_tensor(self.config.target_rgb).view(1, 3, 1, 1).expand(1, 3, height, width)
        mean, logvar = self.model.encode_moments(pattern)
        return self.model.latents((mean, logvar), torch.zeros_like(mean))

    def _embed(self, batch: Batch) -> Tensor:
        return self.model.embed_prompts(batch.prompts or (self.config.prompt,) * len(batch.seeds))


def stripes(height: int, width: int, stripe: int) -> Tensor:
    """Diagonal black and white stripes ``(1, 3, H, W)`` in {0, 1}, `stripe` pixels wide along a row."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return ((rows + columns) // stripe % 2).float().expand(1, 3, height, width)
