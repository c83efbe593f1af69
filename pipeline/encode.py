"""Pixels to stored bytes, and what those bytes then really hold: the budget is measured here."""

from __future__ import annotations

import hashlib
import io
import math
import struct
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from PIL import Image, PngImagePlugin
from skimage.metrics import structural_similarity

from pipeline.decode import DecodedImage, DecodeLimits, Pixels, decode
from pipeline.errors import EncodeError
from pipeline.image_metadata import portable_exif

OutputFormat = Literal["png", "webp", "jpeg"]

PNG_LEVEL = 4
"""zlib level. Level 6 takes about twice as long on a noisy photo, for a file of nearly the same size."""

# 6 megapixels took 0.7 s (8.6 MB); Pillow's defaults, method 4 and quality 80, took 2.7 s (8.5 MB).
_WEBP_LOSSLESS = {"lossless": True, "exact": True, "method": 2, "quality": 20}
_MAX_SIDE = {"png": 2**31 - 1, "webp": 16_383, "jpeg": 65_500}  # the formats' own limits
_SSIM_WINDOW = 7
_STRIP_ROWS = 256  # 24 megapixels need 130 MB instead of 2 GB, and the same number comes out
_PEAK = 255


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What the stored bytes hold, compared with the original in the stored colour space.

    Attributes:
        linf_levels: largest absolute difference of any sample, in 8-bit levels.
        psnr: dB; None where nothing differs.
        ssim: mean over channels, 7 x 7 uniform window.
        pixel_sha256: see the function of this name.
        mode: Pillow's mode of the stored file.
        format: "PNG", "WEBP" or "JPEG".
        xmp: the packet.
    """

    linf_levels: int
    psnr: float | None
    ssim: float
    pixel_sha256: str
    width: int
    height: int
    mode: str
    format: str
    xmp: bytes | None


def choose_format(policy: OutputFormat, image: DecodedImage) -> OutputFormat:
    """Returns the policy's format, or png for an image that this format cannot hold.

    That is: alpha in JPEG, sides above 16,383 (WebP) or 65,500 (JPEG), a grey ICC profile in WebP. An archive
    with a few such images is then stored whole, rather than with those images missing.
    """
    return "png" if _obstacle(policy, image) else policy


def encode(image: DecodedImage, pixels: Pixels, format: OutputFormat, *, png_level: int = PNG_LEVEL) -> bytes:
    """Writes pixels with the alpha, profile, orientation and metadata of `image`; deterministic.

    PNG and WebP are lossless (WebP also keeps the colours under transparent alpha); JPEG is quality 95 without
    chroma subsampling, and moves samples by some levels more than was asked: only ``measure`` knows. Grey images
    stay grey, but for WebP, which stores RGB only.

    Args:
        pixels: uint8 (H, W, 3) in the stored layout, as large as the image's; equal channels if it is grey.

    Raises:
        EncodeError: the format cannot hold this image (see ``choose_format``), or the encoder failed.
    """
    if pixels.shape != image.pixels.shape or pixels.dtype != np.uint8:
        raise EncodeError(f"pixels are {pixels.dtype} {pixels.shape}; give uint8 {image.pixels.shape}")
    if obstacle := _obstacle(format, image):
        raise EncodeError(f"{obstacle}; store it as png")
    out = io.BytesIO()
    try:
        _to_pillow(image, pixels).save(out, format.upper(), **_options(image, format, png_level))
    except (OSError, ValueError, MemoryError, struct.error) as error:
        raise EncodeError(f"{format} encoder failed: {error}; try another format") from error
    return out.getvalue()


def lost_texts(image: DecodedImage, format: OutputFormat) -> tuple[str, ...]:
    """Names the PNG texts for which another format has no place: EXIF takes most of them, if it says nothing itself."""
    if format == "png" or image.source_format != "PNG":
        return ()
    kept = replace(image.metadata, exif=portable_exif(image.metadata)).exif_words
    return tuple(f"PNG text {key!r}" for key, _ in image.metadata.texts if key not in kept)


def measure(data: bytes, image: DecodedImage, limits: DecodeLimits) -> Measured:
    """Decodes the stored bytes again and compares them with the original.

    Raises:
        DecodeError: the stored bytes are no image within the limits.
        EncodeError: size, alpha, ICC profile or orientation are not the original's.
    """
    stored = decode(data, limits=limits)
    _check_unchanged(stored, image)
    linf, mean_square, ssim = _compare(stored, image)
    height, width, _ = stored.pixels.shape
    return Measured(
        linf_levels=linf,
        psnr=10 * math.log10(_PEAK**2 / mean_square) if mean_square else None,
        ssim=ssim,
        pixel_sha256=pixel_sha256(stored),
        width=width,
        height=height,
        mode=stored.source_mode,
        format=stored.source_format,
        xmp=stored.metadata.xmp,
    )


def pixel_sha256(image: DecodedImage) -> str:
    """Returns a hash of the pixels alone: the same for one picture in PNG and WebP, grey or RGB.

    SHA-256 over ASCII "height,width,channels\\n", the RGB samples row by row, then, if any pixel is not opaque
    (channels is 4), the alpha samples row by row.
    """
    height, width, _ = image.pixels.shape
    digest = hashlib.sha256(f"{height},{width},{3 if image.alpha is None else 4}\n".encode())
    digest.update(np.ascontiguousarray(image.pixels).data)
    if image.alpha is not None:
        digest.update(np.ascontiguousarray(image.alpha).data)
    return digest.hexdigest()


def pixel_sha256_of_bytes(data: bytes, limits: DecodeLimits) -> str:
    """Returns ``pixel_sha256`` of an image file. Raises DecodeError."""
    return pixel_sha256(decode(data, limits=limits))


def _obstacle(format: OutputFormat, image: DecodedImage) -> str | None:
    """Why the format cannot hold the image, None if it can."""
    if max(image.pixels.shape[:2]) > _MAX_SIDE[format]:
        return f"{format} holds at most {_MAX_SIDE[format]} pixels a side"
    if format == "jpeg" and image.alpha is not None:
        return "JPEG has no alpha"
    if format == "webp" and image.grey and image.icc:
        return "WebP stores grey as RGB, for which the image's grey ICC profile is not valid"
    return None


def _to_pillow(image: DecodedImage, pixels: Pixels) -> Image.Image:
    if image.grey and not (pixels == pixels[:, :, :1]).all():
        raise EncodeError("the pixels of a grey image have unequal channels; use apply_delta")
    colours = pixels[:, :, :1] if image.grey else pixels
    if image.alpha is not None:
        colours = np.concatenate([colours, image.alpha[:, :, None]], axis=2)
    mode = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}[colours.shape[2]]
    return Image.frombytes(mode, (pixels.shape[1], pixels.shape[0]), np.ascontiguousarray(colours).tobytes())


def _options(image: DecodedImage, format: OutputFormat, png_level: int) -> dict[str, Any]:
    """Pillow's save options. None and empty values are left out: some encoders take them for data."""
    metadata = image.metadata
    options: dict[str, Any] = {"icc_profile": image.icc, "dpi": metadata.dpi}
    if format == "png":
        chunks = PngImagePlugin.PngInfo()
        if metadata.xmp:  # Pillow ignores xmp= for PNG
            chunks.add_itxt("XML:com.adobe.xmp", metadata.xmp.decode())
        for keyword, text in metadata.texts:
            chunks.add_itxt(keyword, text)
        options |= {"exif": metadata.exif, "pnginfo": chunks, "compress_level": png_level}
    else:
        options |= {"exif": portable_exif(metadata), "xmp": metadata.xmp}
        options |= {"quality": 95, "subsampling": 0} if format == "jpeg" else _WEBP_LOSSLESS
    return {name: value for name, value in options.items() if value is not None}


