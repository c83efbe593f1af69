"""FID: the Fréchet distance of two sets of images by Inception's features. Secondary at best, and never per subject.

Heusel, Ramsauer, Unterthiner, Nessler, Hochreiter, "GANs Trained by a Two Time-Scale Update Rule" (NeurIPS 2017),
equation 6. Its bias falls with the number of images, so that it is not even monotone on small sets: with fewer images
than features the covariances are not of full rank, and it is refused. `kid` is unbiased on any number.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance

from pipeline.verify.metrics.base import GIVEN, Facts
from pipeline.verify.metrics.inception import FEATURES, Inception

FEWEST_FID = FEATURES
"""Images per set."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FrechetDistance:
    """The distance of two sets, and what it rests on."""

    value: float
    # Of either set.
    images: tuple[int, int]
    # Of either covariance; below `features` the distance is of a part of the space only.
    ranks: tuple[int, int]
    features: int

    @property
    def full_rank(self) -> bool:
        """Whether both covariances are; equal or nearly equal images in a set take rank away."""
        return min(self.ranks) == self.features

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self) | {"full_rank": self.full_rank}


def fid_facts(inception: Inception) -> Facts:
    """What a report says of the distance."""
    how = (
        "torchmetrics' Fréchet distance of Inception features (2015-12-05, 2048, TensorFlow 1 resize to 299x299); "
        f"at least {FEWEST_FID} images per set; biased, secondary"
    )
    return Facts(name="fid", better="neither", how=how, weights=inception.weights, licence=GIVEN)


class FrechetSets:
    """Two sets of images, of which only sums over their features are kept.

    Args:
        network: images uint8 `(N, 3, H, W)` to features `(N, D)`; with `num_features`.
        fewest: images per set; at least `num_features`, or covariances cannot be of full rank.
        device: of the network.
    """

    def __init__(self, network: nn.Module, *, fewest: int = FEWEST_FID, device: str = "cpu") -> None:
        self._metric: Any = FrechetInceptionDistance(feature=network).to(device)
        self._fewest, self._device, self._counts = fewest, device, [0, 0]

    @torch.no_grad()
    def add(self, side: int, images: Tensor) -> None:
        """Adds images uint8 `(N, 3, H, W)` to set 0 or 1; the order of the sets does not matter."""
        self._metric.update(images.to(self._device), real=side == 0)
        self._counts[side] += len(images)

    def distance(self) -> FrechetDistance:
        """The distance of what was added.

        Raises:
            ValueError: too few images in a set.
        """
        counts, metric = (self._counts[0], self._counts[1]), self._metric
        if min(counts) < self._fewest:
            raise ValueError(f"{counts[0]} and {counts[1]} images: fid needs at least {self._fewest} in each set")
        sides = (
            (metric.real_features_sum, metric.real_features_cov_sum, counts[0]),
            (metric.fake_features_sum, metric.fake_features_cov_sum, counts[1]),
        )
        ranks = [_rank(*side) for side in sides]
        features = len(metric.real_features_sum)
        return FrechetDistance(
            value=float(metric.compute()), images=counts, ranks=(ranks[0], ranks[1]), features=features
        )


def _rank(total: Tensor, products: Tensor, count: int) -> int:
    """Rank of the covariance of features, from their sum and the sum of their products."""
    mean = total / count
    covariance = (products - count * torch.outer(mean, mean)) / (count - 1)
    # The difference is known no better than the products are, which may be much larger than it.
    rounding = len(total) * torch.finfo(products.dtype).eps * products.norm() / (count - 1)
    return int(torch.linalg.matrix_rank(covariance, hermitian=True, atol=float(rounding)))
