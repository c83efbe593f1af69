"""Rights go where an image says nothing; what it says stays; and an RDF reader finds them where the standards say."""

from __future__ import annotations

import io
import struct
import xml.etree.ElementTree as ElementTree

import pytest
from PIL import Image
from rdflib import Graph, URIRef
from rdflib.namespace import RDF

from pipeline.config import ProvenanceSettings
from pipeline.image_metadata import MAX_BLOCK_BYTES, ImageMetadata, read_metadata
from pipeline.provenance.rights import DATA_MINING, TRAINING_MINING_KEYS, rights_in, training_mining, with_rights
from pipeline.provenance.xmp import MAX_PACKET_BYTES, NAMESPACES, Packet, Property
from tests.pipeline import images

PROHIBITED = "http://ns.useplus.org/ldf/vocab/DMI-PROHIBITED-AIMLTRAINING"
EVERYTHING = ProvenanceSettings(
    data_mining="prohibited-see-constraint",
    constraint="no training & no <mining>",
    creator="Zoë",
    copyright_notice="© 2026 Zoë",
    credit="Zoë / Archive",
    usage_terms="Ask first.",
    web_statement="https://example.org/licence",
    licensor_url="https://example.org/buy",
)


def graph(xmp: bytes | None) -> Graph:
    assert xmp is not None
    root = ElementTree.fromstring(xmp.decode().strip())
    found = root.find(f".//{{{RDF}}}RDF")
    assert found is not None
    return Graph().parse(data=ElementTree.tostring(found), format="xml", publicID="file:///")


def values(xmp: bytes | None, name: str) -> list[str]:
    """A property as rdflib reads it: a literal, or the members of its container."""
    prefix, _, local = name.partition(":")
    read = graph(xmp)
    found = []
    for item in read.objects(None, URIRef(NAMESPACES[prefix] + local)):
        members = [str(o) for p, o in sorted(read.predicate_objects(item)) if str(p).startswith(f"{RDF}_")]
        found += members or [str(item)]
    return found


def packet(inner: str = "", attributes: str = "", *, prefix: str = "rdf") -> bytes:
    names = " ".join(f'xmlns:{key}="{uri}"' for key, uri in NAMESPACES.items())
    return (
        f'<x:xmpmeta xmlns:x="adobe:ns:meta/"><{prefix}:RDF xmlns:{prefix}="{RDF}"><{prefix}:Description {names} '
        f'{prefix}:about="" {attributes}>{inner}</{prefix}:Description></{prefix}:RDF></x:xmpmeta>'
    ).encode()


def test_every_field_reads_back_with_an_rdf_reader() -> None:
    xmp = with_rights(ImageMetadata(), EVERYTHING).xmp
    assert values(xmp, "plus:DataMining") == ["http://ns.useplus.org/ldf/vocab/DMI-PROHIBITED-SEECONSTRAINT"]
    assert values(xmp, "plus:OtherConstraints") == ["no training & no <mining>"]
    assert values(xmp, "dc:creator") == ["Zoë"]
    assert values(xmp, "dc:rights") == ["© 2026 Zoë"]
    assert values(xmp, "photoshop:Credit") == ["Zoë / Archive"]
    assert values(xmp, "xmpRights:UsageTerms") == ["Ask first."]
    assert values(xmp, "xmpRights:WebStatement") == ["https://example.org/licence"]
    assert values(xmp, "plus:LicensorURL") == ["https://example.org/buy"]
    assert set(rights_in(xmp)) == {
        *("data_mining", "constraint", "creator", "copyright_notice", "credit"),
        *("usage_terms", "web_statement", "licensor_url"),
    }


@pytest.mark.parametrize("prefix", ["rdf", "r"])
def test_rights_join_what_is_there(prefix: str) -> None:
    source = packet("<dc:title>Möwe</dc:title>", 'photoshop:City="Bern"', prefix=prefix)
    xmp = with_rights(ImageMetadata(xmp=source), EVERYTHING).xmp
    assert values(xmp, "dc:title") == ["Möwe"]
    assert values(xmp, "photoshop:City") == ["Bern"]
    assert values(xmp, "dc:rights") == ["© 2026 Zoë"]
    assert set(graph(source)) < set(graph(xmp))


