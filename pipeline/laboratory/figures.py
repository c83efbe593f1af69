"""A measured number with what it has to reach."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One number of an evaluation."""

    model: str
    name: str
    value: float
    sample: str
    """What it was measured on, with the sample size."""
    low: float | None = None
    high: float | None = None
    """95 % bootstrap interval, where there is one."""
    at_least: float | None = None
    at_most: float | None = None
    sound: bool = True
    """False if the measurement cannot count for its bar, for example because the control failed."""

    @property
    def reached(self) -> bool | None:
        """Whether the bar is met; None where there is none."""
        if self.at_least is None and self.at_most is None:
            return None
        return (
            self.sound
            and (self.at_least is None or self.value >= self.at_least)
            and (self.at_most is None or self.value <= self.at_most)
        )

    def to_dict(self) -> dict[str, object]:
        """Plain values for JSON; numbers that are not finite become None."""
        interval = None if self.low is None or self.high is None else [_number(self.low), _number(self.high)]
        return {
            "model": self.model,
            "name": self.name,
            "value": _number(self.value),
            "interval_95": interval,
            "sample": self.sample,
            "at_least": self.at_least,
            "at_most": self.at_most,
            "reached": self.reached,
        }


def _number(value: float) -> float | None:
    return round(value, 4) if math.isfinite(value) else None


def bootstrap_interval(
    values: Sequence[float], groups: Sequence[str] | None = None, *, seed: int = 0, resamples: int = 10_000
) -> tuple[float, float]:
    """The 95 % percentile interval of the mean over resampled units.

    Args:
        values: one per image or subject.
        groups: what is drawn together, for images of one subject are not independent; None draws each alone.
    """
    array = np.asarray(values, dtype=np.float64)
    names, places = np.unique(np.asarray(groups if groups is not None else range(len(array))), return_inverse=True)
    sums, sizes = np.bincount(places, array), np.bincount(places)
    draws = np.random.default_rng(seed).integers(0, len(names), (resamples, len(names)))
    means = sums[draws].sum(axis=1) / sizes[draws].sum(axis=1)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def bootstrap_ratio(
    above: Sequence[float], below: Sequence[float], *, seed: int = 0, resamples: int = 10_000
) -> tuple[float, float]:
    """The 95 % percentile interval of sum(above) / sum(below) over resampled pairs.

    Resamples whose denominator is not positive have no ratio and count as the worst on either side.
    """
    pairs = np.stack([np.asarray(above, dtype=np.float64), np.asarray(below, dtype=np.float64)])
    random = np.random.default_rng(seed)
    draws = random.integers(0, pairs.shape[1], (resamples, pairs.shape[1]))
    top, bottom = pairs[0][draws].sum(axis=1), pairs[1][draws].sum(axis=1)
    usable = bottom > 0
    ratios = np.full(resamples, np.nan)
    ratios[usable] = top[usable] / bottom[usable]
    low, high = (np.where(usable, ratios, extreme) for extreme in (-np.inf, np.inf))
    # "nearest", because infinity cannot be interpolated.
    return float(np.percentile(low, 2.5, method="nearest")), float(np.percentile(high, 97.5, method="nearest"))
