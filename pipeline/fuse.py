"""Counts a unit's attempts in the store, so that an image that kills its worker is found and set aside."""

from __future__ import annotations

import uuid
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field

from pipeline.errors import AlreadyExists, FatalWorkerError
from pipeline.storage import Store

DEATHS_PER_IMAGE = 2  # an image that was current at this many deaths is quarantined
SURVIVED = 999_999_999  # stands for a row after the last
ATTEMPTS_OVER_ALL_RUNS = 10  # beyond this, kills by the operator no longer explain the attempts


@dataclass(slots=True)
class Attempt:
    """One attempt at a unit, begun by ``begin``."""

    store: Store
    prefix: str
    # How many attempts of this run came before.
    number: int
    # Work one image at a time and mark each, because an earlier attempt died.
    isolate: bool
    # Rows that were current at ``DEATHS_PER_IMAGE`` deaths.
    blamed: set[int] = field(default_factory=set)
    # First rows of groups that were current at a death: their images are worked on one at a time.
    broken: set[int] = field(default_factory=set)

    def enter_group(self, first: int) -> bool:
        """Call before each group of isolated work, in row order and before any single row; False: enter its rows."""
        if first not in self.broken:
            self._mark("group", first)
        return first not in self.broken

    def enter(self, row: int) -> bool:
        """Call before each row of isolated work; False: this row has killed its workers, leave it out."""
        if self.isolate and row not in self.blamed:
            self._mark("row", row)
        return row not in self.blamed

    def finish(self) -> None:
        """Call when isolated work is done: the last row that was entered is innocent."""
        if self.isolate:
            self._mark("row", SURVIVED)

    def _mark(self, kind: str, row: int) -> None:
        with suppress(AlreadyExists):  # the answer to this very PUT was lost
            self.store.put_new(f"{self.prefix}/{self.number:02d}-{kind}-{row:09d}", b"")


def begin(store: Store, work: str, run_id: str, *, max_deaths: int | None = None) -> Attempt:
    """Marks that a worker starts on a piece of work, and says how it should go about it.

    Args:
        store: The destination.
        work: Prefix for the marks of this stage on this unit.
        run_id: This run; attempts of other runs count only to a larger limit, since operators kill runs too.
        max_deaths: Deaths of workers in this run after which the machine counts as ill. None: a second attempt
            need not be a death, as in stages that Ray repeats when their result is lost.

    Raises:
        FatalWorkerError: More than ``max_deaths`` workers have died in this run.
    """
    runs: dict[str, list[str]] = {}
    for item in store.list(f"{work}/"):
        run, marker = item.key.removeprefix(f"{work}/").split("/")
        runs.setdefault(run, []).append(marker)
    earlier = runs.get(run_id, [])
    number = sum(marker.endswith("-start") for marker in earlier)
    total = sum(marker.endswith("-start") for markers in runs.values() for marker in markers)
    worn = total >= ATTEMPTS_OVER_ALL_RUNS
    judged = [(run, marker) for run, markers in runs.items() if worn or run == run_id for marker in markers]
    blamed, broken = _culprits(judged)
    attempt = Attempt(store, f"{work}/{run_id}", number, number > 0 or worn, blamed, broken)
    while not _claim(store, f"{attempt.prefix}/{attempt.number:02d}-start"):
        attempt.number += 1  # a worker that is not dead yet; it counts like one that is
    if attempt.number > 0 and max_deaths is not None:
        _count_death(store, f"{work.rpartition('/')[2]}-{attempt.number:02d}", run_id, max_deaths)
    return attempt


def _claim(store: Store, key: str) -> bool:
    token = uuid.uuid4().hex.encode()
    try:
        store.put_new(key, token)
    except AlreadyExists:
        return store.get(key) == token  # then the answer to our own PUT was lost
    return True


def _culprits(markers: list[tuple[str, str]]) -> tuple[set[int], set[int]]:
    """Rows that were the last one marked in at least ``DEATHS_PER_IMAGE`` attempts; groups that were it in one."""
    last: dict[tuple[str, str], tuple[bool, int]] = {}
    for run, marker in markers:
        number, kind, *row = marker.split("-")
        if kind in ("row", "group"):  # rows come after all groups
            place = (kind == "row", int(row[0]))
            last[run, number] = max(last.get((run, number), place), place)
    counts = Counter(last.values())
    rows = {row for (single, row), count in counts.items() if single and count >= DEATHS_PER_IMAGE and row != SURVIVED}
    return rows, {first for single, first in counts if not single}


def _count_death(store: Store, death: str, run_id: str, max_deaths: int) -> None:
    with suppress(AlreadyExists):
        store.put_new(f"attempts/_deaths/{run_id}/{death}", b"")
    deaths = sum(1 for _ in store.list(f"attempts/_deaths/{run_id}/"))
    if deaths > max_deaths:
        raise FatalWorkerError(
            f"{deaths} workers died in this run, the last one as {death}: the machine looks ill. "
            "Look at the worker logs, then run the same command again to go on."
        )