OWN = f"<dc:rights><rdf:Alt xmlns:rdf='{RDF}'><rdf:li xml:lang='x-default'>mine</rdf:li></rdf:Alt></dc:rights>"


@pytest.mark.parametrize(
    ("source", "name", "kept"),
    [
        (packet(OWN), "dc:rights", ["mine"]),
        (packet(attributes='photoshop:Credit="mine"'), "photoshop:Credit", ["mine"]),
        (packet(attributes=f'plus:DataMining="{DATA_MINING["allowed"]}"'), "plus:DataMining", [DATA_MINING["allowed"]]),
        (packet('<dc:creator xmlns:r="x">mine</dc:creator>'), "dc:creator", ["mine"]),
        (
            packet(f"<cc:license rdf:resource='https://creativecommons.org/licenses/by/4.0/' xmlns:rdf='{RDF}'/>"),
            "plus:DataMining",
            [],
        ),
        (packet(attributes='xmpRights:Marked="False"'), "plus:DataMining", []),
        (
            packet(attributes='xmpRights:WebStatement="https://creativecommons.org/publicdomain/zero/1.0/"'),
            "plus:DataMining",
            [],
        ),
    ],
)
def test_what_an_image_says_is_not_contradicted(source: bytes, name: str, kept: list[str]) -> None:
    settings = ProvenanceSettings(creator="other", copyright_notice="other", credit="other")
    assert values(with_rights(ImageMetadata(xmp=source), settings).xmp, name) == kept


def test_words_in_exif_and_texts_count() -> None:
    settings = ProvenanceSettings(creator="other", copyright_notice="other")
    in_exif = with_rights(ImageMetadata(exif=images.exif()), settings)
    assert rights_in(in_exif.xmp).keys() == {"data_mining"}
    in_texts = with_rights(ImageMetadata(texts=(("Author", "Zoe"),)), settings)
    assert rights_in(in_texts.xmp).keys() == {"data_mining", "copyright_notice"}
    blank = Image.Exif()
    blank[0x8298] = "     "  # as cameras write it
    assert "copyright_notice" in rights_in(with_rights(ImageMetadata(exif=blank.tobytes()), settings).xmp)


def test_nothing_is_written_where_nothing_is_asked() -> None:
    silent = ProvenanceSettings(data_mining="none")
    assert with_rights(ImageMetadata(), silent) == ImageMetadata()
    source = ImageMetadata(xmp=packet("<dc:title>Möwe</dc:title>"))
    assert with_rights(source, silent) is source
    assert rights_in(None) == {}


def test_a_reservation_is_the_default_and_no_more() -> None:
    assert rights_in(with_rights(ImageMetadata(), ProvenanceSettings()).xmp) == {"data_mining": PROHIBITED}


def test_xml_that_is_no_xmp_does_not_stand_in_the_way() -> None:
    assert rights_in(with_rights(ImageMetadata(xmp=b"<x/>"), ProvenanceSettings()).xmp) == {"data_mining": PROHIBITED}
    bare = f'<r:RDF xmlns:r="{RDF}"/>'.encode()
    assert rights_in(with_rights(ImageMetadata(xmp=bare), ProvenanceSettings()).xmp) == {"data_mining": PROHIBITED}


def test_a_full_packet_takes_what_fits_the_reservation_first() -> None:
    room = MAX_BLOCK_BYTES - len(packet("<dc:title></dc:title>"))
    full = packet(f"<dc:title>{'w' * room}</dc:title>")
    settings = ProvenanceSettings(copyright_notice="&" * 1000, usage_terms="short", credit="&" * 1000)
    xmp = with_rights(ImageMetadata(xmp=full), settings).xmp
    assert xmp is not None
    assert len(xmp) <= MAX_PACKET_BYTES
    assert rights_in(xmp).keys() == {"data_mining", "usage_terms"}


def test_characters_that_xml_cannot_hold_are_left_out() -> None:
    found = Packet(None)
    found.add(Property(name="dc:rights", form="Alt", values=["a\x00b\x1fc\N{GRINNING FACE}"]))
    assert Packet(found.data).get("dc:rights") == ["abc\N{GRINNING FACE}"]


