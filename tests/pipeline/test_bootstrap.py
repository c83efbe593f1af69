"""The bootstrap of paired units, on planted numbers and beside SciPy's own."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from pipeline.verify.bootstrap import (
    Floats,
    Plan,
    Sample,
    figures_with_intervals,
    holm,
    replicates,
    sign_flip_p,
)

FAST = Plan(resamples=500)


def mean_of_first(values: Floats) -> dict[str, Floats]:
    return {"mean": values[..., 0].mean(axis=1)}


def test_noise_alone_leaves_zero_inside_as_often_as_promised() -> None:
    draws = np.random.default_rng(2)
    found = [
        figures_with_intervals(Sample.of_units(draws.normal(size=(25, 1))), mean_of_first, FAST)["mean"]
        for _ in range(100)
    ]
    assert 88 <= sum(f.low <= 0 <= f.high for f in found if f.low is not None and f.high is not None) <= 99


@pytest.mark.parametrize(("units", "method"), [(12, "percentile"), (40, "BCa")])
@pytest.mark.parametrize("decimals", [6, 0])
def test_intervals_agree_with_scipys(units: int, method: str, decimals: int) -> None:
    """Also on whole numbers, where many resamples tie."""
    values = np.random.default_rng(1).exponential(size=units).round(decimals)
    ours = figures_with_intervals(Sample.of_units(values[:, None]), mean_of_first, Plan())["mean"]
    theirs = stats.bootstrap((values,), np.mean, n_resamples=10_000, method=method, rng=np.random.default_rng(0))
    # The same seed draws the same resamples; only the quantiles are read in another way.
    assert ours.low == pytest.approx(theirs.confidence_interval.low, abs=1e-3)
    assert ours.high == pytest.approx(theirs.confidence_interval.high, abs=1e-3)


def test_a_resample_carries_all_cells_of_a_unit() -> None:
    units = np.random.default_rng(0).normal(size=(15, 1)) * 100
    sample = Sample.of_units(np.c_[units, units - 0.25])
    drawn = replicates(sample, lambda values: {"gap": (values[..., 0] - values[..., 1]).mean(axis=1)}, FAST)
    np.testing.assert_allclose(drawn["gap"], 0.25, atol=1e-9)


def test_nested_resamples_spread_as_units_and_seeds_do() -> None:
    """Variance of the mean: between units var/n, plus the spread of seeds inside, with unequal numbers of seeds."""
    sample = Sample([np.array([[0.0], [3.0], [6.0]]), np.array([[1.0], [1.0], [4.0], [6.0]])])
    drawn = replicates(sample, mean_of_first, Plan(resamples=40_000))["mean"]
    inside = np.mean([np.var([0, 3, 6]) / 3, np.var([1, 1, 4, 6]) / 4])
    assert sample.nested
    assert drawn.mean() == pytest.approx(3.0, abs=0.02)
    assert drawn.var() == pytest.approx((inside + np.var([3.0, 3.0])) / 2, rel=0.05)
    assert not Sample([np.zeros((2, 1)), np.zeros((3, 1))]).nested


def test_a_ratio_without_denominator_is_the_worst_on_either_side() -> None:
    sample = Sample.of_units(np.array([[1.0], [-1.0], [1.0], [-1.0]]))

    def ratio(values: Floats) -> dict[str, Floats]:
        mean = values[..., 0].mean(axis=1)
        return {"ratio": np.where(mean > 0, 1.0, np.nan)}

    found = figures_with_intervals(sample, ratio, FAST)["ratio"]
    assert (found.low, found.high) == (None, None)


def test_a_sample_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one unit"):
        Sample([])
    with pytest.raises(ValueError, match="not finite"):
        Sample([np.array([[math.nan]])])


def test_sign_flips_are_exact() -> None:
    assert sign_flip_p([1.0, 2.0, 3.0]) == 2 / 8
    assert sign_flip_p([1.0, 2.0, 3.0], one_sided=True) == 1 / 8
    assert sign_flip_p([1.0, -1.0]) == 1.0
    # By hand: of the eight means, those of (1, 2, -0.5) and its like at least as far from zero as 2.5 / 3.
    assert sign_flip_p([1.0, 2.0, -0.5]) == 4 / 8


def test_holm() -> None:
    # The example of Holm's procedure by hand: 4 * .01, 3 * .02, 2 * .03, never falling.
    assert holm([0.03, 0.01, 0.04, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([]) == []
