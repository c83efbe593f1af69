"""The table of pipeline/README.md says what becomes of metadata: here it is measured, in every format.

Fields are read by Pillow, and Content Credentials by c2pa's reader, from files that have every field.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import c2pa
import pytest
from PIL import Image, IptcImagePlugin
from PIL.ExifTags import IFD

from tests.pipeline import images
from tests.pipeline.archives import write_folder
from tests.pipeline.certificates import make_signer
from tests.pipeline.local_job import data_table, job_config, run_job
from tests.pipeline.rich_images import RICH_FILES, THUMBNAIL, with_credentials

PAGE = Path(__file__).parents[2] / "pipeline" / "README.md"
HEADING = "| metadata of the original |"
SOURCES = {"JPEG": "a.jpg", "PNG": "b.png", "WebP": "c.webp", "TIFF": "d.tiff"}
OUTPUTS = {"png": "PNG", "webp": "WebP", "jpeg": "JPEG"}
CREDENTIALS = "Content Credentials (C2PA)"

Value = Any
"""What a file says; None or empty where it says nothing."""


class File:
    """What the readers find in a file."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        with Image.open(io.BytesIO(data)) as image:
            if image.format == "PNG":
                image.load()  # texts may lie behind the pixels; a TIFF loses its orientation
            self.kind = "JPEG" if image.format == "MPO" else str(image.format)
            self.info = dict(image.info)
            self.tags: Any = dict(getattr(image, "tag_v2", {}))
            self.exif = dict(image.getexif())
            self.camera, self.gps = (dict(image.getexif().get_ifd(place)) for place in (IFD.Exif, IFD.GPSInfo))
            self.thumbnail = {} if self.tags else dict(image.getexif().get_ifd(IFD.IFD1))
            self.texts = dict(getattr(image, "text", {}))
            self.iptc = IptcImagePlugin.getiptcinfo(image) or {}
            xmp = image.getxmp()
            self.xmp: Any = xmp["xmpmeta"]["RDF"]["Description"] if xmp else {}
            self.pictures = getattr(image, "n_frames", 1)

    def resolution(self) -> Value:
        found = self.info.get("dpi") or [self.exif[tag] for tag in (0x011A, 0x011B) if tag in self.exif]
        return [round(value) for value in found]

    def manifests(self) -> set[str]:
        reader = c2pa.Reader.try_create(f"image/{self.kind.lower()}", io.BytesIO(self.data))
        if reader is None:
            return set()
        with reader:
            return set(json.loads(reader.json())["manifests"])


def values(found: Any, *keys: Any) -> Value:
    return {key: found[key] for key in keys if key in found}


def utf8(text: str) -> str:
    """A text of EXIF, where Pillow expects Latin-1."""
    return text.encode("latin-1").decode()


FIELDS: dict[str, Callable[[File], Value]] = {
    "EXIF orientation": lambda file: values(file.exif, 0x0112),
    "EXIF camera, lens, exposure": lambda file: values({**file.exif, **file.camera}, 0x010F, 0x0110, 0xA434, 0x829A),
    "EXIF date": lambda file: values(file.camera, 0x9003),
    "EXIF GPS": lambda file: values(file.gps, 1, 2),
    "EXIF author, copyright, description, comment": lambda file: values(
        {**file.exif, **file.camera}, 0x013B, 0x8298, 0x010E, 0x9286
    ),
    "EXIF MakerNote, private tags": lambda file: values({**file.exif, **file.camera}, 0x927C, 0xC6FD),
    "EXIF thumbnail (IFD1)": lambda file: file.thumbnail,
    "XMP title, keywords, rights, rating": lambda file: values(file.xmp, "title", "subject", "rights", "Rating"),
    "XMP thumbnail": lambda file: values(file.xmp, "Thumbnails"),
    "IPTC-IIM": lambda file: file.iptc.get((2, 90), b"").decode(),
    "ICC profile": lambda file: file.info.get("icc_profile"),
    "resolution (DPI)": lambda file: file.resolution(),
    "PNG texts: title, author, description ...": lambda file: values(file.texts, "Title"),
    "PNG texts: creation time, disclaimer": lambda file: values(file.texts, "Disclaimer"),
    "PNG texts: others": lambda file: values(file.texts, "Comment"),
    "JPEG comment": lambda file: file.info.get("comment"),
    "TIFF tags: description, software, author ...": lambda file: values(file.tags, 270, 305, 315),
    "JPEG thumbnail (JFXX), further pictures (MPF)": lambda file: (
        file.kind == "JPEG" and (b"JFXX" in file.data or file.pictures > 1)
    ),
    "Photoshop resources, with a thumbnail": lambda file: b"8BIM" in file.data and THUMBNAIL in file.data,
    "preview pages, SubIFDs": lambda file: file.kind == "TIFF" and (file.pictures > 1 or 330 in file.tags),
    CREDENTIALS: lambda file: file.manifests(),
}
# Where a field is that has moved.
MOVED: dict[str, Callable[[File], Value]] = {
    "IPTC-IIM": lambda file: file.xmp.get("City"),
    "PNG texts: title, author, description ...": lambda file: {"Title": utf8(file.exif.get(0x010D, ""))},
    "TIFF tags: description, software, author ...": lambda file: values(file.exif, 270, 305, 315),
}