NO, ASK = "notAllowed", "constrained"


@pytest.mark.parametrize(
    ("value", "uses"),
    [
        (DATA_MINING["allowed"], ["allowed"] * 4),
        (DATA_MINING["prohibited"], [NO] * 4),
        (DATA_MINING["prohibited-ai-training"], [ASK, ASK, NO, NO]),
        (DATA_MINING["prohibited-generative-ai-training"], [ASK, ASK, ASK, NO]),
        (DATA_MINING["prohibited-except-search-indexing"], [ASK, NO, NO, NO]),
        (DATA_MINING["prohibited-see-constraint"], [ASK] * 4),
        ("http://ns.useplus.org/ldf/vocab/DMI-PROHIBITED-SEELINKEDRIGHTSEXPR", [ASK] * 4),
    ],
)
def test_training_mining_says_what_the_packet_says(value: str, uses: list[str]) -> None:
    entries = training_mining(packet(attributes=f'plus:DataMining="{value}"'))
    assert entries is not None
    assert [entries[key]["use"] for key in TRAINING_MINING_KEYS] == uses
    assert all(("constraint_info" in entry) == (entry["use"] == ASK) for entry in entries.values())


@pytest.mark.parametrize("attributes", ["", f'plus:DataMining="{DATA_MINING["unspecified"]}"'])
def test_training_mining_says_nothing_where_the_packet_says_nothing(attributes: str) -> None:
    assert training_mining(packet(attributes=attributes)) is None


def iim(*records: tuple[int, bytes]) -> bytes:
    return b"".join(struct.pack(">BBBH", 28, 2, number, len(text)) + text for number, text in records)


def jpeg_with_iim(block: bytes, xmp: bytes | None = None) -> bytes:
    data = images.plain("JPEG", **({"xmp": xmp} if xmp else {}))
    resource = b"8BIM\x04\x04\0\0" + struct.pack(">I", len(block)) + block + b"\0" * (len(block) % 2)
    body = b"Photoshop 3.0\0" + resource
    return data[:2] + b"\xff\xed" + struct.pack(">H", len(body) + 2) + body + data[2:]


def metadata_of(data: bytes) -> ImageMetadata:
    with Image.open(io.BytesIO(data)) as image:
        image.load()
        return read_metadata(image, data)


def test_iptc_fields_move_into_the_xmp() -> None:
    block = iim((25, b"gull"), (25, "Möwe".encode()), (80, b"Zoe"), (90, b"Bern"), (55, b"20240506"), (120, b"caption"))
    metadata = metadata_of(jpeg_with_iim(block + iim((202, b"preview"))))
    assert values(metadata.xmp, "dc:subject") == ["gull", "Möwe"]
    assert values(metadata.xmp, "dc:creator") == ["Zoe"]
    assert values(metadata.xmp, "photoshop:City") == ["Bern"]
    assert values(metadata.xmp, "photoshop:DateCreated") == ["2024-05-06"]
    assert values(metadata.xmp, "dc:description") == ["caption"]
    assert metadata.dropped == ("IPTC-IIM 2:202",)


def test_xmp_wins_over_iptc_and_pictures_stay_out() -> None:
    xmp = packet(OWN)
    metadata = metadata_of(jpeg_with_iim(iim((116, b"theirs"), (90, images.JPEG_SIGNATURE + b"x"), (95, b"BE")), xmp))
    assert values(metadata.xmp, "dc:rights") == ["mine"]
    assert values(metadata.xmp, "photoshop:State") == ["BE"]
    assert values(metadata.xmp, "photoshop:City") == []
    assert "IPTC-IIM 2:90" in metadata.dropped


def test_a_link_to_a_manifest_of_other_pixels_is_gone() -> None:
    linked = images.XMP.format(extra='<t:provenance xmlns:t="http://purl.org/dc/terms/">https://x.y/z</t:provenance>')
    metadata = metadata_of(images.plain("WEBP", xmp=linked.encode()))
    assert "XMP t:provenance" in metadata.dropped
    assert metadata.xmp is not None
    assert b"https://x.y/z" not in metadata.xmp
