"""A shard is committed whole or not at all: every row once, in order, with the customer's columns."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline import finalize as finalize_module
from pipeline.config import CheckSettings
from pipeline.errors import IntegrityError, SourceChanged
from pipeline.ids import sha256_hex
from pipeline.job import Job
from pipeline.manifest import Commits, Manifest, abandon, read_commits
from pipeline.parts import PARQUET_OPTIONS, read_part
from pipeline.plan import Plan, load_index, make_plan, publish_plan, unit_ids
from pipeline.run import prepare, publish
from pipeline.schema import QUARANTINED
from pipeline.storage_local import LocalStore
from tests.pipeline.archives import flip, photo, photos, write_folder, write_parquet, write_tar
from tests.pipeline.local_job import (
    check_shard,
    commit,
    data_table,
    job_config,
    part_rows,
    protect_shard,
    ready,
    run_job,
    tree,
)

Ready = tuple[Job, Plan]
PLAIN = CheckSettings().purifiers
MEASURED = {"none", *PLAIN, *(f"{name}@training-scale" for name in PLAIN)}


def folder_job(tmp_path: Path, files: dict[str, bytes], **sections: Any) -> Ready:
    settings = {"archive": {"unit_assets": 3}, **sections}
    return ready(job_config(write_folder(tmp_path / "in", files), tmp_path / "out", **settings))


def part_keys(job: Job, plan: Plan) -> list[str]:
    """Keys of the first shard's parts, in row order."""
    shard = plan.shards[0]
    units = unit_ids(load_index(job.destination(), shard), job.config_fp, shard.rung)
    return [f"parts/{shard.shard_id}/{unit}.parquet" for unit in units]


def committed_files(root: Path) -> list[str]:
    return [key for key in tree(root) if key.startswith(("data/", "quarantine/", "manifests/"))]


def test_rows_are_merged_in_input_order(tmp_path: Path) -> None:
    files = {f"{n:02d}.png": photo(n) for n in range(10)}
    job, plan = folder_job(tmp_path, files)
    (manifest,) = commit(job, plan)
    table = data_table(tmp_path / "out", manifest)
    assert table.column("asset_id").to_pylist() == sorted(files)
    assert (manifest.rows_in, manifest.rows_ok, manifest.rows_quarantined) == (10, 10, 0)
    assert manifest.quarantine is None
    assert manifest.data is not None
    path = tmp_path / "out" / manifest.data["key"]
    assert manifest.data["sha256"] == sha256_hex(path.read_bytes())
    assert (manifest.data["size"], manifest.data["rows"]) == (path.stat().st_size, 10)
    parts = {row["asset_id"]: row for row in part_rows(job, plan.shards[0])}
    for row in table.to_pylist():
        assert all(row[name] == parts[row["asset_id"]][name] for name in ("image", "pixel_sha256", "seed", "unit_id"))


def test_the_check_is_folded_into_its_rows(tmp_path: Path) -> None:
    job, plan = folder_job(tmp_path, {f"{n}.png": photo(n) for n in range(6)}, check={"min_per_shard": 2})
    (manifest,) = commit(job, plan)
    rows = data_table(tmp_path / "out", manifest).to_pylist()
    checked = [row for row in rows if row["sampled"]]
    assert len(checked) == 2 == manifest.verify["sampled"]
    assert all(row["verified"] for row in checked)
    for row in checked:
        cells = {cell["purifier"]: cell for cell in row["check"]}
        assert cells.keys() == MEASURED
        assert cells["none"]["objective_clean"] == 0 < cells["none"]["objective_protected"]
    assert all(row["verified"] is None and row["check"] is None for row in rows if not row["sampled"])
    assert {item["purifier"] for item in manifest.verify["survival"]} == MEASURED


