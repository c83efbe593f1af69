"""The stored bytes hold what was asked: pixels, budget, alpha, profile, metadata; and no picture of the original."""

from __future__ import annotations

import dataclasses
import hashlib
import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from skimage.metrics import structural_similarity

from pipeline import encode as encode_module
from pipeline.decode import DecodedImage, DecodeLimits, apply_delta, decode, model_view
from pipeline.encode import OutputFormat, choose_format, encode, measure, pixel_sha256, pixel_sha256_of_bytes
from pipeline.errors import EncodeError
from pipeline.image_metadata import ImageMetadata
from tests.pipeline import images

LIMITS = DecodeLimits()
FORMATS: tuple[OutputFormat, ...] = ("png", "webp", "jpeg")


def decoded(data: bytes) -> DecodedImage:
    return decode(data, limits=LIMITS)


def protected(image: DecodedImage, eps: int = 8, seed: int = 0) -> np.ndarray:
    shape = model_view(image).shape
    return apply_delta(image, np.random.default_rng(seed).integers(-12, 13, shape).astype(np.int16), eps)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(16, 40),
    st.integers(16, 40),
    st.sampled_from(["L", "LA", "RGB", "RGBA"]),
    st.sampled_from(["png", "webp"]),
    st.integers(1, 8),
    st.integers(0, 16),
    st.integers(0, 2**32),
)
def test_lossless_round_trip(
    height: int, width: int, mode: str, format: OutputFormat, orientation: int, eps: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    noise = rng.integers(0, 256, (height, width, len(mode.replace("RGB", "rgb"))), dtype=np.uint8)
    source = Image.fromarray(noise if noise.shape[2] > 1 else noise[:, :, 0])
    image = decoded(images.save(source, "PNG", exif=images.exif(orientation)))
    pixels = protected(image, eps, seed)
    data = encode(image, pixels, format)
    np.testing.assert_array_equal(decoded(data).pixels, pixels)
    measured = measure(data, image, LIMITS)
    assert measured.linf_levels == np.abs(pixels.astype(int) - image.pixels).max() <= eps
    assert encode(image, pixels, format) == data


@pytest.mark.parametrize("format", FORMATS)
def test_metadata_is_in_the_file(format: OutputFormat) -> None:
    image = decoded(images.rich_png(icc_profile=images.adobe_rgb_profile()))
    data = encode(image, protected(image), format)
    stored = Image.open(io.BytesIO(data))
    stored.load()
    assert stored.size == (56, 40)
    assert stored.info["icc_profile"] == images.adobe_rgb_profile()
    exif = Image.Exif()
    exif.load(stored.info["exif"])
    assert (exif[0x0112], exif[0x013B], exif.get_ifd(0x8769)[0xA434]) == (6, "Zoe", "50mm F1.8")
    xmp = stored.info["xmp"]
    assert "© Zoë".encode() in xmp
    again = decoded(data).metadata
    assert again.xmp == image.metadata.xmp
    assert again.dpi == pytest.approx((300, 300), abs=0.5)
    title = dict(again.texts).get("Title") or exif[0x010D].encode("latin-1").decode().rstrip("\0")
    assert title == "Möwe"
    assert again.dropped == ()


def test_png_metadata_is_in_its_standard_chunks() -> None:
    image = decoded(images.rich_png())
    data = encode(image, image.pixels, "png")
    assert b"eXIf" in data
    assert b"iTXtXML:com.adobe.xmp\0" in data
    assert b"pHYs" in data


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("source", [images.jpeg_with_exif_thumbnail(), images.rich_png()], ids=["exif", "xmp"])
def test_no_picture_of_the_original_is_in_the_file(format: OutputFormat, source: bytes) -> None:
    image = decoded(source)
    data = encode(image, protected(image), format)
    assert image.metadata.dropped
    assert images.JPEG_SIGNATURE not in data[3:]
    assert b"/9j/4" not in data
    assert b"xmp:Thumbnails" not in data


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", FORMATS)
def test_orientation_tag_is_the_originals(format: OutputFormat, orientation: int) -> None:
    image = decoded(images.oriented("JPEG", orientation))
    data = encode(image, protected(image), format)
    measured = measure(data, image, LIMITS)
    assert (measured.width, measured.height) == (56, 40)
    assert decoded(data).orientation == orientation


@pytest.mark.parametrize(
    ("source", "modes"),
    [
        (images.plain("PNG", "L", icc_profile=images.grey_profile()), {"png": "L", "jpeg": "L"}),
        (images.plain("JPEG", "L"), {"png": "L", "webp": "RGB", "jpeg": "L"}),
        (images.grey_alpha_png(), {"png": "LA", "webp": "RGBA"}),
        (images.rgba_png(), {"png": "RGBA", "webp": "RGBA"}),
        (images.cmyk_jpeg(images.cmyk_profile()), {"png": "RGB", "webp": "RGB", "jpeg": "RGB"}),
        (images.grey16("TIFF"), {"png": "L", "webp": "RGB", "jpeg": "L"}),
        (images.palette_png(transparent=True), {"png": "RGBA", "webp": "RGBA"}),
        (images.plain("PNG", height=17, width=19), {"png": "RGB", "webp": "RGB", "jpeg": "RGB"}),
    ],
)
def test_every_kind_in_every_format_that_can_hold_it(source: bytes, modes: dict[OutputFormat, str]) -> None:
    image = decoded(source)
    pixels = protected(image)
    for format in FORMATS:
        if format not in modes:
            assert choose_format(format, image) == "png"
            with pytest.raises(EncodeError, match="store it as png"):
                encode(image, pixels, format)
            continue
        assert choose_format(format, image) == format
        measured = measure(encode(image, pixels, format), image, LIMITS)
        assert measured.mode == modes[format]
        assert format == "jpeg" or measured.linf_levels <= 8


def test_formats_have_largest_sides() -> None:
    image = decoded(images.plain("PNG"))
    wide = dataclasses.replace(image, pixels=np.zeros((16, 16_384, 3), np.uint8))
    with pytest.raises(EncodeError, match="16383"):
        encode(wide, wide.pixels, "webp")
    assert choose_format("webp", wide) == "png"
    assert choose_format("jpeg", wide) == "jpeg"


def test_pixels_must_fit_the_image() -> None:
    image = decoded(images.plain("PNG", "L"))
    with pytest.raises(EncodeError, match="give uint8"):
        encode(image, image.pixels[1:], "png")
    unequal = image.pixels.copy()
    unequal[0, 0, 0] ^= 1
    with pytest.raises(EncodeError, match="unequal channels"):
        encode(image, unequal, "png")


def test_encoder_failure_becomes_encode_error() -> None:
    image = decoded(images.plain("PNG"))
    broken = dataclasses.replace(image, metadata=ImageMetadata(xmp=b"x" * 70_000))
    with pytest.raises(EncodeError, match="XMP data is too long"):
        encode(broken, image.pixels, "jpeg")


def test_measure_refuses_what_was_not_kept() -> None:
    image = decoded(images.rgba_png())
    data = encode(image, image.pixels, "png")
    assert image.alpha is not None
    for wrong, named in (
        (dataclasses.replace(image, alpha=255 - image.alpha), "alpha"),
        (dataclasses.replace(image, alpha=None), "alpha"),
        (dataclasses.replace(image, icc=b"other"), "ICC profile"),
        (dataclasses.replace(image, orientation=6), "orientation"),
        (dataclasses.replace(image, pixels=image.pixels[1:]), "size"),
    ):
        with pytest.raises(EncodeError, match=named):
            measure(data, wrong, LIMITS)


def test_measure_of_identical_pixels() -> None:
    image = decoded(images.plain("PNG"))
    measured = measure(encode(image, image.pixels, "png"), image, LIMITS)
    assert (measured.linf_levels, measured.psnr, measured.ssim) == (0, None, 1.0)


@pytest.mark.parametrize("rows", [5, 16, 33, 34, 256])
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_strips_give_the_numbers_of_the_whole_image(rows: int, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encode_module, "_STRIP_ROWS", rows)
    image = decoded(images.plain("PNG", mode))
    pixels = protected(image)
    measured = measure(encode(image, pixels, "png"), image, LIMITS)
    whole = structural_similarity(image.pixels, pixels, channel_axis=2, data_range=255)
    assert measured.ssim == pytest.approx(whole, abs=1e-5)
    mean_square = np.square(image.pixels.astype(float) - pixels).mean()
    assert measured.psnr == pytest.approx(10 * np.log10(255**2 / mean_square))


def test_pixel_hash_is_of_the_pixels_alone() -> None:
    image = decoded(images.plain("PNG", "L", icc_profile=images.srgb_profile()))
    png, webp = encode(image, image.pixels, "png"), encode(image, image.pixels, "webp")
    assert pixel_sha256_of_bytes(png, LIMITS) == pixel_sha256_of_bytes(webp, LIMITS)
    by_hand = hashlib.sha256(b"40,56,3\n" + image.pixels.tobytes()).hexdigest()
    assert measure(png, image, LIMITS).pixel_sha256 == pixel_sha256(image) == by_hand
    with_alpha = decoded(images.rgba_png())
    assert with_alpha.alpha is not None
    content = b"40,56,4\n" + with_alpha.pixels.tobytes() + with_alpha.alpha.tobytes()
    assert pixel_sha256(with_alpha) == hashlib.sha256(content).hexdigest()
