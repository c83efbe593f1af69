"""Plain image processing that anybody can do without a model."""

from __future__ import annotations

import io
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter
from torch import Tensor

from pipeline.verify.attack_models import AttackModels
from pipeline.verify.purifiers.base import Purifier
from protectors.randomness import normal
from protectors.tiles import mirrored_border


class Resampling(StrEnum):
    """Pillow's filter for a change of size."""

    BICUBIC = "bicubic"
    LANCZOS = "lanczos"


class PictureTransform(Purifier):
    """What Pillow does to one 8-bit picture, for every picture of a batch."""

    def _purify(self, images: Tensor, generators: Sequence[torch.Generator], models: AttackModels) -> Tensor:
        pixels = (images * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
        changed = np.stack([np.asarray(self.change(Image.fromarray(picture))) for picture in pixels])
        return torch.from_numpy(changed).permute(0, 3, 1, 2).float() / 255

    @abstractmethod
    def change(self, picture: Image.Image) -> Image.Image:
        """The changed RGB picture, of the same size."""


@dataclass(frozen=True, kw_only=True)
class Jpeg(PictureTransform):
    """JPEG with 4:2:0 chroma subsampling, decoded again."""

    # Pillow's scale, 1 to 95; of libjpeg.
    quality: int

    def change(self, picture: Image.Image) -> Image.Image:
        file = io.BytesIO()
        picture.save(file, "JPEG", quality=self.quality, subsampling="4:2:0")
        return Image.open(file).convert("RGB")


@dataclass(frozen=True, kw_only=True)
class Resample(PictureTransform):
    """To a share of the size and back, through an 8-bit picture."""

    factor: float
    resampling: Resampling

    def change(self, picture: Image.Image) -> Image.Image:
        kernel = Image.Resampling[self.resampling.name]
        small = (max(1, int(picture.width * self.factor)), max(1, int(picture.height * self.factor)))
        return picture.resize(small, kernel).resize(picture.size, kernel)


@dataclass(frozen=True, kw_only=True)
class Chain(PictureTransform):
    """JPEG, then half the size and back (Lanczos).

    In every suite, because it is reported to undo protections that survive each step alone (arXiv 2604.23688, second
    hand).
    """

    quality: int = 75

    def change(self, picture: Image.Image) -> Image.Image:
        halved = Resample(factor=0.5, resampling=Resampling.LANCZOS)
        return halved.change(Jpeg(quality=self.quality).change(picture))


@dataclass(frozen=True, kw_only=True)
class CropAndResize(PictureTransform):
    """Cuts the border off and enlarges what is left to the old size (Lanczos)."""

    # Of each side's length, half of it at either end; at least one pixel stays.
    share: float = 0.1

    def change(self, picture: Image.Image) -> Image.Image:
        left, top = (min((side - 1) // 2, round(side * self.share / 2)) for side in picture.size)
        box = (left, top, picture.width - left, picture.height - top)
        return picture.resize(picture.size, Image.Resampling.LANCZOS, box=box)


@dataclass(frozen=True, kw_only=True)
class Median(PictureTransform):
    """Median of a square window, each channel by itself."""

    # Odd, in pixels.
    size: int = 3

    def change(self, picture: Image.Image) -> Image.Image:
        return picture.filter(ImageFilter.MedianFilter(self.size))


@dataclass(frozen=True, kw_only=True)
class GaussianBlur(Purifier):
    """Gaussian blur with a window of limited size, mirrored at the border."""

    # Odd, in pixels.
    size: int
    # Standard deviation in pixels.
    sigma: float

    def _purify(self, images: Tensor, generators: Sequence[torch.Generator], models: AttackModels) -> Tensor:
        reach = self.size // 2
        weights = torch.exp(-0.5 * (torch.arange(-reach, reach + 1) / self.sigma) ** 2)
        weights = (weights / weights.sum()).expand(3, 1, 1, -1)
        # One image at a time: convolutions of other batch sizes round differently.
        blurred = []
        for image in torch.split(mirrored_border(images, reach), 1):
            across = F.conv2d(image, weights, groups=3)
            blurred.append(F.conv2d(across, weights.transpose(2, 3), groups=3))
        return torch.cat(blurred)


@dataclass(frozen=True, kw_only=True)
class Shift(Purifier):
    """Moves the image to the lower right by whole pixels; the border pixels are repeated."""

    pixels: int = 1

    def _purify(self, images: Tensor, generators: Sequence[torch.Generator], models: AttackModels) -> Tensor:
        height, width = images.shape[-2:]
        return F.pad(images, (self.pixels, 0, self.pixels, 0), mode="replicate")[..., :height, :width]


@dataclass(frozen=True, kw_only=True)
class Noise(Purifier):
    """Adds Gaussian noise, independent in every pixel and channel."""

    # Standard deviation of images in [0, 1].
    sigma: float = 0.05

    @property
    def randomised(self) -> bool:
        return True

    def _purify(self, images: Tensor, generators: Sequence[torch.Generator], models: AttackModels) -> Tensor:
        return images + self.sigma * normal(generators, images.shape[1:])


@dataclass(frozen=True, kw_only=True)
class BitDepth(Purifier):
    """Rounds every channel to fewer, evenly spaced values, black and white included."""

    bits: int

    def _purify(self, images: Tensor, generators: Sequence[torch.Generator], models: AttackModels) -> Tensor:
        highest = (1 << self.bits) - 1
        return (images * highest).round() / highest


@dataclass(frozen=True, kw_only=True)
class TotalVariation(Purifier):
    """Minimises total variation near the image (Chambolle's algorithm, as scikit-image has it).

    An algorithm for total variation minimization and applications, https://doi.org/10.1023/B:JMIV.0000011325.36760.1e.
    """

    # Larger is smoother; 0.1 is scikit-image's default for images in [0, 1].
    weight: float = 0.1

    def _purify(self, images: Tensor, generators: Sequence[torch.Generator], models: AttackModels) -> Tensor:
        from skimage.restoration import denoise_tv_chambolle

        pictures: list[npt.NDArray[np.float32]] = [
            denoise_tv_chambolle(image.numpy(), weight=self.weight, channel_axis=0) for image in images
        ]
        return torch.from_numpy(np.stack(pictures).astype(np.float32))
