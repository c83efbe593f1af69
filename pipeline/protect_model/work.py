"""Where checkpoints of a run lie until the model is finished: a folder of this machine, or a far one's mirror."""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from pipeline.errors import AlreadyExists, IntegrityError, NotFound, PipelineError, PreconditionFailed, UserError
from pipeline.ids import differing_fields
from pipeline.protect_model.fetch import Fetched, download
from pipeline.protect_model.job import ModelJob
from pipeline.protect_model.lock import LOCK, OWNER, Lease, Say, locked
from pipeline.storage import Store, get_json, join_url, json_bytes
from pipeline.storage_local import LocalStore

# What a run is bound to; the mark that it has begun to fill OUT; what a far folder's last checkpoint is.
RUN = "run.json"
PUBLISHING = "publishing.json"
POINTER = "checkpoint.json"
_CHECKPOINT = "checkpoint"
_TRIED = "plans/.selftest-"
_STATE = "state.json"


class Work:
    """The folder of one run, which nobody else uses meanwhile.

    Args:
        job: the run's.
        checkpoint: folder of this machine; a model protector keeps its checkpoints there.
    """

    def __init__(self, job: ModelJob, checkpoint: Path) -> None:
        self.job = job
        self.store = job.work_store()
        self.checkpoint = checkpoint

    def begin(self, facts: Mapping[str, Any]) -> None:
        """Binds the folder to a run. Raises UserError where it is bound to another."""
        try:
            self.store.put_new(RUN, json_bytes(facts))
        except AlreadyExists:
            check_bound(self.job, get_json(self.store, RUN), facts)

    def keep(self) -> None:
        """Called after each update: sees to it that the last checkpoint outlives this machine as far as it can."""

    def announce(self) -> None:
        """Marks that whatever lies in OUT from now on is this run's, here and there.

        The mark in OUT decides between runs that have found it empty. It is written in one request: completing an
        upload of many parts lets a second writer win on some servers, and two runs' files could end up in one model.

        Raises:
            UserError: another run has marked it.
        """
        with suppress(AlreadyExists):
            self.store.put_new(PUBLISHING, json_bytes({"out": self.job.out_name, "run": uuid.uuid4().hex}))
        mark = get_json(self.store, PUBLISHING)
        with suppress(AlreadyExists):
            self.job.out_store().put_new(PUBLISHING, json_bytes({"run": mark["run"]}))
        if not self._has_marked(mark):
            self.withdraw()
            out = self.job.out_name
            raise UserError(
                f"{out} is being filled by another run, or was left by one: wait for it, or choose another --out; "
                "the checkpoints stay"
            )

    def withdraw(self) -> None:
        """Takes the marks back."""
        with suppress(NotFound):  # there is none
            if self._has_marked(get_json(self.store, PUBLISHING)):
                self.job.out_store().delete(PUBLISHING)
        self.store.delete(PUBLISHING)

    def clean(self) -> None:
        """Removes what runs left; other files stay."""
        self.withdraw()
        for item in list(self.store.list(f"{_CHECKPOINT}/")):
            self.store.delete(item.key)
        for key in (POINTER, RUN):
            self.store.delete(key)

    def _has_marked(self, mark: Mapping[str, Any]) -> bool:
        """Whether OUT's mark is this run's. Raises NotFound where there is none."""
        return bool(get_json(self.job.out_store(), PUBLISHING).get("run") == mark["run"])


