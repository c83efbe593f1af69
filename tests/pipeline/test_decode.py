"""What decode accepts and refuses, and that its pixels are the file's."""

from __future__ import annotations

import contextlib
import io
import random
import time
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from pipeline.decode import DecodedImage, DecodeLimits, apply_delta, decode, model_view, to_stored_layout, upright
from pipeline.errors import DecodeError
from tests.pipeline import images

LIMITS = DecodeLimits()


def opened(data: bytes, mode: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert(mode))


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_rgb_pixels_are_the_files(format: str) -> None:
    data = images.plain(format)
    image = decode(data, limits=LIMITS)
    np.testing.assert_array_equal(image.pixels, opened(data, "RGB"))
    assert (image.grey, image.alpha, image.icc, image.orientation) == (False, None, None, 1)
    assert (image.source_format, image.source_mode) == (format, "RGB")
    assert not image.pixels.flags.writeable


@pytest.mark.parametrize(
    ("data", "grey", "alpha"),
    [
        (images.plain("JPEG", "L"), True, False),
        (images.plain("PNG", "1"), True, False),
        (images.plain("TIFF", "1"), True, False),
        (images.grey_alpha_png(), True, True),
        (images.rgba_png(), False, True),
        (images.rgba_png("WEBP"), False, True),
        (images.rgba_png("TIFF"), False, True),
        (images.palette_png(transparent=False), False, False),
        (images.palette_png(transparent=True), False, True),
        (images.rgb_png_with_key(), False, True),
        (images.plain("TIFF", "YCbCr"), False, False),
        (images.plain("TIFF", "CMYK"), False, False),
        (images.plain("PNG", "RGBA"), False, False),  # opaque everywhere: no alpha
    ],
)
def test_modes(data: bytes, grey: bool, alpha: bool) -> None:
    image = decode(data, limits=LIMITS)
    expected = opened(data, "RGBA")
    np.testing.assert_array_equal(image.pixels, expected[:, :, :3])
    assert image.grey == grey
    assert (image.alpha is not None) == alpha
    if image.alpha is not None:
        np.testing.assert_array_equal(image.alpha, expected[:, :, 3])


def test_turned_bigtiff_stays_upright() -> None:
    data = images.save(images.picture(), "TIFF", big_tiff=True, tiffinfo={0x0112: 6})
    image = decode(data, limits=LIMITS)
    assert image.orientation == 1
    np.testing.assert_array_equal(image.pixels, upright(images.samples(), 6))


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_16_bit_grey_is_rounded_not_clipped(format: str) -> None:
    image = decode(images.grey16(format), limits=LIMITS)
    np.testing.assert_array_equal(image.pixels[:, :, 1], np.rint(images.grey16_samples() / 257))
    assert image.grey


def test_white_is_zero_and_12_bit_tiff() -> None:
    inverted = decode(images.tiff_from_samples(images.grey16_samples(), photometric=0), limits=LIMITS)
    np.testing.assert_array_equal(inverted.pixels[:, :, 0], 255 - np.rint(images.grey16_samples() / 257))
    levels = np.linspace(0, 4095, 400).astype(np.uint16).reshape(20, 20)
    packed = images.packed_12_bit(levels)
    data = bytearray(images.tiff_from_samples(packed, photometric=1, bits=12))
    data[data.index(b"\0\x01\x03\0\x01\0\0\0") + 8] = 20  # the width counts samples, not bytes
    image = decode(bytes(data), limits=LIMITS)
    np.testing.assert_array_equal(image.pixels[:, :, 0], np.rint(levels * (255 / 4095)))


@pytest.mark.parametrize(("scale", "accepted"), [(1.0, True), (255.0, False), (np.nan, False)])
def test_float_grey_is_accepted_only_within_0_and_1(scale: float, accepted: bool) -> None:
    ramp = np.linspace(0, 1, 400, dtype=np.float32).reshape(20, 20)
    data = images.tiff_from_samples(ramp * np.float32(scale), photometric=1)
    if not accepted:
        with pytest.raises(DecodeError, match="not known"):
            decode(data, limits=LIMITS)
        return
    np.testing.assert_array_equal(decode(data, limits=LIMITS).pixels[:, :, 0], np.rint(ramp * 255))


def test_signed_grey_is_accepted_only_in_the_16_bit_range() -> None:
    ramp = np.linspace(0, 65_535, 400).astype(np.int32).reshape(20, 20)
    good = decode(images.tiff_from_samples(ramp, photometric=1), limits=LIMITS)
    np.testing.assert_array_equal(good.pixels[:, :, 0], np.rint(ramp / 257))
    with pytest.raises(DecodeError, match="not known"):
        decode(images.tiff_from_samples(ramp - 5, photometric=1), limits=LIMITS)


