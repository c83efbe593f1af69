"""PhotoGuard, encoder attack (Salman et al., ICML 2023, https://arxiv.org/abs/2302.06588)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from protectors.base import Batch
from protectors.config import LATE, PgdConfig, ScheduleName
from protectors.diffusion import DiffusionModel
from protectors.objectives import encoder_distance
from protectors.pgd import PgdPlan, Plateau, Progress, pgd, start_of
from protectors.randomness import streams
from protectors.search import PgdProtector


@dataclass(frozen=True, slots=True, kw_only=True)
class PhotoGuardConfig(PgdConfig):
    """Fields of ``PgdConfig``. The objective has no random draws, so ``eval_draws`` changes nothing here."""

    # Published: in a line from step_levels down to 1 % of it.
    schedule: ScheduleName = field(default="linear", metadata=LATE)


class PhotoGuard(PgdProtector[PhotoGuardConfig, DiffusionModel]):
    """Minimises the norm of the latent mean, so that editors and trainers see an image of nothing.

    "Raising the Cost of Malicious AI-Powered Image Editing", https://arxiv.org/abs/2302.06588; the encoder
    attack with target latent zero: min over d of || mu(x0 + d) ||_2.

    Distance: l_inf, ``config.eps_levels`` 8-bit levels of the saved pixels.

    Args:
        config: ``PhotoGuardConfig``. The published 0.06 and 0.02 on [-1, 1] are 7.65 and 2.55 levels
            (times 127.5); a saved file then changes by 7 levels at most.
        model: ``DiffusionModel``; only its VAE encoder is used.

    Shape: images ``(N, 3, H, W)`` float32 in [0, 1] sRGB, any H and W (padded inside to the model's stride);
        the output has the same shape.

    Returns:
        ``ProtectResult``; the objective is minus the norm. Prompts are ignored.

    Raises:
        ValueError: bad input or configuration. ModelError: the model is no ``DiffusionModel``.

    Cost: per step one encoder pass forward and backward; no UNet, no text encoder.

    Differs from the paper: pixels outside a mask keep the original (the public notebook blanks them); no
        target image (the inpainting notebook's variant); no diffusion attack; the result is clamped to whole
        levels inside the budget, where the public code may round 7.65 up to 8.
    """

    name = "photoguard"
    version = "1"
    config_type = PhotoGuardConfig
    model_type = DiffusionModel
    presets: ClassVar[Mapping[str, PhotoGuardConfig]] = {
        "paper": PhotoGuardConfig(eps_levels=7.65, step_levels=2.55, steps=1000),
        "fast": PhotoGuardConfig(eps_levels=8.0, step_levels=2.0, steps=40),
        "strong": PhotoGuardConfig(eps_levels=16.0, step_levels=2.0, steps=300),
    }

    def _climb(self, batch: Batch, progress: Progress, plateau: Plateau | None) -> Tensor:
        start = start_of(self.config, batch.originals, streams(batch.seeds, "photoguard/attack"))
        return pgd(
            lambda images, _: encoder_distance(self.model, images),
            batch.originals,
            PgdPlan.of(self.config, ascend=False),
            start=start,
            masks=batch.masks,
            progress=progress,
            plateau=plateau,
        )

    def _objective(self, images: Tensor, batch: Batch) -> Tensor:
        return -encoder_distance(self.model, images)
