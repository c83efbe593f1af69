"""Mirroring at the border: how images of any size get the sides that models and filters need."""

from __future__ import annotations

from torch import Tensor

from protectors.tiles import pad_reflect


def pad_to_multiple(images: Tensor, multiple: int) -> Tensor:
    """Mirrors `(..., H, W)` at the right and lower border until both sides are multiples of a number."""
    height, width = (-(-side // multiple) * multiple for side in images.shape[-2:])
    return pad_reflect(images, height, width)
