"""An archive of files, Parquet and tar goes from one bucket to another, with the command, Ray, Prefect and S3.

1. Every asset is protected, or quarantined with a reason (one JPEG is truncated); the manifests' counts say so.
2. Every stored image holds the budget, measured here again on its decoded bytes; its hashes are right.
3. ``_SUCCESS.json`` names the manifests; ``verification.json`` holds their numbers.
4. ``datasets`` reads the data files as images, the customer's columns are there.
5. No object holds original bytes, and neither objects nor output hold the credentials.
6. One line names the actors and the dashboard of Ray.
7. A rerun calls no optimizer and changes no object.
"""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline.inspection import quarantined_rows
from pipeline.manifest import Manifest, rows_of
from pipeline.storage import Store, get_json, open_store
from tests.conftest import S3Server, make_bucket
from tests.e2e.archives import fill, three_kinds
from tests.e2e.command import Result, contents, finished, fixative, job_file, running, starts

pytestmark = [pytest.mark.ray, pytest.mark.timeout(240)]
SECRET = "wJalrXUtnFEMIK7MDENG-bPxRfiCYEXAMPLEKEY"
EPS = 4


@dataclass(frozen=True)
class Run:
    """A finished run and what it started from."""

    images: dict[str, bytes]
    truncated: str
    destination: Store
    manifests: list[Manifest]
    arguments: list[object]
    result: Result

    def rows(self) -> Iterator[dict[str, object]]:
        for manifest in self.manifests:
            yield from rows_of(self.destination, manifest)


@pytest.fixture(scope="module")
def run(s3_server: S3Server, prefect_home: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    objects, images, truncated = three_kinds()
    originals, protected = make_bucket(s3_server), make_bucket(s3_server)
    source, destination = f"s3://{originals}/archive", f"s3://{protected}/2026"
    fill(open_store(source, s3_server.options), objects)
    config = job_file(tmp_path_factory.mktemp("job") / "job.yaml")
    arguments: list[object] = ["protect", source, destination, "-c", config, "--s3-endpoint", s3_server.endpoint_url]
    with running(*arguments, home=prefect_home, environment={"AWS_SECRET_ACCESS_KEY": SECRET}) as command:
        result = command.wait(200)
    assert result.code == 0, result
    store = open_store(destination, s3_server.options)
    return Run(images, truncated, store, finished(store), arguments, result)


def test_every_asset_is_protected_or_quarantined_with_its_reason(run: Run) -> None:
    protected = [row["asset_id"] for row in run.rows()]
    quarantined = [row for manifest in run.manifests for row in quarantined_rows(run.destination, manifest)]
    assert sorted([*protected, *(row["asset_id"] for row in quarantined)]) == sorted(run.images)
    (row,) = quarantined
    assert (row["asset_id"], row["stage"], row["error_type"]) == (run.truncated, "decode", "DecodeError")
    assert {item.source["kind"]: (item.rows_in, item.rows_ok, item.rows_quarantined) for item in run.manifests} == {
        "files": (4, 4, 0),
        "parquet": (5, 5, 0),
        "tar": (5, 4, 1),
    }


def test_stored_pixels_hold_the_budget_and_hashes_hold(run: Run) -> None:
    for row in run.rows():
        original = run.images[row["asset_id"]]
        stored = row["image"]["bytes"]
        before, after = (
            np.asarray(Image.open(io.BytesIO(data)).convert("RGB"), np.int16) for data in (original, stored)
        )
        assert 0 < np.abs(after - before).max() == row["eps_linf_measured"] <= EPS
        assert row["source_sha256"] == hashlib.sha256(original).hexdigest()
        assert row["protected_sha256"] == hashlib.sha256(stored).hexdigest()
    assert fixative("inspect", run.destination.url, *run.arguments[-2:]).code == 0


def test_success_and_verification_hold_the_numbers_of_the_manifests(run: Run) -> None:
    success = get_json(run.destination, "_SUCCESS.json")
    assert success["manifests"].keys() == {manifest.key for manifest in run.manifests}
    assert (success["rows_in"], success["rows_ok"], success["rows_quarantined"]) == (14, 13, 1)
    report = get_json(run.destination, success["report"])
    assert report["shards"].keys() == {manifest.shard_id for manifest in run.manifests}
    for manifest in run.manifests:
        entry = report["shards"][manifest.shard_id]
        for name in ("rows_in", "rows_ok", "rows_quarantined"):
            assert entry[name] == getattr(manifest, name)
        assert {name: entry[name] for name in ("sampled", "survival")} == {
            name: manifest.verify[name] for name in ("sampled", "survival")
        }
    assert report["sampled"] == sum(manifest.verify["sampled"] for manifest in run.manifests) > 0
    assert sum(bool(row["sampled"]) for row in run.rows()) == report["sampled"]


def test_datasets_reads_images_and_the_customers_columns(run: Run, tmp_path: Path) -> None:
    for manifest in run.manifests:
        assert manifest.data is not None
        path = tmp_path / Path(manifest.data["key"]).name
        path.write_bytes(run.destination.get(manifest.data["key"]))
        table = datasets.load_dataset("parquet", data_files=str(path), split="train", cache_dir=str(tmp_path / "hf"))
        assert isinstance(table.features["image"], datasets.Image)
        assert [row["image"].size for row in table] == [(48, 40)] * manifest.rows_ok
        if manifest.source["kind"] == "parquet":
            assert table["caption"] == [f"caption of {name}" for name in table["asset_id"]]
        if manifest.source["kind"] == "tar":
            names = [name.rpartition("#")[2] for name in table["asset_id"]]
            assert table["txt"] == [f"text of {name}" for name in names]


def test_no_original_bytes_and_no_credentials_get_out(run: Run) -> None:
    # Pieces from the middle: of compressed pixels, not of headers that every file shares.
    pieces = [data[len(data) // 2 :][:40] for data in run.images.values()]
    secrets = [SECRET.encode(), *pieces]
    written = 0
    for item in run.destination.list():
        for content in _contents(run.destination.get(item.key), item.key):
            assert not any(secret in content for secret in secrets), item.key
            written += len(content)
    assert written > sum(map(len, run.images.values()))
    assert SECRET not in run.result.out + run.result.err


def _contents(data: bytes, key: str) -> Iterator[bytes]:
    """An object's bytes; of Parquet also what is in it, since its pages are compressed."""
    yield data
    if key.endswith(".parquet"):
        table = pq.read_table(pa.BufferReader(data))
        yield repr(table.schema.metadata).encode()
        for batch in table.to_batches():
            for column in batch.columns:
                yield from (buffer.to_pybytes() for buffer in column.buffers() if buffer is not None)


def test_one_line_names_the_actors_and_the_dashboard(run: Run) -> None:
    assert re.findall(r"^(.+); Ray dashboard: http://127\.0\.0\.1:\d+$", run.result.out, re.MULTILINE) == [
        "1 cpu actors"
    ]
    assert run.result.err == ""


@pytest.mark.usefixtures("prefect_server")
def test_a_rerun_is_free(run: Run) -> None:
    before, calls = contents(run.destination), starts(run.destination)
    again = fixative(*run.arguments)
    assert again.code == 0, again
    assert re.search(r"this run: 0 units, 0 protected, 0 quarantined; 14 were done before", again.out)
    assert starts(run.destination) == calls
    assert contents(run.destination) == before
