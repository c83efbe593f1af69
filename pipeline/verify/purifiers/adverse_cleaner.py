"""AdverseCleaner: smooths away what lies between a pixel and its look-alikes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.verify.attack_models import AttackModels
from pipeline.verify.purifiers.base import Purifier
from protectors.bilateral import bilateral
from protectors.tiles import pad_reflect


@dataclass(frozen=True, kw_only=True)
class AdverseCleaner(Purifier):
    """Many bilateral filters, then a few guided filters with the input as their guide (AdverseCleaner).

    https://github.com/lllyasviel/AdverseCleaner. The guide brings some of the perturbation back; with
    `guided_rounds=0` it is the bilateral filter alone. Works at full size, one image at a time.
    """

    bilateral_rounds: int = 64
    # Of the round window, in pixels.
    diameter: int = 5
    # Standard deviations: of the sum of the channels' absolute differences in levels, and of the distance in pixels.
    sigma_colour: float = 8.0
    sigma_space: float = 8.0
    guided_rounds: int = 4
    # Of the guided filter's square window, in pixels.
    radius: int = 4
    # What the guided filter takes for noise: a variance in squared levels.
    epsilon: float = 16.0

    def _purify(self, images: Tensor, generators: Sequence[torch.Generator], models: AttackModels) -> Tensor:
        return torch.cat([self._clean(image) for image in torch.split(images * 255, 1)]) / 255

    def _clean(self, image: Tensor) -> Tensor:
        from kornia.filters import guided_blur

        height, width = image.shape[-2:]
        # The guided filter cannot mirror more than the image has.
        guide = pad_reflect(image, self.radius + 1, self.radius + 1)
        current = guide
        for _ in range(self.bilateral_rounds):
            current = bilateral(current, self.diameter, self.sigma_colour, self.sigma_space)
        for _ in range(self.guided_rounds):
            current = guided_blur(guide, current, 2 * self.radius + 1, self.epsilon, separable=True)
        return current[..., :height, :width].clamp(0, 255)
