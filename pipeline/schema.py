"""Arrow schemas and metadata keys of everything that is stored. Nothing else."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import pyarrow as pa

from pipeline.errors import UserError

SCHEMA_VERSION = 2

CHECK_TYPE = pa.list_(
    pa.struct(
        [
            pa.field("purifier", pa.string()),
            # The method's objective on the purified original and on the purified stored image.
            pa.field("objective_clean", pa.float64()),
            pa.field("objective_protected", pa.float64()),
        ]
    )
)

PROTECTED = pa.schema(
    [
        pa.field("asset_id", pa.string(), nullable=False),
        pa.field("image", pa.struct([pa.field("bytes", pa.binary()), pa.field("path", pa.string())])),
        pa.field("width", pa.int32()),
        pa.field("height", pa.int32()),
        pa.field("format", pa.string()),
        pa.field("mode", pa.string()),
        pa.field("source_uri", pa.string()),
        pa.field("source_etag", pa.string()),
        pa.field("source_sha256", pa.string()),
        pa.field("source_format", pa.string()),
        pa.field("source_mode", pa.string()),
        pa.field("protected_sha256", pa.string()),
        pa.field("pixel_sha256", pa.string()),
        pa.field("protector", pa.string()),
        pa.field("protector_version", pa.string()),
        pa.field("config_fingerprint", pa.string()),
        pa.field("model_digest", pa.string()),
        pa.field("rung", pa.int32()),
        pa.field("seed", pa.int64()),
        # Where it was computed: equal pixels are promised for one kind of device and one version.
        pa.field("device", pa.string()),
        pa.field("torch_version", pa.string()),
        pa.field("steps_run", pa.int32()),
        pa.field("eps_levels", pa.float64()),
        pa.field("eps_linf_measured", pa.int32()),
        pa.field("psnr", pa.float64()),
        pa.field("ssim", pa.float64()),
        # At the optimizer's scale; ``check`` has them on stored bytes.
        pa.field("objective_before", pa.float64()),
        pa.field("objective_after", pa.float64()),
        pa.field("metadata_dropped", pa.list_(pa.string())),
        # plus:DataMining of the stored image, a URI; null where it says nothing.
        pa.field("data_mining", pa.string()),
        # Content Credentials; null where nobody signs. A signature differs each time: the file without it does not.
        pa.field("unsigned_sha256", pa.string()),
        pa.field("c2pa_manifest", pa.string()),
        pa.field("signed_by", pa.string()),
        pa.field("certificate_serial", pa.string()),
        pa.field("unit_id", pa.string()),
        pa.field("run_id", pa.string()),
        pa.field("processed_at", pa.timestamp("ms", tz="UTC")),
    ]
)
"""Columns of a protected row as its part holds them; the finalizer adds ``CHECKED``."""

CHECKED = pa.schema(
    [
        pa.field("sampled", pa.bool_()),
        # Sampled rows: the stored bytes were read back, their hash and budget hold. Null: not sampled.
        pa.field("verified", pa.bool_()),
        pa.field("check", CHECK_TYPE),
    ]
)

FAILURE = pa.schema(
    [
        pa.field("stage", pa.string()),
        pa.field("error_type", pa.string()),
        pa.field("message", pa.string()),
        pa.field("attempt", pa.int32()),
    ]
)

QUARANTINED = pa.schema(
    [
        pa.field("asset_id", pa.string(), nullable=False),
        pa.field("shard_id", pa.string()),
        pa.field("unit_id", pa.string()),
        *FAILURE,
        pa.field("source_uri", pa.string()),
        pa.field("source_etag", pa.string()),
        pa.field("source_sha256", pa.string()),
        pa.field("config_fingerprint", pa.string()),
        pa.field("run_id", pa.string()),
        pa.field("processed_at", pa.timestamp("ms", tz="UTC")),
    ]
)
"""One row per asset that could not be protected. Holds no image bytes."""

RESERVED = frozenset([*PROTECTED.names, *CHECKED.names])
_OWN_METADATA = frozenset({b"huggingface", b"ARROW:schema", b"pandas"})


def output_columns(schemas: Iterable[pa.Schema]) -> pa.Schema:
    """The customer's columns as the output names them: the union over all shards, each field's origin noted.

    A column whose name Fixative uses itself becomes ``source_<name>``; the field's metadata keeps its first name.

    Raises:
        UserError: Two shards hold a column of one name with different types, or a renamed column meets another.
    """
    fields: dict[str, pa.Field] = {}
    features: dict[str, Any] = {}
    metadata: dict[bytes, bytes] = {}
    for schema in schemas:
        metadata |= {k: v for k, v in (schema.metadata or {}).items() if k not in _OWN_METADATA}
        described = _features(schema)
        for column in schema:
            name = output_name(column.name)
            known = fields.get(name)
            if known is not None and known.metadata[b"fixative.source"] != column.name.encode():
                raise UserError(f"columns '{column.name}' and '{name}' would both be stored as '{name}'; rename one")
            if known is not None and known.type != column.type:
                raise UserError(
                    f"column '{name}' is {known.type} in one shard and {column.type} in another; "
                    "protect them into two destinations, or make the types equal"
                )
            fields[name] = pa.field(name, column.type, metadata={b"fixative.source": column.name.encode()})
            if column.name in described:
                features[name] = described[column.name]
    metadata[b"huggingface"] = json.dumps({"info": {"features": features}}).encode()
    return pa.schema(fields.values(), metadata=metadata)


def _features(schema: pa.Schema) -> dict[str, Any]:
    """What the customer's `datasets` metadata says of the columns; empty where it says nothing readable."""
    try:
        info = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        return dict(info.get("info", {}).get("features", {}))
    except (ValueError, AttributeError, TypeError):
        return {}


def output_name(column: str) -> str:
    """The name under which a customer's column is stored."""
    return f"source_{column}" if column in RESERVED else column


def part_schema() -> pa.Schema:
    """Rows of a part: protected and quarantined ones together, in row order; a ``customer`` struct may follow."""
    facts = [item.with_nullable(True) for item in PROTECTED]
    return pa.schema([pa.field("row", pa.int64()), pa.field("status", pa.string()), *facts, *FAILURE])


def data_schema(customer: pa.Schema, metadata: dict[str, Any]) -> pa.Schema:
    """Rows of a protected shard, with its key-value metadata.

    Args:
        customer: Output form of the customer's columns (``output_columns``).
        metadata: Values under ``fixative.<key>``, stored as JSON.
    """
    kept = dict(customer.metadata or {})
    features = json.loads(kept.pop(b"huggingface", b'{"info": {"features": {}}}'))
    features["info"]["features"]["image"] = {"_type": "Image"}  # readers decode the column as pictures
    own = {f"fixative.{key}": json.dumps(value, sort_keys=True) for key, value in metadata.items()}
    described = {**kept, **own, "huggingface": json.dumps(features)}
    return pa.schema([*PROTECTED, *CHECKED, *_unmarked(customer)], metadata=described)


def _unmarked(customer: pa.Schema) -> list[pa.Field]:
    return [item.remove_metadata() for item in customer]
