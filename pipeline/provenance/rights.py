"""Rights in an image's XMP: the data-mining reservation of PLUS, and the operator's texts where the image has none.

What an image says itself is never changed or contradicted. Vocabulary: PLUS Data Mining (2023) as the IPTC Photo
Metadata Standard takes it over; and how each of its values reads in a ``cawg.training-mining`` assertion (CAWG 1.1).
"""

from __future__ import annotations

from dataclasses import replace
from typing import TypedDict

from pipeline.config import ProvenanceSettings
from pipeline.image_metadata import ImageMetadata
from pipeline.provenance.xmp import Packet, Property

_VOCABULARY = "http://ns.useplus.org/ldf/vocab/"
DATA_MINING = {
    "unspecified": f"{_VOCABULARY}DMI-UNSPECIFIED",
    "allowed": f"{_VOCABULARY}DMI-ALLOWED",
    "prohibited": f"{_VOCABULARY}DMI-PROHIBITED",
    "prohibited-ai-training": f"{_VOCABULARY}DMI-PROHIBITED-AIMLTRAINING",
    "prohibited-generative-ai-training": f"{_VOCABULARY}DMI-PROHIBITED-GENAIMLTRAINING",
    "prohibited-except-search-indexing": f"{_VOCABULARY}DMI-PROHIBITED-EXCEPTSEARCHENGINEINDEXING",
    "prohibited-see-constraint": f"{_VOCABULARY}DMI-PROHIBITED-SEECONSTRAINT",
}
"""URIs of ``plus:DataMining`` by the names of the setting."""

TRAINING_MINING_KEYS = ("cawg.data_mining", "cawg.ai_inference", "cawg.ai_training", "cawg.ai_generative_training")

_FIELDS = {
    "data_mining": "plus:DataMining",
    "constraint": "plus:OtherConstraints",
    "creator": "dc:creator",
    "copyright_notice": "dc:rights",
    "credit": "photoshop:Credit",
    "usage_terms": "xmpRights:UsageTerms",
    "web_statement": "xmpRights:WebStatement",
    "licensor_url": "plus:Licensor",
}
_EXIF_WORDS = {"dc:creator": "Author", "dc:rights": "Copyright"}
_NOT_STATED = "not stated; ask the rights holder"


class Use(TypedDict, total=False):
    """One entry of a training-mining assertion."""

    use: str
    constraint_info: str


def with_rights(metadata: ImageMetadata, settings: ProvenanceSettings) -> ImageMetadata:
    """Adds the settings' rights to what an image says, each where the image says nothing of that kind.

    An image that grants a licence of its own (Creative Commons, or marked as public domain) gets no reservation.
    Creator and copyright count as said, too, where only the EXIF or the texts name them.
    """
    packet = Packet(metadata.xmp)
    said = {key for key, _ in metadata.texts} | metadata.exif_words
    wanted: list[Property] = []
    if settings.data_mining != "none" and not packet.get("plus:DataMining") and not _openly_licensed(packet):
        wanted.append(Property(name="plus:DataMining", form="text", values=[DATA_MINING[settings.data_mining]]))
        if settings.constraint:
            wanted.append(Property(name="plus:OtherConstraints", form="Alt", values=[settings.constraint]))
    texts = [
        Property(name="dc:rights", form="Alt", values=[settings.copyright_notice or ""]),
        Property(name="dc:creator", form="Seq", values=[settings.creator or ""]),
        Property(name="photoshop:Credit", form="text", values=[settings.credit or ""]),
        Property(name="xmpRights:WebStatement", form="text", values=[settings.web_statement or ""]),
        Property(name="plus:Licensor", form="struct", values=[settings.licensor_url or ""], field="plus:LicensorURL"),
        Property(name="xmpRights:UsageTerms", form="Alt", values=[settings.usage_terms or ""]),
    ]
    wanted += [item for item in texts if _EXIF_WORDS.get(item.name) not in said]
    if not any([packet.add(item) for item in wanted]):
        return metadata
    return replace(metadata, xmp=packet.data)


def rights_in(xmp: bytes | None) -> dict[str, str]:
    """what a packet says of rights, by the names of the settings; several values are joined."""
    if xmp is None:
        return {}
    packet = Packet(xmp)
    found = {name: "; ".join(packet.get(key)) for name, key in _FIELDS.items()}
    return {name: text for name, text in found.items() if text}


def training_mining(xmp: bytes | None) -> dict[str, Use] | None:
    """The entries of the assertion that say what the packet's ``plus:DataMining`` says; None where it says nothing.

    All four keys are written. What the value of PLUS leaves open is "constrained", with a pointer to the rights holder:
    neither a permission nor a prohibition that nobody gave.
    """
    rights = rights_in(xmp)
    value = rights.get("data_mining", "")
    if value in ("", DATA_MINING["unspecified"]):
        return None
    names = {uri: name for name, uri in DATA_MINING.items()}
    asks: Use = {"use": "constrained", "constraint_info": _NOT_STATED}
    no: Use = {"use": "notAllowed"}
    match names.get(value):
        case "allowed":
            return {key: {"use": "allowed"} for key in TRAINING_MINING_KEYS}
        case "prohibited":
            return dict.fromkeys(TRAINING_MINING_KEYS, no)
        case "prohibited-ai-training":
            return {key: no if "training" in key else asks for key in TRAINING_MINING_KEYS}
        case "prohibited-generative-ai-training":
            return {key: no if "generative" in key else asks for key in TRAINING_MINING_KEYS}
        case "prohibited-except-search-indexing":
            search: Use = {"use": "constrained", "constraint_info": "search engine indexing only"}
            return {key: search if key == "cawg.data_mining" else no for key in TRAINING_MINING_KEYS}
        case "prohibited-see-constraint":
            named: Use = {"use": "constrained", "constraint_info": rights.get("constraint", _NOT_STATED)}
            return dict.fromkeys(TRAINING_MINING_KEYS, named)
    elsewhere: Use = {"use": "constrained", "constraint_info": f"see plus:DataMining {value}"}
    return dict.fromkeys(TRAINING_MINING_KEYS, elsewhere)


def _openly_licensed(packet: Packet) -> bool:
    """Whether the image grants a licence that a reservation would contradict."""
    statements = packet.get("cc:license") + packet.get("xmpRights:WebStatement")
    marked = [value.lower() for value in packet.get("xmpRights:Marked")]
    return "false" in marked or any("creativecommons.org/" in text for text in statements)
