"""Intervals over concepts, or over what was drawn from one of them."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.verify.bootstrap import (
    NESTED_SEEDS,
    Floats,
    Interval,
    Plan,
    Sample,
    Statistic,
    figures_with_intervals,
)


def intervals(
    units: Sequence[Floats], statistic: Statistic, *, alone: str, several: str
) -> tuple[dict[str, Interval], str, int]:
    """Figures with intervals over units and the rows inside them; what is resampled, in words, and how many there are.

    One unit has no spread: its rows are resampled in its place, which says nothing of another training.

    Args:
        units: one array `(rows, columns)` each.
        statistic: of resamples `(R, units or rows, columns)`.
        alone: what rows are.
        several: what units are.
    """
    if len(units) == 1:
        return figures_with_intervals(Sample.of_units(units[0]), statistic, Plan()), alone, len(units[0])
    inside = f", and {alone} in them" if min(map(len, units)) >= NESTED_SEEDS else ""
    return figures_with_intervals(Sample(list(units)), statistic, Plan()), f"{several}{inside}", len(units)
