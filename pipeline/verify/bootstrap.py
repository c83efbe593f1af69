"""Intervals from resampled units: every cell of a drawn unit travels together, every figure is computed anew.

Efron and Tibshirani, "An Introduction to the Bootstrap" (1993): percentile interval, chapter 13; BCa, chapter 14.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.stats import norm, permutation_test

Floats = npt.NDArray[np.float64]
Statistic = Callable[[Floats], Mapping[str, Floats]]
"""Units' values `(R, units, columns)` to named figures `(R,)`; not a number where a figure does not exist."""

RESAMPLES = 10_000
CONFIDENCE = 0.95
BCA_UNITS = 20
"""From so many units on intervals are BCa; below, its correction is itself too noisy."""
NESTED_SEEDS = 3
"""From so many seeds in every unit on, seeds are resampled inside the units too."""
_TOGETHER = 2_000_000  # drawn numbers in memory at a time


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """A figure with its 95 % interval."""

    value: float
    # None: no limit on this side, or fewer than two units.
    low: float | None
    high: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How the units are resampled; stored with every result."""

    seed: int = 0
    resamples: int = RESAMPLES

    def describe(self, sample: Sample) -> dict[str, Any]:
        """What a report records."""
        return {
            "kind": "BCa" if sample.units >= BCA_UNITS else "percentile",
            "confidence": CONFIDENCE,
            "resamples": self.resamples,
            "seed": self.seed,
            "levels": ["unit", "seed"] if sample.nested else ["unit"],
        }


class Sample:
    """The measured values, by unit and seed.

    Args:
        values: one array `(seeds, columns)` per unit; the number of seeds may differ, that of columns may not.

    Raises:
        ValueError: no units, a unit without seeds, or a value that is not finite.
    """

    def __init__(self, values: Sequence[Floats]) -> None:
        if not values or not all(len(unit) for unit in values):
            raise ValueError("a sample needs at least one unit, and every unit at least one seed")
        self.seeds = np.array([len(unit) for unit in values])
        self.padded = np.zeros((len(values), int(self.seeds.max()), values[0].shape[1]))
        for place, unit in enumerate(values):
            if not np.isfinite(unit).all():
                raise ValueError(f"unit {place} has a value that is not finite; leave errors out and count them")
            self.padded[place, : len(unit)] = unit

    @classmethod
    def of_units(cls, values: Floats) -> Sample:
        """A sample of one seed per unit, from `(units, columns)`."""
        return cls(list(np.asarray(values, dtype=np.float64)[:, None, :]))

    @property
    def units(self) -> int:
        """Number of units."""
        return len(self.seeds)

    @property
    def nested(self) -> bool:
        """Whether there are seeds enough to resample them too."""
        return bool(self.seeds.min() >= NESTED_SEEDS)

    @property
    def means(self) -> Floats:
        """One value per unit and column: the mean over the unit's seeds, `(units, columns)`."""
        means: Floats = self.padded.sum(axis=1) / self.seeds[:, None]
        return means

    def drawn(self, random: np.random.Generator, count: int) -> Floats:
        """`count` resamples of the units, and of their seeds where nested: `(count, units, columns)`."""
        units = random.integers(0, self.units, (count, self.units))
        if not self.nested:
            return self.means[units]
        seeds = self.seeds[units][..., None]
        places = np.arange(self.padded.shape[1])
        picked = (random.random((count, self.units, len(places))) * seeds).astype(np.int64)
        values = self.padded[units[..., None], picked]
        drawn: Floats = (values * (places < seeds)[..., None]).sum(axis=2) / seeds
        return drawn


def figures_with_intervals(sample: Sample, statistic: Statistic, plan: Plan) -> dict[str, Interval]:
    """Every figure of the statistic with its interval; all figures of a resample come from the same draw."""
    point = {name: float(value[0]) for name, value in statistic(sample.means[None]).items()}
    if sample.units < 2:
        return {name: Interval(value=value, low=None, high=None) for name, value in point.items()}
    resampled = replicates(sample, statistic, plan)
    jackknife: Mapping[str, Floats] = {}
    if sample.units >= BCA_UNITS:
        jackknife = _joined(statistic(part) for part in _left_out(sample))
    return {name: _interval(value, resampled[name], jackknife.get(name)) for name, value in point.items()}


