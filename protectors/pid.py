"""PID (Li et al., ICML 2024, https://arxiv.org/abs/2406.15305)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from protectors.base import Batch
from protectors.config import PgdConfig, require
from protectors.diffusion import DiffusionModel
from protectors.pgd import PgdPlan, Places, Plateau, Progress, pgd, uniform_start
from protectors.randomness import streams
from protectors.search import PgdProtector

Posterior = tuple[Tensor, Tensor]
"""Unscaled mean and log variance ``(B, C, h, w)``."""
PidTarget = Literal["add-log", "mean", "var", "kl"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PIDConfig(PgdConfig):
    """Fields of ``PgdConfig`` and what of the posterior is moved.

    The objective has no random draws, so ``eval_draws`` changes nothing here.
    """

    # "add-log": mean and log variance, the published one; "mean" and "var" (its standard deviation) move one of them;
    # "kl": the divergence of the image's posterior from the original's.
    target: PidTarget = "add-log"

    def check(self) -> None:
        PgdConfig.check(self)
        # Every target has its minimum, and so no gradient, at the original.
        require(self.random_start, "random_start", self.random_start, "use true: at the original the gradient is zero")


class PID(PgdProtector[PIDConfig, DiffusionModel]):
    """Maximises the distance of the latent posterior from the original's, whatever the prompt.

    "PID: Prompt-Independent Data Protection Against Latent Diffusion Models", https://arxiv.org/abs/2406.15305.
    J = mean (mu(x) - mu(x0))^2 + mean (logvar(x) - logvar(x0))^2, means over latent elements, mu not scaled.

    Distance: l_inf, ``config.eps_levels`` 8-bit levels of the saved pixels.

    Args:
        config: ``PIDConfig``. The published 12.75 and 1 are levels already; a saved file changes by 12 at most.
        model: ``DiffusionModel``; only its VAE encoder is used.

    Shape: images ``(N, 3, H, W)`` float32 in [0, 1] sRGB, any H and W (padded inside to the model's stride);
        the output has the same shape.

    Returns:
        ``ProtectResult``; the objective is J, 0 at the original. Prompts are ignored.

    Raises:
        ValueError: bad input or configuration, a start at the original among it. ModelError: the model is no
            ``DiffusionModel``.

    Cost: per step one encoder pass forward and backward; no UNet, no text encoder. The original is encoded once for
        all steps, and once for every measurement of J.

    Differs from the paper: no random crop; the public code's other targets, a sample of the posterior ("sampled") and
        mean plus log variance ("add"), are left out; the result is rounded inside the budget, where the public code
        truncates and can exceed it. diffusers clamps logvar to -30..20, and what is clamped gives no gradient.
    """

    name = "pid"
    version = "1"
    config_type = PIDConfig
    model_type = DiffusionModel
    presets: ClassVar[Mapping[str, PIDConfig]] = {
        "paper": PIDConfig(eps_levels=12.75, step_levels=1.0, steps=1000),
        "fast": PIDConfig(eps_levels=8.0, step_levels=1.0, steps=40),
        "strong": PIDConfig(eps_levels=16.0, step_levels=1.0, steps=300),
    }

    def _climb(self, batch: Batch, progress: Progress, plateau: Plateau | None) -> Tensor:
        generators = streams(batch.seeds, "pid/attack")
        mean, logvar = self._clean(batch)

        def loss(images: Tensor, places: Places) -> Tensor:
            clean = mean[places], logvar[places]
            return posterior_distance(self.model.encode_moments(images), clean, self.config.target)

        return pgd(
            loss,
            batch.originals,
            PgdPlan.of(self.config, ascend=True),
            start=uniform_start(batch.originals, self.config.eps_levels, generators),
            masks=batch.masks,
            progress=progress,
            plateau=plateau,
        )

    def _objective(self, images: Tensor, batch: Batch) -> Tensor:
        return posterior_distance(self.model.encode_moments(images), self._clean(batch), self.config.target)

    @torch.no_grad()
    def _clean(self, batch: Batch) -> Posterior:
        return self.model.encode_moments(batch.originals)


def posterior_distance(moved: Posterior, clean: Posterior, target: PidTarget) -> Tensor:
    """How far one posterior is from the other, per image ``(B,)``: a mean over latent elements."""
    (mean, logvar), (clean_mean, clean_logvar) = moved, clean
    means, logvars = (mean - clean_mean).square(), (logvar - clean_logvar).square()
    match target:
        case "add-log":
            distance = means + logvars
        case "mean":
            distance = means
        case "var":
            distance = ((logvar / 2).exp() - (clean_logvar / 2).exp()).square()
        case "kl":
            ratio = logvar - clean_logvar
            distance = (means / clean_logvar.exp() + ratio.exp() - 1 - ratio) / 2
    return distance.flatten(1).mean(1)
