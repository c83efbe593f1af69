"""How many items a statement about a shard needs: defects, rates, means and paired differences."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable

from scipy.stats import beta, binom, hypergeom, norm

_LARGEST = 10**9


def to_find_a_defect(share: float, *, population: int | None = None, alpha: float = 0.05, allowed: int = 0) -> int:
    """Items to check so that, where at least this share fails, more than `allowed` failures are seen.

    The chance to see `allowed` failures or fewer is then at most `alpha`: hypergeometric in a finite population,
    binomial in a large one. With none allowed in a large population: ceil(ln alpha / ln(1 - share)).

    Args:
        share: of failing items that must not go unseen, in (0, 1).
        population: items in the shard; None for many.
        alpha: risk of missing them.
        allowed: failures that are accepted; decide before sampling.

    Raises:
        ValueError: numbers out of range, or no more than `allowed` items of the population fail.
    """
    _check_share("share", share)
    _check_share("alpha", alpha)
    if allowed < 0:
        raise ValueError(f"allowed must not be negative, but is {allowed}")
    if population is None:
        return _smallest(lambda count: bool(binom.cdf(allowed, count, share) <= alpha), _LARGEST)
    defects = math.ceil(round(share * population, 9))  # 0.07 * 100 is a little more than 7
    if defects <= allowed:
        raise ValueError(f"{defects} of {population} fail and {allowed} are allowed: no sample can find too many")
    return _smallest(lambda count: bool(hypergeom.cdf(allowed, population, defects, count) <= alpha), population)


def defect_bound(count: int, *, failures: int = 0, alpha: float = 0.05) -> float:
    """Upper limit of the share of failing items after `count` checks (Clopper-Pearson, one-sided).

    Without failures 1 - alpha^(1/count), about 3/count.
    """
    if not 0 <= failures <= count or count < 1:
        raise ValueError(f"{failures} failures of {count} checks cannot be")
    return 1.0 if failures == count else float(beta.ppf(1 - alpha, failures + 1, count - failures))


def for_rate(margin: float, *, population: int | None = None, rate: float = 0.5, confidence: float = 0.95) -> int:
    """Items for a failure rate within plus or minus `margin`; `rate` 0.5 where nothing is known."""
    _check_share("margin", margin)
    z = _quantile(confidence)
    return _in_population(z**2 * rate * (1 - rate) / margin**2, population)


def for_mean(deviation: float, half_width: float, *, population: int | None = None, confidence: float = 0.95) -> int:
    """Items for the mean of a score of this standard deviation within plus or minus `half_width`."""
    _check_positive(deviation=deviation, half_width=half_width)
    return _in_population((_quantile(confidence) * deviation / half_width) ** 2, population)


def for_paired_difference(effect: float, deviation: float, *, confidence: float = 0.95, power: float = 0.80) -> int:
    """Units that show a mean paired difference of `effect` with this power.

    Args:
        effect: the smallest difference that matters.
        deviation: standard deviation of the per-unit differences, from a pilot.
        confidence: of the two-sided interval that must leave out zero.
        power: chance that it does.
    """
    _check_positive(effect=effect, deviation=deviation)
    z = _quantile(confidence) + float(norm.ppf(power))
    # Two more, because the deviation is estimated too.
    return math.ceil((z * deviation / effect) ** 2) + 2


def in_clusters(count: int, *, per_cluster: int, correlation: float) -> int:
    """Images that tell as much as `count` independent ones, `per_cluster` of them of each subject.

    Args:
        count: sample size as if images were independent.
        per_cluster: images per subject.
        correlation: of images of one subject, in [0, 1]; near 1 count subjects, not images.
    """
    if per_cluster < 1 or not 0 <= correlation <= 1:
        raise ValueError("per_cluster must be at least 1 and correlation in [0, 1]")
    return math.ceil(round(count * (1 + (per_cluster - 1) * correlation), 9))


def for_width(low: float, high: float, count: int, target: float) -> int:
    """Units that would bring a measured interval down to the target width, as widths fall with the root of n.

    Raises:
        ValueError: the interval is empty, or the target not positive.
    """
    _check_positive(width=high - low, target=target)
    return max(2, math.ceil(round(count * ((high - low) / target) ** 2, 9)))


def _in_population(count: float, population: int | None) -> int:
    """Whole items, fewer where the population is small; never more than there are."""
    if population is None:
        return math.ceil(count)
    return min(population, math.ceil(count / (1 + (count - 1) / population)))


def _smallest(enough: Callable[[int], bool], largest: int) -> int:
    """The smallest number from 1 that is enough, where every larger one is too."""
    return bisect_left(range(1, largest + 1), True, key=enough) + 1


def _quantile(confidence: float) -> float:
    _check_share("confidence", confidence)
    return float(norm.ppf((1 + confidence) / 2))


def _check_share(name: str, value: float) -> None:
    if not 0 < value < 1:
        raise ValueError(f"{name} must lie between 0 and 1, but is {value}")


def _check_positive(**values: float) -> None:
    for name, value in values.items():
        if not value > 0:
            raise ValueError(f"{name} must be positive, but is {value}")