def replicates(sample: Sample, statistic: Statistic, plan: Plan) -> dict[str, Floats]:
    """The statistic of every resample; each figure `(resamples,)`."""
    random = np.random.default_rng(plan.seed)
    return _joined(statistic(sample.drawn(random, len(part))) for part in _portions(plan.resamples, sample))


def ratio(above: Floats, below: Floats) -> Floats:
    """A share, for statistics; not a number where there is nothing to be a share of."""
    share: Floats = np.full_like(above, np.nan)
    np.divide(above, below, out=share, where=below > 0)
    return share


def _left_out(sample: Sample) -> Iterator[Floats]:
    """The sample without each of its units, `(portion, units - 1, columns)` at a time."""
    means = sample.means
    for part in _portions(sample.units, sample):
        yield np.stack([np.delete(means, unit, axis=0) for unit in part])


def _portions(count: int, sample: Sample) -> Iterator[range]:
    """0 to count - 1, as many at a time as samples of this size fit into memory."""
    size = max(1, _TOGETHER // sample.padded.size)
    return (range(start, min(start + size, count)) for start in range(0, count, size))


def _joined(parts: Iterable[Mapping[str, Floats]]) -> dict[str, Floats]:
    found = list(parts)
    return {name: np.concatenate([part[name] for part in found]) for name in found[0]}


def _interval(value: float, resampled: Floats, jackknife: Floats | None) -> Interval:
    tail = (1 - CONFIDENCE) / 2
    levels = np.array([tail, 1 - tail])
    if jackknife is not None:
        levels = _bca_levels(value, resampled, jackknife, levels)
    # A resample without a figure, such as a ratio to nothing, counts as the worst on either side; "nearest",
    # because infinity cannot be interpolated.
    low = np.quantile(np.where(np.isnan(resampled), -np.inf, resampled), levels[0], method="nearest")
    high = np.quantile(np.where(np.isnan(resampled), np.inf, resampled), levels[1], method="nearest")
    return Interval(value=value, low=_finite(low), high=_finite(high))


def _bca_levels(value: float, resampled: Floats, jackknife: Floats, levels: Floats) -> Floats:
    """The levels moved by bias and acceleration; as they are where those do not exist, e.g. without any spread."""
    # Half of the ties, or a figure of few distinct values would look biased.
    below = np.mean(resampled < value) + 0.5 * np.mean(resampled == value)
    deviations = jackknife.mean() - jackknife
    spread = float((deviations**2).sum() ** 1.5)
    if np.isnan(resampled).any() or not spread > 0 or not 0 < below < 1:
        return levels
    bias, acceleration = norm.ppf(below), (deviations**3).sum() / (6 * spread)
    shifted = bias + norm.ppf(levels)
    moved: Floats = norm.cdf(bias + shifted / (1 - acceleration * shifted))
    return moved


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def sign_flip_p(differences: Sequence[float] | Floats, *, one_sided: bool = False, seed: int = 0) -> float:
    """P-value of paired differences of mean zero: the share of sign flips with a mean as far from zero, or as high.

    Exact over all 2^n flips up to 13 units, over 10,000 random ones beyond.
    """
    result = permutation_test(
        (np.asarray(differences, dtype=np.float64),),
        lambda values, axis: values.mean(axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=RESAMPLES,
        batch=500,  # memory: as many sign flips of all units at a time
        alternative="greater" if one_sided else "two-sided",
        rng=np.random.default_rng(seed),
    )
    return float(result.pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction (Scand. J. Statist. 6, 1979); corrected p-values in the given order."""
    order = sorted(range(len(p_values)), key=lambda place: p_values[place])
    corrected, highest = [0.0] * len(p_values), 0.0
    for rank, place in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[place]))
        corrected[place] = highest
    return corrected
