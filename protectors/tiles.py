"""Tiles: how images of any size go through pixel-space models of one size, in the layout of GrIDPure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
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


def pad_reflect(images: Tensor, height: int, width: int) -> Tensor:
    """Mirrors `(..., H, W)` at the right and lower border until it has at least this size.

    The border pixel is not repeated. Mirrors as often as needed, where torch's own padding stops after one.
    """
    rows = _mirror(images.shape[-2], max(height, images.shape[-2]), images.device)
    columns = _mirror(images.shape[-1], max(width, images.shape[-1]), images.device)
    return images[..., rows, :][..., columns]


def _mirror(length: int, total: int, device: torch.device) -> Tensor:
    period = max(1, 2 * (length - 1))
    place = torch.arange(total, device=device) % period
    return torch.minimum(place, period - place) if length > 1 else place


def mirrored_border(images: Tensor, width: int) -> Tensor:
    """Mirrors `(..., H, W)` at all four borders by `width` pixels, however small the image is."""
    height, wide = images.shape[-2:]
    right = pad_reflect(images, height + width, wide + width)
    return pad_reflect(right.flip(-2, -1), height + 2 * width, wide + 2 * width).flip(-2, -1)
