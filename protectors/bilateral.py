"""The bilateral filter: smooths between edges and leaves them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from protectors.tiles import mirrored_border


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
            total = total + weight * shifted
            weights = weights + weight
    return total / weights
