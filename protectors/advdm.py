"""AdvDM (Liang et al., ICML 2023, https://arxiv.org/abs/2302.04578)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from protectors.base import Batch
from protectors.config import PgdConfig
from protectors.diffusion import DiffusionModel
from protectors.objectives import denoising_loss, draw, embed_prompts, mean_denoising_loss
from protectors.pgd import PgdPlan, Places, Plateau, Progress, pgd, start_of
from protectors.randomness import streams
from protectors.search import PgdProtector


@dataclass(frozen=True, slots=True, kw_only=True)
class AdvDMConfig(PgdConfig):
    """Fields of ``PgdConfig`` and the direction."""

    # "+" raises the denoising loss as published; "-" lowers it (the variant of arXiv 2311.12832), which looks
    # smoother and makes the model paint flat images.
    sign: Literal["+", "-"] = "+"
    # Text for images that come without one. Short and generic: it stands for the attacker's unknown prompt.
    prompt: str = "a photo"


class AdvDM(PgdProtector[AdvDMConfig, DiffusionModel]):
    """Maximises the denoising loss of the image under a frozen diffusion model (minimises with sign "-").

    "Adversarial Example Does Good: Preventing Painting Imitation from Diffusion Models via Adversarial
    Examples", https://arxiv.org/abs/2302.04578. J = E over t, n of || eps_theta(z_t, t, c) - n ||^2, one draw
    of (t, n, posterior) per image and step; v-prediction models use v as target.

    Distance: l_inf, ``config.eps_levels`` 8-bit levels of the saved pixels.

    Args:
        config: ``AdvDMConfig``. The published 16 and 1, scaled by 2/255 on [-1, 1], are 16 levels and 1 level.
        model: ``DiffusionModel``.

    Shape: images ``(N, 3, H, W)`` float32 in [0, 1] sRGB, any H and W (padded inside to the model's stride);
        the output has the same shape.

    Returns:
        ``ProtectResult``; the objective is the mean loss over ``eval_draws`` fixed draws, negated for "-".

    Raises:
        ValueError: bad input or configuration. ModelError: the model is no ``DiffusionModel``.

    Cost: per step one encoder and one UNet pass, forward and backward, without weight gradients.

    Differs from the paper: the caller may give each image its own prompt; the result is rounded inside the
        budget, where the public code truncates and can exceed it by one level.
    """

    name = "advdm"
    version = "2"  # 2: plain attention on the CPU rounds in another way
    config_type = AdvDMConfig
    model_type = DiffusionModel
    presets: ClassVar[Mapping[str, AdvDMConfig]] = {
        "paper": AdvDMConfig(eps_levels=16.0, step_levels=1.0, steps=100),
        "fast": AdvDMConfig(eps_levels=8.0, step_levels=1.0, steps=30),
        "strong": AdvDMConfig(eps_levels=16.0, step_levels=0.5, steps=300),
    }

    def _climb(self, batch: Batch, progress: Progress, plateau: Plateau | None) -> Tensor:
        generators = streams(batch.seeds, "advdm/attack")
        embeddings = embed_prompts(self.model, batch, self.config.prompt)
        start = start_of(self.config, batch.originals, generators)

        def loss(images: Tensor, places: Places) -> Tensor:
            draws = draw(self.model, images, [generators[place] for place in places])
            return denoising_loss(self.model, images, embeddings[places], draws)

        plan = PgdPlan.of(self.config, ascend=self.config.sign == "+")
        return pgd(loss, batch.originals, plan, start=start, masks=batch.masks, progress=progress, plateau=plateau)

    def _objective(self, images: Tensor, batch: Batch) -> Tensor:
        generators = streams(batch.seeds, "advdm/evaluation")
        embeddings = embed_prompts(self.model, batch, self.config.prompt)
        mean = mean_denoising_loss(self.model, images, embeddings, generators, self.config.eval_draws)
        return mean if self.config.sign == "+" else -mean
