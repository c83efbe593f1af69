"""Looking from outside: how far a destination is, and whether every stored byte is still what was published."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.errors import IntegrityError, UserError
from pipeline.inspection import EXAMPLES, inspect_asset, read_status, verify_destination
from pipeline.manifest import SUCCESS_KEY, Manifest
from pipeline.run import prepare
from pipeline.storage_local import LocalStore
from tests.pipeline.archives import flip, photo, write_folder
from tests.pipeline.local_job import Outcome, commit, job_config, protect_shard, ready, run_job

FILES = {f"{n}.png": photo(n) for n in range(5)} | {"bad.png": b"no", "empty.png": b""}


def config(tmp_path: Path) -> Any:
    source = write_folder(tmp_path / "in", FILES)
    return job_config(source, tmp_path / "out", archive={"files_per_shard": 4, "unit_assets": 2})


@pytest.fixture
def finished(tmp_path: Path) -> Outcome:
    return run_job(config(tmp_path))


def test_no_destination(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is no destination of Fixative"):
        read_status(LocalStore(str(tmp_path)))


def test_status_on_the_way(tmp_path: Path) -> None:
    job, plan = prepare(config(tmp_path))
    store = job.destination()
    status = read_status(store)
    assert [(entry.shard, entry.manifest, entry.parts) for entry in status.shards] == [
        (s, None, 0) for s in plan.shards
    ]
    protect_shard(job, plan.shards[0])
    assert [entry.parts for entry in read_status(store).shards] == [2, 0]
    ready(job.config)
    commit(job, plan, plan.shards[1:])
    status = read_status(store)
    assert [(entry.manifest is not None, entry.parts) for entry in status.shards] == [(False, 2), (True, 0)]
    assert status.finished is False
    commit(job, plan)
    assert read_status(store).finished is False  # not published yet


def test_status_of_a_finished_destination(finished: Outcome) -> None:
    status = read_status(finished.job.destination())
    assert status.finished
    assert [entry.manifest for entry in status.shards] == finished.manifests
    assert status.reasons == {"DecodeError": 1, "FetchError": 1}
    assert [row["asset_id"] for row in status.examples] == ["bad.png", "empty.png"]
    assert status.binding["config_fingerprint"] == finished.job.config_fp


def test_status_tells_current_replaced_and_gone(finished: Outcome, tmp_path: Path) -> None:
    """Shards: 0 to 3; 4 and two broken files, later mended or taken away; then what is new, which changes again."""
    source = tmp_path / "in"
    for name in ("2.png", "3.png", "empty.png"):
        (source / name).unlink()
    write_folder(source, {"0.png": photo(10), "4.png": photo(14), "bad.png": photo(11)})
    status = read_status(run_job(finished.job.config).job.destination())
    states = [(entry.state, entry.newer, entry.gone) for entry in status.shards]
    assert states == [("current", 1, 2), ("gone", 2, 1), ("current", 0, 0)]
    assert (status.finished, status.reasons, status.examples) == (True, {}, [])
    write_folder(source, {"0.png": photo(20), "4.png": photo(24), "bad.png": photo(21)})
    prepare(finished.job.config)
    assert [entry.state for entry in read_status(finished.job.destination()).shards][2:] == ["current", "open"]
    run_job(finished.job.config)
    assert [entry.state for entry in read_status(finished.job.destination()).shards][2:] == ["replaced", "current"]


def test_status_shows_some_examples_only(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "in", {f"{n:02d}.png": b"no" for n in range(9)})
    outcome = run_job(job_config(source, tmp_path / "out", archive={"files_per_shard": 4}))
    status = read_status(outcome.job.destination())
    assert [row["asset_id"] for row in status.examples] == [f"{n:02d}.png" for n in range(EXAMPLES)]
    assert status.reasons == {"DecodeError": 9}


def test_an_intact_destination(finished: Outcome) -> None:
    lines = verify_destination(finished.job.destination())
    assert [(line["shard_id"], line["rows"], line["protected"], line["quarantined"]) for line in lines] == [
        (manifest.shard_id, manifest.rows_in, manifest.rows_ok, manifest.rows_quarantined)
        for manifest in finished.manifests
    ]


def path_of(finished: Outcome, entry: dict[str, Any] | None) -> Path:
    assert entry is not None
    return Path(finished.job.config.destination) / str(entry["key"])


@pytest.mark.parametrize("where", [4, 0.3, 0.6, 0.99])
def test_a_flipped_byte_of_a_data_file(finished: Outcome, where: float) -> None:
    path = path_of(finished, finished.manifests[0].data)
    flip(path, int(where) or int(where * path.stat().st_size))
    with pytest.raises(IntegrityError, match=path.name):
        verify_destination(finished.job.destination())


def test_a_flipped_byte_of_a_quarantine_file(finished: Outcome) -> None:
    path = path_of(finished, finished.manifests[1].quarantine)
    flip(path, path.stat().st_size // 2)
    with pytest.raises(IntegrityError, match=path.name):
        verify_destination(finished.job.destination())


def test_a_changed_manifest(finished: Outcome) -> None:
    path = Path(finished.job.config.destination) / finished.manifests[0].key
    path.write_bytes(path.read_bytes().replace(finished.job.run_id.encode(), b"somebodyelse"))
    with pytest.raises(IntegrityError, match=path.name):
        verify_destination(finished.job.destination())


def forge(finished: Outcome, change: Callable[[list[dict[str, Any]]], list[dict[str, Any]]]) -> Manifest:
    """Rewrites the first data file, and every hash of files that names it."""
    root, manifest = Path(finished.job.config.destination), finished.manifests[0]
    path = path_of(finished, manifest.data)
    table = pq.read_table(path)
    pq.write_table(pa.Table.from_pylist(change(table.to_pylist()), table.schema), path)
    document = json.loads((root / manifest.key).read_bytes())
    document["data"]["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    (root / manifest.key).write_text(json.dumps(document))
    success = json.loads((root / SUCCESS_KEY).read_bytes())
    success["manifests"][manifest.key]["sha256"] = hashlib.sha256((root / manifest.key).read_bytes()).hexdigest()
    (root / SUCCESS_KEY).write_text(json.dumps(success))
    return manifest


def renamed(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{**rows[0], "asset_id": "other"}, *rows[1:]]


def exchanged_image(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{**rows[0], "image": rows[1]["image"]}, *rows[1:]]


def exchanged_image_and_hash(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{**rows[0], "image": rows[1]["image"], "protected_sha256": rows[1]["protected_sha256"]}, *rows[1:]]


def doubled(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [rows[0], rows[0], *rows[2:]]


def fewer(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return rows[1:]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (renamed, "do not match logical_sha256"),
        (doubled, "do not match logical_sha256"),
        (exchanged_image, "do not match protected_sha256"),
        (exchanged_image_and_hash, "do not match pixel_sha256"),
        (fewer, "has not the rows"),
    ],
)
def test_altered_rows_behind_matching_file_hashes(finished: Outcome, change: Any, message: str) -> None:
    forge(finished, change)
    with pytest.raises(IntegrityError, match=message):
        verify_destination(finished.job.destination())


def test_one_asset(finished: Outcome) -> None:
    store = finished.job.destination()
    (row,) = inspect_asset(store, "0.png")
    assert (row["status"], row["file"], row["shard_id"]) == ("protected", "0.png", finished.manifests[0].shard_id)
    assert "image" not in row
    (row,) = inspect_asset(store, "bad.png")
    assert (row["status"], row["error_type"]) == ("quarantined", "DecodeError")
    with pytest.raises(UserError, match="no asset 'nobody'"):
        inspect_asset(store, "nobody")


def test_one_asset_of_a_damaged_file(finished: Outcome) -> None:
    path = path_of(finished, finished.manifests[0].data)
    flip(path, path.stat().st_size // 4, 4)
    with pytest.raises(IntegrityError):
        inspect_asset(finished.job.destination(), "0.png")


def test_one_asset_whose_row_was_altered(finished: Outcome) -> None:
    forge(finished, exchanged_image)
    with pytest.raises(IntegrityError, match=r"0\.png: its stored bytes do not match"):
        inspect_asset(finished.job.destination(), "0.png")
