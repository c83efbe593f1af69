"""Readers follow ``_SUCCESS.json`` to manifests and trust nothing that does not match its hash."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline import finalize as finalize_module
from pipeline.errors import IntegrityError, UserError
from pipeline.manifest import (
    SUCCESS_KEY,
    Commits,
    Manifest,
    abandon,
    logical_hash,
    publish_success,
    read_commits,
    read_manifest,
    rows_of,
    says,
    success_manifests,
)
from pipeline.storage import ObjectInfo, put_json_new
from pipeline.storage_local import LocalStore
from tests.pipeline.archives import flip, photo, write_folder
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


def about(report: str = "", superseded: dict[str, list[str]] | None = None, **fields: Any) -> dict[str, Any]:
    return {"report": report, "superseded": superseded or {}, "gone": {}, **fields}


def success(store: LocalStore) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(store.get(SUCCESS_KEY))
    return document


def test_publishing_and_following(store: LocalStore) -> None:
    found = stored(store, 0, 1)
    publish_success(store, found, about("r"))
    assert (success(store)["report"], success(store)["rows_in"], success(store)["rows_ok"]) == ("r", 6, 4)
    assert list(success_manifests(store)) == found
    assert read_commits(store) == Commits({item.shard_id for item in found}, set())
    assert read_manifest(store, found[1].shard_id) == found[1]


def test_nothing_new_writes_nothing(store: LocalStore) -> None:
    found = stored(store, 0, 1)
    publish_success(store, found, about("r"))
    before = store.get(SUCCESS_KEY)
    publish_success(store, found, about("another"))
    publish_success(store, found[:1], about("another"))
    assert store.get(SUCCESS_KEY) == before


def test_later_shards_are_merged_in(store: LocalStore) -> None:
    publish_success(store, stored(store, 0), about("first"))
    publish_success(store, stored(store, 1), about("second"))
    assert [item.shard_id for item in success_manifests(store)] == ["shard-00000-aa", "shard-00001-aa"]
    assert (success(store)["report"], success(store)["rows_in"]) == ("second", 6)


def test_another_state_of_what_is_superseded_is_published(store: LocalStore) -> None:
    found = stored(store, 0, 1)
    publish_success(store, found, about("first"))
    replaced = {found[0].shard_id: ["a.png"]}
    publish_success(store, found, about("second", replaced))
    assert (success(store)["report"], success(store)["superseded"]) == ("second", replaced)
    assert list(success_manifests(store)) == found
    before = store.get(SUCCESS_KEY)
    publish_success(store, found, about("third", replaced))
    assert store.get(SUCCESS_KEY) == before
    publish_success(store, found, about("fourth"))
    assert success(store)["superseded"] == {}
    publish_success(store, found, about("fifth", gone=replaced))
    assert (success(store)["report"], success(store)["gone"]) == ("fifth", replaced)


def test_a_shard_that_is_wholly_replaced_is_read_no_longer(store: LocalStore) -> None:
    old, new, other = stored(store, 0, 1, 2)
    publish_success(store, [old], about("first"))
    replaced = {old.shard_id: ["p.parquet"]}
    publish_success(store, [old, new], about("second", replaced), [old.shard_id])
    assert list(success_manifests(store)) == [new]
    assert (success(store)["replaced"].keys(), success(store)["rows_in"]) == ({old.key}, 3)
    before = store.get(SUCCESS_KEY)
    publish_success(store, [old, new], about("third", replaced), [old.shard_id])
    publish_success(store, [old], about("late"))  # a run that knew less
    assert store.get(SUCCESS_KEY) == before
    publish_success(store, [other], about("fourth", replaced))  # of another source: it knows nothing of the old one
    assert list(success_manifests(store)) == [new, other]
    publish_success(store, [old, new, other], about("back", {new.shard_id: ["p.parquet"]}), [new.shard_id])
    assert list(success_manifests(store)) == [old, other]


def test_what_the_published_state_says(store: LocalStore) -> None:
    found = stored(store, 0, 1)
    replaced = {found[0].shard_id: ["a.png"]}
    publish_success(store, found, about(superseded=replaced))
    keys = [item.key for item in found]
    assert says(success(store), keys, about(superseded=replaced))
    assert says(success(store), keys[:1], about(superseded=replaced))
    assert not says(success(store), [*keys, manifest(2).key], about(superseded=replaced))
    assert not says(success(store), keys, about())
    assert not says(success(store), keys, about(superseded=replaced, gone=replaced))


def test_an_abandoned_shard_is_not_committed(store: LocalStore) -> None:
    (first,) = stored(store, 0)
    assert abandon(store, "shard-00001-aa")
    assert read_commits(store) == Commits({first.shard_id}, {"shard-00001-aa"})
    ours, found = put_json_new(store, manifest(1).key, asdict(manifest(1)))
    assert (ours, found["shard_id"], found["abandoned"]) == (False, "shard-00001-aa", True)
    before = tree(store.root)
    assert abandon(store, "shard-00001-aa")  # again, by another run
    assert not abandon(store, first.shard_id)
    assert tree(store.root) == before


def test_nothing_is_sealed_before_the_first_commit(store: LocalStore) -> None:
    assert read_commits(store) == Commits(set(), set())


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
    publish_success(store, stored(store, 0), about())
    overtaken = Overtaken(store.root, lambda: publish_success(store, stored(store, 1), about()))
    publish_success(overtaken, stored(store, 2), about())
    assert sorted(success(store)["manifests"]) == [f"manifests/shard-0000{n}-aa.json" for n in range(3)]
    assert success(store)["rows_in"] == 9


def test_before_the_first_run_has_finished(store: LocalStore) -> None:
    with pytest.raises(UserError, match=r"holds no _SUCCESS\.json"):
        list(success_manifests(store))


def test_a_changed_manifest_is_named(store: LocalStore) -> None:
    (first,) = stored(store, 0)
    publish_success(store, [first], about())
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
    assert [row["asset_id"] for row in rows_of(store, found, only="1.png")] == ["1.png"]
    assert list(rows_of(store, found, only="nobody")) == []
    assert found.data is not None
    with pytest.raises(IntegrityError, match="has not the rows its manifest names"):
        list(rows_of(store, manifest(9, data={**found.data, "rows": 4})))


def test_a_second_run_publishes_nothing(tmp_path: Path) -> None:
    config = job_config(write_folder(tmp_path / "in", {"a.png": photo()}), tmp_path / "out")
    run_job(config)
    before = tree(tmp_path / "out")
    run_job(config)
    assert tree(tmp_path / "out") == before


def test_row_groups_without_the_asset_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finalize_module, "ROW_GROUP_BYTES", 1)
    files = {f"{n}.png": photo(n) for n in range(4)}
    config = job_config(write_folder(tmp_path / "in", files), tmp_path / "out", archive={"unit_assets": 1})
    (found,) = run_job(config).manifests
    assert found.data is not None
    assert found.data["row_groups"] == 4
    path = tmp_path / "out" / found.data["key"]
    images = pq.ParquetFile(path).metadata.row_group(0).column(1)
    flip(path, images.data_page_offset + images.total_compressed_size // 2, 4)
    store = LocalStore(str(tmp_path / "out"))
    assert [row["asset_id"] for row in rows_of(store, found, only="3.png")] == ["3.png"]
    with pytest.raises(IntegrityError, match="is damaged"):
        list(rows_of(store, found, only="0.png"))
