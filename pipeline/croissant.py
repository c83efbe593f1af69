"""The dataset card: ``croissant.json`` (Croissant 1.1, MLCommons), which says what a published destination holds.

Written from the published state alone, so equal states have equal cards, byte for byte. It names no place outside of
the destination: no source, no path of a machine, no endpoint.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import AlreadyExists, IntegrityError, NotFound, PreconditionFailed
from pipeline.ids import sha256_hex
from pipeline.manifest import SUCCESS_KEY, Manifest, listed_manifest
from pipeline.plan import BINDING_KEY
from pipeline.provenance.rights import DATA_MINING
from pipeline.storage import Store, get_json, in_parallel, json_bytes

CARD_KEY = "croissant.json"
CONFORMS_TO = ("http://mlcommons.org/croissant/1.1", "http://mlcommons.org/croissant/RAI/1.0")
PARQUET = "application/x-parquet"  # as mlcroissant spells it

_TERMS = (
    *("arrayShape", "citeAs", "column", "containedIn", "equivalentProperty", "extract", "field", "fileObject"),
    *("fileProperty", "fileSet", "format", "includes", "isArray", "isLiveDataset", "jsonPath", "key", "md5"),
    *("parentField", "path", "recordSet", "references", "regex", "repeated", "replace", "samplingRate"),
    *("separator", "source", "subField", "transform"),
)
# The context that the specification prescribes, and two vocabularies for what it leaves to others.
CONTEXT: dict[str, Any] = {
    "@language": "en",
    "@vocab": "https://schema.org/",
    **{name: f"cr:{name}" for name in _TERMS},
    "conformsTo": "dct:conformsTo",
    "cr": "http://mlcommons.org/croissant/",
    "data": {"@id": "cr:data", "@type": "@json"},
    "dataType": {"@id": "cr:dataType", "@type": "@vocab"},
    "dct": "http://purl.org/dc/terms/",
    "description": {"@container": "@language"},
    "examples": {"@id": "cr:examples", "@type": "@json"},
    "name": {"@container": "@language"},
    "prov": "http://www.w3.org/ns/prov#",
    "rai": "http://mlcommons.org/croissant/RAI/",
    "sc": "https://schema.org/",
}

_TYPES: dict[pa.DataType, str] = {
    pa.bool_(): "sc:Boolean",
    pa.string(): "sc:Text",
    pa.large_string(): "sc:Text",
    pa.float16(): "cr:Float16",
    pa.float32(): "cr:Float32",
    pa.float64(): "cr:Float64",
    **{getattr(pa, name.lower())(): f"cr:{name}" for name in ("Int8", "Int16", "Int32", "Int64")},
    **{getattr(pa, name.lower())(): f"cr:{name}" for name in ("UInt8", "UInt16", "UInt32", "UInt64")},
}

_ABOUT = {
    "asset_id": "The customer's id of the image, or its place in the archive",
    "image": "The protected image",
    "source_sha256": "SHA-256 of the original's bytes",
    "protected_sha256": "SHA-256 of the protected image's bytes",
    "pixel_sha256": "SHA-256 of the protected image's pixels, whatever the file format",
    "eps_levels": "Budget: largest change of any sample that was allowed, in 8-bit levels",
    "eps_linf_measured": "Largest change of any sample in the stored bytes, in 8-bit levels",
    "psnr": "Of the stored bytes against the original, dB",
    "ssim": "Of the stored bytes against the original",
    "sampled": "Whether it was part of the check before the shard was committed",
}


def write_card(destination: Store) -> None:
    """Writes the card of the published state, unless it is there already. Safe beside other runs that do the same.

    Raises:
        NotFound: Nothing is published.
        IntegrityError: A manifest or a data file is not what was published.
    """
    while True:
        # In this order: a card read first cannot be newer than the state read after it.
        try:
            etag, card = destination.info(CARD_KEY).etag, destination.get(CARD_KEY)
        except NotFound:
            etag, card = "", b""
        success = destination.get(SUCCESS_KEY)
        if _describes(card, success):
            return
        data = json_bytes(build_card(destination, success))
        try:
            if etag:
                destination.replace(CARD_KEY, data, etag=etag)
            else:
                destination.put_new(CARD_KEY, data)
            return
        except (AlreadyExists, PreconditionFailed):
            continue  # another run wrote one in between: look again


def _describes(card: bytes, success: bytes) -> bool:
    """Whether a card was made from this published state."""
    try:
        distribution = json.loads(card)["distribution"]
        return any(item["@id"] == SUCCESS_KEY and item["sha256"] == sha256_hex(success) for item in distribution)
    except (ValueError, KeyError, TypeError):  # none, or one that somebody else wrote
        return False


def build_card(destination: Store, success: bytes) -> dict[str, Any]:
    """The card as a JSON document.

    Args:
        destination: The published destination.
        success: The bytes of its ``_SUCCESS.json``.
    """
    state = json.loads(success)
    fields: dict[str, Any] = get_json(destination, BINDING_KEY)["fields"]
    manifests = in_parallel(partial(listed_manifest, destination), sorted(state["manifests"].items()))
    rungs = [fields["method"]["config"], *fields["ladder"]]
    levels = max(float(rungs[manifest.rung]["eps_levels"]) for manifest in manifests)
    method = f"{fields['method']['name']} {fields['method']['version']}"
    software = f"Fixative {state['code_version']}"
    total = sum(manifest.rows_ok for manifest in manifests)
    outdated = " Rows of sources that have changed since are still in it; _SUCCESS.json lists them under superseded."
    card: dict[str, Any] = {
        "@context": CONTEXT,
        "@type": "sc:Dataset",
        "conformsTo": list(CONFORMS_TO),
        "name": f"protected-images-{state['config_fingerprint'][:12]}",
        "description": (
            f"{total} images, protected against misuse by diffusion models with the method {method}: no sample was "
            f"meant to change by more than {levels:g} of 255 levels. Of every row, eps_linf_measured says by how much "
            f"any did. {sum(manifest.rows_quarantined for manifest in manifests)} images could not be protected and "
            f"are not in it.{outdated if state.get('superseded') else ''}"
        ),
        "version": f"1.{len({manifest.plan_id for manifest in manifests}) - 1}.0",
        "datePublished": max(manifest.created_at for manifest in manifests),
        "keywords": ["images", "adversarial protection", "diffusion models"],
        **_rights(fields.get("provenance", {})),
        "rai:dataManipulationProtocol": (
            f"An adversarial perturbation ({method}, at most {levels:g} levels of 8 bits, model "
            f"{fields['model'][:12]}) was added to every image by {software}; the manifests "
            "hold its parameters and what a sampled check measured."
        ),
        "rai:dataLimitations": (
            "The protection hinders models of the kind it was made against, and some purification; it is no proof "
            f"against every attack. What was measured is in {state['report']}."
        ),
        "prov:wasGeneratedBy": {
            "@type": "prov:Activity",
            "prov:label": f"protection with {method}, configuration {state['config_fingerprint']}",
            "prov:wasAssociatedWith": {
                "@type": "prov:SoftwareAgent",
                "prov:label": f"Fixative {state['code_version']}",
            },
        },
        "distribution": _distribution(manifests, success),
    }
    columns = _common_columns(destination, manifests)
    if columns:
        card["recordSet"] = [_record_set(columns)]
    return card


def _rights(settings: dict[str, Any]) -> dict[str, Any]:
    """What the job says of all images; an image's own metadata may say more, and holds."""
    said = {
        "usageInfo": DATA_MINING.get(settings.get("data_mining", "none")),
        "license": settings.get("web_statement"),
        "copyrightNotice": settings.get("copyright_notice"),
        "creditText": settings.get("credit"),
        "acquireLicensePage": settings.get("licensor_url"),
    }
    return {name: value for name, value in said.items() if value}


