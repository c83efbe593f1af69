"""The upper frequencies of an image's patches, by the discrete cosine transform (DCT-II)."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

DctNorm = Literal["ortho", "none"]


def dct_matrix(size: int, norm: DctNorm = "ortho") -> Tensor:
    """Rows are the cosines of the DCT-II, so that ``matrix @ signal`` transforms; ``(size, size)`` float64.

    X_m = 2 sum_n x_n cos(pi m (2 n + 1) / (2 size)), which "ortho" scales to an orthogonal matrix (Ahmed et al. 1974).
    """
    places = torch.arange(size, dtype=torch.float64)
    matrix = 2 * torch.cos(math.pi / (2 * size) * torch.outer(places, 2 * places + 1))
    if norm == "ortho":
        matrix *= math.sqrt(1 / (2 * size))
        matrix[0] *= math.sqrt(1 / 2)
    return matrix


class PatchFrequencies:
    """Coefficients (m, n) with m and n of at least s / 2, of all whole s x s patches of square tiles.

    The grid of patches may start at another row and column in every tile, so that patches of overlapping tiles can
    be those of one image.

    Args:
        side: S, of a tile.
        patch: s, even and at most S.
        norm: of the DCT.
        device: where tiles are.

    Raises:
        ValueError: the patch is odd, below 2 or larger than a tile.
    """

    def __init__(self, side: int, patch: int, norm: DctNorm, device: torch.device) -> None:
        if patch < 2 or patch % 2 or patch > side:
            raise ValueError(f"patches of {patch}: use an even number from 2 to the tile's side of {side}")
        self.patch = patch
        high = dct_matrix(patch, norm)[patch // 2 :]
        # One matrix per start of the grid; patches that do not fit keep rows of zeros.
        grids = torch.zeros(patch, side // patch, len(high), side, dtype=torch.float64)
        for start in range(patch):
            for number in range((side - start) // patch):
                first = start + number * patch
                grids[start, number, :, first : first + patch] = high
        self._grids = grids.flatten(1, 2).float().to(device)
        self._patches = torch.tensor([(side - start) // patch for start in range(patch)], device=device)

    def coefficients(self, tiles: Tensor, starts: Tensor) -> Tensor:
        """The kept coefficients, patch by patch as the patches lie in the tile; zeros where a patch does not fit.

        Args:
            tiles: ``(N, C, S, S)`` float32.
            starts: row and column of the first whole patch in each tile, 0 to s - 1; ``(N, 2)`` int64.

        Returns:
            ``(N, C, P s / 2, P s / 2)`` with P the whole part of S / s.
        """
        rows, columns = (self._grids[starts[:, axis]].unsqueeze(1) for axis in (0, 1))
        return rows @ tiles @ columns.mT

    def count(self, channels: int, starts: Tensor) -> Tensor:
        """How many of the ``coefficients`` belong to whole patches, ``(N,)``."""
        patches: Tensor = self._patches[starts].prod(1)
        return patches * channels * (self.patch // 2) ** 2
