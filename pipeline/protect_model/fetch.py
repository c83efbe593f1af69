"""Brings files of far stores to this machine, for as long as they are used."""

from __future__ import annotations

import json
import shutil
import tempfile
import weakref
from functools import partial
from pathlib import Path

from pipeline.errors import NotFound, PipelineError, UserError
from pipeline.storage import READ_BLOCK, ObjectInfo, Store, in_parallel, url_scheme
from protectors.model_files import MODEL_INDEX, defines

# The base model's licence binds whoever passes it on.
LEGAL = ("license", "notice")
_NEAR = ("file", "local")


class Fetched:
    """A temporary folder that goes when nobody holds this object any more, at the latest when the process ends.

    ``drop()`` removes it at once: for processes that Ray may kill.
    """

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="fixative-"))
        self.drop = weakref.finalize(self, shutil.rmtree, self.folder, ignore_errors=True)


# By URL and the versions of all files: planning a job a second time fetches nothing.
_models: weakref.WeakValueDictionary[tuple[object, ...], Fetched] = weakref.WeakValueDictionary()


def is_far(url: str) -> bool:
    """Whether a place is no folder of this machine."""
    return url_scheme(url) not in _NEAR


def fetch_model(store: Store) -> Fetched:
    """Downloads the files that define a model, and its licence: text and safetensors, no pickle files.

    Raises:
        UserError: there is no model, or no whole one: the index is written last.
    """
    items = {item.key: item for item in store.list()}
    try:
        index = json.loads(store.get(MODEL_INDEX))
        parts = [name for name, value in index.items() if isinstance(value, list)]
    except (NotFound, ValueError, AttributeError) as error:
        raise UserError(f"MODEL {store.url} holds no {MODEL_INDEX}: name a diffusers model's top folder") from error
    wanted = [item for key, item in items.items() if _is_wanted(key, parts)]
    name = (store.url, *((item.key, item.etag) for item in wanted))
    found = _models.get(name)
    if found is None or not found.drop.alive:
        found = Fetched()
        in_parallel(partial(_into, store, found.folder), wanted)
        _models[name] = found
    return found


def fetch_file(store: Store, key: str) -> Fetched:
    """Downloads one file, under its name. Raises UserError where there is none."""
    try:
        item = store.info(key)
    except NotFound as error:
        raise UserError(str(error)) from error
    found = Fetched()
    _into(store, found.folder, item)
    return found


def download(store: Store, item: ObjectInfo, target: Path) -> None:
    """Writes this version of an object to a file, block by block: it may be larger than memory.

    Raises:
        SourceChanged: it is another one by now.
        PipelineError: the file cannot be written.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("wb") as file:
            for start in range(0, item.size, READ_BLOCK):
                file.write(store.get(item.key, start=start, length=READ_BLOCK, etag=item.etag))
    except OSError as error:
        raise PipelineError(f"{target} cannot be written: {error}; set TMPDIR to a disk with room for it") from error


def _into(store: Store, folder: Path, item: ObjectInfo) -> None:
    download(store, item, folder / item.key)


def _is_wanted(key: str, parts: list[str]) -> bool:
    part, slash, name = key.rpartition("/")
    if slash:
        return part in parts and defines(name)
    return name == MODEL_INDEX or name.lower().startswith(LEGAL)