def _distribution(manifests: Iterable[Manifest], success: bytes) -> list[dict[str, Any]]:
    files = [{"key": SUCCESS_KEY, "sha256": sha256_hex(success), "size": len(success)}]
    data = [manifest.data for manifest in manifests if manifest.data is not None]
    described = [
        {
            "@type": "cr:FileObject",
            "@id": item["key"],
            "name": item["key"],
            "contentUrl": item["key"],
            "contentSize": f"{item['size']} B",
            "sha256": item["sha256"],
            "encodingFormat": "application/json" if item["key"] == SUCCESS_KEY else PARQUET,
        }
        for item in [*files, *data]
    ]
    if not data:
        return described
    names = [item["key"] for item in data]
    # Each by its name: other files may lie beside them that no manifest lists.
    return [
        *described,
        {"@type": "cr:FileSet", "@id": "shards", "name": "shards", "encodingFormat": PARQUET, "includes": names},
    ]


def _common_columns(destination: Store, manifests: Sequence[Manifest]) -> list[pa.Field]:
    """The columns that every shard has with one type, in their order. Shards of one plan have the same ones."""
    newest = {manifest.plan_id: manifest for manifest in manifests if manifest.data is not None}
    schemas = [_schema(destination, manifest) for manifest in newest.values()]
    first, *others = schemas or [pa.schema([])]
    return [column for column in first if all(column in other for other in others)]


def _schema(destination: Store, manifest: Manifest) -> pa.Schema:
    key = (manifest.data or {})["key"]
    try:
        with destination.open(key) as stream:
            return pq.read_schema(stream)
    except (NotFound, pa.ArrowInvalid, OSError) as error:
        raise IntegrityError(f"{destination.url}/{key} is missing or damaged") from error


def _record_set(columns: Iterable[pa.Field]) -> dict[str, Any]:
    fields = [field for column in columns if (field := _field(column)) is not None]
    return {
        "@type": "cr:RecordSet",
        "@id": "images",
        "name": "images",
        "description": "One record per protected image. Nested columns of the files are not described here.",
        "field": fields,
    }


def _field(column: pa.Field) -> dict[str, Any] | None:
    source: dict[str, Any] = {"fileSet": {"@id": "shards"}, "extract": {"column": column.name}}
    field: dict[str, Any] = {"@type": "cr:Field", "@id": f"images/{column.name}", "name": column.name}
    kind, shape = column.type, {}
    if column.name == "image":
        field["dataType"] = "sc:ImageObject"
        source["transform"] = {"jsonPath": "bytes"}
    else:
        if pa.types.is_list(kind) or pa.types.is_large_list(kind):
            kind, shape = kind.value_type, {"isArray": True, "arrayShape": "-1"}
        name = "sc:DateTime" if pa.types.is_timestamp(kind) else _TYPES.get(kind)
        if name is None:
            return None
        field |= {"dataType": name, **shape}
    if column.name in _ABOUT:
        field["description"] = _ABOUT[column.name]
    return {**field, "source": source}
