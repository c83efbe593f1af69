"""An XMP packet as a set of properties: what it says, and properties added to it; what is there is never changed.

Works on packets that ``pipeline.image_metadata`` has cleaned: UTF-8, no document type, no pictures.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal
from xml.dom import minidom

MAX_PACKET_BYTES = 65_000
"""A JPEG segment holds 65,533 bytes, 29 of them the name of the XMP namespace."""

RDF = "http://www.w3.org/1999/02/22-rdf-syntax-ns#"
NAMESPACES = {
    "cc": "http://creativecommons.org/ns#",
    "dc": "http://purl.org/dc/elements/1.1/",
    "photoshop": "http://ns.adobe.com/photoshop/1.0/",
    "xmpRights": "http://ns.adobe.com/xap/1.0/rights/",
    "Iptc4xmpCore": "http://iptc.org/std/Iptc4xmpCore/1.0/xmlns/",
    "plus": "http://ns.useplus.org/ldf/xmp/1.0/",
}

_EMPTY = (
    '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?><x:xmpmeta xmlns:x="adobe:ns:meta/">'
    f'<rdf:RDF xmlns:rdf="{RDF}"><rdf:Description rdf:about=""/></rdf:RDF></x:xmpmeta><?xpacket end="w"?>'
)
_XMLNS = "http://www.w3.org/2000/xmlns/"
_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")

Form = Literal["text", "Alt", "Bag", "Seq", "struct"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Property:
    """A property to add.

    Attributes:
        name: with its prefix, one of ``NAMESPACES``: "dc:rights".
        form: a plain text, one text for every language (Alt), a list without (Bag) or with order (Seq), or a list of
            one structure of which ``field`` is set.
        values: one text; a Bag or Seq may have more.
    """

    name: str
    form: Form
    values: Sequence[str]
    field: str = ""


class Packet:
    """A parsed packet.

    Args:
        data: UTF-8 packet; None starts an empty one. XML that holds no rdf:RDF is no XMP and is replaced.

    Raises:
        ExpatError: It is no XML.
    """

    def __init__(self, data: bytes | None) -> None:
        self._document: Any = minidom.parseString(data or _EMPTY.encode())
        if not self._document.getElementsByTagNameNS(RDF, "RDF"):
            self._document = minidom.parseString(_EMPTY.encode())

    def get(self, name: str) -> list[str]:
        """The texts of a top-level property, such as "dc:creator"; empty where there is none."""
        namespace, local = _split(name)
        for subject in self._subjects():
            if subject.hasAttributeNS(namespace, local):
                return [subject.getAttributeNS(namespace, local)]
            for node in subject.childNodes:
                if node.nodeType == node.ELEMENT_NODE and (node.namespaceURI, node.localName) == (namespace, local):
                    items = node.getElementsByTagNameNS(RDF, "li")
                    return [_text(item) for item in items] or [_text(node)]
        return []

    def add(self, item: Property, limit: int = MAX_PACKET_BYTES) -> bool:
        """Adds a property. Returns whether it was added: not one that is there, and none beyond `limit` bytes."""
        if self.get(item.name) or not any(item.values):
            return False
        node = self._element(item)
        subjects = self._subjects()
        if not subjects:
            root = self._document.getElementsByTagNameNS(RDF, "RDF")[0]
            root.appendChild(self._rdf("Description", about=""))
            subjects = self._subjects()
        subjects[0].appendChild(node)
        if len(self.data) <= limit:
            return True
        subjects[0].removeChild(node)
        return False

    @property
    def data(self) -> bytes:
        """The packet as UTF-8."""
        return "".join(node.toxml() for node in self._document.childNodes).encode()

    def _subjects(self) -> list[Any]:
        """The elements whose attributes and children are the packet's top-level properties."""
        root = self._document.getElementsByTagNameNS(RDF, "RDF")[0]
        return [node for node in root.childNodes if getattr(node, "localName", None) == "Description"]

    def _element(self, item: Property) -> Any:
        namespace, _ = _split(item.name)
        node = self._document.createElementNS(namespace, item.name)
        # Prefixes are declared where they are used: in the customer's packet they may mean another thing, or nothing.
        node.setAttributeNS(_XMLNS, f"xmlns:{item.name.partition(':')[0]}", namespace)
        if self._document.getElementsByTagNameNS(RDF, "RDF")[0].prefix != "rdf":
            node.setAttributeNS(_XMLNS, "xmlns:rdf", RDF)
        if item.form == "text":
            self._write(node, item.values[0])
            return node
        values = self._rdf("Seq" if item.form == "struct" else item.form)
        for value in item.values:
            entry = self._rdf("li")
            if item.form == "Alt":
                entry.setAttribute("xml:lang", "x-default")
            if item.form == "struct":
                entry.setAttributeNS(RDF, "rdf:parseType", "Resource")
                inner = self._document.createElementNS(_split(item.field)[0], item.field)
                self._write(inner, value)
                entry.appendChild(inner)
            else:
                self._write(entry, value)
            values.appendChild(entry)
        node.appendChild(values)
        return node

    def _rdf(self, name: str, **attributes: str) -> Any:
        node = self._document.createElementNS(RDF, f"rdf:{name}")
        for key, value in attributes.items():
            node.setAttributeNS(_XMLNS, "xmlns:rdf", RDF)
            node.setAttributeNS(RDF, f"rdf:{key}", value)
        return node

    def _write(self, node: Any, text: str) -> None:
        node.appendChild(self._document.createTextNode(_NOT_XML.sub("", text)))


def _split(name: str) -> tuple[str, str]:
    prefix, _, local = name.partition(":")
    return NAMESPACES[prefix], local


def _text(node: Any) -> str:
    """All text below a node; for a resource, its URI."""
    if node.hasAttributeNS(RDF, "resource"):
        return str(node.getAttributeNS(RDF, "resource"))
    own = [child.data for child in node.childNodes if child.nodeType in (child.TEXT_NODE, child.CDATA_SECTION_NODE)]
    inner = [_text(child) for child in node.childNodes if child.nodeType == child.ELEMENT_NODE]
    return "".join([*own, *inner]).strip()
