"""AdverseCleaner: smooths away what lies between a pixel and its look-alikes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.verify.attack_models import AttackModels
from pipeline.verify.padding import mirrored_border
from pipeline.verify.purifiers.base import Purifier
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


def bilateral(images: Tensor, diameter: int, sigma_colour: float, sigma_space: float) -> Tensor:
    """The mean over a round window, weighted by nearness in place and colour (Tomasi and Manduchi 1998).

    Colour distance is the sum of the channels' absolute differences and the window is round, as in OpenCV, for whose
    filter the parameters were published; kornia's is square, and its corners would double the window.

    Args:
        images: `(B, C, H, W)` on the scale of `sigma_colour`; mirrored at the border.
        diameter: of the window, in pixels, odd.
        sigma_colour: standard deviation of the colour distance.
        sigma_space: standard deviation of the distance in pixels.
    """
    height, width = images.shape[-2:]
    radius = diameter // 2
    padded = mirrored_border(images, radius)
    total, weights = images.clone(), torch.ones_like(images[:, :1])  # the middle pixel has weight 1
    for down in range(-radius, radius + 1):
        for right in range(-radius, radius + 1):
            distance = math.hypot(down, right)
            if not 0 < distance <= radius:
                continue
            top, left = radius + down, radius + right
            shifted = padded[..., top : top + height, left : left + width]
            colour = (shifted - images).abs().sum(1, keepdim=True)
            weight = torch.exp(-0.5 * ((colour / sigma_colour).square() + (distance / sigma_space) ** 2))
            total += weight * shifted
            weights += weight
    return total / weights
