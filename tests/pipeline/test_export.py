"""Exports hold exactly the published images: right names, right bytes, nothing else, however often they are run."""

from __future__ import annotations

import io
import json
import tarfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pipeline.errors import IntegrityError, NotFound, UserError
from pipeline.export import Export, Form, Options, export, rows_to_export, summary
from pipeline.export_names import Names, safe_path
from pipeline.ids import sha256_hex
from pipeline.storage import StorageOptions, open_store
from pipeline.storage_fsspec import FsspecStore
from pipeline.storage_local import LocalStore
from tests.conftest import S3Server
from tests.pipeline.archives import flip, photo, photos, write_folder, write_parquet
from tests.pipeline.local_job import Outcome, data_table, job_config, run_job, tree
from tests.pipeline.published import CAPTIONS, published

PATHS = {
    "a/one.png",
    "a/two.png",
    "b/Äpfel am Baum.png",
    "cats/1.png",
    "_/_/up.png",
    "_CON.png",
    "c/plain/000000.png",
    "c/plain/000001.png",
    "d/x.png",
    "d/deep/y.v2.png",
}


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    return published(tmp_path_factory.mktemp("published"))


def rows(outcome: Outcome) -> list[dict[str, Any]]:
    root = Path(outcome.job.config.destination)
    return [row for item in outcome.manifests if item.data for row in data_table(root, item).to_pylist()]


def run(outcome: Outcome, out: Path, form: Form = "files", **options: Any) -> Export:
    return export(outcome.job.destination(), LocalStore(str(out)), Options(form=form, **options))


def test_files_have_their_names_and_bytes(done: Outcome, tmp_path: Path) -> None:
    steps: list[int] = []
    result = export(done.job.destination(), LocalStore(str(tmp_path)), Options(form="files"), steps.append)
    stored = tree(tmp_path)
    assert stored.keys() == PATHS
    assert sorted(map(sha256_hex, stored.values())) == sorted(row["protected_sha256"] for row in rows(done))
    by_id = {row["asset_id"]: row["image"]["bytes"] for row in rows(done)}
    assert stored["a/two.png"] == by_id["a/two.jpg"]
    assert stored["_/_/up.png"] == by_id["../../up.png"]
    assert stored["d/x.png"] == by_id["d.tar#x.png"]
    assert (result.images, result.written, result.present) == (10, 10, 0)
    assert sum(steps) == 10 == rows_to_export(done.job.destination())
    assert [(row["asset_id"], row["stage"]) for row in result.quarantined] == [("b/broken.png", "decode")]
    said = "\n".join(summary(result))
    assert "1 assets are quarantined" in said
    assert "b/broken.png: decode" in said


def test_a_stopped_export_goes_on(done: Outcome, tmp_path: Path) -> None:
    run(done, tmp_path)
    first = tree(tmp_path)
    kept = tmp_path / "a" / "one.png"
    before = kept.stat().st_mtime_ns
    for gone in ("d/x.png", "cats/1.png"):
        (tmp_path / gone).unlink()
    result = run(done, tmp_path)
    assert (result.images, result.written, result.present) == (10, 2, 8)
    assert tree(tmp_path) == first
    assert kept.stat().st_mtime_ns == before


def test_a_dry_run_writes_nothing_and_counts_right(done: Outcome, tmp_path: Path) -> None:
    for form in ("files", "webdataset"):
        result = run(done, tmp_path / "out", form, dry_run=True)
        assert (result.images, result.written) == (10, 10)
        assert result.examples
        assert not (tmp_path / "out").exists()


def test_other_bytes_are_not_written_over(done: Outcome, tmp_path: Path) -> None:
    write_folder(tmp_path, {"a/one.png": b"somebody's"})
    result = run(done, tmp_path)
    assert (tmp_path / "a" / "one.png").read_bytes() == b"somebody's"
    assert (result.written, len(result.problems)) == (9, 1)
    assert "a/one.png holds other bytes" in result.problems[0]
    assert "--replace" in result.problems[0]
    looked = run(done, tmp_path, replace=True, dry_run=True)
    assert (looked.replaced, looked.present, looked.written) == (1, 9, 0)
    result = run(done, tmp_path, replace=True)
    assert (result.replaced, result.present, result.problems) == (1, 9, [])
    assert (tmp_path / "a" / "one.png").read_bytes() != b"somebody's"


