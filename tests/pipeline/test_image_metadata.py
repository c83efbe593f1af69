"""Metadata survives, pictures in it do not, and nothing in it can fail an image."""

from __future__ import annotations

import base64
import io
import random
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pipeline.image_metadata import MAX_BLOCK_BYTES, ImageMetadata, orientation_of, portable_exif, read_metadata
from tests.pipeline import images


def metadata_of(data: bytes) -> ImageMetadata:
    with Image.open(io.BytesIO(data)) as image:
        image.load()
        return read_metadata(image, data)


def tags(exif: bytes | None) -> tuple[dict[int, object], dict[int, object], dict[int, object]]:
    """IFD0, Exif and GPS, as Pillow reads them."""
    assert exif is not None
    block = Image.Exif()
    block.load(exif)
    return dict(block), block.get_ifd(0x8769), block.get_ifd(0x8825)


def test_exif_keeps_what_describes_the_picture() -> None:
    ifd0, camera, gps = tags(metadata_of(images.plain("JPEG", exif=images.exif(6))).exif)
    assert str(ifd0[0x8298]).encode("latin-1").decode() == "© Zoë Müller"  # Pillow would write question marks
    assert (ifd0[0x013B], ifd0[0x0112]) == ("Zoe", 6)
    assert (camera[0x9003], camera[0xA434], camera[0x9286]) == (
        "2024:05:06 07:08:09",
        "50mm F1.8",
        b"ASCII\0\0\0hello",
    )
    assert (gps[1], gps[2]) == ("N", (47.0, 22.0, 30.5))


def test_exif_of_a_source_is_left_byte_for_byte_equal_when_cleaned_twice() -> None:
    once = metadata_of(images.plain("JPEG", exif=images.exif(6)))
    twice = metadata_of(images.plain("JPEG", exif=once.exif))
    assert once.exif == twice.exif
    assert once.dropped == ()


def test_thumbnail_maker_note_and_previews_are_gone_and_named() -> None:
    data = images.jpeg_with_exif_thumbnail()
    assert data.count(images.JPEG_SIGNATURE) == 5  # itself, IFD1, MakerNote, private tag, description
    metadata = metadata_of(data)
    assert metadata.exif is not None
    assert images.JPEG_SIGNATURE not in metadata.exif
    ifd0, camera, _ = tags(metadata.exif)
    assert not {0x927C, 0xC6FD, 0x010E} & (ifd0.keys() | camera.keys())
    assert ifd0[0x0112] == 6
    assert {"EXIF thumbnail (IFD1)", "EXIF tag 0x927c", "EXIF tag 0xc6fd", "EXIF tag 0x010e"} <= set(metadata.dropped)


def test_tiff_gives_its_descriptions_but_not_its_structure() -> None:
    ifd0, camera, _ = tags(metadata_of(images.plain("TIFF", exif=images.exif(6), dpi=(200, 200))).exif)
    assert ifd0[0x0112] == 6
    assert camera[0xA434] == "50mm F1.8"
    assert not {256, 258, 259, 273, 279} & ifd0.keys()


def test_interop_directory_is_kept() -> None:
    block = Image.Exif()
    block.get_ifd(0x8769)[0xA005] = {1: "R98"}
    exif = metadata_of(images.plain("JPEG", exif=block.tobytes())).exif
    assert exif is not None
    assert b"R98" in exif


@pytest.mark.parametrize(("value", "expected"), [(1, 1), (8, 8), (0, 1), (9, 1)])
def test_orientation(value: int, expected: int) -> None:
    assert orientation_of(images.exif(value)) == expected
    assert orientation_of(None) == 1


@pytest.mark.parametrize("format", ["JPEG", "WEBP", "TIFF", "PNG"])
def test_dpi(format: str) -> None:
    block = Image.Exif()
    block[0x011A], block[0x011B], block[0x0128] = 300, 300, 2
    options = {"exif": block.tobytes()} if format == "WEBP" else {"dpi": (300, 300)}
    assert metadata_of(images.plain(format, **options)).dpi == pytest.approx((300, 300), abs=0.01)


def xmp_jpeg(extra: str) -> bytes:
    return images.plain("JPEG", xmp=images.XMP.format(extra=extra).encode())


def test_xmp_keeps_its_text_and_prefixes() -> None:
    xmp = metadata_of(xmp_jpeg("")).xmp
    assert xmp is not None
    assert xmp.decode() == images.XMP.format(extra="")


PREVIEW = base64.b64encode(images.plain("JPEG", height=200, width=300)).decode()
LINES = "&#xA;".join(PREVIEW[i : i + 76] for i in range(0, len(PREVIEW), 76))


