"""One small store over files, S3 and whatever else fsspec reads: the only way to bytes that outlive a process."""

from __future__ import annotations

import hashlib
import json
import os
import re
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol, TypeVar

from pipeline.errors import (
    AlreadyExists,
    IntegrityError,
    PreconditionFailed,
    SourceChanged,
    StorageError,
    UserError,
)

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")

PARALLEL_REQUESTS = 16
READ_BLOCK = 8 << 20
_S3_SCHEMES = ("s3", "s3a")
_LOCAL_SCHEMES = ("file", "local")
WRITER_HINT = (
    "--single-writer goes on without it, but then two runs on one destination at the same time may overwrite each other"
)


class ConditionsUnsupported(StorageError):
    """The store cannot do create-only or compare-and-swap writes. Nothing was written."""


@dataclass(frozen=True)
class StorageOptions:
    """How to reach S3: plain data, safe to pickle and print.

    Credentials are never held here. They come from the environment, the profile or the machine's role,
    as for every AWS tool, in the process that opens the connection.
    """

    # None: AWS itself, or what AWS_ENDPOINT_URL says.
    endpoint_url: str | None = None
    region: str | None = None
    # Section of the AWS configuration files.
    profile: str | None = None
    # Read public buckets without any credentials.
    anon: bool = False
    # Tries per request (botocore "standard" retries with back-off) and per body that breaks off.
    max_attempts: int = 5
    connect_timeout_s: float = 5.0
    read_timeout_s: float = 60.0
    # Files of at least twice this size are uploaded in parts of this size; S3 wants 5 MiB or more.
    part_bytes: int = 16 * 2**20

    def __post_init__(self) -> None:
        if self.endpoint_url and public_url(self.endpoint_url) != self.endpoint_url:
            raise UserError(
                f"the S3 endpoint {public_url(self.endpoint_url)} was given with credentials in its URL: "
                "leave them out and use AWS_PROFILE or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
            )


@dataclass(frozen=True)
class ObjectInfo:
    """One stored object.

    ``etag`` names the stored version: S3's ETag without quotes; for local files ``<mtime_ns>-<size>``, which
    survives a copy that keeps times and changes with every write through a store.
    """

    key: str
    size: int
    etag: str


class Store(Protocol):
    """Objects under one root URL. Keys are relative POSIX paths. Pickles; usable from several threads."""

    url: str
    """The root without credentials, for messages and provenance."""
    single_writer: bool
    """Whether create-only and compare-and-swap are mere looks before a plain write."""

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """Yields every object whose key starts with ``prefix``, sorted by key, as the store is now.

        Not objects, and left out: empty S3 keys that end in ``/`` (folder marks of consoles) and the hidden
        temporary files of local writes. A root that does not exist yet has no objects.
        """

    def info(self, key: str) -> ObjectInfo:
        """Returns size and version of an object. Raises NotFound."""

    def get(self, key: str, *, start: int = 0, length: int | None = None, etag: str | None = None) -> bytes:
        """Returns the bytes of an object, or of a range of it; a range past the end gives what is there.

        Args:
            key: The object.
            start: First byte.
            length: Number of bytes. None: to the end.
            etag: Read this version and no other.

        Raises:
            NotFound: No such object, and no ``etag`` was asked for.
            SourceChanged: The version ``etag`` is not what is stored (replaced or gone).
        """

    def open(self, key: str) -> BinaryIO:
        """Opens an object for reading, seekable, for Parquet and tar readers. Raises NotFound."""

    def put_new(self, key: str, data: bytes) -> ObjectInfo:
        """Creates an object, atomically and only if the key is free.

        No reader sees a part of it and a crash leaves nothing under the key. When the answer to our own
        successful write is lost, the retry inside raises AlreadyExists too: look at the content to tell.

        Raises:
            AlreadyExists: The key is taken; what is there is untouched.
        """

    def put_new_file(self, key: str, path: Path) -> ObjectInfo:
        """Creates an object from a local file of any size; the promises of ``put_new``."""

    def replace(self, key: str, data: bytes, *, etag: str) -> ObjectInfo:
        """Writes over the version ``etag`` and no other. Raises PreconditionFailed if it changed or is gone."""

    def delete(self, key: str) -> None:
        """Removes an object; it may be gone already."""


def open_store(url: str, options: StorageOptions, *, single_writer: bool = False) -> Store:
    """Opens the store at a URL or local path, without asking the network yet.

    Args:
        url: ``s3://bucket/prefix``, ``file:///folder``, a plain path, or any other fsspec URL (read only,
            unless ``single_writer``).
        options: How to reach S3.
        single_writer: The caller promises that nobody else writes here; create-only becomes look, then write.

    Raises:
        UserError: The URL carries credentials, or its protocol is not known or not installed.
    """
    scheme = url_scheme(url)
    if scheme in _S3_SCHEMES:
        # Imported here: s3fs costs a second to load, and local jobs need none of it.
        from pipeline.storage_s3 import S3Store

        return S3Store(url, options, single_writer=single_writer)
    if scheme in _LOCAL_SCHEMES:
        from pipeline.storage_local import LocalStore

        return LocalStore(local_path(url), single_writer=single_writer)
    from pipeline.storage_fsspec import FsspecStore

    return FsspecStore(url, single_writer=single_writer)


