"""A case set of our own for tests and trials: drawn shapes on patterns, free of photos and of anybody's rights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from pipeline.verify.editors.cases import PROMPT_FILE

_ORIENTATION_TAG, _QUARTER_TURN = 0x0112, 6
# Case, waves across and down, ground's colour, shape's corners (1: a disc) and colour, prompt.
_DRAWINGS = (
    ("disc-on-stripes", (6, 0), (40, 90, 160), 1, (220, 60, 40), "a photo of a sunflower"),
    ("square-on-diagonals", (4, 4), (70, 130, 60), 4, (240, 220, 90), "a photo of a chair"),
    ("triangle-on-waves", (1, 3), (150, 120, 90), 3, (60, 40, 120), "a photo of a pyramid"),
    ("hexagon-on-slope", (1, 1), (120, 160, 190), 6, (30, 110, 60), "a photo of a turtle"),
    ("pentagon-on-bars", (0, 5), (200, 150, 150), 5, (90, 60, 30), "a photo of a starfish"),
    ("disc-on-dusk", (1, 0), (60, 50, 80), 1, (240, 200, 120), "a photo of a watch"),
)


def drawing(number: int, side: int = 128) -> Image.Image:
    """One of the six drawings, RGB, `side` wide and three quarters as high for every other one."""
    _, waves, ground, corners, colour, _ = _DRAWINGS[number]
    height = side if number % 2 == 0 else side * 3 // 4
    image = Image.fromarray(_pattern(height, side, waves, ground))
    middle, radius = (side * 0.45, height * 0.55), height * 0.3
    if corners == 1:
        ImageDraw.Draw(image).circle(middle, radius, fill=colour)
    else:
        ImageDraw.Draw(image).regular_polygon((middle, radius), corners, rotation=10 * number, fill=colour)
    return image


def _pattern(height: int, width: int, waves: tuple[int, int], colour: tuple[int, int, int]) -> npt.NDArray[np.uint8]:
    y, x = np.mgrid[0:height, 0:width].astype(np.float64)
    wave = np.sin(2 * np.pi * (waves[0] * x / width + waves[1] * y / height))
    pattern: npt.NDArray[np.uint8] = np.clip(np.asarray(colour) + 50 * wave[..., None], 0, 255).astype(np.uint8)
    return pattern


def write_case_set(root: Path, *, side: int = 128, broken: bool = False) -> None:
    """Writes six cases that load, among them the awkward kinds that collected sets hold, in Defense-Edit's layout.

    A transparent PNG, a PNG named .jpg, a JPEG turned by its EXIF, a grey PNG, a prompt with byte order mark and
    Windows line ends, hidden and nested files.

    Args:
        root: folder to write into; must not hold these cases yet.
        side: width in pixels, at least 32.
        broken: adds five folders that are to be refused: an empty prompt, none, two images, none, half an image.

    Raises:
        FileExistsError: a case is there already.
        ValueError: `side` is below 32.
    """
    if side < 32:
        raise ValueError(f"side is {side}; choose at least 32")
    folders = [root / row[0] for row in _DRAWINGS]
    for folder, row in zip(folders, _DRAWINGS, strict=True):
        folder.mkdir(parents=True)
        (folder / PROMPT_FILE).write_text(row[-1] + "\n", encoding="utf-8")
    plain, misnamed, clear, turned, grey, messy = folders
    drawing(0, side).save(plain / "image.png")
    drawing(1, side).save(misnamed / "image.jpg", "PNG")
    see_through = drawing(2, side).convert("RGBA")
    see_through.putalpha(Image.linear_gradient("L").resize(see_through.size))
    see_through.save(clear / "image.png")
    _save_turned(drawing(3, side), turned / "IMAGE.JPG")
    drawing(4, side).convert("L").save(grey / "image.png")
    drawing(5, side).save(messy / "image.webp", lossless=True)
    (messy / PROMPT_FILE).write_bytes(b"\xef\xbb\xbf" + _DRAWINGS[5][-1].encode() + b"  \r\n\r\n")
    (messy / ".DS_Store").write_bytes(b"\0")
    (messy / "old").mkdir()
    drawing(0, side).save(messy / "old" / "image.png")
    if broken:
        _write_broken(root, side)


def _save_turned(image: Image.Image, path: Path) -> None:
    """Stores it lying on its side; the EXIF orientation puts it upright."""
    exif = Image.Exif()
    exif[_ORIENTATION_TAG] = _QUARTER_TURN
    image.transpose(Image.Transpose.ROTATE_90).save(path, quality=95, exif=exif)


def _write_broken(root: Path, side: int) -> None:
    image = drawing(0, side)
    for name, prompt, pictures in (
        ("broken-empty-prompt", " \r\n", ("image.png",)),
        ("broken-no-prompt", None, ("image.png",)),
        ("broken-two-images", "a photo of a cat", ("image.png", "other.png")),
        ("broken-no-image", "a photo of a cat", ()),
        ("broken-half-image", "a photo of a cat", ("image.png",)),
    ):
        folder = root / name
        folder.mkdir()
        if prompt is not None:
            (folder / PROMPT_FILE).write_text(prompt, encoding="utf-8")
        for picture in pictures:
            image.save(folder / picture)
    half = root / "broken-half-image" / "image.png"
    half.write_bytes(half.read_bytes()[: half.stat().st_size // 2])
