"""SDS and SDST of Diff-Protect (Xue et al., ICLR 2024, https://arxiv.org/abs/2311.12832)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from protectors.base import Batch
from protectors.config import PgdConfig, require
from protectors.diffusion import DiffusionModel
from protectors.mist import pattern_latents
from protectors.objectives import Draws, draw, embed_prompts
from protectors.pgd import PgdPlan, Places, Plateau, Progress, pgd, start_of
from protectors.randomness import streams
from protectors.search import PgdProtector


@dataclass(frozen=True, slots=True, kw_only=True)
class SDSConfig(PgdConfig):
    """Fields of ``PgdConfig``, the direction, the target of SDST and the prompt."""

    # Published: it starts at the original.
    random_start: bool = False
    # "-" lowers the noise error, the published default, which looks smoother; "+" raises it.
    sign: Literal["+", "-"] = "-"
    # Weight of the squared distance to the target's latents, beside a weight of 1 on the score. 0 is SDS; the published
    # SDST weighs score to distance as 5 to 1: 0.2. Both are sums over latent elements, so the size does not matter.
    target_weight: float = 0.0
    # Side in pixels of one square of the target, as in Mist.
    cell: int = 4
    # Text for images that come without one.
    prompt: str = "a photo"

    def check(self) -> None:
        PgdConfig.check(self)
        require(self.target_weight >= 0, "target_weight", self.target_weight, "use 0 (no target) or more")
        require(self.cell >= 1, "cell", self.cell, "use 1 or more (pixels)")


class SDS(PgdProtector[SDSConfig, DiffusionModel]):
    """Follows the score distillation gradient, which needs no backward pass through the UNet.

    "Toward effective protection against diffusion-based mimicry through score distillation",
    https://arxiv.org/abs/2311.12832. With g = eps_theta(z_t, t, c) - n held constant, the images move along the sign of
    s grad <g, z(x)> - w grad || z(x) - z(y) ||^2, s = -1 or +1 by ``sign``; y is Mist's pattern and w the weight that
    turns SDS into SDST. v models are converted to epsilon first.

    Distance: l_inf, ``config.eps_levels`` 8-bit levels of the saved pixels.

    Args:
        config: ``SDSConfig``. The published 16 and 1, scaled by 2/255 on [-1, 1], are 16 levels and 1 level.
        model: ``DiffusionModel``.

    Shape: images ``(N, 3, H, W)`` float32 in [0, 1] sRGB, any H and W (padded inside to the model's stride);
        the output has the same shape.

    Returns:
        ``ProtectResult``; the objective is s mean g^2 / 2 - w mean (z - z_y)^2 over ``eval_draws`` fixed draws.

    Raises:
        ValueError: bad input or configuration. ModelError: the model is no ``DiffusionModel``.

    Cost: per step one encoder pass forward and backward, one UNet pass forward. Against AdvDM this saves a fifth of the
        arithmetic at SD's size and the memory of the UNet's graph.

    Differs from the paper: SDST goes through the encoder once for both terms; its target is a checkerboard; the result
        is rounded inside the budget, where the public code truncates and can exceed it by one level.
    """

    name = "sds"
    version = "1"
    config_type = SDSConfig
    model_type = DiffusionModel
    presets: ClassVar[Mapping[str, SDSConfig]] = {
        "paper": SDSConfig(eps_levels=16.0, step_levels=1.0, steps=100),
        "paper-sdst": SDSConfig(eps_levels=16.0, step_levels=1.0, steps=100, target_weight=0.2),
        "fast": SDSConfig(eps_levels=8.0, step_levels=1.0, steps=30),
        "strong": SDSConfig(eps_levels=16.0, step_levels=0.5, steps=300),
    }

    def _climb(self, batch: Batch, progress: Progress, plateau: Plateau | None) -> Tensor:
        generators = streams(batch.seeds, "sds/attack")
        embeddings = embed_prompts(self.model, batch, self.config.prompt)
        target = self._target(batch.originals)
        start = start_of(self.config, batch.originals, generators)

        def loss(images: Tensor, places: Places) -> Tensor:
            draws = draw(self.model, images, [generators[place] for place in places])
            latents = self.model.latents(self.model.encode_moments(images), draws.posterior)
            score = self._direction * noise_error(self.model, latents.detach(), embeddings[places], draws)
            # Its gradient by the latents is score - 2 w (z - z_y): one backward pass through the encoder for both.
            return self._less_distance(score * latents, latents, target).flatten(1).sum(1)

        plan = PgdPlan.of(self.config, ascend=True)
        return pgd(loss, batch.originals, plan, start=start, masks=batch.masks, progress=progress, plateau=plateau)

    def _objective(self, images: Tensor, batch: Batch) -> Tensor:
        generators = streams(batch.seeds, "sds/evaluation")
        embeddings = embed_prompts(self.model, batch, self.config.prompt)
        target = self._target(images)
        moments = self.model.encode_moments(images)
        values = []
        for _ in range(self.config.eval_draws):
            draws = draw(self.model, images, generators)
            latents = self.model.latents(moments, draws.posterior)
            error = noise_error(self.model, latents, embeddings, draws).square() / 2
            values.append(self._less_distance(self._direction * error, latents, target).flatten(1).mean(1))
        return torch.stack(values).mean(0)

    def _target(self, images: Tensor) -> Tensor | None:
        """Latents of the pattern, or None where their distance has no weight."""
        return pattern_latents(self.model, images, self.config.cell) if self.config.target_weight > 0 else None

    def _less_distance(self, values: Tensor, latents: Tensor, target: Tensor | None) -> Tensor:
        """Values per latent element, less the weighted squared distance to the target."""
        return values if target is None else values - self.config.target_weight * (latents - target).square()

    @property
    def _direction(self) -> float:
        return 1.0 if self.config.sign == "+" else -1.0


@torch.no_grad()
def noise_error(model: DiffusionModel, latents: Tensor, embeddings: Tensor, draws: Draws) -> Tensor:
    """eps_theta(z_t, t, c) - n, ``(B, C, h, w)`` without graph, also for models that predict v."""
    noisy = model.add_noise(latents, draws.noise, draws.t)
    prediction = model.predict(noisy, draws.t, embeddings)
    return model.schedule.predict_noise(noisy, prediction, draws.t) - draws.noise
