"""Runs over files full of metadata: every field survives in every format, and nothing of an original gets out.

The archive's files hold a picture of the original in every place that the formats and their metadata have for one.
"""

from __future__ import annotations

import base64
import io
import struct
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import c2pa
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from PIL import Image, PngImagePlugin

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
from tests.pipeline.test_inspection import forge

MARK = b"picture of the original"
THUMBNAIL = images.save(Image.new("RGB", (24, 16), "red"), "JPEG", comment=MARK)
TITLE = "Möwe über Zürich"
RICH = images.XMP.format(
    extra=f"<dc:title><rdf:Alt><rdf:li xml:lang='x-default'>{TITLE}</rdf:li></rdf:Alt></dc:title>"
    "<dc:subject><rdf:Bag><rdf:li>gull</rdf:li><rdf:li>lake</rdf:li></rdf:Bag></dc:subject>"
    f"<xmp:Thumbnails><rdf:Alt><rdf:li><xmpGImg:image>{base64.b64encode(THUMBNAIL).decode()}</xmpGImg:image></rdf:li>"
    "</rdf:Alt></xmp:Thumbnails>"
).encode()
SECRETS = ["hunter2-access-key", "hunter2-secret-key"]


def exif_block() -> Image.Exif:
    block = Image.Exif()
    block.load(images.exif(6))
    block[0x010E] = "a gull"
    block.get_ifd(0x8769)[0x927C] = b"Maker\0" + THUMBNAIL
    block[0xC6FD] = THUMBNAIL
    return block


def exif_with_thumbnail() -> bytes:
    """IFD1 holds the thumbnail; put there by hand, since Pillow writes none."""
    body = exif_block().tobytes()[6:]
    count = struct.unpack_from(">H", body, 8)[0]
    link, at = 10 + 12 * count, len(body)
    ifd1 = struct.pack(">HHHIIHHIII", 2, 0x0201, 4, 1, at + 30, 0x0202, 4, 1, len(THUMBNAIL), 0)
    return b"Exif\0\0" + body[:link] + struct.pack(">I", at) + body[link + 4 :] + ifd1 + THUMBNAIL


def iptc() -> bytes:
    records = ((25, b"gull"), (90, b"Bern"), (202, THUMBNAIL))
    return b"".join(struct.pack(">BBBH", 28, 2, number, len(text)) + text for number, text in records)


def resources() -> bytes:
    """Photoshop image resources: IPTC, and a thumbnail (0x040C)."""
    header = struct.pack(">IIIIIIHH", 1, 24, 16, 72, 1152, len(THUMBNAIL), 24, 1)
    blocks = ((0x0404, iptc()), (0x040C, header + THUMBNAIL))
    return b"".join(
        b"8BIM" + struct.pack(">HHI", number, 0, len(data)) + data + bytes(len(data) % 2) for number, data in blocks
    )


def segment(marker: int, body: bytes) -> bytes:
    return b"\xff" + bytes([marker]) + struct.pack(">H", len(body) + 2) + body


def rich_jpeg() -> bytes:
    preview = Image.new("RGB", (28, 20), "red")
    preview.info["comment"] = MARK
    options = {"exif": exif_with_thumbnail(), "icc_profile": images.adobe_rgb_profile(), "dpi": (300, 300)}
    data = images.camera_mpo(0x010001, preview, xmp=RICH, **options)
    assert b"\xff\xfe" + struct.pack(">H", len(MARK) + 2) + MARK in data, "in the picture that MPF points to"
    extra = segment(0xE0, b"JFXX\0\x10" + THUMBNAIL) + segment(0xED, b"Photoshop 3.0\0" + resources())
    return data[:20] + extra + data[20:] + THUMBNAIL  # JFIF first; a preview behind the end, as cameras append it


def rich_png() -> bytes:
    info = PngImagePlugin.PngInfo()
    info.add_itxt("XML:com.adobe.xmp", RICH.decode())
    info.add_itxt("Author", "Zoë")
    info.add_text("Comment", MARK.decode())
    info.add(b"prVW", THUMBNAIL)
    options = {"exif": exif_with_thumbnail(), "icc_profile": images.adobe_rgb_profile(), "dpi": (300, 300)}
    return images.plain("PNG", pnginfo=info, **options) + THUMBNAIL


def rich_webp() -> bytes:
    data = images.plain("WEBP", exif=exif_with_thumbnail(), xmp=RICH, icc_profile=images.adobe_rgb_profile())
    return data + b"JUNK" + struct.pack("<I", len(THUMBNAIL)) + THUMBNAIL


