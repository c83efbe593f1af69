"""Images back out of the tables: as files under their names, or as WebDataset tars. Can be stopped and run again."""

from __future__ import annotations

import base64
import io
import json
import math
import tarfile
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from datetime import date, datetime, time
from functools import partial
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from pipeline.errors import AlreadyExists, IntegrityError, NotFound, UserError
from pipeline.export_names import Names, image_name, source_key, source_name
from pipeline.ids import canonical_json, sha256_hex
from pipeline.inspection import quarantined_rows
from pipeline.manifest import Manifest, read_success, rows_of, success_manifests
from pipeline.storage import PARALLEL_REQUESTS, Store, in_parallel, join_url, same_or_nested

Form = Literal["files", "webdataset"]

TAR_VERSION = 1
"""Raised whenever a tar's bytes change for the same rows; part of its name, so old and new never mix."""

_NAMED = ("asset_id", "source_uri", "format", "protected_sha256")


@dataclass(slots=True, kw_only=True)
class Export:
    """What an export came to, or would come to."""

    out: str
    dry_run: bool
    # Images, and for tars these as well.
    images: int = 0
    written: int = 0
    # There already, byte for byte (tars: under a name that stands for their bytes).
    present: int = 0
    # Held other bytes, and were written over because that was asked for.
    replaced: int = 0
    tars: int = 0
    # Rows whose source has a newer version, which is exported in their stead.
    superseded: int = 0
    # Assets without an image: id, stage, error type and message of each.
    quarantined: list[dict[str, Any]] = field(default_factory=list)
    # What could not be exported, and why.
    problems: list[str] = field(default_factory=list)
    # The first paths.
    examples: list[str] = field(default_factory=list)
    # Tars beside ours that this export does not list: of an earlier state of the archive.
    strangers: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How to export."""

    form: Form
    # Files that hold other bytes are written over.
    replace: bool = False
    # Look, but write nothing.
    dry_run: bool = False


Advance = Callable[[int], object]


def export(destination: Store, out: Store, options: Options, advance: Advance = lambda _: None) -> Export:
    """Writes the images that the manifests of a published destination list, and no others.

    Every image's bytes are checked against its row. Files appear whole or not at all; one that is there with the
    right bytes is left alone, so an export that was stopped goes on.

    Args:
        destination: The protected archive.
        out: Where to; outside of the destination.
        options: As what, and whether to write at all.
        advance: Told of every few images that are done.

    Raises:
        UserError: Nothing is published there, or `out` and the destination overlap.
        IntegrityError: Stored bytes are not what the manifests say.
    """
    if same_or_nested(destination.url, out.url):
        raise UserError(f"{out.url} and {destination.url} overlap: give --out a folder or prefix of its own")
    result = Export(out=out.url, dry_run=options.dry_run)
    superseded = (read_success(destination) or {}).get("superseded", {})
    with closing(Names()) as names:
        for manifest in success_manifests(destination):
            outdated = frozenset(superseded.get(manifest.shard_id, ()))
            shard = _Shard(destination, manifest, outdated)
            result.quarantined += shard.quarantined()
            if options.form == "files":
                _export_files(shard, out, options, names, result, advance=advance)
            else:
                _export_tar(shard, out, options, result, advance=advance)
    if options.form == "webdataset":
        ours = set(result.examples)
        result.strangers = [item.key for item in out.list("shard-") if item.key not in ours]
    result.examples = result.examples[:5]
    return result


def rows_to_export(destination: Store) -> int:
    """Number of images that the published manifests list; 0 where nothing is published."""
    return int((read_success(destination) or {}).get("rows_ok", 0))


@dataclass(frozen=True, slots=True)
class _Shard:
    destination: Store
    manifest: Manifest
    # Source objects whose rows have newer versions elsewhere.
    outdated: frozenset[str]

    def rows(self, columns: tuple[str, ...] | None = None) -> Iterator[dict[str, Any]]:
        """Protected rows in order, without those that have newer versions."""
        for row in rows_of(self.destination, self.manifest, columns):
            if not self._is_outdated(row):
                yield row

    def quarantined(self) -> list[dict[str, Any]]:
        """Why assets have no image, without those that have newer versions."""
        told = ("asset_id", "stage", "error_type", "message")
        rows = quarantined_rows(self.destination, self.manifest)
        return [{name: row[name] for name in told} for row in rows if not self._is_outdated(row)]

    def _is_outdated(self, row: Mapping[str, Any]) -> bool:
        return bool(self.outdated) and source_key(source_name(row, self.manifest), self.manifest) in self.outdated


# --- Files


def _export_files(
    shard: _Shard, out: Store, options: Options, names: Names, result: Export, *, advance: Advance
) -> None:
    wanted: dict[str, str] = {}
    hashes: list[str] = []
    for row in shard.rows(_NAMED):
        path = names.give(image_name(row, shard.manifest), str(row["source_uri"]))
        wanted[path] = row["protected_sha256"]
        hashes.append(row["protected_sha256"])
    result.images += len(wanted)
    result.superseded += shard.manifest.rows_ok - len(wanted)
    result.examples += list(wanted)[: max(0, 5 - len(result.examples))]
    advance(shard.manifest.rows_ok - len(wanted))
    found = in_parallel(partial(_stored_hash, out), wanted)
    todo: dict[str, bool] = {}
    for (path, digest), stored in zip(wanted.items(), found, strict=True):
        if stored is None or (stored != digest and options.replace):
            todo[path] = stored is not None
        elif stored == digest:
            result.present += 1
        else:
            result.problems.append(f"{join_url(out.url, path)} holds other bytes: move it away, or use --replace")
    advance(len(wanted) - len(todo))
    if options.dry_run:
        result.written += sum(not there for there in todo.values())
        result.replaced += sum(todo.values())
        advance(len(todo))
    elif todo:
        _write_files(shard, out, list(wanted), todo, result, advance=advance)


def _stored_hash(out: Store, path: str) -> str | None:
    try:
        return sha256_hex(out.get(path))
    except NotFound:
        return None


def _write_files(
    shard: _Shard, out: Store, paths: list[str], todo: Mapping[str, bool], result: Export, *, advance: Advance
) -> None:
    """Writes the files of a shard; `todo` says of each whether something else is there."""

    def put(item: tuple[str, dict[str, Any]]) -> str | None:
        return _put(out, item[0], _image_bytes(item[1]), there=todo[item[0]])

    rows = zip(paths, shard.rows(("image", "protected_sha256", "asset_id", "source_uri")), strict=True)
    open_rows = (item for item in rows if item[0] in todo)
    while batch := list(islice(open_rows, PARALLEL_REQUESTS)):
        for (path, _), problem in zip(batch, in_parallel(put, batch), strict=True):
            if problem is not None:
                result.problems.append(problem)
            elif todo[path]:
                result.replaced += 1
            else:
                result.written += 1
        advance(len(batch))


def _put(out: Store, path: str, data: bytes, *, there: bool) -> str | None:
    try:
        if there:
            out.replace(path, data, etag=out.info(path).etag)
        else:
            out.put_new(path, data)
    except AlreadyExists:
        if out.get(path) != data:  # else it is the lost answer to our own write, or another export's
            return f"{join_url(out.url, path)} was written by somebody else meanwhile: export into a place of its own"
    except NotFound as error:  # a file stands where a folder should, or the other way round
        return str(error)
    return None


def _image_bytes(row: Mapping[str, Any]) -> bytes:
    data: bytes = row["image"]["bytes"]
    if sha256_hex(data) != row["protected_sha256"]:
        raise IntegrityError(f"{row['asset_id']}: its stored bytes do not match protected_sha256")
    return data


# --- WebDataset


def _export_tar(shard: _Shard, out: Store, options: Options, result: Export, *, advance: Advance) -> None:
    manifest = shard.manifest
    kept = sum(1 for _ in shard.rows(_NAMED)) if shard.outdated else manifest.rows_ok
    result.superseded += manifest.rows_ok - kept
    if not kept or manifest.data is None:
        advance(manifest.rows_ok)
        return
    identity = sha256_hex(canonical_json([manifest.data["sha256"], sorted(shard.outdated), TAR_VERSION]))
    key = f"{'-'.join(manifest.shard_id.split('-')[:2])}-{identity[:12]}.tar"
    result.tars += 1
    result.images += kept
    result.examples.append(key)
    there = any(item.key == key for item in out.list(key))
    if not there and not options.dry_run:
        with tempfile.TemporaryDirectory(prefix="fixative-") as folder:
            path = Path(folder) / key
            _write_tar(path, shard)
            try:
                out.put_new_file(key, path)
            except AlreadyExists:
                there = True
    if there:
        result.present += kept
    else:
        result.written += kept
    advance(manifest.rows_ok)


def _write_tar(path: Path, shard: _Shard) -> None:
    """The same bytes for the same rows: no times, no owners, row order."""
    with closing(Names()) as names, tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for row in shard.rows():
            data = _image_bytes(row)
            image = PurePosixPath(image_name(row, shard.manifest))
            # WebDataset cuts a name at its first dot.
            plain = str(image.with_name(image.stem.replace(".", "_")))
            key = names.give(plain, str(row["source_uri"]))
            facts = {name: value for name, value in row.items() if name != "image"}
            _add(tar, f"{key}{image.suffix.lower()}", data)
            _add(tar, f"{key}.json", json.dumps(_plain(facts), sort_keys=True, ensure_ascii=False).encode())


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def _plain(value: Any) -> Any:
    """A value of a row as JSON has it: times in ISO 8601, bytes in base64, numbers that are none as null."""
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    if isinstance(value, datetime | date | time):
        return value.isoformat()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def summary(result: Export) -> Iterable[str]:
    """The lines that tell a person what became of every asset."""
    verb = "would export" if result.dry_run else "exported"
    counts = [f"{result.written} new", f"{result.present} there already"]
    counts += [f"{result.replaced} replaced"] if result.replaced else []
    tars = f" in {result.tars} tars" if result.tars else ""
    yield f"{verb} {result.images} images{tars} to {result.out}: {', '.join(counts)}"
    if result.examples:
        yield f"for example {', '.join(result.examples)}"
    if result.superseded:
        yield f"{result.superseded} rows were left out, since their sources have newer versions"
    if result.strangers:
        shown = ", ".join(result.strangers[:3])
        yield f"{len(result.strangers)} tars there are of an earlier state and may be deleted: {shown}"
    if result.quarantined:
        yield f"{len(result.quarantined)} assets are quarantined and have no image:"
    yield from (f"  {row['asset_id']}: {row['stage']}: {row['message']}" for row in result.quarantined)
    yield from (f"not exported: {problem}" for problem in result.problems)
