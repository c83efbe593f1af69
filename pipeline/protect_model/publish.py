"""Puts a finished folder where it belongs: under its name at once, or object by object with provenance at the end."""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from pipeline.errors import AlreadyExists, IntegrityError, PipelineError, UserError
from pipeline.protect_model.fetch import Fetched
from pipeline.protect_model.folder import write_folder
from pipeline.protect_model.plan import PROVENANCE, ModelPlan
from pipeline.protect_model.work import PUBLISHING, Work, keys_of
from pipeline.storage import Store, in_parallel, stored_sha256
from pipeline.storage_local import LocalStore, sync
from protectors.diffusion import DiffusionModel
from protectors.model_base import ProtectedModel
from protectors.model_files import MODEL_INDEX


def publish(plan: ModelPlan, protected: ProtectedModel, model: DiffusionModel, work: Work) -> None:
    """Writes the folder of a protected model.

    On this machine it is there whole or not at all: it is written beside it first. In a far store its objects are
    created one by one, the model's index and provenance last; what a killed run left is completed, not replaced.

    Raises:
        PipelineError: it cannot be written.
        UserError: something else was put there meanwhile.
    """
    store = plan.job.out_store()
    try:
        if isinstance(store, LocalStore):
            with _beside(store.root) as part:
                write_folder(part, plan, protected, model)
                for path in (*part.rglob("*"), part):
                    sync(path)  # the checkpoints go next
                part.replace(store.root)
                sync(store.root.parent)
        else:
            whole = Fetched()
            try:
                write_folder(whole.folder, plan, protected, model)
                upload(store, whole.folder, work)
            finally:
                whole.drop()
    except (OSError, SafetensorError) as error:
        raise PipelineError(
            f"{plan.job.out_name} cannot be written: {error}; the checkpoints stay, run it again"
        ) from error


def sweep(store: Store) -> None:
    """Removes the hidden folders that killed runs left beside a folder of this machine."""
    if not isinstance(store, LocalStore) or not store.root.parent.is_dir():
        return
    name = re.compile(re.escape(f".{store.root.name}-") + "[0-9a-f]{8}")
    for folder in store.root.parent.iterdir():
        if name.fullmatch(folder.name):
            with suppress(OSError), _locked(folder):  # a run that is alive holds its own
                shutil.rmtree(folder)


@contextmanager
def _beside(out: Path) -> Iterator[Path]:
    """A hidden folder beside it, which is never taken for a model; gone at the end, if it still has its name."""
    part = out.with_name(f".{out.name}-{uuid.uuid4().hex[:8]}")
    part.mkdir(parents=True)
    try:
        with _locked(part):
            yield part
    finally:
        shutil.rmtree(part, ignore_errors=True)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Marks a folder as in use until the end of the block, or of the process. Raises OSError if it is."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def upload(store: Store, folder: Path, work: Work) -> None:
    """Creates the objects of a model, one run at a time: its mark in the store decides, see ``Work.announce``.

    Raises:
        UserError: another run is at it or was here, or something else is there.
        IntegrityError: an object of ours was changed.
    """
    names = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file()]
    work.announce()
    keys, out = keys_of(store), work.job.out_name
    if PROVENANCE in keys:
        work.withdraw()
        raise UserError(f"{out} has become another run's model meanwhile: choose another --out; the checkpoints stay")
    if others := sorted(keys - {*names, PUBLISHING}):
        raise UserError(f"--out {out} holds {others[0]}, which is no part of this model: choose another")

    def put(name: str) -> None:
        try:
            store.put_new_file(name, folder / name)
        except AlreadyExists as error:
            with (folder / name).open("rb") as file:
                ours = hashlib.file_digest(file, "sha256").hexdigest()
            if stored_sha256(store, name) != ours:
                raise IntegrityError(
                    f"{out} holds another {name} than this run made: remove {out} and run again; the checkpoints stay"
                ) from error

    last = (MODEL_INDEX, PROVENANCE)
    in_parallel(put, [name for name in names if name not in last])
    for name in last:
        put(name)
