"""Losses over squared errors of the denoiser, element by element: what model protectors ascend and descend."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from protectors.diffusion import DiffusionModel
from protectors.objectives import Draws

Reduction = Literal["element", "sample_mean", "sample_sum"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PairErrors:
    """Squared errors ``(B, C, h, w)`` of one network on pairs, both sides at the same t and noise."""

    positive: Tensor
    """On what shall stay well denoised."""
    negative: Tensor
    """On what shall become badly denoised."""


def squared_error(model: DiffusionModel, latents: Tensor, embeddings: Tensor, draws: Draws) -> Tensor:
    """(prediction - target)^2, ``(B, C, h, w)`` float32; ``draws.posterior`` is not used."""
    noisy = model.add_noise(latents, draws.noise, draws.t)
    error = model.predict(noisy, draws.t, embeddings) - model.target(latents, draws.noise, draws.t)
    return error.square()


def preference_margin(trained: PairErrors, reference: PairErrors) -> Tensor:
    """r+ - r-, ``(B, C, h, w)``: how much more the positive's error has risen since the reference than the negative's.

    Below zero the positive is preferred.
    """
    return (trained.positive - reference.positive) - (trained.negative - reference.negative)


def dpo_loss(margin: Tensor, *, beta: float, reduction: Reduction) -> Tensor:
    """-log sigmoid(-beta (r+ - r-)), one number: log 2 at the reference, always above 0.

    Diffusion-DPO (Wallace et al., CVPR 2024, https://arxiv.org/abs/2311.12908) has the squared norm inside of the
    sigmoid; APDM's released code takes the sigmoid of every element. A beta means nothing without its reduction.

    Args:
        margin: of ``preference_margin``.
        beta: above 0; how soon a pair counts as won.
        reduction: what is inside of the sigmoid: each "element", or the "sample_mean" or "sample_sum" of a pair.
    """
    if reduction != "element":
        rows = margin.flatten(1)
        margin = rows.mean(1) if reduction == "sample_mean" else rows.sum(1)
    return -F.logsigmoid(-beta * margin).mean()
