"""Sizes: how images are brought to a model's size and back."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def shrink_to(images: Tensor, side: int) -> Tensor:
    """Brings the shorter side of `(B, C, H, W)` down to `side` (antialiased bicubic); smaller ones stay as they are."""
    height, width = images.shape[-2:]
    short = min(height, width)
    if short <= side:
        return images
    return resize(images, max(side, round(height * side / short)), max(side, round(width * side / short)))


def resize(images: Tensor, height: int, width: int) -> Tensor:
    """Antialiased bicubic to a size, clipped to [0, 1] because bicubic overshoots."""
    if images.shape[-2:] == (height, width):
        return images
    return F.interpolate(images, (height, width), mode="bicubic", antialias=True).clamp(0, 1)
