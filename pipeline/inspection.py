"""Looks at a destination from outside: how far it is, and whether every stored byte is what its manifest says."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import pyarrow.parquet as pq

from pipeline.decode import DecodeLimits, decode
from pipeline.encode import pixel_sha256
from pipeline.errors import IntegrityError, NotFound, UserError
from pipeline.ids import sha256_hex
from pipeline.manifest import (
    Manifest,
    logical_hash,
    read_commits,
    read_manifest,
    read_success,
    rows_of,
    success_manifests,
)
from pipeline.plan import BINDING_KEY, Shard
from pipeline.provenance.credentials import check_credentials, read_credentials
from pipeline.provenance.rights import rights_in
from pipeline.storage import Store, get_json, stored_sha256

EXAMPLES = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardStatus:
    """One shard of a destination."""

    shard: Shard
    manifest: Manifest | None
    # Units whose part is stored, where the shard is not committed yet.
    parts: int
    # Source objects with a newer version in another shard, and those that the source lost, as last published.
    newer: int = 0
    gone: int = 0

    @property
    def state(self) -> str:
        """open: not committed. current: at least one of its source objects is as it was. replaced: by newer versions in
        other shards. gone: what of it was not replaced has left the source, and stays published.
        """
        if self.manifest is None:
            return "open"
        objects = self.shard.rows if self.shard.kind == "files" else 1
        if self.newer + self.gone < objects:
            return "current"
        return "gone" if self.gone else "replaced"


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """How far a destination is."""

    url: str
    binding: dict[str, Any]
    finished: bool
    shards: list[ShardStatus]
    # How often each error type occurs among the quarantined whose source is as it was, and some of them.
    reasons: Counter[str]
    examples: list[dict[str, Any]]


def read_status(destination: Store) -> Status:
    """Reads plans, manifests and quarantine of a destination.

    Raises:
        UserError: Nothing was ever protected into it.
    """
    try:
        binding = get_json(destination, BINDING_KEY)
    except NotFound as error:
        raise UserError(f"{destination.url} is no destination of Fixative: it holds no {BINDING_KEY}") from error
    committed, abandoned = read_commits(destination)
    published = read_success(destination)
    superseded, lost = ((published or {}).get(name, {}) for name in ("superseded", "gone"))
    shards: list[ShardStatus] = []
    reasons: Counter[str] = Counter()
    examples: list[dict[str, Any]] = []
    for item in destination.list("plans/plan-"):
        for shard in (Shard(**entry) for entry in get_json(destination, item.key)["shards"]):
            if shard.shard_id in abandoned:
                continue  # a later plan holds its assets
            manifest = read_manifest(destination, shard.shard_id) if shard.shard_id in committed else None
            parts = 0 if manifest else sum(1 for _ in destination.list(f"parts/{shard.shard_id}/"))
            newer, gone = (keys.get(shard.shard_id, []) for keys in (superseded, lost))
            shards.append(ShardStatus(shard=shard, manifest=manifest, parts=parts, newer=len(newer), gone=len(gone)))
            if manifest is not None:
                rows = quarantined_now(destination, manifest, {*newer, *gone})
                reasons.update(row["error_type"] for row in rows)
                examples += rows[: max(0, EXAMPLES - len(examples))]
    finished = all(entry.manifest is not None for entry in shards) and published is not None
    return Status(
        url=destination.url, binding=binding, finished=finished, shards=shards, reasons=reasons, examples=examples
    )


def quarantined_rows(destination: Store, manifest: Manifest) -> list[dict[str, Any]]:
    """The quarantined assets of a shard with their reasons."""
    if manifest.quarantine is None:
        return []
    with destination.open(manifest.quarantine["key"]) as stream:
        rows: list[dict[str, Any]] = pq.read_table(stream).to_pylist()
    return rows


def quarantined_now(destination: Store, manifest: Manifest, outdated: Collection[str]) -> list[dict[str, Any]]:
    """The quarantined assets of a shard, but for those whose source object is outdated: mended since, or taken away."""
    if outdated and manifest.source["kind"] != "files":
        return []  # its one source object is
    return [row for row in quarantined_rows(destination, manifest) if row["asset_id"] not in outdated]


def inspect_asset(destination: Store, asset_id: str, authorities: str = "") -> list[dict[str, Any]]:
    """The rows of an asset without their bytes, with the rights and credentials of the file; all checked again.

    Args:
        destination: The destination.
        asset_id: The asset.
        authorities: PEM certificates; where given, a signature must be by someone whom one of them vouches for.

    Raises:
        UserError: No such asset, or a signature that cannot be checked here.
        IntegrityError: Stored bytes are not what the row says.
    """
    found: list[dict[str, Any]] = []
    for manifest in success_manifests(destination):
        for row in rows_of(destination, manifest, only=asset_id):
            said = _check_row(row, authorities)
            image = row.pop("image")
            found.append({"status": "protected", "shard_id": manifest.shard_id, "file": image["path"], **row, **said})
        found += [
            {"status": "quarantined", **row}
            for row in quarantined_rows(destination, manifest)
            if row["asset_id"] == asset_id
        ]
    if not found:
        raise UserError(f"no asset '{asset_id}' in {destination.url}; ids are the column asset_id of its data files")
    return found


def _check_row(row: dict[str, Any], authorities: str) -> dict[str, Any]:
    """Holds the stored file, its XMP and its signed manifest against the row; returns what the two say."""
    name, data = row["asset_id"], row["image"]["bytes"]
    if sha256_hex(data) != row["protected_sha256"]:
        raise IntegrityError(f"{name}: its stored bytes do not match protected_sha256")
    stored = decode(data, limits=DecodeLimits(max_pixels=max(1, row["width"] * row["height"]), min_side=7))
    if pixel_sha256(stored) != row["pixel_sha256"]:
        raise IntegrityError(f"{name}: its stored pixels do not match pixel_sha256")
    rights = rights_in(stored.metadata.xmp)
    if row.get("data_mining") != rights.get("data_mining") and "data_mining" in row:
        raise IntegrityError(f"{name}: plus:DataMining of its XMP does not match data_mining")
    if row.get("c2pa_manifest") is None:
        return {"rights": rights}
    credentials = read_credentials(data, f"image/{stored.source_format.lower()}", trust_anchors=authorities)
    if credentials is None:
        raise IntegrityError(f"{name}: its file does not hold the C2PA manifest that its row names")
    if problems := check_credentials(credentials, row, stored.metadata.xmp):
        raise IntegrityError(f"{name}: {'; '.join(problems)}")
    return {
        "rights": rights,
        "content_credentials": {
            "signature": "valid" if credentials.trusted is None else "valid, its signer trusted",
            "signed_by": f"{credentials.signed_by}, certificate {credentials.serial}",
            **{key.removeprefix("cawg."): use["use"] for key, use in (credentials.training_mining or {}).items()},
        },
    }


def verify_destination(destination: Store, authorities: str = "") -> list[dict[str, Any]]:
    """Checks every published byte: manifests, data files, rows, pixels, rights, signatures; one line per shard.

    Raises:
        UserError: A signature cannot be checked here.
        IntegrityError: Something is not what its manifest says; the message names it.
    """
    return [_verify_shard(destination, manifest, authorities) for manifest in success_manifests(destination)]


def _verify_shard(destination: Store, manifest: Manifest, authorities: str) -> dict[str, Any]:
    for entry in (manifest.data, manifest.quarantine):
        if entry is not None and stored_sha256(destination, entry["key"]) != entry["sha256"]:
            raise IntegrityError(f"{destination.url}/{entry['key']} does not match its manifest")
    identities: list[tuple[str | None, ...]] = []
    signed = 0
    for row in rows_of(destination, manifest):
        signed += "content_credentials" in _check_row(row, authorities)
        identities.append((row["asset_id"], row["pixel_sha256"], "protected", row["config_fingerprint"]))
    for row in quarantined_rows(destination, manifest):
        identities.append((row["asset_id"], None, "quarantined", row["config_fingerprint"]))
    if logical_hash(identities) != manifest.logical_sha256 or len(identities) != manifest.rows_in:
        raise IntegrityError(f"{manifest.shard_id}: its rows do not match logical_sha256 of its manifest")
    return {
        "shard_id": manifest.shard_id,
        "source": manifest.source["uri"],
        "rows": manifest.rows_in,
        "protected": manifest.rows_ok,
        "quarantined": manifest.rows_quarantined,
        "logical_sha256": manifest.logical_sha256,
        "signed": signed,
        "checked": f"manifest, files, rows, pixels, rights{' and signatures' if signed else ''} agree",
    }