def test_a_file_where_a_folder_should_be(done: Outcome, tmp_path: Path) -> None:
    write_folder(tmp_path, {"d": b"in the way"})
    result = run(done, tmp_path)
    assert (result.written, len(result.problems)) == (8, 2)


def test_images_that_want_one_name(tmp_path: Path) -> None:
    files = {"a.jpg": photo(1), "a.png": photo(2), "A.PNG": photo(3), "twin.jpg": photo(4), "twin.png": photo(4)}
    outcome = run_job(job_config(write_folder(tmp_path / "in", files), tmp_path / "out"))
    result = run(outcome, tmp_path / "images")
    stored = tree(tmp_path / "images")
    assert (result.written, len(stored)) == (5, 5)  # also where two images are equal byte for byte
    assert len({name.lower() for name in stored}) == 5
    assert {"A.PNG", "twin.png"} < stored.keys()
    assert run(outcome, tmp_path / "images").present == 5  # the same names again
    run(outcome, tmp_path / "tars", "webdataset")
    (tar,) = (tmp_path / "tars").glob("*.tar")
    with tarfile.open(tar) as opened:
        names = opened.getnames()
    assert len(names) == len(set(names)) == 10


def test_newer_versions_take_the_place_of_older_ones(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "in", {"a.png": photo(1), "b.png": photo(2), "c.png": b"no"})
    write_parquet(source / "p.parquet", photos(2, 10))
    config = job_config(source, tmp_path / "out")
    run(run_job(config), tmp_path / "images")
    (source / "b.png").unlink()
    (source / "c.png").unlink()
    write_folder(source, {"b.png": photo(3, side=30), "c.png": photo(4)})
    write_parquet(source / "p.parquet", photos(3, 50))
    outcome = run_job(config)
    result = run(outcome, tmp_path / "images")
    assert (result.images, result.written, result.quarantined) == (6, 2, [])  # c.png, and the third row
    assert len(result.problems) == 3
    assert run(outcome, tmp_path / "images", replace=True).replaced == 3
    assert run(outcome, tmp_path / "fresh").written == 6
    assert tree(tmp_path / "fresh") == tree(tmp_path / "images")
    sizes = {name: Image.open(io.BytesIO(data)).width for name, data in tree(tmp_path / "fresh").items()}
    assert sizes["b.png"] == 30


def test_only_what_is_published(done: Outcome, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"_SUCCESS.json: no run has finished here"):
        export(LocalStore(str(tmp_path / "in")), LocalStore(str(tmp_path / "out")), Options(form="files"))
    root = Path(done.job.config.destination)
    for inside in (root, root / "images", root.parent):
        with pytest.raises(UserError, match="overlap"):
            run(done, inside)


def test_damaged_bytes_do_not_go_out(tmp_path: Path) -> None:
    outcome = run_job(job_config(write_folder(tmp_path / "in", {"a.png": photo(1)}), tmp_path / "out"))
    (manifest,) = outcome.manifests
    assert manifest.data is not None
    path = tmp_path / "out" / manifest.data["key"]
    place = path.read_bytes().index(b"IDAT")
    flip(path, place + 10)
    for form in ("files", "webdataset"):
        with pytest.raises(IntegrityError):
            run(outcome, tmp_path / form, form)
        assert tree(tmp_path / form) == {}