def test_quarantined_rows_have_a_table_of_their_own(tmp_path: Path) -> None:
    files = {"a.png": photo(1), "b.png": b"no", "c.png": b"", "d.png": photo(4, marker=7), "e.png": photo(5)}
    job, plan = folder_job(tmp_path, files, method={"overrides": {"raise_on": 7}})
    (manifest,) = commit(job, plan)
    assert (manifest.rows_in, manifest.rows_ok, manifest.rows_quarantined) == (5, 2, 3)
    assert manifest.quarantine is not None
    table = pq.read_table(tmp_path / "out" / manifest.quarantine["key"])
    assert table.schema.equals(QUARANTINED)
    found = [(row["asset_id"], row["stage"], row["error_type"]) for row in table.to_pylist()]
    assert found == [
        ("b.png", "decode", "DecodeError"),
        ("c.png", "fetch", "FetchError"),
        ("d.png", "protect", "RuntimeError"),
    ]
    for row in table.to_pylist():
        assert row["shard_id"] == plan.shards[0].shard_id
        assert row["run_id"] == job.run_id
        assert row["message"]
        assert row["source_sha256"] == (sha256_hex(files[row["asset_id"]]) if files[row["asset_id"]] else None)
    ids = data_table(tmp_path / "out", manifest).column("asset_id").to_pylist()
    assert sorted([*ids, "b.png", "c.png", "d.png"]) == sorted(files)


def test_a_shard_that_is_quarantined_whole(tmp_path: Path) -> None:
    job, plan = folder_job(tmp_path, {"a.png": b"x", "b.png": b"y"})
    (manifest,) = commit(job, plan)
    assert manifest.data is None
    assert manifest.quarantine is not None
    assert (manifest.rows_ok, manifest.rows_quarantined) == (0, 2)
    assert manifest.verify == {"sampled": 0, "survival": [], "customization": [], "gate": []}


CUSTOMER: dict[str, pa.Array] = {
    "label": pa.array([0, 1, None, 1], pa.int8()),
    "width": pa.array([1, 2, 3, 4], pa.uint16()),
    "status": pa.array(["w", "x", "y", None]),
    "row": pa.array([5.5, None, 7.5, 8.5]),
    "tags": pa.array([["a"], [], None, ["b", "c"]], pa.list_(pa.string())),
    "box": pa.array([{"x": 1, "y": [1.5]}, None, {"x": None, "y": None}, {"x": 2, "y": []}]),
    "when": pa.array([1, 2, None, 4], pa.timestamp("us", tz="UTC")),
    "kind": pa.array(["cat", "dog", None, "cat"]).dictionary_encode(),
    "price": pa.array(["1.50", None, "2.25", "0.00"]).cast(pa.decimal128(9, 2)),
    "note": pa.array(["ä", None, "", "x" * 300], pa.large_string()),
    "nothing": pa.nulls(4),
}


def test_the_customers_columns_keep_values_types_and_metadata(tmp_path: Path) -> None:
    features = {"label": {"names": ["cat", "dog"], "_type": "ClassLabel"}, "image": {"_type": "Image"}}
    metadata = {"licence": "CC0", "huggingface": json.dumps({"info": {"features": features}})}
    write_parquet(tmp_path / "in" / "a.parquet", photos(4), CUSTOMER, metadata=metadata)
    write_tar(tmp_path / "in" / "b.tar", [("x.png", photo(8)), ("x.txt", b"caption"), ("x.cls", b"3")])
    config = job_config(tmp_path / "in", tmp_path / "out", archive={"unit_assets": 3})
    first, second = run_job(config).manifests
    table = data_table(tmp_path / "out", first)
    for name, column in CUSTOMER.items():
        stored = table.column({"width": "source_width"}.get(name, name))
        assert stored.type == column.type, name
        assert stored.to_pylist() == column.to_pylist(), name
    assert table.column("txt").to_pylist() == [None] * 4
    other = data_table(tmp_path / "out", second)
    assert other.schema.equals(table.schema)
    assert (other.column("txt").to_pylist(), other.column("cls").to_pylist()) == (["caption"], ["3"])
    for name in ("label", "status", "row"):  # also where Fixative's own parts have a column of this name
        assert other.column(name).to_pylist() == [None]
    kept = {key.decode(): value.decode() for key, value in table.schema.metadata.items()}
    assert kept["licence"] == "CC0"
    assert json.loads(kept["huggingface"])["info"]["features"]["label"] == features["label"]
    assert json.loads(kept["fixative.inputs"])["key"] == "a.parquet"