def check_conditional_writes(store: Store) -> None:
    """Proves on a scratch key that the store refuses second creators and stale replacements.

    Leaves nothing behind. A single-writer store promises none of it and is not asked.

    Raises:
        UserError: The store ignores or refuses conditional writes; the message names the way out.
    """
    if store.single_writer:
        return
    key = f"plans/.selftest-{uuid.uuid4().hex}"
    try:
        # The key is ours alone: if it is taken, this was the lost answer to our own write.
        with suppress(AlreadyExists):
            store.put_new(key, b"first")
        try:
            ignored = _ignored_condition(store, key)
        finally:
            store.delete(key)
    except ConditionsUnsupported as error:
        raise UserError(f"{error}, so commits are not safe there: {WRITER_HINT}") from error
    if ignored:
        raise UserError(f"{store.url} ignores {ignored}, so commits are not safe there: {WRITER_HINT}")


def _ignored_condition(store: Store, key: str) -> str:
    try:
        store.put_new(key, b"second")
    except AlreadyExists:
        pass
    else:
        return "create-only writes (If-None-Match)"
    try:
        store.replace(key, b"third", etag="0" * 32)
    except PreconditionFailed:
        return ""
    return "compare-and-swap writes (If-Match)"


def put_json_new(store: Store, key: str, doc: Mapping[str, Any]) -> tuple[bool, dict[str, Any]]:
    """Commits a JSON document, create-only; returns whether it is ours and the document that is stored.

    A lost answer to our own write is recognised by ``writer_id``: it is ours all the same.

    Args:
        store: Where to.
        key: The commit's key.
        doc: Must hold ``writer_id``, unique to this writer.

    Raises:
        IntegrityError: The key holds something that is no JSON object.
    """
    if not doc.get("writer_id"):
        raise ValueError(f"a committed document needs a writer_id: {key}")
    data = json_bytes(doc)
    try:
        store.put_new(key, data)
    except AlreadyExists:
        stored = get_json(store, key)
        return stored.get("writer_id") == doc["writer_id"], stored
    return True, _json_object(data, key)


def stored_sha256(store: Store, key: str) -> str:
    """SHA-256 of a stored object, read in blocks: objects may be larger than memory."""
    digest = hashlib.sha256()
    for start in range(0, store.info(key).size, READ_BLOCK):
        digest.update(store.get(key, start=start, length=READ_BLOCK))
    return digest.hexdigest()


def in_parallel(work: Callable[[_Item], _Result], items: Iterable[_Item]) -> list[_Result]:
    """Applies a function that waits for the store to many items, in order; hides the latency of small requests."""
    with ThreadPoolExecutor(PARALLEL_REQUESTS) as pool:
        return list(pool.map(work, items))


def json_bytes(doc: Mapping[str, Any]) -> bytes:
    """The stored form of a JSON document: sorted keys, one spelling per value."""
    return json.dumps(doc, sort_keys=True, indent=1, ensure_ascii=False, allow_nan=False).encode()


def get_json(store: Store, key: str) -> dict[str, Any]:
    """Reads a JSON document. Raises NotFound, or IntegrityError for what is no JSON object."""
    return _json_object(store.get(key), join_url(store.url, key))


def _json_object(data: bytes, where: str) -> dict[str, Any]:
    try:
        value = json.loads(data)
    except ValueError as error:
        raise IntegrityError(f"{where} is not JSON: move it away and run again") from error
    if not isinstance(value, dict):
        raise IntegrityError(f"{where} is no JSON object: move it away and run again")
    return value


def join_url(base: str, *keys: str) -> str:
    """A URL below another: exactly one slash between the pieces."""
    return "/".join([base.rstrip("/"), *(key.strip("/") for key in keys if key)])


def public_url(url: str) -> str:
    """The URL without what may be secret: user and password, and the query of web addresses."""
    bare = re.sub(r"(://)[^/@\s]*@", r"\1", url)
    return re.sub(r"(?i)(https?://[^?\s]*)\?(?:(?!::)\S)*", r"\1", bare)  # a query may hold single colons


def same_or_nested(a: str, b: str) -> bool:
    """Whether two URLs name the same place or one lies within the other.

    Knows that a plain path and ``file://`` are one, and follows symbolic links of local folders. S3 URLs are
    compared by bucket and prefix: equal names at two endpoints count as the same place.
    """
    first, second = _location(a), _location(b)
    shared = min(len(first), len(second))
    return first[:shared] == second[:shared]


def local_path(url: str) -> str:
    """The absolute path of a ``file://`` URL or plain path."""
    _, mark, rest = url.partition("://")
    return os.path.abspath(rest if mark else os.path.expanduser(url))


def check_key(key: str) -> str:
    """Returns the key if it is a plain relative path. Raises StorageError for one that could leave the root."""
    if "\0" in key or any(part in ("", ".", "..") for part in key.split("/")):
        raise StorageError(f"key {key!r} is not a plain relative path: refused")
    return key


def url_scheme(url: str) -> str:
    if "::" in url:
        return url.partition("::")[0].partition("://")[0].lower() + "::"
    scheme, mark, _ = url.partition("://")
    return scheme.lower() if mark else "file"


def _location(url: str) -> tuple[str, ...]:
    scheme = url_scheme(url)
    if scheme in _LOCAL_SCHEMES:
        return ("file", *Path(os.path.realpath(local_path(url))).parts)
    parts = public_url(url).partition("://")[2].split("/")
    return ("s3" if scheme in _S3_SCHEMES else scheme, *(part for part in parts if part))


def source_changed(where: str, wanted: str, stored: str) -> SourceChanged:
    """The error for a version that is not there any more."""
    return SourceChanged(f"{where} changed: version {wanted} was planned, now it is {stored}; plan again")
