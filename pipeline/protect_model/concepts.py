"""Reads the photos of a concept and cuts them to the model's size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from pipeline.config import S3Settings
from pipeline.decode import DecodeLimits, decode, model_view
from pipeline.errors import DecodeError, UserError
from pipeline.protect_model.job import ConceptSource
from pipeline.shard_index import kind_of
from pipeline.verify.samples import read_samples
from pipeline.verify.trial import Pixels, tensor
from protectors.concepts import Concept
from protectors.reference.data import centre_crop, read_columns

_COLUMNS = ("asset_id", "image", "subject", "subject_class")


def read_concept(source: ConceptSource, *, side: int, most: int | None) -> Concept:
    """Reads a folder of images, or the rows of one subject of a Parquet file.

    Unlike in an archive, one image that cannot be read is an error: a concept has few, and who owns them decides.

    Args:
        source: where, and what they show.
        side: of the centre squares that are cut, in pixels: the model's base size.
        most: images at most, the first by name or asset id; None for all.

    Raises:
        UserError: nothing is there, an image cannot be read (the message names it), or the class word is not known.
    """
    path, subject = split_source(source.path)
    if path.is_dir():
        photos, word = _from_folder(path, most), source.class_word
    elif kind_of(path.name) == "parquet" and path.is_file():
        photos, word = _from_parquet(path, subject, source.class_word, most)
    else:
        raise UserError(f"--concept {source.path}: name a folder of images, or FILE.parquet#SUBJECT")
    if word is None or not word.strip():
        raise UserError(f"--concept {source.path}: say what it shows with --class-word, e.g. --class-word dog")
    return Concept(images=torch.stack([centre_crop(tensor(photo), side) for photo in photos]), class_word=word.strip())


def split_source(text: str) -> tuple[Path, str | None]:
    """Path and subject of PATH#SUBJECT; a path that is there as a whole has no subject."""
    path, mark, subject = text.rpartition("#")
    if not mark or Path(text).exists():
        return Path(text), None
    return Path(path), subject


def _from_folder(folder: Path, most: int | None) -> list[Pixels]:
    if archives := sorted(file.name for file in folder.rglob("*") if kind_of(file.name) in ("parquet", "tar")):
        raise UserError(f"--concept {folder} holds {archives[0]}: name a folder of one subject's images, or that file")
    samples, left_out = read_samples(str(folder), most, limits=DecodeLimits(), s3=S3Settings())
    if left_out:
        raise UserError(f"--concept {folder}: {left_out[0]}; mend it or take it out")
    return [sample.pixels for sample in samples]


def _from_parquet(file: Path, subject: str | None, word: str | None, most: int | None) -> tuple[list[Pixels], str]:
    """The photos, and the class word that was given, or else the file's."""
    try:
        table = read_columns(file, _COLUMNS)
    except (OSError, ValueError) as error:
        raise UserError(f"--concept: {error}") from error
    column = table.column("subject").to_pylist()
    known = sorted({str(name) for name in column if name is not None})
    wanted = known[0] if subject is None and len(known) == 1 else subject
    if wanted not in known:
        which = "name a subject" if wanted is None else f"no subject {wanted!r}"
        raise UserError(f"--concept {file}: {which}, as {file.name}#SUBJECT; it has {', '.join(known)}")
    rows = table.take([place for place, name in enumerate(column) if str(name) == wanted]).to_pylist()
    rows = sorted(rows, key=lambda row: str(row["asset_id"]))[:most]
    words = {str(row["subject_class"]) for row in rows if row["subject_class"]}
    if word is None and len(words) != 1:
        raise UserError(f"--concept {file}#{wanted}: its subject_class says no one word; give --class-word")
    return [_photo(file, row) for row in rows], word or words.pop()


def _photo(file: Path, row: dict[str, Any]) -> Pixels:
    image = row["image"]
    data = image["bytes"] if isinstance(image, dict) else image
    try:
        return model_view(decode(data or b"", limits=DecodeLimits()))
    except DecodeError as error:
        raise UserError(f"--concept {file}: {row['asset_id']}: {error}; mend it or take it out") from error
