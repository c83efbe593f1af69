"""The committed state of a destination: manifests and ``_SUCCESS.json``, and reading both back, hashes checked."""

from __future__ import annotations

import json
import uuid
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import IntegrityError, NotFound, PreconditionFailed, UserError
from pipeline.ids import canonical_json, sha256_hex
from pipeline.storage import Store, get_json, in_parallel, json_bytes, put_json_new

SUCCESS_KEY = "_SUCCESS.json"
COUNTS = ("rows_in", "rows_ok", "rows_quarantined")


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What one committed shard holds. Readers trust these and nothing else."""

    schema_version: int
    shard_id: str
    source: dict[str, Any]
    # key, sha256, size, rows, row_groups; None when every asset was quarantined.
    data: dict[str, Any] | None
    # The same; None when none was.
    quarantine: dict[str, Any] | None
    rows_in: int
    rows_ok: int
    rows_quarantined: int
    logical_sha256: str
    config_fingerprint: str
    protector: str
    protector_version: str
    model_digest: str
    code_version: str
    plan_id: str
    run_id: str
    writer_id: str
    created_at: str
    rung: int
    verify: dict[str, Any]

    @property
    def key(self) -> str:
        """Where it lies."""
        return manifest_key(self.shard_id)


def manifest_key(shard_id: str) -> str:
    """Where the manifest of a shard lies."""
    return f"manifests/{shard_id}.json"


def logical_hash(identities: Iterable[Sequence[str | None]]) -> str:
    """Hash of what a shard means: (asset id, pixel hash, status, configuration) of every row, whatever their order.

    Times, run ids and file bytes stay out, so an interrupted and an undisturbed run agree.
    """
    rows = sorted(canonical_json(list(row)) for row in identities)
    return sha256_hex("\n".join(rows))


class Commits(NamedTuple):
    """Ids of the shards whose fate is sealed."""

    committed: set[str]
    # Planned anew before anyone committed them, because their source changed.
    abandoned: set[str]


def read_commits(destination: Store) -> Commits:
    """Which shards are committed, and which were abandoned."""
    keys = [item.key for item in destination.list("manifests/")]
    commits = Commits(set(), set())
    for document in in_parallel(partial(get_json, destination), keys):
        (commits.abandoned if "abandoned" in document else commits.committed).add(document["shard_id"])
    return commits


def abandon(destination: Store, shard_id: str) -> bool:
    """Bars a shard from being committed, by taking its manifest's place; returns False if it is committed already.

    Its assets may then be planned into another shard: no other run can still commit them here.
    """
    document = {"writer_id": uuid.uuid4().hex, "shard_id": shard_id, "abandoned": True}
    _, stored = put_json_new(destination, manifest_key(shard_id), document)
    return "abandoned" in stored


def read_manifests(destination: Store, shard_ids: Sequence[str]) -> list[Manifest]:
    """Reads manifests, in the order of the ids."""
    return in_parallel(partial(read_manifest, destination), shard_ids)


def read_manifest(destination: Store, shard_id: str) -> Manifest:
    """Reads one manifest."""
    return Manifest(**get_json(destination, manifest_key(shard_id)))


def publish_success(
    destination: Store, manifests: Sequence[Manifest], about: dict[str, Any], replaced: Collection[str] = ()
) -> None:
    """Publishes ``_SUCCESS.json``: creates it, or replaces exactly the version that was read.

    Entries of another run that published in between are kept. Where nothing is new, nothing is written.

    Args:
        destination: Where results are.
        manifests: Every committed shard that this run knows.
        about: Further fields. Of these, only a change of ``superseded`` or ``gone`` is a reason to write.
        replaced: Ids of shards all of whose source objects have newer versions in others: listed as ``replaced``,
            not among the ``manifests`` that readers follow.
    """
    entries = dict(in_parallel(partial(_entry, destination), manifests))
    outdated = {manifest_key(shard_id) for shard_id in replaced}
    document = {**about, "writer_id": uuid.uuid4().hex}
    ours, stored = put_json_new(destination, SUCCESS_KEY, {**document, **_listed(entries, outdated)})
    while not (ours or says(stored, entries, about)):
        etag = destination.info(SUCCESS_KEY).etag
        stored = get_json(destination, SUCCESS_KEY)
        earlier = stored.get("replaced", {})
        merged = _listed({**stored["manifests"], **earlier, **entries}, outdated | (earlier.keys() - entries.keys()))
        try:
            destination.replace(SUCCESS_KEY, json_bytes({**document, **merged}), etag=etag)
            return
        except PreconditionFailed:
            continue  # another run published in between: merge with what it wrote


def says(published: dict[str, Any], manifests: Iterable[str], about: Mapping[str, Any]) -> bool:
    """Whether the published state says this already, or comes from a run that knew more shards."""
    ours, listed = set(manifests), {*published["manifests"], *published.get("replaced", {})}
    same = all(published.get(name, {}) == about[name] for name in ("superseded", "gone"))
    return ours < listed or (ours == listed and same)


def _listed(entries: dict[str, dict[str, Any]], outdated: Collection[str]) -> dict[str, Any]:
    current = {key: entry for key, entry in entries.items() if key not in outdated}
    replaced = {key: entry for key, entry in entries.items() if key in outdated}
    return {"manifests": current, "replaced": replaced, **_totals(current)}


def _entry(destination: Store, manifest: Manifest) -> tuple[str, dict[str, Any]]:
    counts = {name: getattr(manifest, name) for name in COUNTS}
    return manifest.key, {"sha256": sha256_hex(destination.get(manifest.key)), **counts}


def _totals(entries: dict[str, dict[str, Any]]) -> dict[str, int]:
    return {name: sum(entry[name] for entry in entries.values()) for name in COUNTS}


def read_success(destination: Store) -> dict[str, Any] | None:
    """The published state; None before a run has finished."""
    try:
        return get_json(destination, SUCCESS_KEY)
    except NotFound:
        return None


def success_manifests(destination: Store) -> Iterator[Manifest]:
    """Follows ``_SUCCESS.json`` to its manifests and checks their hashes.

    Raises:
        UserError: There is no finished result here.
        IntegrityError: A manifest is not the one that was published.
    """
    success = read_success(destination)
    if success is None:
        raise UserError(f"{destination.url} holds no {SUCCESS_KEY}: no run has finished here yet")
    for item in sorted(success["manifests"].items()):
        yield listed_manifest(destination, item)


def listed_manifest(destination: Store, item: tuple[str, dict[str, Any]]) -> Manifest:
    """Reads a manifest as ``_SUCCESS.json`` lists it: its key, and the entry with its hash.

    Raises:
        IntegrityError: It is not the one that was published.
    """
    key, entry = item
    data = destination.get(key)
    if sha256_hex(data) != entry["sha256"]:
        raise IntegrityError(f"{destination.url}/{key} is not the manifest that was published")
    return Manifest(**json.loads(data))


def rows_of(
    destination: Store, manifest: Manifest, columns: Sequence[str] | None = None, *, only: str | None = None
) -> Iterator[dict[str, Any]]:
    """The protected rows of a shard, one row group in memory at a time.

    Args:
        destination: Where the shard is.
        manifest: The shard's.
        columns: None for all.
        only: Rows of this asset alone; row groups without it are not read.
    """
    if manifest.data is None:
        return
    with destination.open(manifest.data["key"]) as stream:
        try:
            parquet = pq.ParquetFile(stream, page_checksum_verification=True)
            if parquet.metadata.num_rows != manifest.data["rows"]:
                raise IntegrityError(f"{destination.url}/{manifest.data['key']} has not the rows its manifest names")
            for group in range(parquet.metadata.num_row_groups):
                if only is not None and only not in _asset_ids(parquet, group):
                    continue
                for row in parquet.read_row_group(group, columns=columns).to_pylist():
                    if only is None or row["asset_id"] == only:
                        yield row
        except (pa.ArrowInvalid, OSError) as error:
            raise IntegrityError(f"{destination.url}/{manifest.data['key']} is damaged") from error


def _asset_ids(parquet: pq.ParquetFile, group: int) -> list[str]:
    ids: list[str] = parquet.read_row_group(group, columns=["asset_id"]).column(0).to_pylist()
    return ids
