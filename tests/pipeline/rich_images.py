"""Files full of metadata, with a picture of the original in every place that formats and metadata have for one."""

from __future__ import annotations

import base64
import io
import struct

import c2pa
from PIL import Image, PngImagePlugin

from tests.pipeline import images
from tests.pipeline.certificates import Files

MARK = b"picture of the original"
THUMBNAIL = images.save(Image.new("RGB", (24, 16), "red"), "JPEG", comment=MARK)
TITLE = "Möwe über Zürich"
RICH = images.XMP.format(
    extra=f"<dc:title><rdf:Alt><rdf:li xml:lang='x-default'>{TITLE}</rdf:li></rdf:Alt></dc:title>"
    "<dc:subject><rdf:Bag><rdf:li>gull</rdf:li><rdf:li>lake</rdf:li></rdf:Bag></dc:subject>"
    f"<xmp:Thumbnails><rdf:Alt><rdf:li><xmpGImg:image>{base64.b64encode(THUMBNAIL).decode()}</xmpGImg:image></rdf:li>"
    "</rdf:Alt></xmp:Thumbnails>"
).encode()


def exif_block() -> Image.Exif:
    block = Image.Exif()
    block.load(images.exif(6))
    block[0x010E], block[0x010F], block[0x0110], block[0x0131] = "a gull", "Maker", "Model 1", "Scanner 2"
    block.get_ifd(0x8769)[0x927C] = b"Maker\0" + THUMBNAIL
    block[0xC6FD] = THUMBNAIL
    return block


def exif_with_thumbnail(dpi: float | None = None) -> bytes:
    """IFD1 holds the thumbnail; put there by hand, since Pillow writes none."""
    block = exif_block()
    if dpi is not None:
        block[0x011A], block[0x011B], block[0x0128] = dpi, dpi, 2
    body = block.tobytes()[6:]
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
    data = images.camera_mpo(0x010001, preview, xmp=RICH, comment=MARK, **options)
    assert b"\xff\xfe" + struct.pack(">H", len(MARK) + 2) + MARK in data, "in the picture that MPF points to"
    extra = segment(0xE0, b"JFXX\0\x10" + THUMBNAIL) + segment(0xED, b"Photoshop 3.0\0" + resources())
    return data[:20] + extra + data[20:] + THUMBNAIL  # JFIF first; a preview behind the end, as cameras append it


def rich_png() -> bytes:
    info = PngImagePlugin.PngInfo()
    info.add_itxt("XML:com.adobe.xmp", RICH.decode())
    info.add_itxt("Title", TITLE)
    info.add_itxt("Author", "Zoë")
    info.add_itxt("Disclaimer", "a model's release is on file")
    info.add_text("Comment", MARK.decode())
    info.add(b"prVW", THUMBNAIL)
    options = {"exif": exif_with_thumbnail(), "icc_profile": images.adobe_rgb_profile(), "dpi": (300, 300)}
    return images.plain("PNG", pnginfo=info, **options) + THUMBNAIL


def rich_webp() -> bytes:
    data = images.plain("WEBP", exif=exif_with_thumbnail(300), xmp=RICH, icc_profile=images.adobe_rgb_profile())
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
