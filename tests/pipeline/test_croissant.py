"""The dataset card is what mlcroissant takes, describes exactly the published state, and leaks no place."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.croissant import CARD_KEY, build_card, write_card
from pipeline.ids import sha256_hex
from pipeline.manifest import SUCCESS_KEY
from pipeline.storage_local import LocalStore
from tests.pipeline.archives import photo, write_folder
from tests.pipeline.local_job import Outcome, data_table, job_config, run_job
from tests.pipeline.published import FILES, published


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    return published(tmp_path_factory.mktemp("published"))


def card_of(outcome: Outcome) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(outcome.job.destination().get(CARD_KEY))
    return document


def test_mlcroissant_reads_card_and_records(done: Outcome, capsys: pytest.CaptureFixture[str]) -> None:
    mlcroissant = pytest.importorskip("mlcroissant")
    root = Path(done.job.config.destination)
    dataset = mlcroissant.Dataset(str(root / CARD_KEY))
    assert not dataset.metadata.ctx.issues.errors
    # Only what nobody told us: who may cite it how, and under which licence.
    assert all(re.search("citeAs|license", text) for text in dataset.metadata.ctx.issues.warnings)
    records = {record["images/asset_id"].decode(): record for record in dataset.records("images")}
    rows = [row for item in done.manifests if item.data for row in data_table(root, item).to_pylist()]
    assert records.keys() == {row["asset_id"] for row in rows}
    for row in rows:
        record = records[row["asset_id"]]
        assert record["images/pixel_sha256"].decode() == row["pixel_sha256"]
        assert record["images/eps_linf_measured"] == row["eps_linf_measured"]
        assert record["images/image"].size == (row["width"], row["height"])
        assert np.isclose(record["images/ssim"], row["ssim"])
    captions = {name: record["images/caption"] for name, record in records.items()}
    assert captions["cats/1.jpg"] == b"first"
    assert captions["a/one.png"] is None


def test_a_card_lists_what_manifests_list(done: Outcome) -> None:
    root = Path(done.job.config.destination)
    (root / "data" / "shard-00099-0123456789ab.parquet").write_bytes(b"an orphan")
    write_card(done.job.destination())
    card = card_of(done)
    listed = {item["contentUrl"]: item for item in card["distribution"] if item["@type"] == "cr:FileObject"}
    assert listed.keys() == {SUCCESS_KEY, *(item.data["key"] for item in done.manifests if item.data)}
    for key, item in listed.items():
        data = (root / key).read_bytes()
        assert (item["sha256"], item["contentSize"]) == (sha256_hex(data), f"{len(data)} B")
    (shards,) = (item for item in card["distribution"] if item["@type"] == "cr:FileSet")
    assert set(shards["includes"]) == listed.keys() - {SUCCESS_KEY}
    assert card["usageInfo"] == "http://ns.useplus.org/ldf/vocab/DMI-PROHIBITED-AIMLTRAINING"
    assert "10 images" in card["description"]
    assert "1 images could not be protected" in card["description"]


def test_a_card_names_no_place(done: Outcome) -> None:
    text = done.job.destination().get(CARD_KEY).decode()
    source, destination = done.job.config.source, done.job.config.destination
    for secret in (source, destination, Path(source).parent.name, "file://", *FILES, "/tmp", "127.0.0.1"):
        assert secret not in text


def test_equal_states_have_equal_cards(done: Outcome) -> None:
    store = done.job.destination()
    first = store.get(CARD_KEY)
    before = store.info(CARD_KEY).etag
    write_card(store)
    assert store.info(CARD_KEY).etag == before  # nothing is written where nothing is new
    store.delete(CARD_KEY)
    write_card(store)
    assert store.get(CARD_KEY) == first
    store.replace(CARD_KEY, b"[] by somebody else", etag=store.info(CARD_KEY).etag)
    write_card(store)
    assert store.get(CARD_KEY) == first


def test_a_card_follows_the_archive(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "in", {"a.png": photo(1)})
    config = job_config(source, tmp_path / "out")
    assert card_of(run_job(config))["version"] == "1.0.0"
    write_folder(source, {"b.png": photo(2)})
    grown = card_of(run_job(config))
    assert (grown["version"], "2 images" in grown["description"]) == ("1.1.0", True)
    names = [item["@id"] for item in grown["distribution"]]
    assert len(names) == 4  # _SUCCESS.json, two shards, and their set


def test_all_quarantined(tmp_path: Path) -> None:
    mlcroissant = pytest.importorskip("mlcroissant")
    run_job(job_config(write_folder(tmp_path / "in", {"a.png": b"no"}), tmp_path / "out"))
    dataset = mlcroissant.Dataset(str(tmp_path / "out" / CARD_KEY))
    assert dataset.metadata.record_sets == []


def test_rights_are_told(tmp_path: Path) -> None:
    rights = {"web_statement": "https://example.org/licence", "credit": "Example", "data_mining": "none"}
    source = write_folder(tmp_path / "in", {"a.png": photo(1)})
    card = card_of(run_job(job_config(source, tmp_path / "out", provenance=rights)))
    assert (card["license"], card["creditText"]) == ("https://example.org/licence", "Example")
    assert "usageInfo" not in card


def test_a_run_in_between(done: Outcome, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another run publishes and writes its card while ours is about to be written: the newer one stays."""
    source = write_folder(tmp_path / "in", {"a.png": photo(1)})
    config = job_config(source, tmp_path / "out")
    outcome = run_job(config)
    store = outcome.job.destination()
    store.delete(CARD_KEY)
    put = LocalStore.put_new

    def late(self: LocalStore, key: str, data: bytes) -> Any:
        if key == CARD_KEY:
            monkeypatch.undo()
            write_folder(source, {"b.png": photo(2)})
            run_job(config)
        return put(self, key, data)

    monkeypatch.setattr(LocalStore, "put_new", late)
    write_card(store)
    assert json.loads(store.get(CARD_KEY)) == build_card(store, store.get(SUCCESS_KEY))
    assert "2 images" in card_of(outcome)["description"]
