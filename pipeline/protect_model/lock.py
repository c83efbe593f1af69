"""Keeps a folder of checkpoints for one run at a time."""

from __future__ import annotations

import fcntl
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pipeline.errors import AlreadyExists, NotFound, PipelineError, PreconditionFailed, UserError
from pipeline.storage import Store, get_json, json_bytes

LOCK = "lock"
OWNER = "owner.json"
# A run that has not renewed its lease for so long is dead: the next one takes over. No two clocks are compared.
LEASE_S = 60.0
_BEATS = 4  # renewals in that time

Say = Callable[[str], None]


def silent(text: str) -> None:
    """Says nothing."""


class InUse(UserError):
    """Another run holds the folder."""


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds a folder of this machine, or of a shared disk; the kernel lets go when the process dies.

    The folder is made, and goes at the end if nothing is in it.

    Raises:
        InUse: another run holds it.
    """
    path = folder / LOCK
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            file = path.open("ab")
        except FileNotFoundError:
            continue  # the run before this one is removing the folder
        except OSError as error:
            raise PipelineError(f"{folder} cannot be written: {error}") from error
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise InUse(f"{folder} is in use by another run: wait for it, or choose another --work") from error
            if not _is_named(path, file.fileno()):
                continue  # it was removed meanwhile
            try:
                yield
            finally:
                path.unlink(missing_ok=True)
                with suppress(OSError):  # something is in it
                    folder.rmdir()
            return


def _is_named(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


class Lease:
    """An object that its holder renews, in a store without locks.

    Who finds one watches it for ``LEASE_S`` seconds and replaces it if it was not renewed, on the condition that it
    still is the same version: of several that wait, one wins. A holder that was held up for longer than that (a
    suspended machine) finds out at its next renewal, or when it writes a checkpoint.
    """

    def __init__(self, store: Store, where: str) -> None:
        self._store, self._where = store, where
        self._run, self._host = uuid.uuid4().hex, socket.gethostname()
        self._renewals = 0
        self._etag = ""
        self._lost = False
        self._ended = threading.Event()

    @contextmanager
    def held(self, say: Say) -> Iterator[Lease]:
        """Takes it, and renews it until the end of the block.

        Args:
            say: told when this has to wait.

        Raises:
            InUse: another run renews it.
        """
        self._take(say)
        thread = threading.Thread(target=self._renew, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self._ended.set()
            thread.join()
            if not self._lost:
                with suppress(PipelineError):  # it would lapse anyway
                    self._store.delete(OWNER)

    def check(self) -> None:
        """Raises PipelineError once another run has taken over."""
        if self._lost:
            raise PipelineError(f"{self._where} was taken over by another run, after this one had not been heard of")

    def _take(self, say: Say) -> None:
        while True:
            try:
                self._etag = self._store.put_new(OWNER, self._document()).etag
                return
            except AlreadyExists:
                found = self._read()
            if found is None:
                continue  # it was given back meanwhile
            if self._is_ours(found):
                return
            say(f"{self._where} was left by a run, or is in use: looking for {LEASE_S:g} s whether that one lives")
            if self._unchanged(found):
                self._replace(found[0])
                return

    def _unchanged(self, found: tuple[str, dict[str, object]]) -> bool:
        """Watches it; False: it was given back. Raises InUse when it is renewed."""
        deadline = time.monotonic() + LEASE_S
        while time.monotonic() < deadline:
            time.sleep(LEASE_S / (2 * _BEATS))
            now = self._read()
            if now is None:
                return False
            if now != found:
                raise self._in_use(now[1])
        return True

    def _replace(self, etag: str) -> None:
        try:
            self._etag = self._store.replace(OWNER, self._document(), etag=etag).etag
        except PreconditionFailed as error:
            found = self._read()
            if found is None or not self._is_ours(found):
                raise self._in_use({} if found is None else found[1]) from error

    def _renew(self) -> None:
        while not self._ended.wait(LEASE_S / _BEATS):
            self._renewals += 1
            try:
                self._replace(self._etag)
            except InUse:
                self._lost = True
                return
            except PipelineError:
                continue  # the store may come back before the lease lapses

    def _read(self) -> tuple[str, dict[str, object]] | None:
        try:
            etag = self._store.info(OWNER).etag
            return etag, get_json(self._store, OWNER)
        except NotFound:
            return None

    def _is_ours(self, found: tuple[str, dict[str, object]]) -> bool:
        """Whether it is ours after all: the answer to a write of our own may have been lost."""
        if found[1].get("run") != self._run:
            return False
        self._etag = found[0]
        return True

    def _document(self) -> bytes:
        return json_bytes({"run": self._run, "host": self._host, "renewals": self._renewals})

    def _in_use(self, owner: dict[str, object]) -> InUse:
        on = f" on {owner['host']}" if "host" in owner else ""
        return InUse(f"{self._where} is in use by another run{on}: wait for it, or choose another --work")
