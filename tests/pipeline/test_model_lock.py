"""One run at a time on a folder of checkpoints.

1. A local folder that is held is refused, and free again when its holder ends or is killed. The lock leaves nothing.
2. A lease that is renewed is refused; one that is not is taken over after its time, by one of all that wait.
3. A holder that was taken over from hears of it.
"""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.errors import PipelineError
from pipeline.protect_model import lock
from pipeline.protect_model.lock import OWNER, InUse, Lease, locked
from pipeline.storage import StorageOptions, Store, open_store
from tests.conftest import S3Server

WAIT_S = 0.8
_HOLDER = "import sys, time; from pathlib import Path; from pipeline.protect_model.lock import locked\n"
_HOLDER += "with locked(Path(sys.argv[1])):\n    print('held', flush=True)\n    time.sleep(60)"


def test_a_local_folder(tmp_path: Path) -> None:
    folder = tmp_path / "work"
    with locked(folder), pytest.raises(InUse, match="work is in use by another run"), locked(folder):
        pass
    assert not folder.exists()
    with subprocess.Popen([sys.executable, "-c", _HOLDER, str(folder)], stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(InUse), locked(folder):
            pass
        holder.kill()
    assert folder.exists()
    with locked(folder):
        (folder / "mine").touch()
    assert [file.name for file in folder.iterdir()] == ["mine"]


@pytest.fixture(params=["s3", "file"])
def store(request: pytest.FixtureRequest, s3_server: S3Server, tmp_path: Path) -> Store:
    if request.param == "s3":
        return open_store(f"s3://{request.getfixturevalue('s3_bucket')}/work", s3_server.options)
    return open_store(str(tmp_path / "work"), StorageOptions())


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "LEASE_S", WAIT_S)


def keys(store: Store) -> list[str]:
    return [item.key for item in store.list()]


def dead(store: Store) -> None:
    """Leaves what a killed run leaves."""
    with Lease(store, "WORK").held(lock.silent):
        owner = store.get(OWNER)
    store.put_new(OWNER, owner)


def test_a_lease_that_is_renewed(store: Store) -> None:
    said: list[str] = []
    with Lease(store, "WORK").held(said.append) as lease:
        with pytest.raises(InUse, match=r"WORK is in use by another run on .+: wait for it"):
            Lease(store, "WORK").held(said.append).__enter__()
        time.sleep(2 * WAIT_S)
        lease.check()
    assert said == [f"WORK was left by a run, or is in use: looking for {WAIT_S:g} s whether that one lives"]
    assert keys(store) == []


def test_one_of_those_that_wait_takes_over(store: Store) -> None:
    dead(store)
    results: list[str] = []
    together, ended = threading.Barrier(3), threading.Barrier(3)

    def run() -> None:
        together.wait()
        try:
            with Lease(store, "WORK").held(lock.silent):
                results.append("held")
                ended.wait()
        except InUse:
            results.append("refused")
            ended.wait()

    threads = [threading.Thread(target=run) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(results) == ["held", "refused", "refused"]
    assert keys(store) == []


def test_one_that_is_given_back_is_taken_at_once(store: Store) -> None:
    dead(store)
    give_back = threading.Timer(WAIT_S / 4, store.delete, [OWNER])
    give_back.start()
    begun = time.monotonic()
    with Lease(store, "WORK").held(lock.silent):
        assert time.monotonic() - begun < WAIT_S
    give_back.join()


def test_who_was_taken_over_from_hears_of_it(store: Store) -> None:
    with Lease(store, "WORK").held(lock.silent) as held_up:
        store.replace(OWNER, b'{"run": "another"}', etag=store.info(OWNER).etag)
        _wait(lambda: _is_lost(held_up))
        with pytest.raises(PipelineError, match="WORK was taken over by another run"):
            held_up.check()
    assert keys(store) == [OWNER], "it is not ours to delete"


def _is_lost(lease: Lease) -> bool:
    try:
        lease.check()
    except PipelineError:
        return True
    return False


def _wait(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)