def test_a_data_file_loads_with_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    datasets = pytest.importorskip("datasets")
    features = {"label": {"names": ["cat", "dog"], "_type": "ClassLabel"}}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    data = photos(4)
    write_parquet(tmp_path / "in" / "a.parquet", data, {"label": [0, 1, 1, 0]}, metadata=metadata)
    run_job(job_config(tmp_path / "in", tmp_path / "out"))
    files = str(tmp_path / "out" / "data" / "*.parquet")
    loaded = datasets.load_dataset("parquet", data_files=files, split="train", cache_dir=str(tmp_path / "cache"))
    assert loaded.features["label"].names == ["cat", "dog"]
    assert loaded["label"] == [0, 1, 1, 0]
    for row, original in zip(loaded, data, strict=True):
        assert isinstance(row["image"], Image.Image)
        difference = np.asarray(row["image"]).astype(int) - np.asarray(Image.open(io.BytesIO(original)))
        assert np.abs(difference).max() == row["eps_linf_measured"] > 0


def test_row_groups_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finalize_module, "ROW_GROUP_BYTES", 5_000)
    job, plan = folder_job(tmp_path, {f"{n}.png": photo(n) for n in range(9)})
    (manifest,) = commit(job, plan)
    assert manifest.data is not None
    assert manifest.data["row_groups"] == 3
    assert data_table(tmp_path / "out", manifest).column("asset_id").to_pylist() == [f"{n}.png" for n in range(9)]


def remove(path: Path) -> None:
    path.unlink()


def empty(path: Path) -> None:
    path.write_bytes(b"")


def cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def rewritten(path: Path, change: Callable[[list[dict[str, Any]]], list[dict[str, Any]]]) -> None:
    table = pq.read_table(path)
    pq.write_table(pa.Table.from_pylist(change(table.to_pylist()), table.schema), path, **PARQUET_OPTIONS)


def one_row_less(path: Path) -> None:
    rewritten(path, lambda rows: rows[:-1])


def one_row_twice(path: Path) -> None:
    rewritten(path, lambda rows: [rows[0], rows[0], *rows[2:]])


def other_order(path: Path) -> None:
    rewritten(path, lambda rows: rows[::-1])


def other_image(path: Path) -> None:
    rewritten(path, lambda rows: [{**rows[0], "image": rows[1]["image"]}, *rows[1:]])


