"""The fingerprint changes with everything that changes a pixel, and with nothing else."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest

from pipeline import job as job_module
from pipeline.config import JobConfig, S3Settings
from pipeline.errors import UserError
from pipeline.ids import fingerprint
from pipeline.job import archive_store, resolve
from protectors.reference import reference_path
from tests.pipeline.local_job import FAKE, job_config


def config(**sections: Any) -> JobConfig:
    return job_config(Path("/archive"), Path("/out"), **sections)


def test_resolved() -> None:
    job = resolve(config(method={"preset": "strong"}))
    assert job.config_fp == fingerprint(job.fields)
    assert (job.eps_levels(0), job.model_digest, job.protector_version) == (16.0, "none", "1")
    assert pickle.loads(pickle.dumps(job)) == job


def test_every_run_has_its_own_id() -> None:
    first, second = resolve(config()), resolve(config())
    assert first.run_id != second.run_id
    assert first.config_fp == second.config_fp


CHANGES: list[dict[str, Any]] = [
    {"method": {"eps": 5}},
    {"method": {"preset": "strong"}},
    {"method": {"overrides": {"sleep_s": 1}}},
    {"method": {"name": "photoguard", "preset": "fast"}},
    {"method": {"name": "advdm", "preset": "fast"}},
    {"method": {"prompt": "a photo"}},
    {"method": {"precision": "bfloat16"}},
    {"output": {"format": "webp"}},
    {"output": {"resolution": "native"}},
    {"check": {"fraction": 0.5}},
    {"limits": {"min_side": 32}},
    {"archive": {"unit_assets": 3}},
    {"archive": {"image_column": "x"}},
    {"archive": {"other_images": "drop"}},
    {"seed": 1},
]


def test_the_fingerprint_changes_with_the_results() -> None:
    prints = [resolve(config(**sections)).config_fp for sections in [{}, *CHANGES]]
    assert len(set(prints)) == len(prints)


def test_the_fingerprint_changes_with_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = config(method={"name": "photoguard"})
    embedded = resolve(chosen)
    named = resolve(config(method={"name": "photoguard", "model": str(reference_path("nano-sd"))}))
    assert named.config_fp == embedded.config_fp  # the same weights under another name
    monkeypatch.setattr(job_module, "model_digest", lambda folder: "0" * 64)
    assert resolve(chosen).config_fp != embedded.config_fp


def test_the_fingerprint_changes_with_the_code(monkeypatch: pytest.MonkeyPatch) -> None:
    before = resolve(config()).config_fp
    monkeypatch.setattr(job_module, "PIXEL_CODE_VERSION", 10_000)
    assert resolve(config()).config_fp != before


@pytest.mark.parametrize(
    "run",
    [
        {"actors": 3},
        {"single_writer": True},
        {"wave_units": 1},
        {"max_quarantine_rows": 0},
        {"ray_address": "auto"},
        {"s3": {"endpoint_url": "http://127.0.0.1:1", "region": "x", "profile": "y"}},
    ],
)
def test_the_fingerprint_does_not_change_with_the_run(run: dict[str, Any]) -> None:
    assert resolve(config(run=run)).config_fp == resolve(config()).config_fp


def test_the_fingerprint_does_not_change_with_places() -> None:
    other = job_config(Path("/elsewhere"), Path("/results"))
    assert resolve(other).config_fp == resolve(config()).config_fp


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ({"name": "photogard"}, "did you mean 'photoguard'"),
        ({"name": "nowhere:Class"}, "cannot be loaded"),
        ({"preset": "turbo"}, "has no preset 'turbo'; it has fast, paper, strong"),
        ({"overrides": {"colour": 1}}, "no field 'colour'"),
        ({"overrides": {"sleep_s": -1}}, "sleep_s"),
        ({"eps": 0.5}, "eps_levels"),
        ({"overrides": {"eps_levels": 200}}, "eps_levels=200: use at most 64"),
        ({"name": "photoguard", "model": "/no/such/folder"}, "/no/such/folder"),
    ],
)
def test_what_cannot_work_is_refused(method: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        resolve(config(method={"name": FAKE, **method}))


@pytest.mark.parametrize(
    ("source", "root", "key"),
    [
        ("/a/b", "/a/b", ""),
        ("/a/b/", "/a/b", ""),
        ("/a/x.parquet", "/a", "x.parquet"),
        ("/x.parquet", "/", "x.parquet"),
        ("/a/x.tar/", "/a", "x.tar"),
        ("/a/photo.jpg", "/a", "photo.jpg"),
    ],
)
def test_a_single_shard_may_be_the_source(source: str, root: str, key: str) -> None:
    store, found = archive_store(source, S3Settings())
    assert (store.url, found) == (f"file://{root}", key)


def test_a_relative_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    store, key = archive_store("x.tar", S3Settings())
    assert (store.url, key) == (f"file://{tmp_path}", "x.tar")
