"""Runs over files full of metadata: nothing of an original gets out, and what is signed holds.

The archive's files hold a picture of the original in every place that the formats and their metadata have for one.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from pipeline.errors import IntegrityError, UserError
from pipeline.inspection import inspect_asset, verify_destination
from pipeline.provenance.signer import read_authorities
from pipeline.run import preflight, prepare
from tests.pipeline import images
from tests.pipeline.archives import write_folder
from tests.pipeline.certificates import Files, make_signer
from tests.pipeline.local_job import (
    Outcome,
    check_shard,
    commit,
    data_table,
    job_config,
    part_rows,
    protect_shard,
    run_job,
    tree,
)
from tests.pipeline.rich_images import MARK, RICH_FILES, THUMBNAIL, with_credentials
from tests.pipeline.test_inspection import forge

SECRETS = ["hunter2-access-key", "hunter2-secret-key"]


@pytest.fixture(scope="module")
def signer(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return make_signer(tmp_path_factory.mktemp("signer"))


def job(folder: Path, files: dict[str, bytes], signer: Files | None, **sections: Any) -> Any:
    rights = {"copyright_notice": "© operator", "creator": "operator", "credit": "operator"}
    provenance = {**rights, **({"signer": signer.settings} if signer else {})}
    return job_config(write_folder(folder / "in", files), folder / "out", provenance=provenance, **sections)


def forms(data: bytes) -> Iterator[bytes]:
    """A secret as it might be spelt in an output."""
    yield data
    yield data.hex().encode()
    for shift in range(3):  # base64 depends on where it starts
        yield base64.b64encode(bytes(shift) + data)[4:-4]


def everything(root: Path) -> bytes:
    """Every byte of a destination, and what its compressed columns hold."""
    parts = []
    for name, data in tree(root).items():
        parts += [name.encode(), data]
        if name.endswith(".parquet"):
            import pyarrow.parquet as pq

            parts += [
                value["bytes"] if isinstance(value, dict) and "bytes" in value else str(value).encode()
                for row in pq.read_table(root / name).to_pylist()
                for value in row.values()
                if value is not None
            ]
    return b"\n".join(parts)


def test_nothing_of_an_original_and_no_secret_gets_out(
    tmp_path: Path, signer: Files, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for name, value in zip(("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"), SECRETS, strict=True):
        monkeypatch.setenv(name, value)
    plain = {"e.jpg": images.plain("JPEG", height=200, width=300), "f.png": images.plain("PNG", height=200, width=300)}
    kinds = {"e.jpg": "image/jpeg", "f.png": "image/png"}
    signed = {name: with_credentials(data, kinds[name], signer) for name, data in plain.items()}
    files = {**RICH_FILES, **signed, "g.png": RICH_FILES["b.png"][:2000]}
    outcome = run_job(job(tmp_path, files, signer))
    logs = "".join(capfd.readouterr())
    rows = data_table(tmp_path / "out", outcome.manifests[0]).to_pylist()
    assert len(rows) == 6
    dropped = {row["asset_id"]: set(row["metadata_dropped"]) for row in rows}
    assert "further pictures of the JPEG (previews, gain maps)" in dropped["a.jpg"]
    assert "TIFF SubIFDs (previews)" in dropped["d.tiff"]
    assert all(b"c2pa.thumbnail" in data for data in signed.values())
    assert "C2PA manifest (JPEG APP11)" in dropped["e.jpg"]
    assert "C2PA manifest (PNG caBX)" in dropped["f.png"]
    found = everything(tmp_path / "out") + logs.encode()
    for name in RICH_FILES:
        assert MARK in files[name], "the source shows what is searched"
    for secret in (MARK, THUMBNAIL[-60:], *(text.encode() for text in SECRETS)):
        assert not [form for form in forms(secret) if form in found]
    key = signer.key.read_bytes()
    for line in key.splitlines()[1:-1]:
        assert line not in found
    loaded = serialization.load_pem_private_key(key, None)
    assert isinstance(loaded, ec.EllipticCurvePrivateKey)
    assert not [form for form in forms(loaded.private_numbers().private_value.to_bytes(32)) if form in found]
    assert b"key.pem" not in found
    for row in rows:
        stored = row["image"]["bytes"]
        assert not [name for name in (b"JFIF", b"c2pa.thumbnail", b"WEBPVP") if name in stored], (
            "a PNG, no picture in it"
        )
        assert stored.count(b"\xff\xd8\xff") == 0
        assert stored.count(b"\x89PNG\r\n") == 1
    for original in plain.values():  # behind the header, compressed pixels alone
        assert not [at for at in range(700, len(original) - 32, 16) if original[at : at + 32] in found]


def test_a_resume_signs_nothing_again(tmp_path: Path, signer: Files) -> None:
    config = job(tmp_path, RICH_FILES, signer)
    made, plan = prepare(config)
    protect_shard(made, plan.shards[0])
    before = {name: data for name, data in tree(tmp_path / "out").items() if name.startswith("parts/")}
    again, plan = prepare(config)  # as after a crash
    assert again.config_fp == made.config_fp
    assert protect_shard(again, plan.shards[0]) == []
    check_shard(again, plan.shards[0])
    manifest = commit(again, plan)[0]
    assert {name: data for name, data in tree(tmp_path / "out").items() if name.startswith("parts/")} == before
    rows = data_table(tmp_path / "out", manifest).to_pylist()
    other = job(tmp_path / "other", RICH_FILES, make_signer(tmp_path / "renewed"))
    elsewhere, plan = prepare(other)
    protect_shard(elsewhere, plan.shards[0])
    for first, second in zip(rows, part_rows(elsewhere, plan.shards[0]), strict=True):
        for name in ("pixel_sha256", "unsigned_sha256", "seed", "signed_by"):
            assert first[name] == second[name] is not None
        for name in ("protected_sha256", "c2pa_manifest", "certificate_serial"):
            assert first[name] != second[name]


@pytest.fixture
def finished(tmp_path: Path, signer: Files) -> Outcome:
    return run_job(job(tmp_path, {"a.png": images.plain("PNG"), "b.png": images.rich_png()}, signer))


def test_inspect_says_what_is_signed(finished: Outcome, signer: Files, tmp_path: Path) -> None:
    store = finished.job.destination()
    (asset,) = inspect_asset(store, "a.png", read_authorities(signer.authority))
    assert asset["rights"]["credit"] == "operator"
    assert asset["content_credentials"]["signature"] == "valid, its signer trusted"
    assert asset["content_credentials"]["ai_generative_training"] == "notAllowed"
    (line,) = verify_destination(store)
    assert (line["signed"], line["checked"]) == (2, "manifest, files, rows, pixels, rights and signatures agree")
    with pytest.raises(IntegrityError, match=r"a\.png: signature: signingCredential\.untrusted"):
        verify_destination(store, read_authorities(make_signer(tmp_path / "other").authority))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data_mining": None}, "plus:DataMining of its XMP does not match"),
        ({"certificate_serial": "1"}, "certificate_serial: the manifest says"),
        ({"eps_levels": 9.0}, "eps_levels: the manifest says 4"),
        ({"source_sha256": "0" * 64}, "source_sha256: the manifest says"),
        ({"protector": "mist"}, "protector: the manifest says"),
    ],
)
def test_a_row_that_its_manifest_contradicts(finished: Outcome, changes: dict[str, Any], message: str) -> None:
    forge(finished, lambda rows: [{**rows[0], **changes}, *rows[1:]])
    with pytest.raises(IntegrityError, match=message):
        verify_destination(finished.job.destination())


def test_a_signer_that_cannot_work_is_named_before_the_run(tmp_path: Path, signer: Files) -> None:
    lost = replace(signer, key=tmp_path / "none.pem")
    with pytest.raises(UserError, match=r"none\.pem cannot be read on this machine"):
        preflight(job(tmp_path, {"a.png": images.plain("PNG")}, lost))
    on_workers = job(tmp_path, {"a.png": images.plain("PNG")}, lost, run={"ray_address": "auto"})
    preflight(on_workers)
    assert not (tmp_path / "out").exists()