def outcome(field: str, before: File, after: File) -> str:
    was, now = FIELDS[field](before), FIELDS[field](after)
    if not was:
        return ""
    if now == was:
        return "kept"
    if field in MOVED and MOVED[field](after) == was:
        return "rewritten"
    if field == CREDENTIALS and not now & was:
        return "replaced"
    assert not now, f"{field}: {was} became {now}"
    return "removed"


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, bytes], dict[str, dict[str, Any]]]:
    """Files, those below "signed" with Content Credentials; their rows by output format and name."""
    folder = tmp_path_factory.mktemp("metadata")
    signer = make_signer(folder / "signer")
    signed = {
        f"signed/{name}": with_credentials(images.plain(kind.upper()), f"image/{kind.lower()}", signer)
        for kind, name in SOURCES.items()
    }
    files = {**RICH_FILES, **signed}
    source = write_folder(folder / "in", files)
    provenance = {"copyright_notice": "© operator", "creator": "operator", "credit": "operator"}
    rows = {}
    for format in OUTPUTS:
        settings = {"output": {"format": format}, "provenance": {**provenance, "signer": signer.settings}}
        (manifest,) = run_job(job_config(source, folder / format, **settings)).manifests
        rows[format] = {row["asset_id"]: row for row in data_table(folder / format, manifest).to_pylist()}
        assert rows[format].keys() == files.keys()
    return files, rows


def test_the_table_is_what_is_measured(archive: tuple[dict[str, bytes], dict[str, dict[str, Any]]]) -> None:
    files, rows = archive
    before = {name: File(data) for name, data in files.items()}
    after = {form: {name: File(row["image"]["bytes"]) for name, row in rows[form].items()} for form in OUTPUTS}
    measured = {}
    for field in FIELDS:
        measured[field] = []
        for name in SOURCES.values():
            asset = f"signed/{name}" if field == CREDENTIALS else name
            found = {form: outcome(field, before[asset], after[form][asset]) for form in OUTPUTS}
            others = {found[form] for form in ("webp", "jpeg")} - {found["png"]}
            measured[field].append("; ".join([found["png"], *(f"{other} in WebP and JPEG" for other in others)]))
    named = {form: "PNG text 'Disclaimer'" in rows[form]["b.png"]["metadata_dropped"] for form in OUTPUTS}
    assert named == {"png": False, "webp": True, "jpeg": True}
    table = PAGE.read_text().partition(HEADING)[2].partition("\n\n")[0].splitlines()
    written = {row[1]: row[2:6] for row in ([cell.strip() for cell in line.split("|")] for line in table[2:])}
    assert written == measured
    assert [cell.strip() for cell in table[0].split("|")][:4] == list(SOURCES)


@pytest.mark.parametrize("format", OUTPUTS)
def test_what_is_added(archive: tuple[dict[str, bytes], dict[str, dict[str, Any]]], format: str) -> None:
    """The reservation, the credit and a manifest. Rich files have a notice and an author: the operator's stay out."""
    files, rows = archive
    for name in files:
        row = rows[format][name]
        with Image.open(io.BytesIO(row["image"]["bytes"])) as image:
            image.load()
            assert (image.format, image.size) == (format.upper(), (56, 40))
            assert getattr(image, "n_frames", 1) == 1
        said = File(row["image"]["bytes"])
        prohibited = "http://ns.useplus.org/ldf/vocab/DMI-PROHIBITED-AIMLTRAINING"
        assert said.xmp["DataMining"] == row["data_mining"] == prohibited
        assert said.xmp["Credit"] == "operator"
        assert said.manifests() == {row["c2pa_manifest"]}
        assert ("© operator" in str(said.xmp)) == name.startswith("signed/")
