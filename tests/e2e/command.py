"""Runs the ``fixative`` command as its users do: in this process for speed, or as one that may be killed."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import psutil
import yaml

from flows import cli
from pipeline.manifest import Manifest, read_commits, success_manifests
from pipeline.storage import Store

FAKE = "protectors.fake:FakeProtector"
_MARK = "FIXATIVE_TEST_RUN"


@dataclass(frozen=True)
class Result:
    """How a command ended, and what it said."""

    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The error, which must be the only line on stderr."""
        lines = self.err.strip().splitlines()
        assert len(lines) == 1, self.err
        return lines[0]


def fixative(*arguments: object) -> Result:
    """Runs the command in this process."""
    out, err = io.StringIO(), io.StringIO()
    handler = signal.getsignal(signal.SIGTERM)
    code = 0
    try:
        with (
            mock.patch.object(sys, "argv", ["fixative", *map(str, arguments)]),
            redirect_stdout(out),
            redirect_stderr(err),
        ):
            cli.main()
    except SystemExit as ended:
        code = int(ended.code or 0)
    finally:
        signal.signal(signal.SIGTERM, handler)
    return Result(code, out.getvalue(), err.getvalue())


@dataclass
class Command:
    """A ``fixative`` process in a session of its own. All its descendants carry a mark in their environment."""

    process: subprocess.Popen[str]
    mark: str
    result: Result | None = field(default=None)

    def members(self) -> list[psutil.Process]:
        """The processes of the run that are alive, however far they have drifted from their parent."""
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if process.status() != psutil.STATUS_ZOMBIE and process.environ().get(_MARK) == self.mark:
                    found.append(process)
        return found

    def kill(self) -> None:
        """SIGKILL to the whole tree, the driver first, until nothing of it is left."""
        self.process.kill()
        while members := self.members():
            for member in members:
                with suppress(psutil.Error):
                    member.kill()
            psutil.wait_procs(members, timeout=1)
        self.process.communicate()

    def wait(self, timeout_s: float) -> Result:
        """Waits for the end."""
        out, err = self.process.communicate(timeout=timeout_s)
        return Result(self.process.returncode, out, err)


def running(
    *arguments: object, home: Path, environment: Mapping[str, str] | None = None
) -> AbstractContextManager[Command]:
    """Starts the command; on leaving, whatever is left of it is killed.

    Args:
        arguments: Of the command.
        home: Folder of Prefect's database.
        environment: Further variables.
    """
    return running_program(
        [str(Path(sys.executable).with_name("fixative")), *map(str, arguments)],
        {"PREFECT_HOME": str(home), "COLUMNS": "200", **(environment or {})},
    )


@contextmanager
def running_program(program: Sequence[str], environment: Mapping[str, str]) -> Iterator[Command]:
    """Starts any program with further variables; on leaving, whatever is left of it and its children is killed."""
    mark = uuid.uuid4().hex
    variables = {**os.environ, **environment, _MARK: mark}
    process = subprocess.Popen(
        program,
        env=variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    command = Command(process, mark)
    try:
        yield command
    finally:
        command.kill()


def until(condition: Callable[[], Any], what: str, timeout_s: float = 90.0, *, every_s: float = 0.05) -> Any:
    """Polls until the condition is true and returns its value."""
    deadline = time.monotonic() + timeout_s
    while not (value := condition()):
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {timeout_s:g} s for {what}")
        time.sleep(every_s)
    return value


def job_file(path: Path, **job: Any) -> Path:
    """Writes a job file for the fake protector, units of two images and one actor; ``job`` lies over its job."""
    document = {"archive": {"unit_assets": 2}, "method": {"name": FAKE}, **job}
    path.write_text(yaml.safe_dump({"job": document, "run": {"actors": 1}}))
    return path


def contents(store: Store) -> dict[str, str]:
    """Every object with its etag."""
    return {item.key: item.etag for item in store.list()}


def starts(store: Store) -> dict[str, int]:
    """How often the optimizer began each unit, over all runs."""
    counts: dict[str, int] = {}
    for item in store.list("attempts/"):
        if item.key.endswith("-start"):
            unit = item.key.split("/")[1]
            counts[unit] = counts.get(unit, 0) + 1
    return counts


def meaning(manifests: Iterable[Manifest]) -> dict[str, str]:
    """Logical hash by source object."""
    return {manifest.source["key"]: manifest.logical_sha256 for manifest in manifests}


def finished(store: Store) -> list[Manifest]:
    """The manifests that ``_SUCCESS.json`` names; no other shard may be committed."""
    manifests = list(success_manifests(store))
    assert read_commits(store).committed == {manifest.shard_id for manifest in manifests}
    return manifests
