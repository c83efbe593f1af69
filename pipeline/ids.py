"""Names that follow from content: hashes, fingerprints, unit ids and seeds. Nothing here reads a clock."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any


def canonical_json(value: Any) -> str:
    """JSON with one spelling per value: sorted keys, no spaces, no NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def sha256_hex(data: bytes | str) -> str:
    """SHA-256 of bytes, or of a text's UTF-8 form, as 64 hex digits."""
    return hashlib.sha256(data.encode() if isinstance(data, str) else data).hexdigest()


def fingerprint(fields: Mapping[str, Any]) -> str:
    """The configuration fingerprint: SHA-256 over the canonical JSON of everything that decides a result."""
    return sha256_hex(canonical_json(fields))


def unit_id(source: str, etag: str, rows: tuple[int, int], config_fp: str, rung: int) -> str:
    """Identity of one unit of work, 16 hex digits.

    Args:
        source: The shard's identity within the archive.
        etag: Version of the shard's source objects.
        rows: First row and one past the last row.
        config_fp: Configuration fingerprint.
        rung: Rung of the preset ladder; a redone unit has another id, so its results never mix with the first.
    """
    return sha256_hex(f"{source}|{etag}|{rows[0]}:{rows[1]}|{config_fp}|{rung}")[:16]


def asset_seed(source_sha256: str, config_fp: str, salt: str = "") -> int:
    """A 63-bit seed from the asset's bytes and the configuration; equal wherever and whenever it is asked."""
    digest = hashlib.sha256(f"{source_sha256}|{config_fp}|{salt}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def differing_fields(ours: Any, theirs: Any, path: str = "") -> list[str]:
    """The leaves in which two JSON values differ, as ``path: theirs -> ours`` lines."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        lines: list[str] = []
        for key in sorted(set(ours) | set(theirs)):
            inner = f"{path}.{key}" if path else key
            lines += differing_fields(ours.get(key), theirs.get(key), inner)
        return lines
    return [] if ours == theirs else [f"{path}: {_short(theirs)} -> {_short(ours)}"]


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:16]}..."
