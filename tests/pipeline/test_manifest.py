"""Readers follow ``_SUCCESS.json`` to manifests and trust nothing that does not match its hash."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import IntegrityError, UserError
from pipeline.manifest import (
    SUCCESS_KEY,
    Manifest,
    committed_shards,
    logical_hash,
    publish_success,
    read_manifest,
    rows_of,
    success_manifests,
)
from pipeline.storage import ObjectInfo, put_json_new
from pipeline.storage_local import LocalStore
from tests.pipeline.archives import photo, write_folder
from tests.pipeline.local_job import job_config, run_job, tree

identity = st.tuples(st.text(), st.none() | st.text(), st.sampled_from(["protected", "quarantined"]), st.text())


@given(st.lists(identity, max_size=8), st.randoms())
def test_the_logical_hash_ignores_order_only(rows: list[tuple[str, ...]], random: Any) -> None:
    mixed = list(rows)
    random.shuffle(mixed)
    assert logical_hash(mixed) == logical_hash(rows)
    assert logical_hash([*rows, ("extra", None, "protected", "")]) != logical_hash(rows)
    for at, row in enumerate(rows):
        assert logical_hash([*rows[:at], (row[0] + "x", *row[1:]), *rows[at + 1 :]]) != logical_hash(rows)


def manifest(number: int, **changes: Any) -> Manifest:
    fields: dict[str, Any] = {
        "schema_version": 1,
        "shard_id": f"shard-{number:05d}-aa",
        "source": {},
        "data": None,
        "quarantine": None,
        "rows_in": 3,
        "rows_ok": 2,
        "rows_quarantined": 1,
        "logical_sha256": "l",
        "config_fingerprint": "c",
        "protector": "p",
        "protector_version": "1",
        "model_digest": "m",
        "code_version": "0",
        "plan_id": "p",
        "run_id": "r",
        "writer_id": f"w{number}",
        "created_at": "now",
        "rung": 0,
        "verify": {},
    }
    return Manifest(**{**fields, **changes})


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(str(tmp_path))


def stored(store: LocalStore, *numbers: int) -> list[Manifest]:
    found = [manifest(number) for number in numbers]
    for item in found:
        put_json_new(store, item.key, asdict(item))
    return found


def success(store: LocalStore) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(store.get(SUCCESS_KEY))
    return document


def test_publishing_and_following(store: LocalStore) -> None:
    found = stored(store, 0, 1)
    publish_success(store, found, {"report": "r"})
    assert (success(store)["report"], success(store)["rows_in"], success(store)["rows_ok"]) == ("r", 6, 4)
    assert list(success_manifests(store)) == found
    assert committed_shards(store) == {item.shard_id for item in found}
    assert read_manifest(store, found[1].shard_id) == found[1]


def test_nothing_new_writes_nothing(store: LocalStore) -> None:
    found = stored(store, 0, 1)
    publish_success(store, found, {"report": "r"})
    before = store.get(SUCCESS_KEY)
    publish_success(store, found, {"report": "another"})
    publish_success(store, found[:1], {"report": "another"})
    assert store.get(SUCCESS_KEY) == before


def test_later_shards_are_merged_in(store: LocalStore) -> None:
    publish_success(store, stored(store, 0), {"report": "first"})
    publish_success(store, stored(store, 1), {"report": "second"})
    assert [item.shard_id for item in success_manifests(store)] == ["shard-00000-aa", "shard-00001-aa"]
    assert (success(store)["report"], success(store)["rows_in"]) == ("second", 6)


class Overtaken(LocalStore):
    """Another run publishes just before our compare-and-swap."""

    def __init__(self, root: Path, rival: Callable[[], object]) -> None:
        super().__init__(str(root))
        self.rival: Callable[[], object] | None = rival

    def replace(self, key: str, data: bytes, *, etag: str) -> ObjectInfo:
        if self.rival is not None:
            rival, self.rival = self.rival, None
            rival()
        return super().replace(key, data, etag=etag)


def test_two_runs_that_publish_at_once_keep_both(store: LocalStore) -> None:
    publish_success(store, stored(store, 0), {})
    overtaken = Overtaken(store.root, lambda: publish_success(store, stored(store, 1), {}))
    publish_success(overtaken, stored(store, 2), {})
    assert sorted(success(store)["manifests"]) == [f"manifests/shard-0000{n}-aa.json" for n in range(3)]
    assert success(store)["rows_in"] == 9


def test_before_the_first_run_has_finished(store: LocalStore) -> None:
    with pytest.raises(UserError, match=r"holds no _SUCCESS\.json"):
        list(success_manifests(store))


def test_a_changed_manifest_is_named(store: LocalStore) -> None:
    (first,) = stored(store, 0)
    publish_success(store, [first], {})
    path = store.root / first.key
    path.write_bytes(path.read_bytes().replace(b'"rows_ok": 2', b'"rows_ok": 3'))
    with pytest.raises(IntegrityError, match=first.key):
        list(success_manifests(store))


def test_rows_of_a_shard(tmp_path: Path) -> None:
    files = {f"{n}.png": photo(n) for n in range(3)}
    outcome = run_job(job_config(write_folder(tmp_path / "in", files), tmp_path / "out"))
    (found,) = outcome.manifests
    store = outcome.job.destination()
    assert list(rows_of(store, found, ["asset_id"])) == [{"asset_id": name} for name in files]
    assert list(rows_of(store, manifest(9))) == []
    assert found.data is not None
    with pytest.raises(IntegrityError, match="has not the rows its manifest names"):
        list(rows_of(store, manifest(9, data={**found.data, "rows": 4})))


def test_a_second_run_publishes_nothing(tmp_path: Path) -> None:
    config = job_config(write_folder(tmp_path / "in", {"a.png": photo()}), tmp_path / "out")
    run_job(config)
    before = tree(tmp_path / "out")
    run_job(config)
    assert tree(tmp_path / "out") == before