class MirroredWork(Work):
    """A far folder, whose last checkpoint is downloaded at the start and replaced by every later one.

    A checkpoint is written under a new name, then the pointer is set to it, then the old one is deleted: a kill at
    any moment leaves one of the two. The pointer is only set while it says what this run left there.
    """

    def __init__(self, job: ModelJob, lease: Lease) -> None:
        self.mirror = Fetched()
        super().__init__(job, self.mirror.folder / _CHECKPOINT)
        self._lease, self._where = lease, job.work_name
        self._kept = ""
        self._etag: str | None = None

    def begin(self, facts: Mapping[str, Any]) -> None:
        super().begin(facts)
        try:
            self._etag = self.store.info(POINTER).etag
            pointer = get_json(self.store, POINTER)
        except NotFound:
            return
        state = pointer["state"]
        name = json.loads(state)["tensors"]
        if Path(name).name != name:
            raise IntegrityError(
                f"{join_url(self._where, POINTER)} names {name!r}, which is no file of a checkpoint: "
                f"remove {self._where} and begin again"
            )
        target = self.checkpoint / name
        download(self.store, self.store.info(pointer["key"]), target)
        if _sha256(target) != pointer["sha256"]:
            damaged = join_url(self._where, pointer["key"])
            raise IntegrityError(f"{damaged} is not what was stored: remove {self._where} and begin again")
        (self.checkpoint / _STATE).write_text(state)
        self._kept = state

    def keep(self) -> None:
        self._lease.check()
        file = self.checkpoint / _STATE
        state = file.read_text() if file.exists() else ""
        if state == self._kept:
            return
        tensors = self.checkpoint / json.loads(state)["tensors"]
        key = f"{_CHECKPOINT}/{tensors.stem}-{uuid.uuid4().hex[:8]}{tensors.suffix}"
        self.store.put_new_file(key, tensors)
        self._point(json_bytes({"key": key, "sha256": _sha256(tensors), "state": state}), key)
        self._kept = state
        for item in list(self.store.list(f"{_CHECKPOINT}/")):
            if item.key != key:
                self.store.delete(item.key)

    def _point(self, pointer: bytes, key: str) -> None:
        try:
            if self._etag is None:
                self._etag = self.store.put_new(POINTER, pointer).etag
            else:
                self._etag = self.store.replace(POINTER, pointer, etag=self._etag).etag
        except (AlreadyExists, PreconditionFailed) as error:
            self._etag = self.store.info(POINTER).etag
            if get_json(self.store, POINTER)["key"] != key:  # else the answer to our own write was lost
                self.store.delete(key)
                raise PipelineError(f"{self._where} was written to by another run: this one ends here") from error


@contextmanager
def opened(job: ModelJob, say: Say) -> Iterator[Work]:
    """Holds the work folder of a job for this run alone.

    Args:
        job: whose.
        say: told when this has to wait for a run that may be dead.

    Raises:
        InUse: another run holds it.
    """
    store = job.work_store()
    if isinstance(store, LocalStore):
        with locked(store.root):
            yield Work(job, store.root / _CHECKPOINT)
            with suppress(OSError):  # something is in it, or it is gone
                (store.root / _CHECKPOINT).rmdir()
    else:
        with Lease(store, job.work_name).held(say) as lease:
            work = MirroredWork(job, lease)
            try:
                yield work
            finally:
                work.mirror.drop()


def keys_of(store: Store) -> set[str]:
    """Of all objects but what a run left that was killed while it tried the store out."""
    return {item.key for item in store.list() if not item.key.startswith(_TRIED)}


def is_announced(job: ModelJob) -> bool:
    """Whether a run with this work folder has begun to fill OUT."""
    try:
        return bool(get_json(job.work_store(), PUBLISHING)["out"] == job.out_name)
    except NotFound:
        return False


def is_left(job: ModelJob) -> bool:
    """Whether there is anything of a run in the folder."""
    return any(item.key != OWNER for item in job.work_store().list())


def bound_to(job: ModelJob) -> dict[str, Any] | None:
    """What the folder's run is bound to; None: nothing is there. Raises UserError where something else is."""
    store = job.work_store()
    keys = keys_of(store) - {LOCK, OWNER}
    if not keys:
        return None
    if RUN not in keys:
        raise UserError(f"--work {job.work_name} is neither empty nor a folder of this command: choose another")
    return get_json(store, RUN)


def check_bound(job: ModelJob, begun: Mapping[str, Any] | None, facts: Mapping[str, Any]) -> None:
    """Raises UserError where a folder is bound to another run."""
    if begun is not None and (differences := differing_fields(facts, begun)):
        raise UserError(
            f"{job.work_name} holds checkpoints of another run ({'; '.join(differences)}): run that one again as it "
            "was, remove the folder, or choose another --work"
        )


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