def _check_unchanged(stored: DecodedImage, image: DecodedImage) -> None:
    same_alpha = (
        stored.alpha is image.alpha
        if stored.alpha is None or image.alpha is None
        else np.array_equal(stored.alpha, image.alpha)
    )
    kept = {
        "size": stored.pixels.shape == image.pixels.shape,
        "alpha": same_alpha,
        "ICC profile": stored.icc == image.icc,
        "orientation": stored.orientation == image.orientation,
    }
    if changed := [name for name, same in kept.items() if not same]:
        raise EncodeError(f"the stored file does not keep the original's {', '.join(changed)}; report this as a bug")


def _compare(stored: DecodedImage, image: DecodedImage) -> tuple[int, float, float]:
    """Returns linf in levels, mean square error and SSIM; reads strips, so that memory does not grow with height.

    The strips' windows overlap, so that the weighted mean is exactly the SSIM of the whole image.
    """
    channels = 1 if image.grey and (stored.pixels == stored.pixels[:, :, :1]).all() else 3
    before, after = image.pixels[:, :, :channels], stored.pixels[:, :, :channels]
    height, margin = before.shape[0], _SSIM_WINDOW // 2
    linf, squares, similarity = 0, 0, 0.0
    for top in range(0, height, _STRIP_ROWS):
        difference = after[top : top + _STRIP_ROWS].astype(np.int32) - before[top : top + _STRIP_ROWS]
        linf = max(linf, int(np.abs(difference).max()))
        squares += int(np.square(difference).sum(dtype=np.int64))
    for top in range(margin, height - margin, _STRIP_ROWS):
        end = min(top + _STRIP_ROWS, height - margin)
        rows = slice(top - margin, end + margin)
        similarity += (end - top) * float(
            structural_similarity(
                before[rows].astype(np.float32),  # skimage would take float64: twice the memory
                after[rows].astype(np.float32),
                channel_axis=2,
                data_range=_PEAK,
                win_size=_SSIM_WINDOW,
            )
        )
    return linf, squares / before.size, similarity / (height - 2 * margin)
