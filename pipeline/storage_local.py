"""The store over local folders and network mounts: hard links create, a lock and a rename replace."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from pipeline.errors import AlreadyExists, NotFound, PreconditionFailed, StorageError
from pipeline.storage import ConditionsUnsupported, ObjectInfo, check_key, source_changed

_NO_HARD_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)


class LocalStore:
    """Files below one folder, which is created by the first write. Needs a file system with hard links."""

    def __init__(self, root: str, *, single_writer: bool = False) -> None:
        self.root = Path(os.path.abspath(root))
        self.url = f"file://{self.root}"
        self.single_writer = single_writer

    def __repr__(self) -> str:
        return f"LocalStore({str(self.root)!r})"

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        folder = prefix.rpartition("/")[0]
        if folder:
            check_key(folder)
        with self._errors(prefix):
            yield from self._walk(f"{folder}/" if folder else "", prefix, frozenset())

    def info(self, key: str) -> ObjectInfo:
        # Opened, not only looked at: a folder is no object.
        with self._errors(key), self._path(key).open("rb") as file:
            return _described(key, os.fstat(file.fileno()))

    def get(self, key: str, *, start: int = 0, length: int | None = None, etag: str | None = None) -> bytes:
        try:
            with self._errors(key), self._path(key).open("rb") as file:
                before = _described(key, os.fstat(file.fileno())).etag
                file.seek(start)
                data = file.read() if length is None else file.read(length)
                # A file replaced meanwhile stays readable as it was; only a write in place can show here.
                after = _described(key, os.fstat(file.fileno())).etag
        except NotFound as error:
            if etag is None:
                raise
            raise source_changed(str(self.root / key), etag, "gone") from error
        if etag is not None and (before != etag or after != etag):
            raise source_changed(str(self.root / key), etag, after)
        return data

    def open(self, key: str) -> BinaryIO:
        with self._errors(key):
            return self._path(key).open("rb")

    def put_new(self, key: str, data: bytes) -> ObjectInfo:
        return self._create(key, lambda file: _write(file, data))

    def put_new_file(self, key: str, path: Path) -> ObjectInfo:
        with path.open("rb") as source:
            return self._create(key, lambda file: shutil.copyfileobj(source, file, 2**20))

    def replace(self, key: str, data: bytes, *, etag: str) -> ObjectInfo:
        target = self._path(key)
        with self._errors(key):
            if self.single_writer:
                return self._rename(key, target, data, newer_than_ns=0)
            with _locked(target) as held:
                stored = _described(key, held).etag if held else "gone"
                if held is None or stored != etag:
                    raise PreconditionFailed(f"{target}: version {etag} was to be replaced, now it is {stored}")
                return self._rename(key, target, data, newer_than_ns=held.st_mtime_ns)

    def delete(self, key: str) -> None:
        target = self._path(key)
        with self._errors(key):
            target.unlink(missing_ok=True)

    def _path(self, key: str) -> Path:
        return self.root / check_key(key)

    def _create(self, key: str, write: Callable[[BinaryIO], object]) -> ObjectInfo:
        target = self._path(key)
        with self._errors(key), _temporary(target, write) as temporary:
            info = _described(key, temporary.stat())
            if self.single_writer and target.exists():
                raise AlreadyExists(f"{target} exists already")
            if self.single_writer:
                os.replace(temporary, target)
            else:
                _link(temporary, target)
            sync(target.parent)
            return info

    def _rename(self, key: str, target: Path, data: bytes, *, newer_than_ns: int) -> ObjectInfo:
        with _temporary(target, lambda file: _write(file, data), newer_than_ns) as temporary:
            info = _described(key, temporary.stat())
            os.replace(temporary, target)
            sync(target.parent)
            return info

    def _walk(self, folder: str, prefix: str, above: frozenset[tuple[int, int]]) -> Iterator[ObjectInfo]:
        path = self.root / folder
        try:
            status = path.stat()
            with os.scandir(path) as scan:
                # A folder sorts with its slash, as its keys do: "a.txt" < "a/b".
                entries = sorted((f"{folder}{entry.name}{'/' * entry.is_dir()}", entry) for entry in scan)
        except FileNotFoundError:
            return  # not written yet, or removed meanwhile
        except NotADirectoryError as error:
            raise StorageError(f"{path} is a file: name the folder that holds it") from error
        identity = (status.st_dev, status.st_ino)
        if identity in above:
            raise StorageError(f"{path} is a link to a folder above it: remove the link")
        for key, entry in entries:
            if key.endswith("/") and (key.startswith(prefix) or prefix.startswith(key)):
                yield from self._walk(key, prefix, above | {identity})
            elif not key.endswith("/") and key.startswith(prefix) and not _is_temporary(entry.name):
                yield from _listed(key, entry)

    @contextmanager
    def _errors(self, key: str) -> Iterator[None]:
        where = self.root / key
        try:
            yield
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError, FileExistsError) as error:
            raise NotFound(f"{where} does not exist, or a folder stands where a file should") from error
        except OSError as error:
            # No more of the error than its reason: its text repeats both paths.
            reason = error.strerror or type(error).__name__
            raise StorageError(f"{where}: {reason} (check permissions and free space)") from error


def _described(key: str, status: os.stat_result) -> ObjectInfo:
    return ObjectInfo(key, status.st_size, f"{status.st_mtime_ns}-{status.st_size}")


def _listed(key: str, entry: os.DirEntry[str]) -> Iterator[ObjectInfo]:
    try:
        key.encode()
        status = entry.stat()
    except UnicodeEncodeError as error:
        raise StorageError(f"file name {key!r} is not UTF-8: rename it") from error
    except FileNotFoundError as error:
        if entry.is_symlink():
            raise StorageError(f"{entry.path} is a link to nothing: repair or remove it") from error
        return  # deleted while we listed
    if not entry.is_file():
        raise StorageError(f"{entry.path} is no regular file: remove it")
    yield _described(key, status)


def _is_temporary(name: str) -> bool:
    return name.startswith(".fixative-") and name.endswith(".tmp")


@contextmanager
def _temporary(target: Path, write: Callable[[BinaryIO], object], newer_than_ns: int = 0) -> Iterator[Path]:
    """A hidden, complete and synced file beside the target, removed at the end if it still has its name.

    Its time is set by the fine clock and lies after ``newer_than_ns``: the kernel's own stamps stand still for
    milliseconds, so two versions of equal size could share an etag.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    path = target.parent / f".fixative-{uuid.uuid4().hex}.tmp"
    try:
        with path.open("xb") as file:
            write(file)
            file.flush()
            stamp = max(time.time_ns(), newer_than_ns + 1)
            os.utime(file.fileno(), ns=(stamp, stamp))
            os.fsync(file.fileno())
        yield path
    finally:
        path.unlink(missing_ok=True)


def _write(file: BinaryIO, data: bytes) -> int:
    return file.write(data)


def _link(path: Path, target: Path) -> None:
    try:
        os.link(path, target)
    except FileExistsError as error:
        raise AlreadyExists(f"{target} exists already") from error
    except OSError as error:
        if error.errno in _NO_HARD_LINKS:
            raise ConditionsUnsupported(f"the file system of {target.parent} has no hard links") from error
        raise


def sync(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _locked(target: Path) -> Iterator[os.stat_result | None]:
    """Holds the lock on the file that has the target's name; None if there is no such file.

    The lock is on the file itself, so it leaves no lock file behind. Who waited for it may hold one that was
    replaced meanwhile, and tries again with its successor.
    """
    while True:
        try:
            file = target.open("r+b")
        except FileNotFoundError:
            yield None
            return
        with file:
            fcntl.flock(file, fcntl.LOCK_EX)
            held = os.fstat(file.fileno())
            if _is_named(target, held):
                yield held
                return


def _is_named(target: Path, status: os.stat_result) -> bool:
    try:
        return os.path.samestat(status, target.stat())
    except FileNotFoundError:
        return False
