"""Deaths are counted, the image at fault is found, no other is blamed. A death is an attempt that goes no further."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.errors import FatalWorkerError
from pipeline.fuse import ATTEMPTS_OVER_ALL_RUNS, Attempt, begin
from pipeline.storage_local import LocalStore

ROWS = range(10, 14)


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(str(tmp_path))


def attempt(store: LocalStore, *, unit: str = "u", run: str = "r", max_deaths: int = 20) -> Attempt:
    return begin(store, unit, run, max_deaths=max_deaths)


def work(found: Attempt, culprits: set[int]) -> bool:
    """One attempt: True if it comes to its end, False if the worker dies."""
    rows = [row for row in ROWS if row not in found.blamed]
    if not found.isolate:
        return not culprits.intersection(rows)
    for row in rows:
        found.mark(row)
        if row in culprits:
            return False
    return True


def test_the_first_attempt_is_a_batch(store: LocalStore) -> None:
    found = attempt(store)
    assert (found.number, found.isolate, found.blamed) == (0, False, set())
    assert [item.key for item in store.list()] == ["attempts/u/r/00-start"]


@pytest.mark.parametrize("culprit", ROWS)
def test_the_culprit_is_found_after_three_deaths(store: LocalStore, culprit: int) -> None:
    states = []
    for _ in range(4):
        found = attempt(store)
        states.append((found.number, found.isolate, set(found.blamed), work(found, {culprit})))
    assert states == [
        (0, False, set(), False),
        (1, True, set(), False),
        (2, True, set(), False),
        (3, True, {culprit}, True),
    ]


def test_two_culprits_are_both_found(store: LocalStore) -> None:
    culprits = {ROWS[1], ROWS[3]}
    outcomes = []
    for _ in range(6):
        found = attempt(store)
        outcomes.append(work(found, culprits))
    assert found.blamed == culprits
    assert outcomes == [False] * 5 + [True]


def test_the_machines_own_deaths_blame_nobody(store: LocalStore) -> None:
    attempt(store)  # dies as a batch
    for row in ROWS:  # and then each time at another image
        found = attempt(store)
        assert found.blamed == set()
        for earlier in range(ROWS[0], row + 1):
            found.mark(earlier)
    assert attempt(store).blamed == set()


def test_other_units_are_not_blamed(store: LocalStore) -> None:
    for _ in range(4):
        work(attempt(store, unit="bad"), {ROWS[0]})
    found = attempt(store, unit="good")
    assert (found.number, found.isolate, found.blamed) == (0, False, set())


def test_kills_by_the_operator_count_to_a_larger_limit(store: LocalStore) -> None:
    for number in range(ATTEMPTS_OVER_ALL_RUNS):
        found = attempt(store, run=f"run-{number}")
        assert (found.number, found.isolate, found.blamed) == (0, False, set())
        assert not work(found, {ROWS[2]})
    for number in (1, 2):
        found = attempt(store, run=f"late-{number}")
        assert (found.isolate, found.blamed) == (True, set())
        assert not work(found, {ROWS[2]})
    found = attempt(store, run="last")
    assert found.blamed == {ROWS[2]}
    assert work(found, {ROWS[2]})


def test_another_runs_deaths_blame_nobody_at_first(store: LocalStore) -> None:
    for _ in range(3):
        work(attempt(store, run="killed"), {ROWS[1]})
    assert attempt(store, run="killed").blamed == {ROWS[1]}
    found = attempt(store, run="next")
    assert (found.number, found.isolate, found.blamed) == (0, False, set())


def test_too_many_deaths_stop_the_run(store: LocalStore) -> None:
    for number in range(3):
        attempt(store, unit=f"u{number}", max_deaths=2)
    attempt(store, unit="u0", max_deaths=2)
    attempt(store, unit="u1", max_deaths=2)
    with pytest.raises(FatalWorkerError, match="3 workers died in this run, the last at unit u2"):
        attempt(store, unit="u2", max_deaths=2)
    attempt(store, unit="u2", run="next", max_deaths=2)  # another run starts to count anew


def test_a_worker_that_lives_on_does_not_share_its_number(store: LocalStore) -> None:
    class Late(LocalStore):
        """Lists what was there before the other worker began."""

        def list(self, prefix: str = ""):  # type: ignore[no-untyped-def]
            return iter(()) if prefix.startswith("attempts/u/") else super().list(prefix)

    attempt(store)
    assert attempt(Late(str(store.root))).number == 1
