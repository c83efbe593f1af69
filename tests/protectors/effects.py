"""What tests of effects on the embedded models share: photos, and paired differences with intervals."""

from __future__ import annotations

import torch
from skimage import data
from skimage.transform import resize
from torch import Tensor

from pipeline.verify.bootstrap import Interval, Plan, Sample, figures_with_intervals


def photos(side: int = 128) -> Tensor:
    """Six squares out of three photos, `(6, 3, side, side)` in [0, 1]."""
    squares = []
    for photo in (data.astronaut(), data.chelsea(), data.coffee()):
        edge = min(photo.shape[:2])
        for square in (photo[:edge, :edge], photo[-edge:, -edge:]):
            squares.append(torch.from_numpy(resize(square, (side, side), anti_aliasing=True)).permute(2, 0, 1))
    return (torch.stack(squares).float().clamp(0, 1) * 255).round() / 255


def mean_difference(above: Tensor, below: Tensor) -> Interval:
    differences = (above - below).double().numpy()[:, None]
    means = figures_with_intervals(Sample.of_units(differences), lambda drawn: {"mean": drawn.mean((1, 2))}, Plan())
    return means["mean"]


def is_above_zero(interval: Interval) -> bool:
    return interval.low is not None and interval.low > 0
