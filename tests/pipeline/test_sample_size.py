"""Sample sizes: the tables of methods/metrics.md, B.7."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.verify import sample_size


def test_defects() -> None:
    shares = (0.10, 0.05, 0.02, 0.01)
    assert [sample_size.to_find_a_defect(p) for p in shares] == [29, 59, 149, 299]
    assert [sample_size.to_find_a_defect(p, population=100) for p in shares] == [25, 45, 78, 95]
    assert [sample_size.to_find_a_defect(p, population=1000) for p in shares] == [29, 57, 138, 258]
    assert [sample_size.to_find_a_defect(0.05, allowed=c) for c in (1, 2)] == [93, 124]


def test_bound_of_defects() -> None:
    assert sample_size.defect_bound(59) == pytest.approx(1 - 0.05 ** (1 / 59))
    assert sample_size.defect_bound(100) == pytest.approx(3 / 100, rel=0.02)
    assert sample_size.defect_bound(93, failures=1) <= 0.0502
    assert sample_size.defect_bound(3, failures=3) == 1.0


def test_rates_and_means() -> None:
    assert [sample_size.for_rate(e) for e in (0.10, 0.05, 0.03)] == [97, 385, 1068]
    assert [sample_size.for_rate(e, population=1000) for e in (0.10, 0.05, 0.03)] == [88, 278, 517]
    assert [sample_size.for_mean(0.15, e) for e in (0.05, 0.03)] == [35, 97]


def test_pairs_clusters_and_widths() -> None:
    assert [sample_size.for_paired_difference(d, 1.0) for d in (0.8, 0.5, 0.3)] == [15, 34, 90]
    assert sample_size.in_clusters(30, per_cluster=4, correlation=0.0) == 30
    assert sample_size.in_clusters(30, per_cluster=4, correlation=1.0) == 120
    assert sample_size.in_clusters(30, per_cluster=4, correlation=0.5) == 75
    assert sample_size.for_width(0.1, 0.3, 12, 0.1) == 48


@given(st.integers(1, 5000), st.floats(0.001, 0.5), st.floats(0.01, 0.4))
def test_never_more_than_there_are(population: int, share: float, margin: float) -> None:
    assert 1 <= sample_size.to_find_a_defect(share, population=population) <= population
    assert 1 <= sample_size.for_rate(margin, population=population) <= population
    assert 1 <= sample_size.for_mean(0.15, margin, population=population) <= population


@pytest.mark.parametrize(
    "call",
    [
        lambda: sample_size.to_find_a_defect(0.0),
        lambda: sample_size.to_find_a_defect(0.01, population=100, allowed=1),
        lambda: sample_size.for_rate(1.5),
        lambda: sample_size.for_mean(0.1, 0.0),
        lambda: sample_size.in_clusters(3, per_cluster=0, correlation=0.5),
        lambda: sample_size.for_width(0.3, 0.1, 12, 0.1),
        lambda: sample_size.defect_bound(3, failures=4),
    ],
)
def test_sizes_of_impossible_numbers_are_refused(call: Callable[[], object]) -> None:
    with pytest.raises(ValueError, match=r"must|cannot|no sample"):
        call()
