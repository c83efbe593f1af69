"""Image files to pixels: strict on what is accepted, exact on what the pixels are.

The pixels stay in the file's own layout and colour space, so that a protected image replaces its original
one for one; ``model_view`` gives what a person, or an attacker's training script, sees of them.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import IO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms, ImageFile, JpegImagePlugin, PngImagePlugin, TiffImagePlugin, WebPImagePlugin
from PIL.MpoImagePlugin import MpoImageFile

from pipeline.errors import DecodeError
from pipeline.image_metadata import ImageMetadata, orientation_of, read_metadata

Pixels = NDArray[np.uint8]

# What Pillow raises on files that are broken or made to break it. Nothing wider: AttributeError, AssertionError
# and the like are bugs, and 50,000 fuzzed files raised none of them.
_BROKEN_FILE = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    LookupError,
    ArithmeticError,
    EOFError,
    MemoryError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,
)
_NEW_SUBFILE_TYPE, _SUBFILE_TYPE, _BITS_PER_SAMPLE, _PHOTOMETRIC, _DNG_VERSION = 254, 255, 258, 262, 50706
_WHITE_IS_ZERO = 0
_MPF_ENTRIES = 0xB002
_INVERSE_ORIENTATION = {6: 8, 8: 6}  # all others undo themselves
_OPAQUE = 255


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeLimits:
    """How large and how small an image may be."""

    # Pixels; read from the header, before memory is taken. 200 million take about 1.4 GB while decoding.
    max_pixels: int = 200_000_000
    # Pixels of the shorter side. Not below 7, the window of SSIM.
    min_side: int = 16

    def __post_init__(self) -> None:
        if self.min_side < 7:
            raise ValueError(f"min_side is {self.min_side}; choose at least 7, the window of SSIM")


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodedImage:
    """One image as its file stores it.

    Attributes:
        pixels: read-only uint8 (H, W, 3) RGB; EXIF orientation and ICC profile are *not* applied. CMYK and Lab
            sources are already sRGB here (and `icc` is None); 16-bit sources are rounded to 8 bit.
        grey: the source has one colour channel; the three channels are equal and are stored back as one.
        alpha: read-only uint8 (H, W), straight; None where the file has none or is opaque everywhere.
        orientation: EXIF orientation, 1..8.
        icc: the embedded profile, None if absent or if it cannot be applied to these pixels; then the
            image is taken as sRGB, as viewers do, and `metadata.dropped` says so.
        source_format: "JPEG", "PNG", "TIFF" or "WEBP".
        source_mode: Pillow's mode of the file, such as "CMYK", "I;16" or "P".
    """

    pixels: Pixels
    grey: bool
    alpha: Pixels | None
    orientation: int
    icc: bytes | None
    metadata: ImageMetadata
    source_format: str
    source_mode: str


def decode(data: bytes, *, limits: DecodeLimits) -> DecodedImage:
    """Decodes a whole JPEG, PNG, WebP or TIFF of one picture; thread-safe.

    PNG gAMA and cHRM chunks are ignored (sRGB is assumed). The previews and gain maps that cameras append
    to a JPEG, and those that a TIFF has as further pages, are left out and named in ``metadata.dropped``.

    Raises:
        DecodeError: truncated or broken, another format, too large or small, several pages or frames, or
            samples whose range is not known.
    """
    opener = _opener(data)
    _check_webp_header(data, limits)
    try:
        with opener(io.BytesIO(data)) as image:
            _check_header(image, limits)
            return _decode_opened(image, data)
    except DecodeError:
        raise
    except _BROKEN_FILE as error:
        raise DecodeError(
            f"the file is truncated or broken ({type(error).__name__}: {error}); replace it with an intact copy"
        ) from error


def upright(array: NDArray[np.generic], orientation: int) -> NDArray[np.generic]:
    """Returns an (H, W, ...) array turned as its EXIF orientation (1..8) asks; a view where possible."""
    match orientation:
        case 1:
            return array
        case 2:
            return array[:, ::-1]
        case 3:
            return array[::-1, ::-1]
        case 4:
            return array[::-1]
        case 5:
            return array.swapaxes(0, 1)
        case 6:
            return array[::-1].swapaxes(0, 1)
        case 7:
            return array[::-1, ::-1].swapaxes(0, 1)
        case 8:
            return array[:, ::-1].swapaxes(0, 1)
    raise ValueError(f"EXIF orientation {orientation} does not exist; use 1 to 8")


def to_stored_layout(array: NDArray[np.generic], orientation: int) -> NDArray[np.generic]:
    """Undoes ``upright``: ``to_stored_layout(upright(a, o), o)`` equals ``a``, for any dtype."""
    return upright(array, _INVERSE_ORIENTATION.get(orientation, orientation))


def model_view(image: DecodedImage) -> Pixels:
    """Returns the image as it is seen: upright, in sRGB, alpha ignored; uint8 (H', W', 3), contiguous."""
    return np.ascontiguousarray(upright(_srgb_pixels(image), image.orientation), dtype=np.uint8)


def apply_delta(image: DecodedImage, delta: NDArray[np.int16], eps_levels: int) -> Pixels:
    """Adds an upright perturbation to the stored pixels, within [0, 255] and +-eps_levels of the original.

    Args:
        delta: int16 (H', W', 3) in 8-bit levels, as tall and wide as ``model_view``; grey images take its
            mean over the channels, rounded.

    Returns:
        uint8 (H, W, 3), a new array.
    """
    stored = to_stored_layout(delta, image.orientation)
    if stored.shape != image.pixels.shape:
        raise ValueError(f"delta is {delta.shape} but the image is {image.pixels.shape}, as stored")
    if image.grey:
        stored = np.rint(stored.mean(axis=2, dtype=np.float32, keepdims=True))
    changed: NDArray[np.int16] = np.clip(stored, -eps_levels, eps_levels).astype(np.int16) + image.pixels
    return np.clip(changed, 0, 255).astype(np.uint8)


def _opener(data: bytes) -> Callable[[IO[bytes]], ImageFile.ImageFile]:
    """Pillow's class for these bytes. ``Image.open`` is avoided: its size limit is process-wide state."""
    if data.startswith(b"\xff\xd8\xff"):
        return JpegImagePlugin.jpeg_factory
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return PngImagePlugin.PngImageFile
    if data[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        return TiffImagePlugin.TiffImageFile
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return WebPImagePlugin.WebPImageFile
    raise DecodeError(f"{len(data)} bytes that are no JPEG, PNG, WebP or TIFF; convert the file to one of these")


def _check_webp_header(data: bytes, limits: DecodeLimits) -> None:
    """Pillow allocates a WebP's canvas while it opens the file, so its size is read here first."""
    if data[:4] == b"RIFF" and data[12:16] == b"VP8X" and len(data) >= 30:
        width, height = (int.from_bytes(data[at : at + 3], "little") + 1 for at in (24, 27))
    elif data[:4] == b"RIFF" and data[12:16] == b"VP8L" and len(data) >= 25:
        bits = int.from_bytes(data[21:25], "little")
        width, height = (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    elif data[:4] == b"RIFF" and data[12:16] == b"VP8 " and len(data) >= 30:
        width, height = (int.from_bytes(data[at : at + 2], "little") & 0x3FFF for at in (26, 28))
    else:
        return
    _check_pixels(width, height, limits)


def _check_pixels(width: int, height: int, limits: DecodeLimits) -> None:
    if width * height > limits.max_pixels:
        raise DecodeError(
            f"{width}x{height} pixels are more than the {limits.max_pixels:,} allowed (a decompression bomb?);"
            " raise max_pixels if the file is trusted"
        )


def _check_header(image: ImageFile.ImageFile, limits: DecodeLimits) -> None:
    width, height = image.size
    _check_pixels(width, height, limits)
    if min(width, height) < limits.min_side:
        raise DecodeError(f"{width}x{height} pixels: a side is shorter than min_side={limits.min_side}")
    if isinstance(image, MpoImageFile):
        _check_further_pictures(image)
    elif getattr(image, "is_animated", False) and not _previews_follow(image):
        raise DecodeError("several pages or frames, of which only one could be kept; split the file first")
    if isinstance(image, TiffImagePlugin.TiffImageFile) and (_DNG_VERSION in image.tag_v2 or _is_preview(image)):
        raise DecodeError("a camera raw file whose readable picture is a preview; develop it to JPEG or TIFF")


def _is_preview(page: TiffImagePlugin.TiffImageFile) -> bool:
    """Whether the current page says that it is another one's at a lower resolution."""
    return bool(int(page.tag_v2.get(_NEW_SUBFILE_TYPE, 0)) & 1) or page.tag_v2.get(_SUBFILE_TYPE) == 2


def _previews_follow(image: ImageFile.ImageFile) -> bool:
    """Whether this is a TIFF whose further pages are previews of the first; it is left at that."""
    if not isinstance(image, TiffImagePlugin.TiffImageFile):
        return False
    found = []
    for page in range(1, image.n_frames):
        image.seek(page)
        found.append(_is_preview(image))
    image.seek(0)
    return all(found)


def _check_further_pictures(image: MpoImageFile) -> None:
    """Cameras append previews and gain maps of the same picture; stereo and multi-angle pictures are others."""
    entries = (image.mpinfo or {}).get(_MPF_ENTRIES, [])
    if any(str(entry["Attribute"]["MPType"]).startswith("Multi-Frame") for entry in entries):
        raise DecodeError("several pictures in one JPEG (stereo, panorama); split the file first")


def _decode_opened(image: ImageFile.ImageFile, data: bytes) -> DecodedImage:
    source_mode, rawmode = image.mode, _rawmode(image)
    tiff = isinstance(image, TiffImagePlugin.TiffImageFile)
    turned = image.getexif().get(0x0112, 1) if tiff else 1  # Pillow turns TIFFs, and only them, while it loads
    image.load()
    metadata = read_metadata(image, data)
    icc = image.info.get("icc_profile")
    pixels, alpha, grey = _to_rgb(image, rawmode, icc)
    usable = icc if _usable(icc, "L" if grey else "RGB") and source_mode not in ("CMYK", "LAB") else None
    dropped = list(metadata.dropped)
    if "mp" in image.info:
        dropped.append("further pictures of the JPEG (previews, gain maps)")
    if icc and not usable and not _usable(icc, source_mode):
        dropped.append("ICC profile (cannot be applied; taken as sRGB)")
    if turned in range(2, 9) and b"+" not in data[:4]:  # a BigTIFF's tags are not carried over: it stays upright
        pixels = to_stored_layout(pixels, turned)
        alpha = None if alpha is None else to_stored_layout(alpha, turned)
    return DecodedImage(
        pixels=_frozen(pixels),
        grey=grey,
        alpha=None if alpha is None or bool((alpha == _OPAQUE).all()) else _frozen(alpha),
        orientation=orientation_of(metadata.exif),
        icc=usable,
        metadata=replace(metadata, dropped=tuple(dropped)),
        source_format="JPEG" if image.format == "MPO" else str(image.format),
        source_mode=source_mode,
    )


def _frozen(array: NDArray[np.generic]) -> Pixels:
    frozen: Pixels = np.ascontiguousarray(array, dtype=np.uint8)
    frozen.setflags(write=False)
    return frozen


def _rawmode(image: ImageFile.ImageFile) -> str:
    """How the samples lie in the file, such as "L;4"; known before the pixels are loaded only."""
    args = image.tile[0].args if image.tile else ""
    return str(args[0] if isinstance(args, tuple) and args else args)


def _to_rgb(
    image: ImageFile.ImageFile, rawmode: str, icc: bytes | None
) -> tuple[NDArray[np.generic], NDArray[np.generic] | None, bool]:
    """Returns pixels (H, W, 3), alpha (H, W) or None, and whether the source is grey."""
    mode = image.mode
    if mode in ("1", "L", "F", "I") or mode.startswith("I;16"):
        grey = _grey_levels(image)
        return np.repeat(grey[:, :, None], 3, axis=2), _grey_key(image, rawmode), True
    if mode in ("LA", "La"):
        both = np.asarray(image.convert("LA"))
        return np.repeat(both[:, :, :1], 3, axis=2), both[:, :, 1], True
    if mode in ("CMYK", "LAB"):
        return np.asarray(_separations_to_srgb(image, icc)), None, False
    if mode == "RGB" and "transparency" in image.info:
        return _colour_key(image, rawmode)
    if mode in ("RGBA", "RGBa", "PA") or (mode == "P" and "transparency" in image.info):
        four = np.asarray(image.convert("RGBA"))
        return four[:, :, :3], four[:, :, 3], False
    if mode in ("RGB", "RGBX", "P", "YCbCr"):
        return np.asarray(image.convert("RGB")), None, False
    raise DecodeError(f"pixels of mode {mode} are not supported; convert the file to 8-bit RGB")


def _colour_key(image: Image.Image, rawmode: str) -> tuple[NDArray[np.generic], NDArray[np.generic], bool]:
    """RGB with one colour declared transparent (PNG tRNS)."""
    if "16" in rawmode:
        raise DecodeError("16-bit RGB with a transparent colour, which 8 bit cannot tell apart; use an alpha channel")
    pixels = np.asarray(image)
    key = np.asarray(image.info["transparency"])
    return pixels, np.where((pixels == key).all(axis=2), 0, _OPAQUE).astype(np.uint8), False


def _grey_key(image: Image.Image, rawmode: str) -> NDArray[np.generic] | None:
    """Alpha of a grey image with one level declared transparent (PNG tRNS), compared at the file's depth."""
    level = image.info.get("transparency")
    if not isinstance(level, int):
        return None
    scale = {"L;2": 85, "L;4": 17}.get(rawmode, 1)  # Pillow scales the pixels but not the level
    samples = np.asarray(image.convert("L") if image.mode == "1" else image)
    return np.where(samples == level * scale, 0, _OPAQUE).astype(np.uint8)


def _grey_levels(image: Image.Image) -> NDArray[np.generic]:
    """Grey of any depth as uint8 (H, W): scaled by its full range and rounded, never clipped."""
    if image.mode in ("1", "L"):
        return np.asarray(image.convert("L"))
    samples = np.asarray(image)
    tags = image.tag_v2 if isinstance(image, TiffImagePlugin.TiffImageFile) else {}
    low, high = float(samples.min()), float(samples.max())
    if image.mode == "F":
        known, full = low >= 0 and high <= 1, 1.0
    elif image.mode == "I":
        known, full = low >= 0 and 255 < high <= 65_535, 65_535.0
    else:
        known, full = True, 4095.0 if tags.get(_BITS_PER_SAMPLE) in (12, (12,)) else 65_535.0
    if not known:  # not a number fails the comparisons too
        raise DecodeError(
            f"grey samples of mode {image.mode} from {low:g} to {high:g}: what is white is not known;"
            " convert the file to 8 or 16 bit"
        )
    levels: Pixels = np.rint(samples.astype(np.float32) * np.float32(255 / full)).astype(np.uint8)
    return 255 - levels if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO else levels  # Pillow does not invert these


def _separations_to_srgb(image: Image.Image, icc: bytes | None) -> Image.Image:
    if image.mode == "LAB":
        profile: ImageCms.ImageCmsProfile | None = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB"))
    else:
        profile = _profile(icc)
    transform = _transform(profile, image.mode)
    return image.convert("RGB") if transform is None else _apply(transform, image)


def _srgb_pixels(image: DecodedImage) -> Pixels:
    transform = _transform(_profile(image.icc), "L" if image.grey else "RGB")
    if transform is None or _changes_nothing(transform, grey=image.grey):
        return image.pixels
    source = Image.fromarray(np.ascontiguousarray(image.pixels[:, :, 0]) if image.grey else image.pixels)
    return np.asarray(_apply(transform, source))


def _profile(icc: bytes | None) -> ImageCms.ImageCmsProfile | None:
    try:
        return ImageCms.ImageCmsProfile(io.BytesIO(icc)) if icc else None
    except (OSError, ImageCms.PyCMSError):
        return None  # corrupt: the caller takes the image as sRGB and says so


def _transform(profile: ImageCms.ImageCmsProfile | None, mode: str) -> ImageCms.ImageCmsTransform | None:
    """From a profile to sRGB; None if there is none or it does not describe pixels of this mode."""
    space = {"L": "GRAY", "RGB": "RGB", "CMYK": "CMYK", "LAB": "Lab"}.get(mode)
    if profile is None or profile.profile.xcolor_space.strip() != space:
        return None
    try:
        return ImageCms.buildTransform(
            profile,
            ImageCms.createProfile("sRGB"),
            mode,
            "RGB",
            ImageCms.Intent.RELATIVE_COLORIMETRIC,
            ImageCms.Flags.BLACKPOINTCOMPENSATION,
        )
    except ImageCms.PyCMSError:
        return None  # as above


def _usable(icc: bytes | None, mode: str) -> bool:
    return _transform(_profile(icc), mode) is not None


def _changes_nothing(transform: ImageCms.ImageCmsTransform, *, grey: bool) -> bool:
    """True for sRGB under any name: no colour of a 17 x 17 x 17 cube moves by more than one level."""
    steps = np.linspace(0, 255, 17).astype(np.uint8)
    cube = np.stack(np.meshgrid(steps, steps, steps, indexing="ij"), axis=-1).reshape(17, -1, 3)
    probe = Image.fromarray(np.ascontiguousarray(cube[:, :, 0]) if grey else cube)
    expected = np.asarray(probe.convert("RGB")).astype(np.int16)
    return bool(np.abs(np.asarray(_apply(transform, probe)) - expected).max() <= 1)


def _apply(transform: ImageCms.ImageCmsTransform, image: Image.Image) -> Image.Image:
    result = ImageCms.applyTransform(image, transform)
    if result is None:  # it answers None only when it works in place
        raise DecodeError("the colour transform gave no image")
    return result