DAMAGES = [remove, empty, cut_off, one_row_less, one_row_twice, other_order, other_image]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_part_is_named_and_nothing_is_committed(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    job, plan = folder_job(tmp_path, {f"{n}.png": photo(n) for n in range(7)})
    key = part_keys(job, plan)[1]
    damage(tmp_path / "out" / key)
    with pytest.raises(IntegrityError, match=key):
        commit(job, plan)
    assert committed_files(tmp_path / "out") == []


def test_a_flipped_byte_of_any_column_is_seen(tmp_path: Path) -> None:
    write_parquet(tmp_path / "in" / "a.parquet", photos(2), {"label": ["one", "two"], "n": [1, 2]})
    job, plan = ready(job_config(tmp_path / "in", tmp_path / "out"))
    (key,) = part_keys(job, plan)
    path = tmp_path / "out" / key
    good, whole = read_part(job.destination(), key), path.read_bytes()
    group = pq.ParquetFile(path).metadata.row_group(0)
    for number in range(group.num_columns):
        chunk = group.column(number)
        flip(path, chunk.data_page_offset + chunk.total_compressed_size - 1)  # the last byte of the column's last page
        with pytest.raises(IntegrityError, match=key):
            read_part(job.destination(), key)
        path.write_bytes(whole)
    end = chunk.data_page_offset + chunk.total_compressed_size
    for offset in range(4, end, 23):  # page headers too
        flip(path, offset)
        with suppress(IntegrityError):
            assert read_part(job.destination(), key).equals(good), offset
        path.write_bytes(whole)


def test_a_missing_check_is_refused(tmp_path: Path) -> None:
    job, plan = folder_job(tmp_path, {"a.png": photo(1), "b.png": photo(2)})
    (check,) = (tmp_path / "out" / "checks").rglob("*.json")
    check.unlink()
    with pytest.raises(IntegrityError, match=r"checks of rows \[0, 1\] are missing"):
        commit(job, plan)
    assert committed_files(tmp_path / "out") == []


def test_a_check_of_other_bytes_is_refused_by_its_key(tmp_path: Path) -> None:
    job, plan = folder_job(tmp_path, {"a.png": photo(1), "b.png": photo(2)})
    (path,) = (tmp_path / "out" / "checks").rglob("*.json")
    document = json.loads(path.read_bytes())
    document["rows"]["1"]["protected_sha256"] = "0" * 64
    path.write_text(json.dumps(document))
    key = path.relative_to(tmp_path / "out").as_posix()
    with pytest.raises(IntegrityError, match=f"^{key} measured other bytes than its part holds now"):
        commit(job, plan)
    assert committed_files(tmp_path / "out") == []
    path.unlink()
    check_shard(job, plan.shards[0])
    assert len(commit(job, plan)) == 1


def test_a_part_that_was_made_again_needs_its_check_again(tmp_path: Path) -> None:
    """Equal pixels, other bytes: the check names the bytes that it measured."""
    job, plan = folder_job(tmp_path, {"a.png": photo(1), "b.png": photo(2)})
    (key,) = part_keys(job, plan)

    def larger(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        for row in rows:
            row["image"]["bytes"] += b"\0"
            row["protected_sha256"] = sha256_hex(row["image"]["bytes"])
        return rows

    rewritten(tmp_path / "out" / key, larger)
    with pytest.raises(IntegrityError, match=r"^checks/.* measured other bytes"):
        commit(job, plan)


def test_bytes_that_the_store_damages_are_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job, plan = folder_job(tmp_path, {"a.png": photo(1)})
    put = LocalStore.put_new_file

    def damaging(store: LocalStore, key: str, path: Path) -> Any:
        flip(path, 100)
        return put(store, key, path)

    monkeypatch.setattr(LocalStore, "put_new_file", damaging)
    with pytest.raises(IntegrityError, match=r"data/shard-00000-.* does not hold what was written"):
        commit(job, plan)
    assert not (tmp_path / "out" / "manifests").exists()


def test_finalizing_twice_changes_nothing(tmp_path: Path) -> None:
    job, plan = folder_job(tmp_path, {f"{n}.png": photo(n) for n in range(4)})
    first = commit(job, plan)
    before = tree(tmp_path / "out")
    assert commit(job, plan) == first
    assert tree(tmp_path / "out") == before


def test_of_two_finalizers_one_wins(tmp_path: Path) -> None:
    job, plan = folder_job(tmp_path, {f"{n}.png": photo(n) for n in range(4)})
    with ThreadPoolExecutor(4) as pool:
        found: list[list[Manifest]] = list(pool.map(lambda _: commit(job, plan), range(4)))
    assert all(manifests == found[0] for manifests in found)
    assert len(committed_files(tmp_path / "out")) == 2


def test_a_finalizer_that_died_before_its_manifest_is_repeated(tmp_path: Path) -> None:
    job, plan = folder_job(tmp_path, {f"{n}.png": photo(n) for n in range(4)})
    (first,) = commit(job, plan)
    (tmp_path / "out" / first.key).unlink()
    (second,) = commit(job, plan)
    assert second.data == first.data
    assert second.logical_sha256 == first.logical_sha256


def test_the_logical_hash_does_not_depend_on_who_worked_when(tmp_path: Path) -> None:
    files = {f"{n}.png": photo(n) for n in range(7)} | {"bad.png": b"no"}
    hashes = []
    for name, order in (("x", 1), ("y", -1)):
        job, plan = folder_job(tmp_path / name, files)
        for key in part_keys(job, plan)[::order][:2]:  # the second job does some units again, later and by another run
            if name == "y":
                (tmp_path / name / "out" / key).unlink()
        other, _ = ready(job.config)
        assert other.run_id != job.run_id
        protect_shard(other, plan.shards[0])
        hashes += [manifest.logical_sha256 for manifest in commit(other, plan)]
    assert hashes[0] == hashes[1]
    job, plan = folder_job(tmp_path / "z", {**files, "3.png": photo(33)})
    assert commit(job, plan)[0].logical_sha256 != hashes[0]


def published_rows(root: Path) -> list[str]:
    """Ids in all files that a manifest names."""
    manifests = [json.loads(path.read_bytes()) for path in sorted((root / "manifests").glob("*.json"))]
    files = [root / document["data"]["key"] for document in manifests if "abandoned" not in document]
    return [name for path in files for name in pq.read_table(path).column("asset_id").to_pylist()]


def test_a_run_that_was_overtaken_by_a_new_plan_commits_nothing(tmp_path: Path) -> None:
    job, plan = folder_job(tmp_path, {"a.png": photo(1), "b.png": photo(2)})  # run A, about to commit
    (tmp_path / "in" / "b.png").unlink()
    write_folder(tmp_path / "in", {"b.png": photo(3, side=30)})
    other, anew = ready(job.config)  # run B
    assert plan.shards[0] not in anew.shards
    with pytest.raises(SourceChanged, match=f"{plan.shards[0].shard_id}: another run has planned its source anew"):
        commit(job, plan)
    assert read_commits(job.destination()) == Commits(set(), {plan.shards[0].shard_id})
    commit(other, anew)
    with pytest.raises(SourceChanged):
        commit(job, plan)
    assert published_rows(tmp_path / "out") == ["a.png", "b.png"]


def test_a_run_that_commits_before_the_new_plan_keeps_its_shard(tmp_path: Path) -> None:
    job, plan = folder_job(tmp_path, {"a.png": photo(1), "b.png": photo(2)})  # run A
    (tmp_path / "in" / "b.png").unlink()
    write_folder(tmp_path / "in", {"b.png": photo(3, side=30)})
    late = make_plan(job.source(), job.destination(), job.config.job.archive, job.config_fp, only="")  # run B
    assert late.dropped == [plan.shards[0].shard_id]
    (first,) = commit(job, plan)
    assert not publish_plan(job.destination(), late)
    other, anew = ready(job.config)
    assert anew.shards[0] == plan.shards[0]
    assert anew.superseded == {first.shard_id: ["b.png"]}
    manifests = commit(other, anew)
    assert manifests[0] == first
    assert published_rows(tmp_path / "out") == ["a.png", "b.png", "b.png"]  # old and new, and it says which is old
    publish(other, anew, manifests, "r")
    assert json.loads((tmp_path / "out" / "_SUCCESS.json").read_bytes())["superseded"] == anew.superseded


def test_a_tombstone_outlives_a_finalizer_in_the_middle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job, plan = folder_job(tmp_path, {"a.png": photo(1)})
    put = LocalStore.put_new_file

    def overtaken(store: LocalStore, key: str, path: Path) -> Any:
        assert abandon(job.destination(), plan.shards[0].shard_id)
        return put(store, key, path)

    monkeypatch.setattr(LocalStore, "put_new_file", overtaken)
    with pytest.raises(SourceChanged):
        commit(job, plan)
    assert read_commits(job.destination()) == Commits(set(), {plan.shards[0].shard_id})
    assert prepare(job.config)[1].shards[0].number == 1
