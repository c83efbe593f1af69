"""The store over any fsspec filesystem: reads; writes only for a caller who promises to be alone."""

from __future__ import annotations

import os
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import fsspec
from fsspec.core import url_to_fs
from fsspec.implementations.dirfs import DirFileSystem

from pipeline.errors import AlreadyExists, NotFound, PipelineError, StorageError, UserError
from pipeline.storage import (
    WRITER_HINT,
    ObjectInfo,
    check_key,
    join_url,
    public_url,
    source_changed,
    url_scheme,
)

# Version fields that say the same in listings and in single look-ups, and those that may differ in form.
_VERSIONS = ("ETag", "etag", "md5Hash", "generation", "CRC")
_TIMES = ("Last-Modified", "LastModified", "last_modified", "mtime", "created")


class LazyFilesystem(ABC):
    """Builds its fsspec filesystem on first use in each process: async clients survive neither fork nor pickle."""

    _held: tuple[int, Any] | None = None

    @abstractmethod
    def _connect(self) -> Any:
        """Builds the filesystem."""

    @property
    def _fs(self) -> Any:
        if self._held is None or self._held[0] != os.getpid():
            self._held = (os.getpid(), self._connect())
        return self._held[1]

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_held"}


class FsspecStore(LazyFilesystem):
    """Any fsspec URL but files and S3, which have stores of their own.

    ``list`` holds the whole listing in memory. ``etag`` is made of what the filesystem tells of a version, which
    for some is the size alone. Put and replace are plain writes, as atomic as the filesystem makes them.
    """

    def __init__(self, url: str, *, single_writer: bool = False) -> None:
        self.url = public_url(url)
        self.single_writer = single_writer
        self._url = url
        scheme = url_scheme(url).rstrip(":")
        if re.search(r"://[^/@\s]*:[^/@\s]*@", url) or re.search(r"https?://[^\s]*\?", url):
            hint = "configure fsspec for it, or copy the archive to a folder"
            raise UserError(f"{self.url} was given with a password or a query in the URL: {hint}")
        try:
            fsspec.get_filesystem_class(scheme)
        except (ValueError, ImportError) as error:
            raise UserError(f"cannot open {self.url}: {error}") from error

    def _connect(self) -> Any:
        filesystem, root = url_to_fs(self._url)
        # It takes an empty path for none, and compares paths as text.
        return DirFileSystem(path=(root or "").rstrip("/") or "/", fs=filesystem)

    def __repr__(self) -> str:
        return f"FsspecStore({self.url!r})"

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        with self._errors(prefix):
            self._fs.invalidate_cache()
            found = self._fs.find("", detail=True)
        below = {path.lstrip("/"): entry for path, entry in found.items()}
        for key in sorted(below):
            if key.startswith(prefix):
                entry = below[key]
                told = entry.get("size") is not None and any(entry.get(name) for name in _VERSIONS)
                yield _described(key, entry) if told else self.info(key)

    def info(self, key: str) -> ObjectInfo:
        with self._errors(key):
            return _described(key, self._fs.info(check_key(key)))

    def get(self, key: str, *, start: int = 0, length: int | None = None, etag: str | None = None) -> bytes:
        self._check_version(key, etag)
        with self._errors(key):
            end = None if length is None else start + length
            data: bytes = self._fs.cat_file(check_key(key), start=start, end=end)
        self._check_version(key, etag)
        return data

    def open(self, key: str) -> BinaryIO:
        with self._errors(key):
            file: BinaryIO = self._fs.open(check_key(key), "rb")
            return file

    def put_new(self, key: str, data: bytes) -> ObjectInfo:
        self._check_alone()
        with self._errors(key):
            if self._fs.exists(check_key(key)):
                raise AlreadyExists(f"{join_url(self.url, key)} exists already")
        return self.replace(key, data, etag="")

    def put_new_file(self, key: str, path: Path) -> ObjectInfo:
        return self.put_new(key, path.read_bytes())

    def replace(self, key: str, data: bytes, *, etag: str) -> ObjectInfo:
        self._check_alone()
        with self._errors(key):
            self._fs.makedirs(check_key(key).rpartition("/")[0], exist_ok=True)
            self._fs.pipe_file(key, data)
        return self.info(key)

    def delete(self, key: str) -> None:
        self._check_alone()
        with self._errors(key):
            if self._fs.exists(check_key(key)):
                self._fs.rm_file(key)

    def _check_alone(self) -> None:
        if not self.single_writer:
            raise UserError(f"{self.url} has no create-only writes, so commits are not safe there: {WRITER_HINT}")

    def _check_version(self, key: str, etag: str | None) -> None:
        if etag is None:
            return
        try:
            stored = self.info(key).etag
        except NotFound:
            stored = "gone"
        if stored != etag:
            raise source_changed(join_url(self.url, key), etag, stored)

    @contextmanager
    def _errors(self, key: str) -> Iterator[None]:
        try:
            yield
        except PipelineError:
            raise
        except FileNotFoundError as error:
            raise NotFound(f"{join_url(self.url, key)} does not exist") from error
        except Exception as error:  # every filesystem raises classes of its own
            raise StorageError(f"{join_url(self.url, key)}: {type(error).__name__}: {error}") from error


def _described(key: str, entry: Mapping[str, Any]) -> ObjectInfo:
    token = next((str(entry[name]).strip('"') for name in (*_VERSIONS, *_TIMES) if entry.get(name)), "unversioned")
    size = int(entry.get("size") or 0)
    return ObjectInfo(key, size, f"{token}-{size}")