@pytest.mark.parametrize(
    ("extra", "named"),
    [
        (images.XMP_THUMBNAIL, "xmp:Thumbnails"),
        ("<xmpGImg:image>/9j/4AAQ</xmpGImg:image>", "xmpGImg:image"),
        (f"<dc:preview>{PREVIEW}</dc:preview>", "dc:preview"),
        (f"<dc:preview>{LINES}</dc:preview>", "dc:preview"),
        (f'<dc:preview data="{LINES}"/>', "data"),
        (f"<dc:preview><![CDATA[{PREVIEW}]]></dc:preview>", "dc:preview"),
        ('<a:GImage xmlns:a="http://ns.adobe.com/xmp/x/">/9j/4</a:GImage>', "a:GImage"),
        ('<g:Data xmlns:g="http://ns.google.com/photos/1.0/image/">/9j/4</g:Data>', "g:Data"),
    ],
)
def test_pictures_in_xmp_are_gone_and_named(extra: str, named: str) -> None:
    metadata = metadata_of(xmp_jpeg(extra + f"<!-- {PREVIEW} -->"))
    assert metadata.xmp is not None
    assert "/9j/4" not in metadata.xmp.decode()
    assert "© Zoë" in metadata.xmp.decode()
    assert f"XMP {named}" in metadata.dropped


@pytest.mark.parametrize(
    ("packet", "reason"),
    [
        (b'<!DOCTYPE x [<!ENTITY a "b">]><x>&a;</x>', "unreadable"),
        (b"<x><y></x>", "unreadable"),
        (b"\xff\xfe<\0x\0/\0>\0", "unreadable"),
        (b"<a>" * 5_000 + b"</a>" * 5_000, "unreadable"),
        (b"<?x " + PREVIEW.encode() + b"?><x/>", "picture"),
        (b"<x>" + b"word " * 13_000 + b"</x>", "too long"),
    ],
)
def test_unsafe_xmp_is_dropped_and_named(packet: bytes, reason: str) -> None:
    metadata = metadata_of(images.plain("WEBP", xmp=packet))
    assert metadata.xmp is None
    assert any(name.startswith("XMP") and reason in name for name in metadata.dropped)


def test_long_text_without_spaces_is_searched_in_linear_time() -> None:
    hostile = ("A" * 599 + ".") * 1_500  # every run is just short of being a picture
    assert metadata_of(images.plain("WEBP", xmp=f"<x>{hostile}</x>".encode())).xmp is None


def test_png_texts() -> None:
    metadata = metadata_of(images.rich_png())
    assert metadata.texts == (("Title", "Möwe"),)
    assert "PNG text 'Comment'" in metadata.dropped
    assert metadata.xmp is not None


def test_iptc_rights_become_texts() -> None:
    records = b"".join(
        struct.pack(">BBBH", 28, 2, number, len(text)) + text
        for number, text in ((80, b"Zoe"), (80, b"Max"), (116, "© Zoë".encode()))
    )
    resource = b"8BIM\x04\x04\0\0" + struct.pack(">I", len(records)) + records + b"\0" * (len(records) % 2)
    body = b"Photoshop 3.0\0" + resource
    data = images.plain("JPEG")
    data = data[:2] + b"\xff\xed" + struct.pack(">H", len(body) + 2) + body + data[2:]
    assert metadata_of(data).texts == (("Author", "Zoe; Max"), ("Copyright", "© Zoë"))


def test_comment_and_c2pa_segment_are_named() -> None:
    data = images.plain("JPEG", comment=b"made by a scanner")
    data = data[:2] + b"\xff\xeb" + struct.pack(">H", 8) + b"JP\0\0\0\0" + data[2:]
    assert set(metadata_of(data).dropped) == {"JPEG comment", "C2PA manifest (JPEG APP11)"}


def test_portable_exif_adds_only_what_is_missing() -> None:
    texts = (("Author", "Other"), ("Title", "Möwe"))
    exif = portable_exif(ImageMetadata(exif=images.exif(6), dpi=(300.0, 300.0), texts=texts))
    ifd0, camera, _ = tags(exif)
    assert (ifd0[0x013B], ifd0[0x011A], ifd0[0x0128]) == ("Zoe", 300, 2)
    assert str(ifd0[0x010D]).encode("latin-1").decode() == "Möwe"
    assert camera[0xA434] == "50mm F1.8"
    assert portable_exif(ImageMetadata()) is None


def test_exif_that_is_too_long_keeps_its_orientation() -> None:
    block = Image.Exif()
    block[0x0112] = 6
    for tag in (0x010E, 0x010F, 0x0110, 0x0131, 0x013B):
        block[tag] = "long words " * 1_300
    data = images.plain("WEBP", exif=block.tobytes())
    metadata = metadata_of(data)
    assert metadata.exif is not None
    assert len(metadata.exif) < MAX_BLOCK_BYTES
    assert orientation_of(metadata.exif) == 6
    assert "EXIF (too long)" in metadata.dropped


@settings(max_examples=300)
@given(st.integers(0, 2**32))
def test_broken_exif_never_fails_an_image(seed: int) -> None:
    rng = random.Random(seed)
    block = bytearray(images.exif(6, thumbnail=True))
    for _ in range(rng.choice((1, 5, 50))):
        block[rng.randrange(6, rng.choice((40, 400)))] = rng.randrange(256)
    metadata = metadata_of(images.plain("WEBP", height=8, width=8, exif=bytes(block[: rng.randrange(8, len(block))])))
    assert orientation_of(metadata.exif) in range(1, 9)
    assert images.JPEG_SIGNATURE not in (metadata.exif or b"")
    assert len(portable_exif(metadata) or b"") <= MAX_BLOCK_BYTES