def test_16_bit_colour() -> None:
    assert decode(images.rgb16_png(), limits=LIMITS).pixels[0, 1].tolist() == [11, 15, 19]
    ramp = np.linspace(0, 65_535, 1200).astype(np.uint16).reshape(20, 20, 3)
    tiff = decode(images.tiff_from_samples(ramp, photometric=2), limits=LIMITS)
    assert np.abs(tiff.pixels - ramp / 257).max() <= 1
    with pytest.raises(DecodeError, match="transparent colour"):
        decode(images.rgb16_png(key=True), limits=LIMITS)


def test_transparent_level_of_4_bit_grey() -> None:
    image = decode(images.grey4_png_with_key(), limits=LIMITS)
    assert image.pixels[0, :, 0].tolist() == [17 * x for x in range(16)]
    assert image.alpha is not None
    assert image.alpha[3].tolist() == [0 if x == 5 else 255 for x in range(16)]


def test_cmyk_goes_through_its_profile() -> None:
    with_profile = decode(images.cmyk_jpeg(images.cmyk_profile()), limits=LIMITS)
    assert with_profile.icc is None
    assert with_profile.source_mode == "CMYK"
    assert "ICC" not in " ".join(with_profile.metadata.dropped)
    yellowish = with_profile.pixels[0, 0].astype(int)  # the profile says Lab (50, 0, 100): olive, not cyan
    assert yellowish[0] > 100
    assert yellowish[2] < 20
    plain = decode(images.cmyk_jpeg(), limits=LIMITS).pixels[0, 0].astype(int)
    assert np.abs(plain - (0, 255, 255)).max() <= 2  # also shows that Adobe's inversion is undone


def test_lab_tiff_becomes_srgb() -> None:
    lab = images.save(Image.new("LAB", (20, 20), (255, 128, 128)), "TIFF")
    image = decode(lab, limits=LIMITS)
    assert image.pixels.min() >= 253
    assert image.icc is None


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_orientation_is_kept_and_undone_only_in_the_view(format: str, orientation: int) -> None:
    plain, turned = images.plain(format), images.oriented(format, orientation)
    image = decode(turned, limits=LIMITS)
    assert image.orientation == orientation
    np.testing.assert_array_equal(image.pixels, decode(plain, limits=LIMITS).pixels)
    seen = ImageOps.exif_transpose(Image.open(io.BytesIO(turned)))
    np.testing.assert_array_equal(model_view(image), np.asarray(seen))


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 8), st.sampled_from([np.uint8, np.int16, np.float32]))
def test_to_stored_layout_undoes_upright(height: int, width: int, orientation: int, dtype: type) -> None:
    array = np.arange(height * width * 3, dtype=dtype).reshape(height, width, 3)
    back = to_stored_layout(upright(array, orientation), orientation)
    np.testing.assert_array_equal(back, array)
    assert back.dtype == dtype


def test_view_applies_rgb_and_grey_profiles_and_leaves_srgb_alone() -> None:
    adobe = decode(images.plain("PNG", icc_profile=images.adobe_rgb_profile()), limits=LIMITS)
    assert adobe.icc == images.adobe_rgb_profile()
    assert np.abs(model_view(adobe).astype(int) - adobe.pixels).max() > 10
    srgb = decode(images.plain("PNG", icc_profile=images.srgb_profile()), limits=LIMITS)
    assert srgb.icc
    np.testing.assert_array_equal(model_view(srgb), srgb.pixels)
    linear = decode(images.plain("PNG", "L", icc_profile=images.grey_profile()), limits=LIMITS)
    assert linear.icc
    middle = model_view(linear)[linear.pixels == 128]
    assert np.abs(middle.astype(int) - 188).max() <= 2  # sRGB of linear 0.5


@pytest.mark.parametrize(
    ("mode", "profile"),
    [("L", images.adobe_rgb_profile()), ("RGB", images.grey_profile()), ("RGB", b"junk" * 99)],
)
def test_profile_that_does_not_fit_is_dropped_and_named(mode: str, profile: bytes) -> None:
    image = decode(images.plain("PNG", mode, icc_profile=profile), limits=LIMITS)
    assert image.icc is None
    assert any("ICC" in name for name in image.metadata.dropped)
    np.testing.assert_array_equal(model_view(image), image.pixels)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "no JPEG, PNG"),
        (b"GIF89a" + bytes(99), "no JPEG, PNG"),
        (images.plain("JPEG")[:-200], "truncated"),
        (images.plain("PNG")[:-200], "truncated"),
        (images.plain("TIFF")[:-200], "truncated"),
        (images.plain("WEBP")[:-20], "truncated"),
        (images.bomb_png(), "decompression bomb"),
        (images.bomb_webp(), "decompression bomb"),
        (images.animated_webp(), "pages or frames"),
        (images.multi_page_tiff(), "pages or frames"),
        (images.tiff_with_previews(images.plain("TIFF"), images.plain("JPEG"), pages=(1, 0)), "pages or frames"),
        (images.camera_mpo(0x020002), "several pictures"),
        (images.plain("PNG", height=15), "min_side"),
    ],
)
def test_refusals_say_why(data: bytes, message: str) -> None:
    with pytest.raises(DecodeError, match=message):
        decode(data, limits=LIMITS)


