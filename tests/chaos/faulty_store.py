"""A store that dies, fails or dawdles at a chosen write."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import BinaryIO, Literal

from pipeline.errors import StorageError
from pipeline.storage import ObjectInfo, Store


@dataclass(frozen=True)
class Rule:
    """One fault: what happens, and at which write (put_new, put_new_file or replace) of matching keys."""

    # kill: SIGKILL to this process. fail: StorageError. slow: sleep, then go on.
    action: Literal["kill", "fail", "slow"]
    # Shell pattern over the key; "*" matches slashes too.
    pattern: str
    when: Literal["before", "after"] = "before"
    # The n-th matching write of each process, from 1. None: every one.
    nth: int | None = 1
    seconds: float = 1.0
    # Created when the rule fires, which it does not if the file exists: once over all processes and restarts.
    once: str | None = None


class FaultyStore:
    """Wraps a store with rules; pickles. Each process counts for itself, from where the pickle stood."""

    def __init__(self, store: Store, rules: Sequence[Rule]) -> None:
        self.url = store.url
        self.single_writer = store.single_writer
        self._store = store
        self._rules = tuple(rules)
        self._counts = [0] * len(self._rules)

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        return self._store.list(prefix)

    def info(self, key: str) -> ObjectInfo:
        return self._store.info(key)

    def get(self, key: str, *, start: int = 0, length: int | None = None, etag: str | None = None) -> bytes:
        return self._store.get(key, start=start, length=length, etag=etag)

    def open(self, key: str) -> BinaryIO:
        return self._store.open(key)

    def delete(self, key: str) -> None:
        self._store.delete(key)

    def put_new(self, key: str, data: bytes) -> ObjectInfo:
        return self._write(key, lambda: self._store.put_new(key, data))

    def put_new_file(self, key: str, path: Path) -> ObjectInfo:
        return self._write(key, lambda: self._store.put_new_file(key, path))

    def replace(self, key: str, data: bytes, *, etag: str) -> ObjectInfo:
        return self._write(key, lambda: self._store.replace(key, data, etag=etag))

    def _write(self, key: str, write: Callable[[], ObjectInfo]) -> ObjectInfo:
        due = []
        for index, rule in enumerate(self._rules):
            if fnmatchcase(key, rule.pattern):
                self._counts[index] += 1
                if rule.nth in (None, self._counts[index]):
                    due.append(rule)
        for rule in due:
            if rule.when == "before":
                _fire(rule, key)
        info = write()
        for rule in due:
            if rule.when == "after":
                _fire(rule, key)
        return info


def _fire(rule: Rule, key: str) -> None:
    if rule.once:
        try:
            Path(rule.once).touch(exist_ok=False)
        except FileExistsError:
            return
    if rule.action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif rule.action == "fail":
        raise StorageError(f"{key}: injected failure {rule.when} the write")
    else:
        time.sleep(rule.seconds)
