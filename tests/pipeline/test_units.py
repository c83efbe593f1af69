"""Units cover every row once, within their limits; groups follow the row groups."""

from __future__ import annotations

from itertools import accumulate, pairwise

from hypothesis import given
from hypothesis import strategies as st

from pipeline.config import ArchiveSettings
from pipeline.units import BUNDLE, RowRange, cut_units, group_units


def settings(unit_assets: int = 16, unit_bytes: int = 10_000_000) -> ArchiveSettings:
    return ArchiveSettings(unit_assets=unit_assets, unit_bytes=unit_bytes)


@given(
    st.lists(st.integers(0, 50), max_size=60),
    st.integers(1, 10),
    st.integers(1, 120),
    st.sets(st.integers(0, 70), max_size=8),
)
def test_cut_units(sizes: list[int], unit_assets: int, unit_bytes: int, breaks: set[int]) -> None:
    units = cut_units(sizes, settings(unit_assets, unit_bytes), breaks)
    assert [row for low, high in units for row in range(low, high)] == list(range(len(sizes)))
    for low, high in units:
        assert 1 <= high - low <= unit_assets
        assert high - low == 1 or sum(sizes[low:high]) <= unit_bytes
        assert not breaks & set(range(low + 1, high))
    for (low, middle), (_, _) in pairwise(units):  # no unit is smaller than it must be
        full = middle - low == unit_assets or sum(sizes[low : middle + 1]) > unit_bytes
        assert full or middle in breaks


@given(
    st.lists(st.tuples(st.integers(1, 12), st.integers(0, 50)), max_size=12),
    st.integers(1, 10),
    st.integers(1, 120),
    st.sets(st.integers(0, 70), max_size=4),
)
def test_a_subject_that_fits_into_a_unit_is_not_cut(
    subjects: list[tuple[int, int]], unit_assets: int, unit_bytes: int, breaks: set[int]
) -> None:
    sizes = [size for count, size in subjects for _ in range(count)]
    ends = list(accumulate(count for count, _ in subjects))
    joined = set(range(len(sizes))) - {0, *ends}
    units = cut_units(sizes, settings(unit_assets, unit_bytes), breaks, joined)
    assert [row for low, high in units for row in range(low, high)] == list(range(len(sizes)))
    for low, high in units:
        assert 1 <= high - low <= unit_assets
        assert high - low == 1 or sum(sizes[low:high]) <= unit_bytes
        assert not breaks & set(range(low + 1, high))
    cuts = sorted({0, *ends} | {row for row in breaks if row < len(sizes)})
    for low, high in pairwise(cuts):  # a subject, or what lies of it between two breaks
        if high - low <= unit_assets and sum(sizes[low:high]) <= unit_bytes:
            assert any(start <= low and high <= end for start, end in units)
    for low, middle in units[:-1]:  # no unit is smaller than it must be: what comes next does not fit into it
        high = next(cut for cut in cuts if cut > middle)
        assert middle in breaks or high - low > unit_assets or sum(sizes[low:high]) > unit_bytes


def test_a_subject_that_began_its_unit_is_cut_where_the_unit_is_full() -> None:
    assert cut_units([1] * 7, settings(unit_assets=3), joined={2, 3, 4, 5}) == [(0, 1), (1, 4), (4, 7)]


def test_a_row_above_the_byte_limit_is_alone() -> None:
    assert cut_units([5, 100, 5, 5], settings(unit_bytes=10)) == [(0, 1), (1, 2), (2, 4)]


@given(st.data())
def test_group_units_keeps_order_and_row_groups(data: st.DataObject) -> None:
    row_groups = data.draw(st.lists(st.integers(0, 9), min_size=1, max_size=6))
    starts = [0, *accumulate(row_groups)]
    units = cut_units([1] * starts[-1], settings(unit_assets=3), starts)
    open_units = [unit for unit in units if data.draw(st.booleans())]
    groups = group_units(open_units, row_groups)
    assert [unit for group in groups for unit in group] == open_units

    def home(unit: RowRange) -> int:
        return max(number for number, start in enumerate(starts) if start <= unit[0])

    homes = [{home(unit) for unit in group} for group in groups]
    assert all(len(found) == 1 for found in homes)
    assert len({found.pop() for found in homes}) == len(groups)


@given(st.integers(0, 40))
def test_archives_read_asset_by_asset_come_in_bundles(count: int) -> None:
    units = [(row, row + 1) for row in range(0, 2 * count, 2)]
    groups = group_units(units, [])
    assert [unit for group in groups for unit in group] == units
    assert all(len(group) == BUNDLE for group in groups[:-1])
    assert all(1 <= len(group) <= BUNDLE for group in groups)