def rich_tiff() -> bytes:
    block = exif_block()
    block[700], block[33723], block[34377] = RICH, iptc(), resources()
    data = images.plain("TIFF", exif=block.tobytes(), icc_profile=images.adobe_rgb_profile(), dpi=(300, 300))
    return images.tiff_with_previews(data, THUMBNAIL)


def with_credentials(data: bytes, format: str, signer: Files) -> bytes:
    """Signed as c2pa does it by itself: with a thumbnail of the picture in the manifest."""
    chain, key = signer.certificate.read_bytes(), signer.key.read_bytes()
    created = {"action": "c2pa.created", "digitalSourceType": "http://cv.iptc.org/newscodes/digitalsourcetype/print"}
    definition = {"assertions": [{"label": "c2pa.actions", "data": {"actions": [created]}}]}
    out = io.BytesIO()
    with c2pa.Builder(definition) as builder:
        builder.sign(
            c2pa.Signer.from_info(c2pa.C2paSignerInfo("es256", chain, key, None)), format, io.BytesIO(data), out
        )
    return out.getvalue()


RICH_FILES = {"a.jpg": rich_jpeg(), "b.png": rich_png(), "c.webp": rich_webp(), "d.tiff": rich_tiff()}


@pytest.fixture(scope="module")
def signer(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return make_signer(tmp_path_factory.mktemp("signer"))


def job(folder: Path, files: dict[str, bytes], signer: Files | None, **sections: Any) -> Any:
    rights = {"copyright_notice": "© operator", "creator": "operator", "credit": "operator"}
    provenance = {**rights, **({"signer": signer.settings} if signer else {})}
    return job_config(write_folder(folder / "in", files), folder / "out", provenance=provenance, **sections)


def fields(data: bytes) -> dict[str, Any]:
    """What Pillow reads of a file's metadata, under plain names."""
    with Image.open(io.BytesIO(data)) as image:
        image.load()
        exif = image.getexif()
        camera, gps = exif.get_ifd(0x8769), exif.get_ifd(0x8825)
        description = image.getxmp()["xmpmeta"]["RDF"]["Description"]
        found = {
            "size": image.size,
            "ICC profile": image.info.get("icc_profile"),
            "EXIF artist": exif.get(0x013B),
            "EXIF copyright": exif.get(0x8298),
            "EXIF description": exif.get(0x010E),
            "EXIF date": camera.get(0x9003),
            "EXIF lens": camera.get(0xA434),
            "EXIF comment": camera.get(0x9286),
            "GPS latitude": gps.get(2),
            "dpi": tuple(map(round, image.info.get("dpi") or [exif[tag] for tag in (0x011A, 0x011B) if tag in exif])),
            "XMP rights": description.get("rights"),
            "XMP title": description.get("title"),
            "XMP keywords": description.get("subject"),
            "XMP rating": description.get("Rating"),
        }
        # Pillow turns TIFFs upright as it loads them, and drops the tag.
        found["orientation"] = 6 if image.format == "TIFF" else exif.get(0x0112)
        if image.format == "TIFF":
            found["size"] = image.size[::-1]
    return found


@pytest.mark.parametrize("format", ["png", "webp", "jpeg"])
def test_every_field_survives(tmp_path: Path, signer: Files, format: str) -> None:
    outcome = run_job(job(tmp_path, RICH_FILES, signer, output={"format": format}))
    rows = data_table(tmp_path / "out", outcome.manifests[0]).to_pylist()
    assert [row["asset_id"] for row in rows] == sorted(RICH_FILES)
    for row in rows:
        name, stored = row["asset_id"], row["image"]["bytes"]
        before, after = fields(RICH_FILES[name]), fields(stored)
        if name == "c.webp":
            before["dpi"] = after["dpi"]  # the source has none
        assert None not in before.values(), "the source has every field"
        assert after == before, name
        with Image.open(io.BytesIO(stored)) as image:
            assert image.format == format.upper()
            assert getattr(image, "n_frames", 1) == 1
            said = image.getxmp()["xmpmeta"]["RDF"]["Description"]
        # Added: the reservation and the credit. The image has a notice and an author, so the operator's stay out.
        assert said["DataMining"] == row["data_mining"] == f"{VOCABULARY}DMI-PROHIBITED-AIMLTRAINING"
        assert said["Credit"] == "operator"
        assert b"\xc2\xa9 operator" not in stored
        if name in ("a.jpg", "d.tiff"):
            assert said["City"] == "Bern", "IPTC-IIM has become XMP"


VOCABULARY = "http://ns.useplus.org/ldf/vocab/"


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
