"""Cuts a shard into units of work. Pure: the same shard always gives the same units."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from pipeline.config import ArchiveSettings

BUNDLE = 8
RowRange = tuple[int, int]
"""First row and one past the last."""


def cut_units(sizes: Sequence[int], settings: ArchiveSettings, breaks: Iterable[int] = ()) -> list[RowRange]:
    """Groups consecutive rows into units of at most ``unit_assets`` rows and ``unit_bytes`` bytes.

    Args:
        sizes: Source bytes of every row (an estimate is enough).
        settings: Limits of one unit. A row larger than the byte limit gets a unit of its own.
        breaks: Rows at which a new unit must begin (row groups of a Parquet file).

    Returns:
        Ranges that cover every row once, in order.
    """
    forced = set(breaks)
    units: list[RowRange] = []
    start, held = 0, 0
    for row, size in enumerate(sizes):
        full = row - start >= settings.unit_assets or held + size > settings.unit_bytes
        if row > start and (full or row in forced):
            units.append((start, row))
            start, held = row, 0
        held += size
    if sizes:
        units.append((start, len(sizes)))
    return units


def group_units(units: Sequence[RowRange], row_groups: Sequence[int]) -> list[list[RowRange]]:
    """Puts units that lie in the same Parquet row group together, so that the group is read once.

    Args:
        units: Units in row order, possibly with gaps (finished ones left out).
        row_groups: Rows of each row group; empty for archives that are read asset by asset.
    """
    if not row_groups:  # some together all the same: whoever reads them looks the shard's index up once
        return [list(units[start : start + BUNDLE]) for start in range(0, len(units), BUNDLE)]
    groups: list[list[RowRange]] = []
    end, remaining, current = 0, iter(row_groups), -1
    for unit in units:
        home = current
        while unit[0] >= end:
            end += next(remaining)
            home += 1
        if home != current or not groups:
            groups.append([])
            current = home
        groups[-1].append(unit)
    return groups
