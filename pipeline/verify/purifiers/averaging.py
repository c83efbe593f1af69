"""Residual averaging: finds a pattern that many protected images, or copies of one, have in common.

No Purifier: what it does to an image depends on the whole set, which that contract forbids.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

PERIODS = (4, 8, 16, 32, 64)
"""What is tried: strides of autoencoders and UNets, and sides of small tiles, in pixels."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pattern:
    """What the residuals of a set of images repeat with one period."""

    # `(3, p, p)` float32, in 8-bit levels.
    tile: Tensor
    # Mean square of the tile in squared levels; compare with the one of clean images.
    folded_energy: float
    # How much of the tile the images that it was not estimated from hold: 1 if it is common to all, 0 if it is chance.
    strength: float

    @property
    def period(self) -> int:
        """Of the pattern, in pixels."""
        return int(self.tile.shape[-1])


def average_residual(images: Sequence[Tensor], period: int) -> Pattern:
    """Folds the residuals r = x - median3(x) of half of the images over a period; fits the strength on the others.

    The tile estimate of the specification: P[a, b] is the mean over images and all positions congruent to (a, b);
    its strength is the least-squares beta of r = beta P.

    Args:
        images: at least two, uint8 `(3, H, W)`, each at least `period` on either side; sizes may differ.
        period: in pixels.

    Raises:
        ValueError: fewer than two images, one of a wrong type, or one smaller than the period.
    """
    if len(images) < 2:
        raise ValueError("one image has no other to fit the strength on: give at least two")
    for image in images:
        if image.dtype != torch.uint8 or image.ndim != 3 or image.shape[0] != 3 or min(image.shape[1:]) < period:
            raise ValueError(
                f"images must be uint8 (3, H, W), sides at least {period}, not {image.dtype} {tuple(image.shape)}"
            )
    tile = _mean_tile(images[::2], period)
    energy = float(tile.square().mean())
    common = float((tile * _mean_tile(images[1::2], period)).mean())
    return Pattern(tile=tile, folded_energy=energy, strength=common / energy if energy > 0 else 0.0)


def subtract(image: Tensor, pattern: Pattern, *, bound: float) -> Tensor:
    """Takes strength times the pattern off an image, at most `bound` levels anywhere.

    Args:
        image: uint8 `(3, H, W)`, with the pattern's origin at its upper left.
        pattern: of `average_residual`.
        bound: the protection's budget, or a guess of it, in levels.
    """
    height, width = image.shape[-2:]
    rows, columns = (-(-side // pattern.period) for side in (height, width))
    correction = (pattern.strength * pattern.tile).clamp(-bound, bound).repeat(1, rows, columns)[:, :height, :width]
    return (image.float() - correction).round().clamp(0, 255).to(torch.uint8)


def average_copies(copies: Sequence[Tensor]) -> Tensor:
    """The mean of independently protected copies of one image, which leaves what their perturbations share.

    Args:
        copies: uint8 `(3, H, W)`, already of one size and aligned.

    Raises:
        ValueError: there are none, or their shapes differ.
    """
    if not copies or any(copy.shape != copies[0].shape for copy in copies):
        raise ValueError("copies must be at least one image, all of one size: align them first")
    return torch.stack(list(copies)).float().mean(0).round().to(torch.uint8)


def _mean_tile(images: Sequence[Tensor], period: int) -> Tensor:
    return torch.stack([_fold(residual(image), period) for image in images]).mean(0)


def _fold(values: Tensor, period: int) -> Tensor:
    rows, columns = (side // period for side in values.shape[-2:])
    whole = values[:, : rows * period, : columns * period]
    tile = whole.reshape(3, rows, period, columns, period).mean((1, 3))
    return tile - tile.mean((1, 2), keepdim=True)


def residual(image: Tensor) -> Tensor:
    """x - median3(x), per channel, in levels: `(3, H, W)` float32 of an image uint8 `(3, H, W)`."""
    from kornia.filters import median_blur

    values = image.float()[None]
    smooth: Tensor = median_blur(values, 3)
    return (values - smooth)[0]
