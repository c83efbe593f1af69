"""The subjects of a comparison, as the 8-bit pixels that a file would hold."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

from pipeline.errors import UserError
from pipeline.ids import fingerprint, sha256_hex
from pipeline.laboratory.personalization import load_subjects
from pipeline.verify.trial import Pixels
from protectors.constraints import to_levels


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

    Args:
        parquet: the file.
        side: of the centre squares in pixels.
        wanted: so many, the first in alphabetical order, or these by name.
        train: photos per subject that are protected, at most; at least one is kept to compare with.

    Raises:
        UserError: the file cannot be used, or a subject is not in it.
    """
    try:
        found = {item.name: item for item in load_subjects(parquet, side, train=train)}
    except (OSError, ValueError) as error:
        raise UserError(f"--photos: {error}") from error
    names = list(found)[:wanted] if isinstance(wanted, int) else list(dict.fromkeys(wanted))
    if unknown := [name for name in names if name not in found]:
        raise UserError(f"{parquet} has no subject {unknown[0]!r}; it has {', '.join(found)}")
    if not names:
        raise UserError("no subjects: ask for at least one with --subjects")
    return tuple(
        Subject(
            name=name,
            class_word=found[name].class_word,
            train=pixels_of(found[name].train),
            references=pixels_of(found[name].others),
        )
        for name in names
    )


def pixels_of(images: Tensor) -> list[Pixels]:
    """Images `(N, 3, H, W)` in [0, 1] as a file would store them, uint8 (H, W, 3) each."""
    return list(np.ascontiguousarray(to_levels(images).permute(0, 2, 3, 1).numpy().astype(np.uint8)))


def photo_digest(photo: Pixels) -> str:
    """SHA-256 of the pixels."""
    return sha256_hex(photo.tobytes())
