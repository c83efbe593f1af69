"""Expectation over transforms: random, differentiable image processing between the perturbation and the loss.

A perturbation that is optimised through these transforms keeps more of its effect when an image is resized or
compressed (Athalye et al., "Synthesizing Robust Adversarial Examples", https://arxiv.org/abs/1707.07397, section 2).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from protectors.config import require
from protectors.constraints import LEVELS

# Smallest and largest standard deviation of the blur in pixels, and the best JPEG quality.
_BLUR_SIGMAS = (0.1, 2.0)
_JPEG_HIGH = 95

Transform = Callable[[Tensor], Tensor]
"""Images ``(B, 3, H, W)`` in [0, 1] -> the same shape and range, with gradient."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Transforms:
    """A distribution of transforms; every one of them is off by default, and the default is the identity.

    A method's configuration has fields of the same names for those that it offers, and builds this object in its
    ``check``, so that values which cannot work are refused early.

    Raises:
        ValueError: a value is out of range; the message names the field.
    """

    # Probability that an image gets each of the transforms that are on, drawn for each apart; ``flip`` has its own.
    # Below 1 the mixture holds gentle cases too, the untouched image among them.
    chance: float = 1.0
    # Mirrors left and right in half of the draws.
    flip: bool = False
    # Smallest factor of a change of size and back, drawn up to 1; 1 is off.
    resize_low: float = 1.0
    # Window of a Gaussian blur in pixels, odd; 0 is off. The standard deviation is drawn from 0.1 to 2 pixels.
    blur_size: int = 0
    # Largest standard deviation of Gaussian noise in 8-bit levels, drawn from 0; 0 is off.
    noise_levels: float = 0.0
    # Smallest JPEG quality on libjpeg's scale, drawn up to 95, with 4:2:0 chroma; None is off.
    jpeg_low: int | None = None

    def __post_init__(self) -> None:
        require(0 <= self.chance <= 1, "chance", self.chance, "use 0 to 1")
        require(0.1 <= self.resize_low <= 1, "resize_low", self.resize_low, "use 0.1 to 1 (off)")
        odd = self.blur_size == 0 or self.blur_size % 2 == 1
        require(odd and self.blur_size >= 0, "blur_size", self.blur_size, "use 0 (off) or an odd number of pixels")
        require(self.noise_levels >= 0, "noise_levels", self.noise_levels, "use 0 (off) or more (8-bit levels)")
        low = 1 if self.jpeg_low is None else self.jpeg_low
        require(1 <= low <= _JPEG_HIGH, "jpeg_low", self.jpeg_low, f"use 1 to {_JPEG_HIGH}, or null (off)")

    def draw(self, images: Tensor, generators: Sequence[torch.Generator]) -> Transform:
        """The next transform of each image's own generator; only the shape of `images` counts.

        Returns:
            A function that may be called repeatedly and does the same each time. Images go through it one by one:
            kernels round differently at other batch sizes.
        """
        size = (int(images.shape[-2]), int(images.shape[-1]))
        chains = [self._chain(size, generator) for generator in generators]

        def transform(pictures: Tensor) -> Tensor:
            pairs = zip(torch.split(pictures, 1), chains, strict=True)
            return torch.cat([_apply(picture, chain) for picture, chain in pairs])

        return transform

    def _chain(self, size: tuple[int, int], generator: torch.Generator) -> list[Transform]:
        """One image's transforms in the order in which pictures meet them: edited, resized, then compressed."""
        chain: list[Transform] = []
        if self.flip and _between(0, 1, generator) < 0.5:
            chain.append(partial(torch.flip, dims=(-1,)))
        if self.resize_low < 1 and self._taken(generator):
            chain.append(partial(resample, factor=_between(self.resize_low, 1, generator)))
        if self.blur_size > 0 and self._taken(generator):
            chain.append(partial(blur, size=self.blur_size, sigma=_between(*_BLUR_SIGMAS, generator)))
        if self.noise_levels > 0 and self._taken(generator):
            spread = _between(0, self.noise_levels, generator) / LEVELS
            chain.append(partial(_add, noise=spread * torch.randn((3, *size), generator=generator)))
        if self.jpeg_low is not None and self._taken(generator):
            quality = int(torch.randint(self.jpeg_low, _JPEG_HIGH + 1, (), generator=generator))
            chain.append(partial(jpeg, quality=quality))
        return chain

    def _taken(self, generator: torch.Generator) -> bool:
        return _between(0, 1, generator) < self.chance


def resample(images: Tensor, factor: float) -> Tensor:
    """To this share of the size and back: bicubic, antialiased on the way down."""
    height, width = images.shape[-2:]
    small = max(1, int(height * factor)), max(1, int(width * factor))
    return _resize(_resize(images, small), (height, width))


def blur(images: Tensor, size: int, sigma: float) -> Tensor:
    """Gaussian blur with a window of `size` pixels and standard deviation `sigma`; border pixels are repeated."""
    from kornia.filters import gaussian_blur2d  # costs a second to import, and few methods blur

    # Not mirrored: that needs an image larger than half the window.
    blurred: Tensor = gaussian_blur2d(images, (size, size), (sigma, sigma), border_type="replicate")
    return blurred


def jpeg(images: Tensor, quality: int) -> Tensor:
    """What JPEG keeps at this quality, 1 to 100, with 4:2:0 chroma; any size.

    kornia's codec rounds coefficients by a cubic whose gradient is near zero for those that JPEG drops (Shin & Song,
    "JPEG-resistant Adversarial Images", 2017), so the perturbation moves to those that survive.
    """
    from kornia.enhance import jpeg_codec_differentiable

    decoded: Tensor = jpeg_codec_differentiable(images, torch.tensor([float(quality)], device=images.device))
    return decoded


def _apply(image: Tensor, chain: Sequence[Transform]) -> Tensor:
    for transform in chain:
        # A picture file holds no values outside [0, 1], and bicubic filters overshoot.
        image = transform(image).clamp(0, 1)
    return image


def _add(images: Tensor, noise: Tensor) -> Tensor:
    return images + noise.to(images.device)


def _resize(images: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(images, size, mode="bicubic", antialias=True)


def _between(low: float, high: float, generator: torch.Generator) -> float:
    return low + (high - low) * float(torch.rand((), generator=generator))
