"""What every writable store promises, run against local files and S3 over HTTP."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest

from pipeline.errors import (
    AlreadyExists,
    IntegrityError,
    NotFound,
    PreconditionFailed,
    SourceChanged,
    StorageError,
)
from pipeline.storage import (
    ObjectInfo,
    StorageOptions,
    Store,
    check_conditional_writes,
    open_store,
    put_json_new,
)

RACERS = 16
ODD_KEYS = ["with space.txt", "ümläut/字.png", "a#b", "100%25.jpg", "a+b", "q?x=1&y=2", "a'b\"c", "x.y/z~!@$;,=:"]


@dataclass(frozen=True)
class Place:
    """A fresh root that several clients can open."""

    url: str
    options: StorageOptions

    def open(self, *, single_writer: bool = False) -> Store:
        return open_store(self.url, self.options, single_writer=single_writer)


@pytest.fixture(params=["local", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    if request.param == "local":
        return Place(str(tmp_path / "root"), StorageOptions())
    bucket = request.getfixturevalue("s3_bucket")
    return Place(f"s3://{bucket}/some/prefix", request.getfixturevalue("s3_server").options)


@pytest.fixture
def store(place: Place) -> Store:
    return place.open()


def _winners(write: Callable[[int], object], lost: type[Exception]) -> list[int]:
    """Runs the write from many threads at once; the numbers of those that succeeded."""
    start = threading.Barrier(RACERS)

    def race(number: int) -> bool:
        start.wait()
        try:
            write(number)
        except lost:
            return False
        return True

    with ThreadPoolExecutor(RACERS) as pool:
        return [number for number, won in enumerate(pool.map(race, range(RACERS))) if won]


def test_put_new_refuses_twice_and_keeps_the_first(store: Store) -> None:
    info = store.put_new("a/b.bin", b"first")
    for _ in range(2):
        with pytest.raises(AlreadyExists, match=r"a/b\.bin"):
            store.put_new("a/b.bin", b"second")
    assert store.get("a/b.bin") == b"first"
    assert store.info("a/b.bin") == info == ObjectInfo("a/b.bin", 5, info.etag)


def _put_number(store: Store, key: str, number: int) -> None:
    store.put_new(key, b"%d" % number)


def test_racing_creators_give_one_winner(store: Store) -> None:
    for round_number in range(3):
        key = f"race/{round_number}"
        winners = _winners(partial(_put_number, store, key), AlreadyExists)
        assert [store.get(key)] == [b"%d" % number for number in winners]


def test_racing_replacers_give_one_winner(store: Store) -> None:
    etag = store.put_new("doc", b"old").etag
    winners = _winners(lambda number: store.replace("doc", b"%d" % number, etag=etag), PreconditionFailed)
    assert [store.get("doc")] == [b"%d" % number for number in winners]


def _create_in_process(root: str, number: int, start: threading.Barrier) -> None:
    store = open_store(root, StorageOptions())
    start.wait()
    try:
        store.put_new("key", b"%d" % number)
    except AlreadyExists:
        os._exit(3)
    os._exit(0)


def _count_in_process(root: str, number: int, start: threading.Barrier) -> None:
    store = open_store(root, StorageOptions())
    start.wait()
    for _ in range(10):
        done = False
        while not done:
            try:
                etag = store.info("count").etag
                store.replace("count", b"%d" % (int(store.get("count", etag=etag)) + 1), etag=etag)
                done = True
            except (PreconditionFailed, SourceChanged):
                done = False
    os._exit(0)


def _exit_codes(target: Callable[..., None], root: str, count: int) -> list[int]:
    context = multiprocessing.get_context("fork")
    start = context.Barrier(count)
    processes = [context.Process(target=target, args=(root, number, start)) for number in range(count)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    return [-1 if process.exitcode is None else process.exitcode for process in processes]


def test_local_racing_processes_give_one_winner(tmp_path: Path) -> None:
    codes = _exit_codes(_create_in_process, str(tmp_path), RACERS)
    assert sorted(codes) == [0] + [3] * (RACERS - 1)
    assert (tmp_path / "key").read_bytes() == b"%d" % codes.index(0)


def test_local_compare_and_swap_loses_no_update_between_processes(tmp_path: Path) -> None:
    open_store(str(tmp_path), StorageOptions()).put_new("count", b"0")
    assert _exit_codes(_count_in_process, str(tmp_path), 6) == [0] * 6
    assert (tmp_path / "count").read_bytes() == b"60"


def test_lost_answer_is_recognised_as_own(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    put_new = store.put_new

    def lose_answer(key: str, data: bytes) -> ObjectInfo:
        put_new(key, data)
        return put_new(key, data)

    monkeypatch.setattr(store, "put_new", lose_answer)
    assert put_json_new(store, "m.json", {"writer_id": "me", "n": 1}) == (True, {"writer_id": "me", "n": 1})


def test_put_json_new_returns_the_winner(place: Place) -> None:
    first, second = place.open(), place.open()
    assert put_json_new(first, "m.json", {"writer_id": "a", "b": {"y": 1, "x": "ü"}})[0]
    assert put_json_new(second, "m.json", {"writer_id": "b"}) == (False, {"writer_id": "a", "b": {"x": "ü", "y": 1}})
    assert first.get("m.json") == '{\n "b": {\n  "x": "ü",\n  "y": 1\n },\n "writer_id": "a"\n}'.encode()
    first.put_new("broken.json", b"{")
    with pytest.raises(IntegrityError, match=r"broken\.json"):
        put_json_new(first, "broken.json", {"writer_id": "a"})
    with pytest.raises(ValueError, match="writer_id"):
        put_json_new(first, "n.json", {})


def test_listing_is_fresh_recursive_and_sorted(place: Place) -> None:
    ours, theirs = place.open(), place.open()
    assert list(ours.list()) == []
    infos = {key: theirs.put_new(key, key.encode()) for key in ["a/b/c", "a.txt", "a-b", "a/b.x", "ab", "B", "é", "字"]}
    assert list(ours.list()) == [infos[key] for key in sorted(infos)]
    assert [info.key for info in ours.list("a/b")] == ["a/b.x", "a/b/c"]
    assert [info.key for info in ours.list("a/b/")] == ["a/b/c"]
    assert list(ours.list("none/")) == []
    theirs.delete("ab")
    assert "ab" not in [info.key for info in ours.list()]


def test_listing_goes_over_page_ends(store: Store) -> None:
    keys = [f"n/{number:04}" for number in range(1005)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda key: store.put_new(key, b""), keys))
    assert [info.key for info in store.list("n/")] == keys


@pytest.mark.parametrize("key", ODD_KEYS)
def test_odd_keys(store: Store, tmp_path: Path, key: str) -> None:
    info = store.put_new(key, b"data")
    assert list(store.list()) == [info]
    assert store.get(key, etag=info.etag) == b"data"
    with store.open(key) as file:
        assert file.read() == b"data"
    store.delete(key)
    source = tmp_path / "source"
    source.write_bytes(b"file")
    store.put_new_file(key, source)
    assert [found.key for found in store.list()] == [key]


@pytest.mark.parametrize("key", ["../x", "a/../../x", "/etc/passwd", "a//b", "a/./b", "", "a/", "x\0y"])
def test_keys_that_could_leave_the_root_are_refused(store: Store, key: str) -> None:
    for write in (store.put_new, lambda key, data: store.replace(key, data, etag="1")):
        with pytest.raises(StorageError, match="refused"):
            write(key, b"")


def test_ranged_get(store: Store) -> None:
    etag = store.put_new("k", b"0123456789").etag
    assert store.get("k", start=3, length=4) == b"3456"
    assert store.get("k", start=8) == b"89"
    assert store.get("k", start=8, length=100, etag=etag) == b"89"
    assert store.get("k", length=0) == store.get("k", start=10) == store.get("k", start=99, length=1) == b""
    store.put_new("empty", b"")
    assert store.get("empty") == store.get("empty", length=5) == b""


def test_absent_objects(store: Store) -> None:
    store.put_new("a/b", b"")
    for key in ("none", "a", "a/b/c"):
        for read in (store.info, store.get, store.open):
            with pytest.raises(NotFound, match=key):
                read(key)
    with pytest.raises(SourceChanged, match="none"):
        store.get("none", etag="1-1")
    store.delete("none")


def test_another_version_is_source_changed(store: Store) -> None:
    old = store.put_new("k", b"old").etag
    new = store.replace("k", b"new", etag=old).etag
    assert new != old
    assert store.get("k", etag=new) == b"new"
    for _ in range(2):
        with pytest.raises(SourceChanged, match="k"):
            store.get("k", etag=old)


def test_open_reads_one_version(store: Store) -> None:
    old = b"x" * 100 + b"y" * 9_000_000
    etag = store.put_new("k", old).etag
    with store.open("k") as file:
        assert file.read(100) == b"x" * 100
        store.replace("k", b"z" * len(old), etag=etag)
        try:
            rest = file.read()
        except SourceChanged:
            return
    assert rest == old[100:]


def test_open_is_seekable(store: Store) -> None:
    data = os.urandom(10_000_000)
    store.put_new("k", data)
    with store.open("k") as file:
        assert file.seek(-4, os.SEEK_END) == len(data) - 4
        assert file.read() == data[-4:]
        assert file.read(1) == b""
        assert file.seek(5_000_000) == file.tell() == 5_000_000
        assert file.read(9) == data[5_000_000:5_000_009]
        file.seek(0)
        assert file.read() == data


def test_replace_refuses_stale_and_gone(store: Store) -> None:
    old = store.put_new("k", b"0").etag
    current = old
    for number in range(1, 4):
        current = store.replace("k", b"%d" % number, etag=current).etag
    for key, etag in [("k", old), ("gone", current)]:
        with pytest.raises(PreconditionFailed, match=key):
            store.replace(key, b"stale", etag=etag)
    assert store.get("k") == b"3"
    assert store.info("k").etag == current


def test_large_file_is_create_only(store: Store, tmp_path: Path) -> None:
    big = tmp_path / "big"
    big.write_bytes(os.urandom(12_000_000))
    info = store.put_new_file("data/big", big)
    other = tmp_path / "other"
    other.write_bytes(bytes(12_000_000))
    with pytest.raises(AlreadyExists):
        store.put_new_file("data/big", other)
    assert info == store.info("data/big")
    assert info.size == 12_000_000
    assert store.get("data/big") == big.read_bytes()


@pytest.mark.parametrize("failing", ["fsync", "utime", "link"])
def test_local_failure_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, failing, full)
    store = open_store(str(tmp_path / "root"), StorageOptions())
    with pytest.raises(StorageError, match="a/b: No space left"):
        store.put_new("a/b", b"data")
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_local_kill_leaves_nothing_under_the_key(tmp_path: Path) -> None:
    store = open_store(str(tmp_path), StorageOptions())
    child = os.fork()
    if child == 0:
        os.fsync = lambda fd: os.kill(os.getpid(), signal.SIGKILL)
        store.put_new("key", b"data" * 1000)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    assert list(store.list()) == []
    assert store.put_new("key", b"again").size == 5


def test_local_listing_skips_nothing_silently(tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "real").mkdir(parents=True)
    (root / "real" / "x").write_bytes(b"1")
    (root / "link").symlink_to(root / "real")
    store = open_store(f"file://{root}", StorageOptions())
    assert [info.key for info in store.list()] == ["link/x", "real/x"]
    for name, target in [("dangling", "nowhere"), ("loop", str(root))]:
        (root / name).symlink_to(target)
        with pytest.raises(StorageError, match=name):
            list(store.list())
        (root / name).unlink()


def test_store_survives_pickle_and_fork(store: Store) -> None:
    store.put_new("k", b"data")
    copy = pickle.loads(pickle.dumps(store))
    assert copy.url == store.url
    assert copy.get("k") == b"data"
    child = os.fork()
    if child == 0:
        os._exit(0 if store.get("k") == b"data" else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert store.get("k") == b"data"


def test_self_test_passes_and_leaves_nothing(store: Store) -> None:
    check_conditional_writes(store)
    assert list(store.list()) == []


def test_single_writer_still_looks_first(place: Place) -> None:
    store = place.open(single_writer=True)
    check_conditional_writes(store)
    store.put_new("k", b"first")
    with pytest.raises(AlreadyExists):
        store.put_new("k", b"second")
    assert store.get("k") == b"first"
    store.replace("k", b"third", etag="any")
    assert store.get("k") == b"third"