def test_apng_is_refused() -> None:
    data = images.save(images.picture(), "PNG", save_all=True, append_images=[Image.new("RGB", (56, 40))])
    with pytest.raises(DecodeError, match="pages or frames"):
        decode(data, limits=LIMITS)


def test_preview_behind_a_camera_jpeg_is_left_out_and_named() -> None:
    image = decode(images.camera_mpo(0x010002), limits=LIMITS)
    assert image.source_format == "JPEG"
    assert any("previews" in name for name in image.metadata.dropped)


@pytest.mark.parametrize("orientation", [1, 6])
def test_previews_in_a_tiff_are_left_out_and_named(orientation: int) -> None:
    whole = images.oriented("TIFF", orientation)
    preview = images.save(Image.new("RGB", (28, 20), "red"), "JPEG")
    image, alone = (decode(data, limits=LIMITS) for data in (images.tiff_with_previews(whole, preview), whole))
    np.testing.assert_array_equal(image.pixels, alone.pixels)
    assert (image.orientation, image.metadata.exif) == (alone.orientation, alone.metadata.exif)
    assert set(image.metadata.dropped) - set(alone.metadata.dropped) == {
        "TIFF SubIFDs (previews)",
        "EXIF thumbnail (IFD1)",
    }


def test_limit_is_ours_whatever_the_process_says(monkeypatch: pytest.MonkeyPatch) -> None:
    data = images.plain("PNG")
    for process_wide in (None, 10):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", process_wide)
        decode(data, limits=DecodeLimits(max_pixels=40 * 56))
        with pytest.raises(DecodeError, match="2,239 allowed"):
            decode(data, limits=DecodeLimits(max_pixels=40 * 56 - 1))


def test_min_side_must_fit_the_ssim_window() -> None:
    with pytest.raises(ValueError, match="at least 7"):
        DecodeLimits(min_side=6)


def test_apply_delta_keeps_the_budget_in_the_stored_layout() -> None:
    image = decode(images.oriented("PNG", 6), limits=LIMITS)
    delta = np.random.default_rng(1).integers(-20, 21, model_view(image).shape).astype(np.int16)
    changed = apply_delta(image, delta, 8)
    wanted = np.clip(np.clip(delta, -8, 8) + model_view(image).astype(int), 0, 255)
    np.testing.assert_array_equal(upright(changed, 6), wanted)
    with pytest.raises(ValueError, match="as stored"):
        apply_delta(image, delta.swapaxes(0, 1), 8)


def test_apply_delta_gives_grey_one_value() -> None:
    image = decode(images.plain("PNG", "L"), limits=LIMITS)
    delta = np.zeros(image.pixels.shape, np.int16)
    delta[:, :, 0] = 8
    changed = apply_delta(image, delta, 8)
    np.testing.assert_array_equal(changed, np.clip(image.pixels.astype(int) + 3, 0, 255))


SOURCES = [
    images.jpeg_with_exif_thumbnail(),
    images.rich_png(),
    images.palette_png(transparent=True),
    images.grey16("TIFF"),
    images.rgba_png("WEBP"),
    images.plain("TIFF", compression="tiff_lzw"),
    images.cmyk_jpeg(images.cmyk_profile()),
    images.camera_mpo(0x010002),
    images.plain("PNG", icc_profile=images.adobe_rgb_profile()),
]


@settings(max_examples=250, deadline=2000)
@given(st.sampled_from(SOURCES), st.integers(0, 2**32))
def test_broken_bytes_decode_or_raise_decode_error(data: bytes, seed: int) -> None:
    rng = random.Random(seed)
    broken = bytearray(data)
    for _ in range(rng.choice((1, 3, 20))):
        # headers decide more than pixels do
        broken[rng.randrange(rng.choice((64, 600, len(broken))) % len(broken) or 1)] = rng.randrange(256)
    if rng.random() < 0.3:
        del broken[rng.randrange(len(broken)) :]
    start = time.monotonic()
    with warnings.catch_warnings(), contextlib.suppress(DecodeError):  # any other exception fails the test
        warnings.simplefilter("ignore")
        assert isinstance(decode(bytes(broken), limits=DecodeLimits(max_pixels=2_000_000)), DecodedImage)
    assert time.monotonic() - start < 2
