"""IPTC-IIM, the metadata block of JPEG and TIFF from before XMP, as XMP properties.

PNG and WebP have no place for it, so its fields move to where today's software looks for them. The names follow the
IPTC Photo Metadata Standard, which gives both spellings of each field.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping

from PIL import ImageFile, IptcImagePlugin

from pipeline.provenance.xmp import Form, Packet, Property

Records = Mapping[tuple[int, int], bytes | list[bytes]]

MAX_TEXT_BYTES = 16_384
_FIELDS: dict[int, tuple[str, Form]] = {
    5: ("dc:title", "Alt"),
    25: ("dc:subject", "Bag"),
    40: ("photoshop:Instructions", "text"),
    55: ("photoshop:DateCreated", "text"),
    80: ("dc:creator", "Seq"),
    85: ("photoshop:AuthorsPosition", "text"),
    90: ("photoshop:City", "text"),
    92: ("Iptc4xmpCore:Location", "text"),
    95: ("photoshop:State", "text"),
    100: ("Iptc4xmpCore:CountryCode", "text"),
    101: ("photoshop:Country", "text"),
    103: ("photoshop:TransmissionReference", "text"),
    105: ("photoshop:Headline", "text"),
    110: ("photoshop:Credit", "text"),
    115: ("photoshop:Source", "text"),
    116: ("dc:rights", "Alt"),
    120: ("dc:description", "Alt"),
    122: ("photoshop:CaptionWriter", "text"),
}
_DATE_CREATED = 55
_TEXTS = {5: "Title", 80: "Author", 116: "Copyright", 120: "Description"}
_SILENT = {(1, 0), (1, 90), (2, 0)}  # versions and character set: they describe the block


def iptc_records(image: ImageFile.ImageFile, forbidden: Callable[[bytes], bool], dropped: list[str]) -> Records:
    """The records of an image's block without forbidden values; empty where there is none or it cannot be read."""
    try:
        found = IptcImagePlugin.getiptcinfo(image) or {}
    except (SyntaxError, ValueError, KeyError, IndexError, TypeError, struct.error, OSError):
        dropped.append("IPTC-IIM (unreadable)")
        return {}
    bad = [key for key, raw in found.items() if any(map(forbidden, raw if isinstance(raw, list) else [raw]))]
    dropped += [f"IPTC-IIM {record}:{number}" for record, number in bad]
    return {key: raw for key, raw in found.items() if key not in bad}


def iptc_texts(records: Records) -> tuple[tuple[str, str], ...]:
    """Title, author, copyright and caption under the keywords of PNG."""
    texts = []
    for number, key in _TEXTS.items():
        values = records.get((2, number), [])
        joined = b"; ".join(values if isinstance(values, list) else [values])
        if joined and len(joined) <= MAX_TEXT_BYTES:
            texts.append((key, decode_text(joined)))
    return tuple(texts)


def with_iptc(xmp: bytes | None, records: Records, dropped: list[str], *, limit: int) -> bytes | None:
    """The packet with those fields of the block that it lacks, so far as they fit into `limit` bytes."""
    if not (found := iptc_properties(records, dropped)):
        return xmp
    packet = Packet(xmp)
    for item in found:
        if not packet.get(item.name) and not packet.add(item, limit):
            dropped.append(f"IPTC-IIM {item.name} (no room)")
    return packet.data


def iptc_properties(records: Records, dropped: list[str]) -> list[Property]:
    """The fields of the application record as XMP properties; what has none is named in ``dropped``."""
    found = []
    for (record, number), raw in records.items():
        values = [decode_text(value) for value in (raw if isinstance(raw, list) else [raw]) if value]
        name, form = _FIELDS.get(number, ("", "text")) if record == 2 else ("", "text")
        if not name:
            if (record, number) not in _SILENT:
                dropped.append(f"IPTC-IIM {record}:{number}")
            continue
        if number == _DATE_CREATED:
            values = [_date(value) for value in values]
        if form in ("Alt", "text"):
            values = ["; ".join(values)]
        if sum(len(value.encode()) for value in values) <= MAX_TEXT_BYTES:
            found.append(Property(name=name, form=form, values=values))
        else:
            dropped.append(f"IPTC-IIM {record}:{number}")
    return found


def _date(value: str) -> str:
    """CCYYMMDD as XMP writes it; anything else stays."""
    return f"{value[:4]}-{value[4:6]}-{value[6:]}" if len(value) == 8 and value.isdigit() else value


def decode_text(value: bytes) -> str:
    """UTF-8 where it is that, else Latin-1, which older software wrote without saying so."""
    try:
        return value.decode("utf-8").rstrip("\0")
    except UnicodeDecodeError:
        return value.decode("latin-1").rstrip("\0")
