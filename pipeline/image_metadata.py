"""What an image says of itself (EXIF, XMP, resolution, texts), taken over without any picture inside.

A thumbnail or preview in the metadata would show the *unprotected* original. EXIF is therefore rebuilt from
a list of allowed tags, and XMP is parsed and cleaned. What cannot be kept is named in
``ImageMetadata.dropped``; metadata never fails an image.

Not carried over: IFD1, MakerNote, DNG and preview tags, JPEG comments, Photoshop resources, C2PA manifests (they vouch
for other pixels). The fields of an IPTC-IIM block move into the XMP, where it has none of that name; author, copyright,
caption and title are kept as texts too.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from xml.dom import minidom
from xml.parsers.expat import ExpatError

from PIL import ImageFile

from pipeline.provenance.iptc import MAX_TEXT_BYTES, iptc_records, iptc_texts, with_iptc

MAX_BLOCK_BYTES = 60_000
"""EXIF and XMP must each fit into one JPEG segment (65,533 bytes), prefix and later additions included."""

_MAX_BLOB_BYTES = 1024
_MAX_XMP_SOURCE_BYTES = 2**20  # the parsed tree takes about 30 times as much

_EXIF_PREFIX = b"Exif\0\0"
_ORIENTATION, _X_RESOLUTION, _Y_RESOLUTION, _RESOLUTION_UNIT = 0x0112, 0x011A, 0x011B, 0x0128
_EXIF_POINTER, _GPS_POINTER, _INTEROP_POINTER = 0x8769, 0x8825, 0xA005
_SUB_IFDS = 0x014A
_ASCII, _SHORT, _LONG, _RATIONAL = 2, 3, 4, 5
_TYPE_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8}

_IFD0_TAGS = frozenset(
    {0x010D, 0x010E, 0x010F, 0x0110, _ORIENTATION, _X_RESOLUTION, _Y_RESOLUTION, 0x011D, _RESOLUTION_UNIT}
    | {0x0131, 0x0132, 0x013B, 0x013C, 0x013E, 0x013F, 0x0213, 0x4746, 0x4749, 0x8298, *range(0x9C9B, 0x9CA0)}
)
_EXIF_TAGS = frozenset(
    {0x829A, 0x829D, 0x8822, 0x8824, 0x8827, *range(0x8830, 0x8836), 0x9000, 0x9003, 0x9004, 0x9286}
    | {*range(0x9010, 0x9013), 0x9101, 0x9102, *range(0x9201, 0x920B), 0x9214, *range(0x9290, 0x9293)}
    | {*range(0x9400, 0x9406), *range(0xA000, 0xA005), 0xA20B, 0xA20E, 0xA20F, 0xA210, 0xA214, 0xA215}
    | {0xA217, 0xA300, 0xA301, 0xA302, *range(0xA401, 0xA40D), 0xA420, *range(0xA430, 0xA440)}
    | {0xA460, 0xA461, 0xA462, 0xA500}
)
_GPS_TAGS = frozenset(range(32))
_INTEROP_TAGS = frozenset({1, 2})
_UTF16_TEXT_TAGS = frozenset(range(0x9C9B, 0x9CA0))  # XPTitle .. XPSubject are text of type BYTE
# Say how a TIFF lays out its pixels, or are read elsewhere (XMP, IPTC, ICC): not worth a line in `dropped`.
_STRUCTURAL_TAGS = frozenset(
    {
        *range(0x00FE, 0x015C),
        *range(0x0200, 0x0215),
        0x02BC,
        0x83BB,
        _EXIF_POINTER,
        0x8773,
        _GPS_POINTER,
        _INTEROP_POINTER,
    }
)

_PICTURE_NAMESPACES = (
    "http://ns.adobe.com/xap/1.0/g/img/",
    "http://ns.adobe.com/hdr-gain-map/1.0/",  # would announce a second picture that is no longer there
    "http://ns.adobe.com/xmp/note/",  # likewise: the extended XMP of a JPEG is not carried over
    "http://ns.google.com/photos/",
)
_PICTURE_NAMES = frozenset({"Thumbnails", "GImage", "DocumentAncestors"})  # the last: megabytes of stale ids
_REMOTE_MANIFEST = ("http://purl.org/dc/terms/", "provenance")  # link to a C2PA manifest of other pixels
# Possessive and anchored at the start of a run, so that hostile text cannot make the search slow.
_BASE64_RUN = re.compile(rb"(?<![A-Za-z0-9+/])(?:(?:[A-Za-z0-9+/]{60,}+(?:\s|&#x[AaDd];)*+){10,}+|[A-Za-z0-9+/]{600})")
_PICTURE_SIGNATURES = (b"\xff\xd8\xff", b"\x89PNG\r\n")

_TEXT_KEYS = ("Title", "Author", "Description", "Copyright", "Creation Time", "Software", "Disclaimer")
_TEXT_TO_EXIF = {
    "Title": 0x010D,
    "Author": 0x013B,
    "Description": 0x010E,
    "Copyright": 0x8298,
    "Software": 0x0131,
}

_Ifd = dict[int, tuple[int, bytes]]
"""tag -> (TIFF field type, value bytes in the block's byte order)"""


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageMetadata:
    """The metadata of one image that may be published with it; holds no picture.

    Attributes:
        exif: a rebuilt block that starts with ``Exif\\0\\0``, field types and values as in the source.
        xmp: a UTF-8 packet of at most ``MAX_BLOCK_BYTES``.
        dpi: horizontal and vertical pixels per inch.
        texts: (PNG keyword, text), from PNG text chunks or IPTC-IIM.
        dropped: what was there and is not kept, by name, for reports.
    """

    exif: bytes | None = None
    xmp: bytes | None = None
    dpi: tuple[float, float] | None = None
    texts: tuple[tuple[str, str], ...] = ()
    dropped: tuple[str, ...] = ()

    @property
    def exif_words(self) -> set[str]:
        """The PNG keywords whose text the EXIF holds; cameras write blanks where nobody has entered any."""
        ifd0 = _parse(self.exif)[1][0]
        return {key for key, tag in _TEXT_TO_EXIF.items() if ifd0.get(tag, (0, b""))[1].strip(b"\0 ")}


def read_metadata(image: ImageFile.ImageFile, data: bytes) -> ImageMetadata:
    """Takes over the metadata of a loaded image, free of pictures. Never raises on bad metadata.

    Args:
        image: the file as Pillow opened it, pixels loaded (a PNG may hold metadata after its pixels).
        data: the bytes of the file; the EXIF of a TIFF is the file's own directory.
    """
    dropped: list[str] = []
    if "comment" in image.info:
        dropped.append("JPEG comment")
    if place := _manifest_place(image, data):
        dropped.append(f"C2PA manifest ({place})")
    exif = _clean_exif(_exif_block(image, data, dropped), dropped)
    dpi = _valid_dpi(image.info.get("dpi")) or _dpi_of(exif)
    xmp = image.info.get("xmp") or image.info.get("XML:com.adobe.xmp")
    records = iptc_records(image, _hides_picture, dropped)
    clean = _clean_xmp(xmp.encode() if isinstance(xmp, str) else xmp, dropped) if xmp else None
    return ImageMetadata(
        exif=exif,
        xmp=with_iptc(clean, records, dropped, limit=MAX_BLOCK_BYTES),
        dpi=dpi,
        texts=_png_texts(image, dropped) or iptc_texts(records),
        dropped=tuple(dict.fromkeys(dropped)),
    )


def orientation_of(exif: bytes | None) -> int:
    """Returns the EXIF orientation, 1 (upright) if the block has none or an invalid one."""
    value = _number(exif, _ORIENTATION)
    return int(value) if value is not None and value in range(1, 9) else 1


def portable_exif(metadata: ImageMetadata) -> bytes | None:
    """Returns EXIF with texts and resolution added where it has none: for formats with no place for them."""
    order, tree = _parse(metadata.exif)
    ifd0 = tree[0]
    added: _Ifd = {
        _TEXT_TO_EXIF[key]: (_ASCII, text.encode() + b"\0") for key, text in metadata.texts if key in _TEXT_TO_EXIF
    }
    if metadata.dpi and _X_RESOLUTION not in ifd0:
        for tag, value in zip((_X_RESOLUTION, _Y_RESOLUTION), metadata.dpi, strict=True):
            added[tag] = (_RATIONAL, struct.pack(order + "II", round(value * 10_000), 10_000))
        added[_RESOLUTION_UNIT] = (_SHORT, struct.pack(order + "H", 2))
    if not added.keys() - ifd0.keys():
        return metadata.exif
    block = _serialise(order, ({**added, **ifd0}, *tree[1:]))
    return block if len(block) <= MAX_BLOCK_BYTES else metadata.exif


def _exif_block(image: ImageFile.ImageFile, data: bytes, dropped: list[str]) -> bytes | None:
    """The TIFF structure that holds the source's EXIF, not cleaned."""
    if image.format == "TIFF":
        return data
    block = image.info.get("exif")
    if block is None and (profile := image.info.get("Raw profile type exif")):
        try:  # as ImageMagick writes it: name, length, then hexadecimal lines
            block = bytes.fromhex("".join(str(profile).split("\n")[3:]))
        except ValueError:
            dropped.append("EXIF (unreadable)")
    return block if isinstance(block, bytes) else None


def _clean_exif(block: bytes | None, dropped: list[str]) -> bytes | None:
    if block is None:
        return None
    order, tree = _parse(block, dropped)
    if not any(tree):
        return None
    clean = _serialise(order, tree)
    if len(clean) <= MAX_BLOCK_BYTES:
        return clean
    dropped.append("EXIF (too long)")
    orientation = {tag: entry for tag, entry in tree[0].items() if tag == _ORIENTATION}
    return _serialise(order, (orientation, {}, {}, {})) if orientation else None


def _parse(block: bytes | None, dropped: list[str] | None = None) -> tuple[str, tuple[_Ifd, _Ifd, _Ifd, _Ifd]]:
    """Returns the byte order and the allowed tags of IFD0, Exif, GPS and Interop."""
    dropped = [] if dropped is None else dropped
    block = (block or b"").removeprefix(_EXIF_PREFIX)
    order = "<" if block[:2] == b"II" else ">"
    if block[:4] not in (b"II*\0", b"MM\0*"):
        if block:
            dropped.append("EXIF (unreadable)")
        return order, ({}, {}, {}, {})
    start = _pointer(block, order, 4)
    ifd0 = _read_ifd(block, order, start, _IFD0_TAGS | {_EXIF_POINTER, _GPS_POINTER}, dropped)
    if start and _pointer(block, order, start + 2 + 12 * _count(block, order, start)):
        dropped.append("EXIF thumbnail (IFD1)")
    camera = _read_ifd(block, order, _pop_pointer(ifd0, order, _EXIF_POINTER), _EXIF_TAGS | {_INTEROP_POINTER}, dropped)
    gps = _read_ifd(block, order, _pop_pointer(ifd0, order, _GPS_POINTER), _GPS_TAGS, dropped)
    interop = _read_ifd(block, order, _pop_pointer(camera, order, _INTEROP_POINTER), _INTEROP_TAGS, dropped)
    return order, (ifd0, camera, gps, interop)


def _pointer(block: bytes, order: str, at: int) -> int:
    field = block[at : at + 4]
    return int(struct.unpack(order + "I", field)[0]) if len(field) == 4 else 0


def _count(block: bytes, order: str, at: int) -> int:
    field = block[at : at + 2]
    return int(struct.unpack(order + "H", field)[0]) if len(field) == 2 else 0


def _pop_pointer(ifd: _Ifd, order: str, tag: int) -> int:
    kind, value = ifd.pop(tag, (_LONG, b""))
    return _pointer(value, order, 0) if kind in (_LONG, 13) else 0


def _read_ifd(block: bytes, order: str, start: int, allowed: frozenset[int], dropped: list[str]) -> _Ifd:
    """The allowed entries of one directory; start 0 means that there is none."""
    ifd: _Ifd = {}
    for at in range(start + 2, start + 2 + 12 * _count(block, order, start) if start else 0, 12):
        if at + 12 > len(block):
            dropped.append("EXIF (truncated)")
            break
        tag, kind, count = struct.unpack_from(order + "HHI", block, at)
        size = count * _TYPE_BYTES.get(kind, 0)
        limit = MAX_TEXT_BYTES if kind == _ASCII or tag in _UTF16_TEXT_TAGS else _MAX_BLOB_BYTES
        if tag not in allowed or not 0 < size <= limit:  # before slicing: a hostile count must not cost memory
            if tag == _SUB_IFDS:
                dropped.append("TIFF SubIFDs (previews)")
            elif tag not in _STRUCTURAL_TAGS:
                dropped.append(f"EXIF tag 0x{tag:04x}")
            continue
        offset = at + 8 if size <= 4 else _pointer(block, order, at + 8)
        value = block[offset : offset + size]
        if len(value) == size and not _hides_picture(value):
            ifd[tag] = (kind, value)
        else:
            dropped.append(f"EXIF tag 0x{tag:04x}")
    return ifd


def _serialise(order: str, tree: tuple[_Ifd, _Ifd, _Ifd, _Ifd]) -> bytes:
    ifd0, camera, gps, interop = (dict(ifd) for ifd in tree)
    here = (_LONG, bytes(4))
    if interop:
        camera[_INTEROP_POINTER] = here
    ifd0 |= ({_EXIF_POINTER: here} if camera else {}) | ({_GPS_POINTER: here} if gps else {})
    camera_at = 8 + len(_directory(order, ifd0, 8))
    gps_at = camera_at + (len(_directory(order, camera, 0)) if camera else 0)
    interop_at = gps_at + (len(_directory(order, gps, 0)) if gps else 0)
    for ifd, tag, target in (
        (ifd0, _EXIF_POINTER, camera_at),
        (ifd0, _GPS_POINTER, gps_at),
        (camera, _INTEROP_POINTER, interop_at),
    ):
        if tag in ifd:
            ifd[tag] = (_LONG, struct.pack(order + "I", target))
    parts = zip((ifd0, camera, gps, interop), (8, camera_at, gps_at, interop_at), strict=True)
    body = b"".join(_directory(order, ifd, at) for ifd, at in parts if ifd or at == 8)
    return _EXIF_PREFIX + (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "I", 8) + body


def _directory(order: str, ifd: _Ifd, at: int) -> bytes:
    """One directory with its values behind it, for the file offset `at`; no further directory follows."""
    entries, values = b"", b""
    values_at = at + 2 + 12 * len(ifd) + 4
    for tag, (kind, value) in sorted(ifd.items()):
        field = value.ljust(4, b"\0")
        if len(value) > 4:
            field = struct.pack(order + "I", values_at + len(values))
            values += value + b"\0" * (len(value) % 2)
        entries += struct.pack(order + "HHI", tag, kind, len(value) // _TYPE_BYTES[kind]) + field
    return struct.pack(order + "H", len(ifd)) + entries + bytes(4) + values


def _number(exif: bytes | None, tag: int) -> float | None:
    order, (ifd0, *_) = _parse(exif)
    kind, value = ifd0.get(tag, (0, b""))
    if kind == _SHORT and len(value) >= 2:
        return float(struct.unpack_from(order + "H", value)[0])
    if kind == _LONG:
        return float(struct.unpack_from(order + "I", value)[0])
    if kind == _RATIONAL:
        numerator, denominator = struct.unpack_from(order + "II", value)
        return float(numerator / denominator) if denominator else None
    return None


def _dpi_of(exif: bytes | None) -> tuple[float, float] | None:
    x, y = _number(exif, _X_RESOLUTION), _number(exif, _Y_RESOLUTION)
    scale = 2.54 if _number(exif, _RESOLUTION_UNIT) == 3 else 1.0
    return _valid_dpi((x * scale, y * scale)) if x and y else None


def _valid_dpi(dpi: object) -> tuple[float, float] | None:
    if not isinstance(dpi, tuple) or len(dpi) != 2:
        return None
    x, y = (float(value) for value in dpi)
    return (x, y) if all(math.isfinite(v) and 1 <= v <= 65_535 for v in (x, y)) else None


def _hides_picture(value: bytes) -> bool:
    return any(signature in value for signature in _PICTURE_SIGNATURES) or bool(_BASE64_RUN.search(value))


def _clean_xmp(packet: bytes, dropped: list[str]) -> bytes | None:
    """Returns the packet without pictures, None if it cannot be parsed safely."""
    if len(packet) > _MAX_XMP_SOURCE_BYTES:
        dropped.append("XMP (too long)")
        return None
    try:
        text = packet.decode("utf-8").strip("\0 \r\n\t\ufeff")
        if "<!DOCTYPE" in text:  # without one, expat has no entities to expand
            raise ValueError("document type in XMP")
        document = minidom.parseString(text.encode())
        _remove_pictures(document, dropped)
        clean = "".join(node.toxml() for node in document.childNodes).encode()
    except (ExpatError, ValueError, RecursionError):
        dropped.append("XMP (unreadable)")
        return None
    if len(clean) > MAX_BLOCK_BYTES or _hides_picture(clean):
        dropped.append("XMP (too long)" if len(clean) > MAX_BLOCK_BYTES else "XMP (holds a picture)")
        return None
    return clean


def _remove_pictures(document: minidom.Document, dropped: list[str]) -> None:
    for node in list(_descendants(document)):
        parent: Any = node.parentNode  # typeshed allows each kind of node only some kinds of children
        if isinstance(node, minidom.Element):
            for attribute in list((node.attributes or {}).values()):
                if _is_picture(attribute) or _hides_picture(attribute.value.encode()):
                    dropped.append(f"XMP {attribute.name}")
                    node.removeAttributeNode(attribute)
            if _is_picture(node):
                dropped.append(f"XMP {node.tagName}")
                parent.removeChild(node)
        elif isinstance(node, minidom.Comment):
            parent.removeChild(node)
        elif isinstance(node, minidom.Text) and _hides_picture(node.data.encode()):
            dropped.append(f"XMP {parent.nodeName}")
            parent.removeChild(node)


def _descendants(node: minidom.Node) -> Iterator[minidom.Node]:
    waiting = [node]  # a stack: hostile nesting must not meet the recursion limit here
    while waiting:
        current = waiting.pop()
        yield current
        waiting.extend(current.childNodes)


def _is_picture(node: minidom.Element | minidom.Attr) -> bool:
    namespace = node.namespaceURI or ""
    return (
        node.localName in _PICTURE_NAMES
        or namespace.startswith(_PICTURE_NAMESPACES)
        or (namespace, node.localName) == _REMOTE_MANIFEST
    )


def _png_texts(image: ImageFile.ImageFile, dropped: list[str]) -> tuple[tuple[str, str], ...]:
    texts = []
    found: dict[str, str] = getattr(image, "text", {}) if image.format == "PNG" else {}
    for key, value in found.items():
        encoded = value.encode(errors="replace")
        if key in _TEXT_KEYS and len(encoded) <= MAX_TEXT_BYTES and not _hides_picture(encoded):
            texts.append((key, encoded.decode()))
        elif key not in ("XML:com.adobe.xmp", "Raw profile type exif"):
            dropped.append(f"PNG text {key[:79]!r}")
    return tuple(texts)


def _manifest_place(image: ImageFile.ImageFile, data: bytes) -> str | None:
    """Where the file keeps a C2PA manifest; None if it has none. That of a TIFF is one of its tags."""
    if any(marker == "APP11" for marker, _ in getattr(image, "applist", ())):
        return "JPEG APP11"
    if any(chunk[0] == b"caBX" for chunk in getattr(image, "private_chunks", ())):
        return "PNG caBX"
    at = 12 if image.format == "WEBP" else len(data)
    while at + 8 <= len(data):
        name, size = struct.unpack_from("<4sI", data, at)
        if name == b"C2PA":
            return "WebP C2PA"
        at += 8 + size + size % 2
    return None
