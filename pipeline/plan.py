"""Lists the source, cuts it into shards and publishes the plan; binds the destination to one configuration."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import pyarrow as pa

from pipeline.config import ArchiveSettings
from pipeline.errors import BindingConflict, NotFound, UserError
from pipeline.ids import canonical_json, differing_fields, fingerprint, sha256_hex, unit_id
from pipeline.manifest import abandon, read_commits
from pipeline.schema import output_columns
from pipeline.shard_index import (
    ShardIndex,
    UnreadableShard,
    index_files,
    index_parquet,
    index_tar,
    kind_of,
    schema_from_text,
    schema_to_text,
)
from pipeline.storage import ObjectInfo, Store, get_json, in_parallel, put_json_new
from pipeline.units import RowRange

BINDING_KEY = "plans/binding.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """One shard of the plan. ``shard_id`` is its number and the first digits of its source's identity."""

    shard_id: str
    kind: str
    key: str
    etag: str
    size: int
    rows: int
    units: int
    # The plan that lists it; holds the output columns of all its shards.
    plan_id: str
    # Which preset of the ladder it is tried with; plans list 0, and a gate that strengthens raises it.
    rung: int = 0

    @property
    def index_key(self) -> str:
        """Where its index lies in the destination."""
        return f"plans/index/{self.shard_id}.json"

    @property
    def number(self) -> int:
        return int(self.shard_id.split("-")[1])


