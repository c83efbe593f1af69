"""Reads the photos of a concept, and those of other things, and cuts them to the model's size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from pipeline.config import S3Settings
from pipeline.decode import DecodeLimits, decode, model_view
from pipeline.errors import DecodeError, UserError
from pipeline.job import archive_store, storage_options
from pipeline.protect_model.fetch import fetch_file, is_far
from pipeline.protect_model.job import ConceptSource
from pipeline.shard_index import kind_of
from pipeline.storage import local_path, open_store
from pipeline.verify.samples import read_samples
from pipeline.verify.trial import Pixels, tensor
from protectors.concepts import Concept
from protectors.constraints import to_8bit
from protectors.reference.data import centre_crop, load_photos, read_columns
from protectors.retention import Kept

_COLUMNS = ("asset_id", "image", "subject", "subject_class")


def read_concept(source: ConceptSource, *, side: int, most: int | None, s3: S3Settings | None = None) -> Concept:
    """Reads a folder of images, or the rows of one subject of a Parquet file.

    Unlike in an archive, one image that cannot be read is an error: a concept has few, and who owns them decides.

    Args:
        source: where, and what they show.
        side: of the centre squares that are cut, in pixels: the model's base size.
        most: images at most, the first by name or asset id; None for all.
        s3: how to reach S3.

    Raises:
        UserError: nothing is there, an image cannot be read (the message names it), or the class word is not known.
    """
    s3 = s3 or S3Settings()
    url, subject = split_source(source.path)
    far, parquet = is_far(url), kind_of(url) == "parquet"
    word = source.class_word
    if parquet and (far or Path(local_path(url)).is_file()):
        photos, word = _from_parquet(url, subject, word, most=most, s3=s3)
    elif not parquet and (far or Path(local_path(url)).is_dir()):
        photos = _from_folder(url, most, s3)
    else:
        raise UserError(f"--concept {source.path}: name a folder of images, or FILE.parquet#SUBJECT")
    if word is None or not word.strip():
        raise UserError(f"--concept {source.path}: say what it shows with --class-word, e.g. --class-word dog")
    return Concept(images=torch.stack([centre_crop(tensor(photo), side) for photo in photos]), class_word=word.strip())


def read_kept(url: str, *, side: int, most: int, s3: S3Settings) -> Kept:
    """Reads photos of other things, with their captions, from a Parquet file.

    Those that ``models evaluate`` and ``verify-model`` hold out by their names are left out, so that what is measured
    on them is not what was trained on.

    Raises:
        UserError: the file, a column or a photo cannot be read; the message names it.
    """
    fetched = fetch_file(*archive_store(url, s3)) if is_far(url) else None
    file = Path(local_path(url)) if fetched is None else next(fetched.folder.iterdir())
    try:
        photos = load_photos(file, held_out=False, limit=most, over_captions=True)
    except (OSError, ValueError) as error:
        raise UserError(f"--keep {str(error).replace(str(file), url)}") from error
    images = torch.stack([centre_crop(image, side) for image in photos.images])
    return Kept(images=to_8bit(images), prompts=tuple(photos.captions))


def split_source(text: str) -> tuple[str, str | None]:
    """Place and subject of PLACE#SUBJECT; a path that is there as a whole has no subject."""
    place, mark, subject = text.rpartition("#")
    whole = kind_of(place) != "parquet" if is_far(text) else Path(local_path(text)).exists()
    return (text, None) if not mark or whole else (place, subject)


def _from_folder(url: str, most: int | None, s3: S3Settings) -> list[Pixels]:
    store = open_store(url, storage_options(s3))
    if archives := [item.key for item in store.list() if kind_of(item.key) in ("parquet", "tar")]:
        raise UserError(f"--concept {url} holds {archives[0]}: name a folder of one subject's images, or that file")
    samples, left_out = read_samples(url, most, limits=DecodeLimits(), s3=s3)
    if left_out:
        raise UserError(f"--concept {url}: {left_out[0]}; mend it or take it out")
    return [sample.pixels for sample in samples]


def _from_parquet(
    url: str, subject: str | None, word: str | None, *, most: int | None, s3: S3Settings
) -> tuple[list[Pixels], str]:
    """The photos, and the class word that was given, or else the file's."""
    table, name = _table(url, s3), url.rpartition("/")[2]
    column = table.column("subject").to_pylist()
    known = sorted({str(found) for found in column if found is not None})
    wanted = known[0] if subject is None and len(known) == 1 else subject
    if wanted not in known:
        which = "name a subject" if wanted is None else f"no subject {wanted!r}"
        raise UserError(f"--concept {url}: {which}, as {name}#SUBJECT; it has {', '.join(known)}")
    rows = table.take([place for place, found in enumerate(column) if str(found) == wanted]).to_pylist()
    rows = sorted(rows, key=lambda row: str(row["asset_id"]))[:most]
    words = {str(row["subject_class"]) for row in rows if row["subject_class"]}
    if word is None and len(words) != 1:
        raise UserError(f"--concept {url}#{wanted}: its subject_class says no one word; give --class-word")
    return [_photo(url, row) for row in rows], word or words.pop()


def _table(url: str, s3: S3Settings) -> Any:
    """The columns that are needed, as an Arrow table."""
    fetched = fetch_file(*archive_store(url, s3)) if is_far(url) else None
    file = Path(local_path(url)) if fetched is None else next(fetched.folder.iterdir())
    try:
        return read_columns(file, _COLUMNS)
    except (OSError, ValueError) as error:
        raise UserError(f"--concept {str(error).replace(str(file), url)}") from error


def _photo(url: str, row: dict[str, Any]) -> Pixels:
    image = row["image"]
    data = image["bytes"] if isinstance(image, dict) else image
    try:
        return model_view(decode(data or b"", limits=DecodeLimits()))
    except DecodeError as error:
        raise UserError(f"--concept {url}: {row['asset_id']}: {error}; mend it or take it out") from error
