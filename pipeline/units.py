"""Cuts a shard into units of work. Pure: the same shard always gives the same units."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

from pipeline.config import ArchiveSettings

BUNDLE = 8
RowRange = tuple[int, int]
"""First row and one past the last."""


def cut_units(
    sizes: Sequence[int], settings: ArchiveSettings, breaks: Iterable[int] = (), joined: Collection[int] = frozenset()
) -> list[RowRange]:
    """Groups consecutive rows into units of at most ``unit_assets`` rows and ``unit_bytes`` bytes.

    Args:
        sizes: Source bytes of every row (an estimate is enough).
        settings: Limits of one unit. A row larger than the byte limit gets a unit of its own.
        breaks: Rows at which a new unit must begin (row groups of a Parquet file).
        joined: Rows that show the subject of the row before. A full unit ends before its last subject, unless it
            begins with it; so a subject between two breaks is cut only if it is larger than a unit.

    Returns:
        Ranges that cover every row once, in order.
    """
    forced = set(breaks)
    units: list[RowRange] = []
    start, held = 0, 0

    def full(row: int) -> bool:
        return row - start >= settings.unit_assets or held + sizes[row] > settings.unit_bytes

    for row, size in enumerate(sizes):
        while row > start and (row in forced or full(row)):
            cut = row if row in forced else _first_of_subject(row, start, joined)
            units.append((start, cut))
            start, held = cut, sum(sizes[cut:row])
        held += size
    if sizes:
        units.append((start, len(sizes)))
    return units


def _first_of_subject(row: int, start: int, joined: Collection[int]) -> int:
    """The row at which the subject of ``row`` begins; ``row`` itself where that is not after ``start``."""
    first = row
    while first > start and first in joined:
        first -= 1
    return first if first > start else row


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
