"""Arithmetic of the budget: the l_inf ball in 8-bit levels, rounding, and what was really used."""

from __future__ import annotations

import math

import torch
from torch import Tensor

LEVELS = 255  # one 8-bit level is 1/255 of the range [0, 1]


def project(images: Tensor, originals: Tensor, eps_levels: float) -> Tensor:
    """Moves images into the l_inf ball of ``eps_levels`` around the originals and into [0, 1].

    Shape: both ``(B, 3, H, W)`` float32 in units of [0, 1]; returns the same. NaN stays NaN.
    """
    eps = eps_levels / LEVELS
    return (originals + (images - originals).clamp(-eps, eps)).clamp(0, 1)


def to_levels(images: Tensor) -> Tensor:
    """Pixel values as a file would store them: whole numbers 0 to 255, still float32."""
    return (images * LEVELS).round().clamp(0, LEVELS)


def to_8bit(images: Tensor) -> Tensor:
    """Rounds images in [0, 1] to the nearest value that an 8-bit file can hold."""
    return to_levels(images) / LEVELS


def quantize(images: Tensor, originals: Tensor, eps_levels: float) -> Tensor:
    """Rounds to 8 bit so that no value is more than floor(eps_levels) away from the saved original.

    Rounding alone is not enough: a budget of 7.65 levels can round to a change of 8.
    """
    reference = to_levels(originals)
    whole = math.floor(eps_levels)
    change = (to_levels(images) - reference).clamp(-whole, whole)
    return (reference + change).clamp(0, LEVELS) / LEVELS


def linf_levels(images: Tensor, originals: Tensor) -> Tensor:
    """Largest change per image in 8-bit levels of the saved pixels; ``(B,)``, whole numbers."""
    return (to_levels(images) - to_levels(originals)).abs().flatten(1).amax(1)


def psnr_db(images: Tensor, originals: Tensor) -> Tensor:
    """Peak signal-to-noise ratio per image in dB, ``(B,)`` float64; infinite for equal images."""
    error = (images.double() - originals.double()).square().flatten(1).mean(1)
    return -10 * torch.log10(error)