@dataclass(frozen=True, slots=True, kw_only=True)
class Changes:
    """How the source differs from what is committed of it, in objects: image files, Parquet files, tars."""

    # Not committed yet: of a key that never was, and of one that is in an older version.
    new: int = 0
    changed: int = 0
    # Committed as they are now.
    unchanged: int = 0
    # Committed, and no longer in the source. They stay published, see `Plan.gone`.
    gone: int = 0

    def __str__(self) -> str:
        return f"{self.new} new, {self.changed} changed, {self.unchanged} unchanged, {self.gone} gone"


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What a run has to do: every shard of the source as it is now."""

    config_fp: str
    shards: list[Shard]
    # Output form of the customer's columns, by plan.
    columns: dict[str, str]
    # Objects that look like shards but cannot be read, with the reason. The run goes on, and fails at the end.
    unreadable: list[tuple[str, str]] = field(default_factory=list)
    # Objects that are no part of an archive.
    ignored: list[str] = field(default_factory=list)
    # Committed shards some of whose source objects have newer versions, with those objects' keys.
    superseded: dict[str, list[str]] = field(default_factory=dict)
    # Those of them that hold nothing else: they are published no longer.
    replaced: set[str] = field(default_factory=set)
    # Committed shards some of whose source objects are in the source no longer, with those objects' keys. Their
    # rows stay published: an archive may be moved or thinned out, and what customers hold must stay traceable.
    gone: dict[str, list[str]] = field(default_factory=dict)
    changes: Changes = Changes()
    # Shards of earlier plans that this one replaces, by id.
    dropped: list[str] = field(default_factory=list)
    # Indexes of the shards that no earlier plan lists, by shard id.
    indexes: dict[str, ShardIndex] = field(default_factory=dict)

    @property
    def rows(self) -> int:
        """Number of assets."""
        return sum(shard.rows for shard in self.shards)

    @property
    def outdated(self) -> dict[str, dict[str, list[str]]]:
        """What the published state says of source objects that are not what they were."""
        return {"superseded": self.superseded, "gone": self.gone}


def bind(destination: Store, fields: dict[str, Any]) -> None:
    """Binds the destination to one configuration. Idempotent.

    Raises:
        BindingConflict: The destination holds results of another configuration; the message names what differs.
    """
    document = {"writer_id": uuid.uuid4().hex, "config_fingerprint": fingerprint(fields), "fields": fields}
    _compare(destination, fields, put_json_new(destination, BINDING_KEY, document)[1])


def check_binding(destination: Store, fields: dict[str, Any]) -> None:
    """``bind`` without writing: raises BindingConflict if the destination is bound to another configuration."""
    with suppress(NotFound):
        _compare(destination, fields, get_json(destination, BINDING_KEY))


def _compare(destination: Store, fields: dict[str, Any], stored: dict[str, Any]) -> None:
    if stored["config_fingerprint"] != fingerprint(fields):
        lines = differing_fields(fields, stored["fields"])
        if any(line.startswith("method.name:") for line in lines):  # another method has other fields: no news
            lines = [line for line in lines if not line.startswith("method.config.")]
        differences = "; ".join(lines)
        raise BindingConflict(
            f"{destination.url} holds results of another configuration ({differences}). "
            "Use the old settings, or another destination."
        )


def make_plan(
    source: Store,
    destination: Store,
    settings: ArchiveSettings,
    config_fp: str,
    *,
    only: str,
    subject_column: str | None = None,
) -> Plan:
    """Plans the source as it is now. Writes nothing.

    Shards of earlier plans stay as they are. Objects that no earlier plan covers, new or changed, become new shards.
    A shard that is not committed and can no longer be read as planned is left out; what remains of it is planned anew.

    Args:
        source: The archive.
        destination: Where earlier plans are read, and new ones published.
        settings: How to read the archive.
        config_fp: Configuration fingerprint of the destination.
        only: The one object or folder of the source that is the archive; "" for all of it.
        subject_column: Parquet column with subjects; units are cut between them where that is possible.

    Raises:
        UserError: The source holds nothing that can be protected.
    """
    listing, ignored = _list_archive(source, only)
    earlier = _earlier_shards(destination, listing, only)
    fresh = [item for item in listing if (item.key, item.etag) not in earlier.covered]
    number = earlier.next_number
    columns = earlier.columns
    indexes, unreadable = _index_all(source, fresh, settings, subject_column)
    new_plan_id = sha256_hex(canonical_json([[i.key, i.etag, i.units] for i in indexes] + [config_fp, number]))[:16]
    new: dict[str, ShardIndex] = {}
    opened = [*earlier.opened, *(key for index in indexes for key in _keys(index))]
    changed = sum(key in earlier.done for key in opened)
    shards = list(earlier.kept)
    for offset, index in enumerate(indexes):
        shard = _shard(index, number + offset, new_plan_id)
        shards.append(shard)
        new[shard.shard_id] = index
    if not shards:
        reasons = [reason for _, reason in unreadable]
        nothing = f"{source.url} holds no images, Parquet files or tars ({len(ignored)} other objects were ignored)"
        raise UserError(reasons[0] if reasons else nothing)
    if new:
        columns[new_plan_id] = schema_to_text(output_columns(i.schema for i in new.values()))
    return Plan(
        config_fp=config_fp,
        shards=shards,
        columns=columns,
        unreadable=unreadable,
        ignored=ignored,
        superseded=earlier.superseded,
        replaced=earlier.replaced,
        gone=earlier.gone,
        changes=Changes(
            new=len(opened) - changed,
            changed=changed,
            unchanged=earlier.unchanged,
            gone=sum(len(keys) for keys in earlier.gone.values()),
        ),
        dropped=earlier.dropped,
        indexes=new,
    )


def publish_plan(destination: Store, plan: Plan) -> bool:
    """Makes a plan the one that runs follow; returns False if the destination has moved on: plan again then.

    Shards that were left out are abandoned first, so that no other run can commit their assets a second time.
    """
    if not all(in_parallel(partial(abandon, destination), plan.dropped)):
        return False
    return not plan.indexes or _publish(destination, plan)


def _list_archive(source: Store, only: str) -> tuple[list[ObjectInfo], list[str]]:
    listing: list[ObjectInfo] = []
    ignored: list[str] = []
    for item in source.list(only):
        if not _within(item.key, only):
            continue
        if kind_of(item.key) is None:
            ignored.append(item.key)
        else:
            listing.append(item)
    return listing, ignored


def _within(key: str, only: str) -> bool:
    return not only or key == only or key.startswith(f"{only}/")


@dataclass(slots=True)
class _Earlier:
    """What the published plans say about the source as it is now."""

    kept: list[Shard] = field(default_factory=list)
    # Key and etag of every object that a kept shard covers.
    covered: set[tuple[str, str]] = field(default_factory=set)
    superseded: dict[str, list[str]] = field(default_factory=dict)
    replaced: set[str] = field(default_factory=set)
    gone: dict[str, list[str]] = field(default_factory=dict)
    # Keys of objects in committed shards, and in kept ones that are not committed.
    done: set[str] = field(default_factory=set)
    opened: list[str] = field(default_factory=list)
    # Number of committed objects that are in the source as they were.
    unchanged: int = 0
    dropped: list[str] = field(default_factory=list)
    columns: dict[str, str] = field(default_factory=dict)
    next_number: int = 0


def _earlier_shards(destination: Store, listing: Sequence[ObjectInfo], only: str) -> _Earlier:
    now = {item.key: item.etag for item in listing}
    committed, abandoned = read_commits(destination)
    earlier = _Earlier()
    shards: list[Shard] = []
    for item in destination.list("plans/plan-"):
        document = get_json(destination, item.key)
        earlier.columns[document["plan_id"]] = document["columns"]
        shards += [Shard(**entry) for entry in document["shards"]]
    earlier.next_number = 1 + max((shard.number for shard in shards), default=-1)
    shards = [shard for shard in shards if shard.shard_id not in abandoned]
    # Committed ones first, then the newest: a source that changed and changed back is in several plans.
    shards.sort(key=lambda shard: (shard.shard_id not in committed, -shard.number))
    for shard, sources in zip(shards, in_parallel(partial(_sources, destination), shards), strict=True):
        stale = [key for key, etag in sources if now.get(key) != etag]
        if shard.shard_id not in committed and (stale or not earlier.covered.isdisjoint(sources)):
            earlier.dropped.append(shard.shard_id)
            continue
        earlier.kept.append(shard)
        earlier.covered.update(sources)
        if shard.shard_id not in committed:
            earlier.opened += [key for key, _ in sources]
            continue
        # Committed shards come newest first: a key that is done already is there in a newer version.
        replaced = [key for key in stale if key in now or key in earlier.done]
        gone = [key for key in stale if not (key in now or key in earlier.done) and _within(key, only)]
        earlier.done.update(key for key, _ in sources)
        earlier.unchanged += len(sources) - len(stale)
        if replaced:
            earlier.superseded[shard.shard_id] = replaced
        if len(replaced) == len(sources):
            earlier.replaced.add(shard.shard_id)
        if gone:
            earlier.gone[shard.shard_id] = gone
    earlier.kept.sort(key=lambda shard: shard.number)
    return earlier


def _keys(index: ShardIndex) -> list[str]:
    return [key for key, _, _ in index.members] if index.kind == "files" else [index.key]


def _sources(destination: Store, shard: Shard) -> list[tuple[str, str]]:
    if shard.kind != "files":
        return [(shard.key, shard.etag)]
    return [(key, etag) for key, etag, _ in load_index(destination, shard).members]


def _index_all(
    source: Store, fresh: Sequence[ObjectInfo], settings: ArchiveSettings, subject_column: str | None
) -> tuple[list[ShardIndex], list[tuple[str, str]]]:
    indexes: list[ShardIndex] = []
    unreadable: list[tuple[str, str]] = []
    readers: dict[str, Callable[[Store, ObjectInfo, ArchiveSettings], ShardIndex]] = {
        "parquet": partial(index_parquet, subject_column=subject_column),
        "tar": index_tar,
    }

    def read(item: ObjectInfo) -> ShardIndex | UnreadableShard:
        try:
            return readers[str(kind_of(item.key))](source, item, settings)
        except UnreadableShard as error:
            return error

    files = [item for item in fresh if kind_of(item.key) == "files"]
    whole = [item for item in fresh if kind_of(item.key) != "files"]
    for item, index in zip(whole, in_parallel(read, whole), strict=True):
        if isinstance(index, UnreadableShard):
            unreadable.append((item.key, str(index)))
        elif index.rows:
            indexes.append(index)
    for start in range(0, len(files), settings.files_per_shard):
        chunk = files[start : start + settings.files_per_shard]
        identity = canonical_json([[item.key, item.etag] for item in chunk])
        indexes.append(index_files(chunk, sha256_hex(identity)[:32], settings))
    return indexes, unreadable


def _shard(index: ShardIndex, number: int, plan_id: str) -> Shard:
    identity = sha256_hex(f"{index.kind}|{index.key}|{index.etag}")[:8]
    return Shard(
        shard_id=f"shard-{number:05d}-{identity}",
        kind=index.kind,
        key=index.key,
        etag=index.etag,
        size=index.size,
        rows=index.rows,
        units=len(index.units),
        plan_id=plan_id,
    )


def _publish(destination: Store, plan: Plan) -> bool:
    """Writes the new indexes, then the plan that names them; returns False if another plan took the number.

    Two planners of one listing write the same plan, and both go on with it.
    """
    writer = uuid.uuid4().hex
    shards = [shard for shard in plan.shards if shard.shard_id in plan.indexes]

    def write_index(shard: Shard) -> None:
        put_json_new(destination, shard.index_key, {"writer_id": writer, **plan.indexes[shard.shard_id].to_json()})

    in_parallel(write_index, shards)
    document = {
        "writer_id": writer,
        "plan_id": shards[0].plan_id,
        "columns": plan.columns[shards[0].plan_id],
        "shards": [asdict(shard) for shard in shards],
    }
    _, stored = put_json_new(destination, f"plans/plan-{shards[0].number:05d}.json", document)
    return bool(stored["plan_id"] == document["plan_id"])


def load_index(destination: Store, shard: Shard) -> ShardIndex:
    """Reads a shard's published index."""
    document = get_json(destination, shard.index_key)
    document.pop("writer_id")
    return ShardIndex.from_json(document)


def plan_columns(plan: Plan, shard: Shard) -> pa.Schema:
    """Output form of the customer's columns for a shard."""
    return schema_from_text(plan.columns[shard.plan_id])


def unit_ids(index: ShardIndex, config_fp: str, rung: int) -> dict[str, RowRange]:
    """The shard's units by id, in row order; every rung of the ladder has ids of its own."""
    return {unit_id(index.key, index.etag, unit, config_fp, rung): unit for unit in index.units}
