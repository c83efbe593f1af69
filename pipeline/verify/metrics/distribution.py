"""Distances between two sets of images, by their embeddings: KID and CMMD.

Both are the unbiased squared maximum mean discrepancy (Gretton et al., JMLR 13, 2012, lemma 6), with the kernel of
Bińkowski et al., "Demystifying MMD GANs" (ICLR 2018), and of Jayasumana et al., "Rethinking FID" (CVPR 2024). On other
embeddings than those of the papers the numbers are not the papers' numbers: name the embedder with them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torchmetrics.image.kid import maximum_mean_discrepancy, poly_mmd

from protectors.randomness import streams

FEWEST = 100
"""Images per set; with fewer the distance is mostly noise."""
_BLOCKS = 10
_CMMD_SIGMA = 10.0
_CMMD_SCALE = 1000.0


@dataclass(frozen=True, slots=True, kw_only=True)
class SetDistance:
    """One distance of two sets: the mean over disjoint blocks; lower is more alike, and below zero is noise."""

    name: str
    value: float
    standard_error: float
    # Images per set that were used.
    images: int
    blocks: int
    seed: int

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def kid(left: Tensor, right: Tensor, *, seed: int = 0) -> SetDistance:
    """Kernel distance with k(x, y) = (x·y + 1)^3.

    The paper divides x·y by the dimension because Inception's features are not of length one; these are.

    Args:
        left: unit vectors `(N, D)` of `Embedder`.
        right: unit vectors `(M, D)`.
        seed: of the blocks.

    Raises:
        ValueError: fewer than a hundred images on a side.
    """
    return _over_blocks("kid", lambda a, b: float(poly_mmd(a, b, degree=3, gamma=1.0, coef=1.0)), left, right, seed)


def cmmd(left: Tensor, right: Tensor, *, seed: int = 0) -> SetDistance:
    """Kernel distance with ``k(x, y) = exp(-|x - y|^2 / (2·10^2))``, times 1000; arguments and errors as `kid`."""
    return _over_blocks("cmmd", _gaussian_mmd, left, right, seed)


def _gaussian_mmd(left: Tensor, right: Tensor) -> float:
    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return torch.exp(-torch.cdist(a, b).square() / (2 * _CMMD_SIGMA**2))

    return _CMMD_SCALE * float(maximum_mean_discrepancy(kernel(left, left), kernel(left, right), kernel(right, right)))


def _over_blocks(
    name: str, distance: Callable[[Tensor, Tensor], float], left: Tensor, right: Tensor, seed: int
) -> SetDistance:
    if min(len(left), len(right)) < FEWEST:
        raise ValueError(f"{len(left)} and {len(right)} images: {name} needs at least {FEWEST} on each side")
    size = min(len(left), len(right)) // _BLOCKS
    # Disjoint blocks are independent, so their spread is an honest standard error; overlapping subsets are not.
    # An order of its own for either side: pairs that met in one block (a photo and its edit) would look more alike
    # than their sets are.
    sides = ("left", "right")
    generators = [generator for side in sides for generator in streams([seed], f"metrics/{name}/{side}")]
    orders = [torch.randperm(len(side), generator=g) for side, g in zip((left, right), generators, strict=True)]
    # Kernels of unit vectors are nearly equal; float32 would lose the difference.
    shuffled = [side[order].double() for side, order in zip((left, right), orders, strict=True)]
    blocks = zip(*(torch.split(side[: size * _BLOCKS], size) for side in shuffled), strict=True)
    values = torch.tensor([distance(a, b) for a, b in blocks], dtype=torch.float64)
    return SetDistance(
        name=name,
        value=float(values.mean()),
        standard_error=float(values.std()) / math.sqrt(_BLOCKS),
        images=size * _BLOCKS,
        blocks=_BLOCKS,
        seed=seed,
    )
