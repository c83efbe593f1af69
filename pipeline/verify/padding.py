"""Mirroring at the border: how images of any size get the sides that models and filters need."""

from __future__ import annotations

import torch
from torch import Tensor


def pad_reflect(images: Tensor, height: int, width: int) -> Tensor:
    """Mirrors `(..., H, W)` at the right and lower border until it has at least this size.

    The border pixel is not repeated. Mirrors as often as needed, where torch's own padding stops after one.
    """
    rows = _mirror(images.shape[-2], max(height, images.shape[-2]), images.device)
    columns = _mirror(images.shape[-1], max(width, images.shape[-1]), images.device)
    return images[..., rows, :][..., columns]


def pad_to_multiple(images: Tensor, multiple: int) -> Tensor:
    """Mirrors `(..., H, W)` at the right and lower border until both sides are multiples of a number."""
    height, width = (-(-side // multiple) * multiple for side in images.shape[-2:])
    return pad_reflect(images, height, width)


def mirrored_border(images: Tensor, width: int) -> Tensor:
    """Mirrors `(..., H, W)` at all four borders by `width` pixels, however small the image is."""
    height, wide = images.shape[-2:]
    right = pad_reflect(images, height + width, wide + width)
    return pad_reflect(right.flip(-2, -1), height + 2 * width, wide + 2 * width).flip(-2, -1)


def _mirror(length: int, total: int, device: torch.device) -> Tensor:
    period = max(1, 2 * (length - 1))
    place = torch.arange(total, device=device) % period
    return torch.minimum(place, period - place) if length > 1 else place
