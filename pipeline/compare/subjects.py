"""The subjects of a comparison, as the 8-bit pixels that a file would hold."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.errors import UserError
from pipeline.ids import fingerprint, sha256_hex
from pipeline.verify.trial import Pixels
from protectors.constraints import to_levels
from protectors.reference.data import centre_crop, decode_photo, read_columns


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """Photos of one thing, uint8 (S, S, 3)."""

    name: str
    # What it is, e.g. "dog".
    class_word: str
    # Those that are protected, and trained on.
    train: list[Pixels]
    # Those that nobody trains on.
    references: list[Pixels]

    def digest(self) -> str:
        """Names words and photos."""
        sides = {"train": self.train, "references": self.references}
        photos = {side: [photo_digest(photo) for photo in photos] for side, photos in sides.items()}
        return fingerprint({"name": self.name, "class": self.class_word, **photos})


def read_subjects(parquet: Path, side: int, wanted: int | tuple[str, ...], *, train: int) -> tuple[Subject, ...]:
    """Reads subjects from a Parquet file with asset_id, image, subject and subject_class.

    Photos without a subject belong to nobody and are left out; only those of wanted subjects are decoded.

    Args:
        parquet: the file.
        side: of the centre squares in pixels.
        wanted: so many, the first in alphabetical order, or these by name.
        train: photos per subject that are protected, at most; at least one is kept to compare with.

    Raises:
        UserError: the file cannot be used, a subject is not in it, or one has too few photos.
    """
    try:
        table = read_columns(parquet, ("asset_id", "image", "subject", "subject_class"))
    except (OSError, ValueError) as error:
        raise UserError(f"--photos: {error}") from error
    column = table.column("subject").to_pylist()
    known = sorted({str(name) for name in column if name is not None})
    names = known[:wanted] if isinstance(wanted, int) else list(dict.fromkeys(wanted))
    if unknown := [name for name in names if name not in known]:
        raise UserError(f"{parquet} has no subject {unknown[0]!r}; it has {', '.join(known)}")
    if not names:
        raise UserError("no subjects: ask for at least one with --subjects")
    places: dict[str, list[int]] = {name: [] for name in names}
    for place, name in enumerate(column):
        if name is not None and str(name) in places:
            places[str(name)].append(place)
    try:
        return tuple(_subject(name, table.take(rows).to_pylist(), side, train) for name, rows in places.items())
    except ValueError as error:
        raise UserError(f"--photos: {parquet}: {error}") from error


def _subject(name: str, rows: list[dict[str, Any]], side: int, train: int) -> Subject:
    """Raises ValueError where its rows are too few or incomplete."""
    if len(rows) < 2:
        raise ValueError(f"subject {name!r} has one photo; it needs one to train on and one to compare")
    for field in ("asset_id", "image", "subject_class"):
        if any(row[field] is None for row in rows):
            raise ValueError(f"a photo of subject {name!r} has no {field}")
    rows = sorted(rows, key=lambda row: row["asset_id"])
    decoded = [decode_photo(row["image"]["bytes"] or b"", str(row["asset_id"])) for row in rows]
    photos = pixels_of(torch.stack([centre_crop(photo, side) for photo in decoded]))
    cut = min(train, len(rows) - 1)
    word = str(rows[0]["subject_class"])
    return Subject(name=name, class_word=word, train=photos[:cut], references=photos[cut:])


def pixels_of(images: Tensor) -> list[Pixels]:
    """Images `(N, 3, H, W)` in [0, 1] as a file would store them, uint8 (H, W, 3) each."""
    return list(np.ascontiguousarray(to_levels(images).permute(0, 2, 3, 1).numpy().astype(np.uint8)))


def photo_digest(photo: Pixels) -> str:
    """SHA-256 of the pixels."""
    return sha256_hex(photo.tobytes())
