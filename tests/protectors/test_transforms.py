"""Differentiable transforms against the real operations of Pillow, and what their draws depend on."""

from __future__ import annotations

import io
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.ndimage import gaussian_filter
from skimage.data import astronaut
from torch import Tensor

from protectors.randomness import streams
from protectors.transforms import Transforms, blur, jpeg, resample

ALL = Transforms(flip=True, resize_low=0.5, blur_size=7, noise_levels=4.0, jpeg_low=60, chance=0.7)


@pytest.fixture(scope="module")
def photo() -> Tensor:
    """A picture that comes with scikit-image, in whole levels; no side is a multiple of 8."""
    return tensor(Image.fromarray(astronaut()[:150, 150:350]))


def tensor(picture: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].float() / 255


def picture(images: Tensor) -> Image.Image:
    return Image.fromarray((images[0] * 255).round().to(torch.uint8).permute(1, 2, 0).numpy())


def psnr(a: Tensor, b: Tensor) -> float:
    return float(-10 * (a - b).square().mean().log10())


@pytest.mark.parametrize("quality", [30, 50, 75, 95])
def test_jpeg_is_near_libjpeg(quality: int, photo: Tensor) -> None:
    """Far nearer to the file than the file is to the photo: at least 5 dB (measured: 7 to 11)."""
    file = io.BytesIO()
    picture(photo).save(file, "JPEG", quality=quality, subsampling="4:2:0")
    real = tensor(Image.open(file))
    assert psnr(jpeg(photo, quality), real) > max(40, psnr(photo, real) + 5)


@pytest.mark.parametrize("factor", [0.5, 0.75])
def test_resample_is_near_pillow(factor: float, photo: Tensor) -> None:
    image = picture(photo)
    small = (int(image.width * factor), int(image.height * factor))
    kernel = Image.Resampling.BICUBIC
    real = tensor(image.resize(small, kernel).resize(image.size, kernel))
    assert psnr(resample(photo, factor), real) > 45


def test_blur_is_near_scipy(photo: Tensor) -> None:
    real = gaussian_filter(photo[0].numpy(), sigma=(0, 1.5, 1.5), radius=(0, 3, 3), mode="nearest")
    assert psnr(blur(photo, 7, 1.5), torch.from_numpy(real)[None]) > 60


@pytest.mark.parametrize(
    "transform",
    [
        partial(jpeg, quality=75),
        partial(resample, factor=0.5),
        partial(blur, size=7, sigma=1),
    ],
)
def test_gradient_points_where_the_output_moves(transform: Callable[[Tensor], Tensor], photo: Tensor) -> None:
    """A step along the gradient of <w, T(x)> raises it (JPEG: through a smooth stand-in for rounding)."""
    images = (photo * 0.8 + 0.1).requires_grad_()
    weights = blur(torch.randn(photo.shape, generator=torch.Generator().manual_seed(0)), 7, 1.0)
    (gradient,) = torch.autograd.grad((weights * transform(images)).sum(), images)
    with torch.no_grad():
        moved = transform(images + 2 / 255 * gradient.sign()) - transform(images)
    assert (weights * moved).sum() > 0


def test_jpeg_gradient_spares_what_jpeg_drops(photo: Tensor) -> None:
    """A checkerboard of single pixels is lost at quality 50, one of 8 x 8 blocks is not: the gradients know."""
    images = photo.clone().requires_grad_()
    rows, columns = torch.meshgrid(torch.arange(150), torch.arange(200), indexing="ij")
    sensitivity = []
    for cell in (1, 8):
        pattern = ((rows // cell + columns // cell) % 2 * 2.0 - 1).expand_as(photo)
        (gradient,) = torch.autograd.grad((pattern * jpeg(images, 50)).sum(), images)
        sensitivity.append(float((gradient * pattern).mean()))
    assert sensitivity[0] < 0.2 * sensitivity[1]


def test_off_is_the_identity(photo: Tensor) -> None:
    for transforms in (Transforms(), Transforms(chance=0.0, resize_low=0.5, blur_size=7, jpeg_low=50)):
        assert torch.equal(transforms.draw(photo, streams([1], "test"))(photo), photo)


def test_output_is_a_picture_and_gradient_reaches_every_image(photo: Tensor) -> None:
    images = photo.repeat(6, 1, 1, 1).requires_grad_()
    output = ALL.draw(images, streams(range(6), "test"))(images)
    assert output.shape == images.shape
    assert output.min() >= 0
    assert output.max() <= 1
    (gradient,) = torch.autograd.grad(output.square().sum(), images)
    assert gradient.isfinite().all()
    assert (gradient != 0).flatten(1).any(1).all()


def test_draws_depend_on_the_generator_alone(photo: Tensor) -> None:
    images = photo.repeat(3, 1, 1, 1)
    batch = ALL.draw(images, streams([1, 2, 3], "test"))(images)
    for place, seed in enumerate([1, 2, 3]):
        alone = ALL.draw(photo, streams([seed], "test"))(photo)
        assert torch.equal(batch[place], alone[0])
    assert not torch.equal(batch[0], batch[1])


def test_a_draw_repeats_itself_and_the_next_one_differs(photo: Tensor) -> None:
    generators = streams([4], "test")
    first, second = ALL.draw(photo, generators), ALL.draw(photo, generators)
    assert torch.equal(first(photo), first(photo))
    assert not torch.equal(first(photo), second(photo))


def test_flip_is_drawn_per_image(photo: Tensor) -> None:
    small = photo[..., :4, :6]
    images = small.repeat(40, 1, 1, 1)
    output = Transforms(flip=True).draw(images, streams(range(40), "test"))(images)
    flipped = [torch.equal(image, small[0].flip(-1)) for image in output]
    assert 8 < sum(flipped) < 32
    assert all(torch.equal(image, small[0]) or known for image, known in zip(output, flipped, strict=True))


def test_smallest_images() -> None:
    images = torch.rand(1, 3, 1, 5)
    every = Transforms(flip=True, resize_low=0.1, blur_size=7, noise_levels=4.0, jpeg_low=60)
    assert every.draw(images, streams([1], "test"))(images).shape == images.shape


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"chance": 1.1}, "chance"),
        ({"resize_low": 0.0}, "resize_low"),
        ({"resize_low": 1.5}, "resize_low"),
        ({"blur_size": 4}, "blur_size"),
        ({"noise_levels": -1.0}, "noise_levels"),
        ({"jpeg_low": 0}, "jpeg_low"),
        ({"jpeg_low": 96}, "jpeg_low"),
    ],
)
def test_impossible_values_are_refused(change: dict[str, Any], field: str) -> None:
    with pytest.raises(ValueError, match=field):
        Transforms(**change)
