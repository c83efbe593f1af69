"""Between an image's own size and the optimizer's: training scale, overlapping tiles, blending."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

OVERLAP = 4  # neighbouring tiles share at least a quarter of their side, so that no seam shows


class Box(NamedTuple):
    """A tile: rows ``top`` to ``top + height``, columns ``left`` to ``left + width``."""

    top: int
    left: int
    height: int
    width: int


def to_training_scale(pixels: npt.NDArray[np.uint8], side: int) -> npt.NDArray[np.uint8]:
    """Shrinks an image so that its shorter side is ``side`` pixels; smaller images stay as they are.

    Args:
        pixels: uint8 (H, W, 3).
        side: The size at which the model was trained.
    """
    height, width = pixels.shape[:2]
    short = min(height, width)
    if short <= side:
        return pixels
    size = (max(side, round(width * side / short)), max(side, round(height * side / short)))
    return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.LANCZOS))


def enlarge_delta(delta: npt.NDArray[np.int8], height: int, width: int) -> npt.NDArray[np.int16]:
    """Brings a perturbation to full size (bicubic). It may overshoot the budget: the caller clips.

    Args:
        delta: int8 (h, w, 3) in 8-bit levels.
        height: Rows of the result.
        width: Columns of the result.
    """
    if delta.shape[:2] == (height, width):
        return delta.astype(np.int16)
    result = np.empty((height, width, 3), np.int16)
    for channel in range(3):
        plane = Image.fromarray(delta[..., channel].astype(np.float32))
        result[..., channel] = np.rint(np.asarray(plane.resize((width, height), Image.Resampling.BICUBIC)))
    return result


def tile_boxes(height: int, width: int, side: int) -> list[Box]:
    """Covers an image with tiles of one size. An image of at most two tiles' area is one tile.

    Args:
        height: Rows of the image.
        width: Columns of the image.
        side: Largest side of a tile.
    """
    if height * width <= 2 * side * side:
        return [Box(0, 0, height, width)]
    rows, columns = _starts(height, side), _starts(width, side)
    return [Box(top, left, min(height, side), min(width, side)) for top in rows for left in columns]


def _starts(length: int, side: int) -> list[int]:
    if length <= side:
        return [0]
    stride = side - side // OVERLAP
    count = -(-(length - side) // stride) + 1
    return [round(i * (length - side) / (count - 1)) for i in range(count)]


def blend_tiles(
    tiles: Sequence[npt.NDArray[np.int8]], boxes: Sequence[Box], height: int, width: int
) -> npt.NDArray[np.int8]:
    """Joins the perturbations of tiles by a weighted mean, which cannot exceed the largest of them.

    Args:
        tiles: int8 (h, w, 3) each, in 8-bit levels.
        boxes: Where they lie; together they cover the image.
        height: Rows of the image.
        width: Columns of the image.
    """
    if len(tiles) == 1:
        return tiles[0]
    total = np.zeros((height, width, 3), np.float32)
    weights = np.zeros((height, width, 1), np.float32)
    for tile, box in zip(tiles, boxes, strict=True):
        weight = np.minimum.outer(_ramp(box.height), _ramp(box.width))[..., None]
        area = np.s_[box.top : box.top + box.height, box.left : box.left + box.width]
        total[area] += weight * tile
        weights[area] += weight
    blended: npt.NDArray[np.int8] = np.rint(total / weights).astype(np.int8)
    return blended


def _ramp(length: int) -> npt.NDArray[np.float32]:
    """1 at the border pixel, rising to the middle."""
    steps = np.arange(1, length + 1, dtype=np.float32)
    return np.minimum(steps, steps[::-1], dtype=np.float32)