@pytest.fixture(scope="module")
def tars(done: Outcome, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tars")
    result = run(done, folder, "webdataset")
    assert (result.images, result.written, result.tars, result.strangers) == (10, 10, 4, [])
    return folder


def test_tars_are_equal_byte_for_byte(done: Outcome, tars: Path, tmp_path: Path) -> None:
    assert run(done, tars, "webdataset").present == 10
    run(done, tmp_path, "webdataset")
    assert tree(tmp_path) == tree(tars)
    first = next(iter(sorted(tars.glob("*.tar"))))
    with tarfile.open(first) as opened:
        for member in opened:
            assert (member.mtime, member.uid, member.gid, member.uname) == (0, 0, 0, "")
    (tmp_path / "shard-00000-000000000000.tar").write_bytes(b"")
    result = run(done, tmp_path, "webdataset")
    assert result.strangers == ["shard-00000-000000000000.tar"]
    assert "may be deleted" in "\n".join(summary(result))


def test_tars_open_with_webdataset(done: Outcome, tars: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    urls = sorted(map(str, tars.glob("*.tar")))
    samples = list(webdataset.WebDataset(urls, shardshuffle=False).decode("pil"))
    assert len(samples) == 10
    by_id = {row["asset_id"]: row for row in rows(done)}
    assert {sample["json"]["asset_id"] for sample in samples} == by_id.keys()
    for sample in samples:
        row = by_id[sample["json"]["asset_id"]]
        original = Image.open(io.BytesIO(row["image"]["bytes"])).convert("RGB")
        assert np.array_equal(np.asarray(sample["png"]), np.asarray(original))
        assert sample["json"]["pixel_sha256"] == row["pixel_sha256"]
        assert sample["json"]["processed_at"] == row["processed_at"].isoformat()
        assert "image" not in sample["json"]
    captions = [sample["json"]["caption"] for sample in samples]
    assert [text for text in captions if text in CAPTIONS] == CAPTIONS


def test_facts_that_json_does_not_know(tmp_path: Path) -> None:
    columns = {
        "mask": pa.array([b"\x00\xff", None]),
        "score": pa.array([float("nan"), 1.5]),
        "price": pa.array(["1.50", None]).cast(pa.decimal128(9, 2)),
        "tags": pa.array([["a"], None], pa.list_(pa.string())),
    }
    write_parquet(tmp_path / "in" / "a.parquet", photos(2), columns)
    outcome = run_job(job_config(tmp_path / "in", tmp_path / "out", archive={"image_column": "image"}))
    run(outcome, tmp_path / "tars", "webdataset")
    (path,) = (tmp_path / "tars").glob("*.tar")
    with tarfile.open(path) as tar:
        documents = [json.loads(tar.extractfile(m).read()) for m in tar if m.name.endswith(".json")]  # type: ignore[union-attr]
    assert [(d["mask"], d["score"], d["price"], d["tags"]) for d in documents] == [
        ("AP8=", None, "1.50", ["a"]),
        (None, 1.5, None, None),
    ]


def test_to_s3_and_to_other_filesystems(done: Outcome, tmp_path: Path, s3_server: S3Server, s3_bucket: str) -> None:
    run(done, tmp_path)
    bucket = open_store(f"s3://{s3_bucket}/images", s3_server.options)
    assert export(done.job.destination(), bucket, Options(form="files")).written == 10
    assert {item.key: bucket.get(item.key) for item in bucket.list()} == tree(tmp_path)
    assert export(done.job.destination(), bucket, Options(form="files")).present == 10
    with pytest.raises(UserError, match="--single-writer"):
        export(done.job.destination(), FsspecStore("memory://images"), Options(form="webdataset"))
    memory = open_store("memory://images", StorageOptions(), single_writer=True)
    assert export(done.job.destination(), memory, Options(form="webdataset")).tars == 4
    assert export(done.job.destination(), memory, Options(form="webdataset")).present == 10


@given(st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=400))
def test_no_name_leaves_the_folder(name: str) -> None:
    path = safe_path(name)
    parts = path.split("/")
    assert all(part and part not in (".", "..") and len(part.encode()) <= 255 for part in parts)
    assert not path.startswith("/")
    assert path.isprintable()
    assert safe_path(path) == path
    with suppress(NotFound):
        LocalStore("/nowhere-at-all").info(path)  # the store's own check takes it


@settings(max_examples=30)
@given(st.lists(st.sampled_from(["a.png", "A.png", "á.png", "á.png", "b/a.png"]), max_size=12))
def test_no_name_is_given_twice(wanted: list[str]) -> None:
    names, again = Names(), Names()
    given_names = [names.give(path, str(number)) for number, path in enumerate(wanted)]
    assert len({name.lower() for name in given_names}) == len(wanted)
    assert [again.give(path, str(number)) for number, path in enumerate(wanted)] == given_names
    names.close()
    again.close()
