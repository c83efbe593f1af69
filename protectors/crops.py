"""Crops: other photos of a subject that can be had from one, for what must hold on photos that nobody gave."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from protectors.randomness import streams

# Smallest side of a window, as a share of the photo's.
_LOW = 0.65


def crops(images: Tensor, count: int) -> Tensor:
    """Square windows of 65 to 100 % of the side at random places, brought back to full size, every other one mirrored.

    Args:
        images: ``(N, 3, S, S)`` in [0, 1].
        count: of each image; number k of an image is the same window whatever else is asked for.

    Returns:
        ``(count N, 3, S, S)``: one of each image, then the next one of each.
    """
    side = images.shape[-1]
    generators = streams(range(count), "crops")
    found = []
    for number, generator in enumerate(generators):
        window = round(side * (_LOW + (1 - _LOW) * float(torch.rand((), generator=generator))))
        top, left = torch.randint(side - window + 1, (2,), generator=generator).tolist()
        part = images[..., top : top + window, left : left + window]
        whole = F.interpolate(part, (side, side), mode="bicubic", antialias=True).clamp(0, 1)
        found.append(whole.flip(-1) if number % 2 == 0 else whole)
    return torch.cat([images[:0], *found])
