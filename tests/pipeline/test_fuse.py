"""Deaths are counted, the image at fault is found, no other is blamed. A death is an attempt that goes no further."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.errors import FatalWorkerError
from pipeline.fuse import ATTEMPTS_OVER_ALL_RUNS, SURVIVED, Attempt, begin
from pipeline.storage import ObjectInfo
from pipeline.storage_local import LocalStore

ROWS = range(10, 14)


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(str(tmp_path))


def attempt(store: LocalStore, *, unit: str = "u", run: str = "r", max_deaths: int = 20) -> Attempt:
    return begin(store, f"attempts/{unit}", run, max_deaths=max_deaths)


def work(found: Attempt, culprits: set[int]) -> bool:
    """One attempt: True if it comes to its end, False if the worker dies."""
    for row in ROWS:
        if found.enter(row) and row in culprits:
            return False
    found.finish()
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
            assert found.enter(earlier)
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
    with pytest.raises(FatalWorkerError, match="3 workers died in this run, the last one as u2-01"):
        attempt(store, unit="u2", max_deaths=2)
    attempt(store, unit="u2", run="next", max_deaths=2)  # another run starts to count anew


def test_a_worker_that_lives_on_does_not_share_its_number(store: LocalStore) -> None:
    class Late(LocalStore):
        """Lists what was there before the other worker began."""

        def list(self, prefix: str = ""):  # type: ignore[no-untyped-def]
            return iter(()) if prefix.startswith("attempts/u/") else super().list(prefix)

    attempt(store)
    assert attempt(Late(str(store.root))).number == 1


def test_calm_work_leaves_no_marks(store: LocalStore) -> None:
    found = attempt(store)
    assert all(found.enter(row) for row in ROWS)
    found.finish()
    assert [item.key for item in store.list()] == ["attempts/u/r/00-start"]


def test_isolated_work_that_ends_blames_nobody(store: LocalStore) -> None:
    for _ in range(5):  # results that were lost, not workers
        found = begin(store, "loads/u", "r")
        assert found.blamed == set()
        assert work(found, set())
    marks = [item.key for item in store.list("loads/u/r/04-row-")]
    assert marks == [f"loads/u/r/04-row-{row:09d}" for row in (*ROWS, SURVIVED)]


def test_one_death_and_one_lost_result_do_not_blame(store: LocalStore) -> None:
    begin(store, "stores/u", "r")
    assert not work(begin(store, "stores/u", "r"), {ROWS[-1]})
    assert work(begin(store, "stores/u", "r"), set())
    assert begin(store, "stores/u", "r").blamed == set()


def test_a_row_that_is_blamed_is_left_out_unmarked(store: LocalStore) -> None:
    for _ in range(3):
        work(attempt(store), {ROWS[1]})
    found = attempt(store)
    assert [found.enter(row) for row in ROWS] == [True, False, True, True]
    assert f"{found.prefix}/03-row-{ROWS[1]:09d}" not in [item.key for item in store.list()]


def test_stages_are_counted_apart(store: LocalStore) -> None:
    for _ in range(3):
        work(begin(store, "loads/u", "r"), {ROWS[0]})
    assert begin(store, "loads/u", "r").blamed == {ROWS[0]}
    assert (attempt(store).number, begin(store, "stores/u", "r").number) == (0, 0)


def test_without_a_limit_no_death_is_counted(store: LocalStore) -> None:
    for number in range(30):
        assert begin(store, "loads/u", "r").number == number
    assert list(store.list("attempts/")) == []
    attempt(store, max_deaths=1)  # the optimizer's count starts at zero


class Mumbling(LocalStore):
    """Stores what it is given, and then says that it was there before: the first answer was lost on the way."""

    def put_new(self, key: str, data: bytes) -> ObjectInfo:
        super().put_new(key, data)
        return super().put_new(key, data)


def test_a_lost_answer_is_no_death(store: LocalStore) -> None:
    mumbling = Mumbling(str(store.root))
    found = attempt(mumbling)
    assert (found.number, found.isolate) == (0, False)
    found = attempt(mumbling)
    assert (found.number, found.isolate) == (1, True)
    assert work(found, set())
    assert [item.key for item in store.list("attempts/_deaths/")] == ["attempts/_deaths/r/u-01"]
