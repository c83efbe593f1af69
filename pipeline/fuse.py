"""Counts a unit's attempts in the store, so that an image that kills its worker is found and set aside."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from pipeline.errors import AlreadyExists, FatalWorkerError
from pipeline.storage import Store

DEATHS_PER_IMAGE = 2  # an image that was current at this many deaths is quarantined
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

    def mark(self, row: int) -> None:
        """Notes that this row is about to be computed. Call it in isolation mode only: it costs one PUT."""
        self.store.put_new(f"{self.prefix}/{self.number:02d}-row-{row:09d}", b"")


def begin(store: Store, unit_id: str, run_id: str, *, max_deaths: int) -> Attempt:
    """Marks that a worker starts to compute a unit, and says how it should go about it.

    Args:
        store: The destination.
        unit_id: The unit.
        run_id: This run; attempts of other runs count only to a larger limit, since operators kill runs too.
        max_deaths: Deaths of workers in this run after which the machine counts as ill.

    Raises:
        FatalWorkerError: More than ``max_deaths`` workers have died in this run.
    """
    runs: dict[str, list[str]] = {}
    for item in store.list(f"attempts/{unit_id}/"):
        _, _, run, marker = item.key.split("/")
        runs.setdefault(run, []).append(marker)
    earlier = runs.get(run_id, [])
    number = sum(marker.endswith("-start") for marker in earlier)
    total = sum(marker.endswith("-start") for markers in runs.values() for marker in markers)
    worn = total >= ATTEMPTS_OVER_ALL_RUNS
    judged = [(run, marker) for run, markers in runs.items() if worn or run == run_id for marker in markers]
    attempt = Attempt(store, f"attempts/{unit_id}/{run_id}", number, number > 0 or worn, _blamed(judged))
    while True:
        try:
            store.put_new(f"{attempt.prefix}/{attempt.number:02d}-start", b"")
            break
        except AlreadyExists:  # a worker that is not dead yet; count it like one that is
            attempt.number += 1
    if attempt.number > 0:
        _count_death(store, unit_id, run_id, attempt.number, max_deaths)
    return attempt


def _blamed(markers: list[tuple[str, str]]) -> set[int]:
    """Rows that were the last one marked, in at least ``DEATHS_PER_IMAGE`` attempts."""
    last: dict[tuple[str, str], int] = {}
    for run, marker in markers:
        number, kind, *row = marker.split("-")
        if kind == "row":
            last[run, number] = max(last.get((run, number), -1), int(row[0]))
    counts = Counter(last.values())
    return {row for row, count in counts.items() if count >= DEATHS_PER_IMAGE}


def _count_death(store: Store, unit_id: str, run_id: str, number: int, max_deaths: int) -> None:
    store.put_new(f"attempts/_deaths/{run_id}/{unit_id}-{number:02d}", b"")
    deaths = sum(1 for _ in store.list(f"attempts/_deaths/{run_id}/"))
    if deaths > max_deaths:
        raise FatalWorkerError(
            f"{deaths} workers died in this run, the last at unit {unit_id}: the machine looks ill. "
            "Look at the worker logs, then run the same command again to go on."
        )
