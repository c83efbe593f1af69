"""The subjects whose photos an attacker has, each photo under the name that a model's provenance gives it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from pipeline.compare.subjects import pixels_of
from pipeline.decode import DecodeLimits, decode, model_view
from pipeline.errors import DecodeError, UserError
from pipeline.verify.attack_models import AttackModels
from pipeline.verify.trial import Pixels, purified_by, tensor
from protectors.concepts import image_digests
from protectors.reference.data import centre_crop, read_columns

BLUR = "blur7"  # APDM's authors blur too, and do not say how much

SETS = {
    "seen": "the photos that the model was protected on",
    "unseen": "other photos of the subject",
    "flipped": "the seen ones, mirrored",
    "blurred": f"the seen ones after the purifier {BLUR}",
}
"""What an attacker may have of a protected subject."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """Photos of one thing, in the order of their asset ids."""

    name: str
    # What it is, e.g. "dog".
    class_word: str
    # uint8 (S, S, 3): centre squares at the model's size.
    photos: list[Pixels]
    # sha256 of each, as a protected model's provenance names it.
    digests: tuple[str, ...]


def read_subjects(parquet: Path, side: int) -> dict[str, Subject]:
    """All subjects of a Parquet file with asset_id, image, subject, subject_class, by name in alphabetical order.

    Photos without a subject belong to nobody and are left out.

    Args:
        parquet: the file.
        side: of the centre squares in pixels.

    Raises:
        UserError: it cannot be used.
    """
    try:
        rows = read_columns(parquet, ("asset_id", "image", "subject", "subject_class")).to_pylist()
    except (OSError, ValueError) as error:
        raise UserError(f"--photos: {error}") from error
    groups: dict[str, list[dict[str, object]]] = {}
    for row in sorted(rows, key=lambda row: str(row["asset_id"])):
        if row["subject"] is not None:
            groups.setdefault(str(row["subject"]), []).append(row)
    return {name: _subject(parquet, name, groups[name], side) for name in sorted(groups)}


def _subject(parquet: Path, name: str, rows: Sequence[dict[str, object]], side: int) -> Subject:
    words = {str(row["subject_class"] or "") for row in rows}
    if len(words) != 1 or words == {""}:
        raise UserError(f"--photos: {parquet}: subject_class of {name!r} must be one word, not {sorted(words)}")
    squares = torch.stack([centre_crop(tensor(_decoded(parquet, row)), side) for row in rows])
    return Subject(name=name, class_word=words.pop(), photos=pixels_of(squares), digests=tuple(image_digests(squares)))


def _decoded(parquet: Path, row: dict[str, object]) -> Pixels:
    """As protect-model reads it: equal photos have equal hashes."""
    image = row["image"]
    data = image["bytes"] if isinstance(image, dict) else image
    try:
        return model_view(decode(data if isinstance(data, bytes) else b"", limits=DecodeLimits()))
    except DecodeError as error:
        raise UserError(f"--photos: {parquet}: {row['asset_id']}: {error}; mend it or take it out") from error


def changed(photos: Sequence[Pixels], kind: str) -> list[Pixels]:
    """The photos as an attacker has them in one of the sets."""
    if kind == "flipped":
        return [np.ascontiguousarray(photo[:, ::-1]) for photo in photos]
    if kind == "blurred":
        stacked = torch.stack([tensor(photo) for photo in photos])
        blurred = purified_by(BLUR, stacked, AttackModels(), seed=0)
        return list(np.ascontiguousarray(blurred.permute(0, 2, 3, 1).numpy()))
    return list(photos)
