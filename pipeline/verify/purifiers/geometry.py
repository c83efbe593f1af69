"""Tiles and sizes: how images of any size go through models of one size."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Piece(NamedTuple):
    """A rectangle that a tile shares with the image; offsets and sizes in pixels."""

    tile: int
    tile_top: int
    tile_left: int
    top: int
    left: int
    height: int
    width: int


def shrink_to(images: Tensor, side: int) -> Tensor:
    """Brings the shorter side of `(B, C, H, W)` down to `side` (antialiased bicubic); smaller ones stay as they are."""
    height, width = images.shape[-2:]
    short = min(height, width)
    if short <= side:
        return images
    return resize(images, max(side, round(height * side / short)), max(side, round(width * side / short)))


def resize(images: Tensor, height: int, width: int) -> Tensor:
    """Antialiased bicubic to a size, clipped to [0, 1] because bicubic overshoots."""
    if images.shape[-2:] == (height, width):
        return images
    return F.interpolate(images, (height, width), mode="bicubic", antialias=True).clamp(0, 1)


def tile_pieces(height: int, width: int, side: int, *, corners: bool) -> list[Piece]:
    """Square tiles at half a side's stride, the last ones flush with the right and lower border.

    Args:
        height: Rows of the image, at least `side`.
        width: Columns of the image, at least `side`.
        side: Of a tile.
        corners: One more tile is made of the image's four corners, each a quarter of it (GrIDPure), so
            that no pixel lies in one tile only.

    Returns:
        What each tile shares with the image: one piece per window, four for the tile of corners.

    Raises:
        ValueError: the image is smaller than a tile.
    """
    if min(height, width) < side:
        raise ValueError(f"an image of {height} x {width} holds no tile of {side}: pad it first")
    windows = [(top, left) for top in _starts(height, side) for left in _starts(width, side)]
    pieces = [Piece(number, 0, 0, top, left, side, side) for number, (top, left) in enumerate(windows)]
    if corners:
        half = side // 2
        rows = ((0, 0, half), (half, height - (side - half), side - half))
        columns = ((0, 0, half), (half, width - (side - half), side - half))
        pieces += [
            Piece(len(windows), tile_top, tile_left, top, left, tall, wide)
            for tile_top, top, tall in rows
            for tile_left, left, wide in columns
        ]
    return pieces


def _starts(length: int, side: int) -> list[int]:
    return [*range(0, length - side, side // 2), length - side]


def cut(images: Tensor, pieces: Sequence[Piece], side: int) -> Tensor:
    """Tiles `(B, K, C, side, side)` of images `(B, C, H, W)`."""
    tiles = images.new_empty((len(images), pieces[-1].tile + 1, images.shape[1], side, side))
    for piece in pieces:
        tiles[:, piece.tile, :, *_in_tile(piece)] = images[:, :, *_in_image(piece)]
    return tiles


def join(tiles: Tensor, pieces: Sequence[Piece], height: int, width: int) -> Tensor:
    """Images `(B, C, height, width)`: every pixel is the mean over the tiles `(B, K, C, S, S)` that it lies in."""
    total = tiles.new_zeros((len(tiles), tiles.shape[2], height, width))
    for piece in pieces:
        total[:, :, *_in_image(piece)] += tiles[:, piece.tile, :, *_in_tile(piece)]
    return total / coverage(pieces, height, width).to(tiles)


def coverage(pieces: Sequence[Piece], height: int, width: int) -> Tensor:
    """How many tiles each pixel lies in, `(height, width)` int64."""
    count = torch.zeros((height, width), dtype=torch.int64)
    for piece in pieces:
        count[_in_image(piece)] += 1
    return count


def _in_image(piece: Piece) -> tuple[slice, slice]:
    return slice(piece.top, piece.top + piece.height), slice(piece.left, piece.left + piece.width)


def _in_tile(piece: Piece) -> tuple[slice, slice]:
    return (
        slice(piece.tile_top, piece.tile_top + piece.height),
        slice(piece.tile_left, piece.tile_left + piece.width),
    )
