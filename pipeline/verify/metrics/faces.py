"""Identity of faces under one rule: where no face is found, the similarity is zero.

Averaging over detected faces only rewards a protection that leaves just the easy faces; counting a failure of the
detector as "no face" rewards anything that breaks it. So a miss is 0, and an exception stays an exception.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from pipeline.ids import sha256_hex
from pipeline.verify.metrics.base import COSINE_DELTA, Against, Facts, Licence, Metric, Reference
from pipeline.verify.tables import Gate

IDENTITY, FOUND, MATCH = "ism_all", "face_found", "face_match"
FACES = (IDENTITY, FOUND, MATCH)
"""The first is judged; the others are read beside it, for a base model draws faces without knowing the subject's."""

NO_FACE = "no face found in any photo of the subject: face metrics do not apply"
SANE_DETECTION = 0.95
"""Share of real photos in which a detector must find the face, or its numbers do not apply."""


class FaceDetector(Protocol):
    """Finds a face."""

    @property
    def how(self) -> str:
        """Which detector, and with which settings."""

    def detect(self, image: Tensor) -> Tensor | None:
        """The largest face, uint8 `(3, h, w)`, of an image uint8 `(3, H, W)`; None where there is none."""


class FaceEmbedder(Protocol):
    """Describes faces, and says how alike two descriptions are."""

    @property
    def how(self) -> str:
        """Which network, and how its vectors are compared."""

    @property
    def same(self) -> float:
        """The likeness above which two faces pass for one person's."""

    def embed(self, faces: Tensor) -> Tensor:
        """Vectors `(N, D)` of faces uint8 `(N, 3, h, w)`."""

    def likeness(self, vector: Tensor, known: Tensor) -> float:
        """How alike a face `(D,)` is to those of the photos, `(M, D)`: 0..1."""


class FaceIdentity(Metric):
    """Identity score matching over all images, whether a face was found, and whether it passes for the subject's.

    Args:
        detector: finds faces; its exceptions pass through.
        embedder: describes them.
        weights: sha256 of the weights of both.
        licence: of these weights.
        version: of the library that computes with them.
    """

    needs = Reference.PHOTOS

    def __init__(
        self, detector: FaceDetector, embedder: FaceEmbedder, *, weights: str, licence: Licence, version: str = "1"
    ) -> None:
        self._detector, self._embedder = detector, embedder
        self._weights, self._licence, self._version = weights, licence, version
        self._last: tuple[str, list[Tensor | None]] = ("", [])

    @property
    def facts(self) -> Sequence[Facts]:
        """Similarity, detection, match."""
        found, alike = self._detector.how, self._embedder.how
        how = {
            IDENTITY: f"{alike}; largest face, {found}; 0 where no face is found",
            FOUND: f"1 or 0; {found}",
            MATCH: f"1 where {IDENTITY} is above {self._embedder.same}, else 0",
        }
        return [
            Facts(
                name=name,
                better="down" if name == IDENTITY else "neither",
                how=text,
                weights=self._weights,
                licence=self._licence,
                version=self._version,
                delta=COSINE_DELTA if name == IDENTITY else None,
            )
            for name, text in how.items()
        ]

    def why_not(self, against: Against) -> str | None:
        """A subject whose photos show no face has no likeness to lose."""
        return None if self._known(against) else NO_FACE

    def _score(self, images: Tensor, against: Against) -> dict[str, list[float]]:
        photos = torch.stack(self._known(against))
        vectors = [self._describe(image) for image in images]
        alike = [0.0 if vector is None else self._embedder.likeness(vector, photos) for vector in vectors]
        return {
            IDENTITY: alike,
            FOUND: [float(vector is not None) for vector in vectors],
            MATCH: [float(value > self._embedder.same) for value in alike],
        }

    def found(self, photos: Iterable[Tensor]) -> list[float]:
        """Whether the detector finds a face in each photo, uint8 `(3, H, W)`: what `detector_gate` asks for."""
        return [float(vector is not None) for vector in self._described(photos)]

    def _known(self, against: Against) -> list[Tensor]:
        if against.photos is None:
            raise ValueError(f"{IDENTITY} needs photos")
        return [vector for vector in self._described(against.photos) if vector is not None]

    def _described(self, photos: Iterable[Tensor]) -> list[Tensor | None]:
        """The photos' faces. The last answer is kept: all pictures of a subject are compared with the same photos."""
        given = list(photos)
        name = sha256_hex("".join(f"{tuple(photo.shape)}{sha256_hex(_bytes(photo))}" for photo in given))
        if name != self._last[0]:
            self._last = name, [self._describe(photo) for photo in given]
        return self._last[1]

    def _describe(self, image: Tensor) -> Tensor | None:
        face = self._detector.detect(image)
        return None if face is None else self._embedder.embed(face[None])[0]


def _bytes(image: Tensor) -> bytes:
    return np.ascontiguousarray(image.numpy()).tobytes()


@dataclass(frozen=True, slots=True, kw_only=True)
class FaceFigures:
    """The three numbers that are always printed together."""

    # Share of images without a face (FDFR).
    not_found: float
    # Mean similarity where a face was found; None where none was.
    detected: float | None
    # Over all images: detection rate times `detected`.
    overall: float


def face_figures(similarities: Sequence[float], found: Sequence[float]) -> FaceFigures:
    """Sums up one cell's `ism_all` and `face_found`.

    Raises:
        ValueError: no images, or not one of each per image.
    """
    if not similarities or len(similarities) != len(found):
        raise ValueError(f"{len(similarities)} similarities and {len(found)} detections: give one of each per image")
    faces = sum(found)
    return FaceFigures(
        not_found=1 - faces / len(found),
        detected=sum(similarities) / faces if faces else None,
        overall=sum(similarities) / len(similarities),
    )


def detector_gate(found_in_photos: Sequence[float]) -> Gate:
    """Whether the detector finds the faces of real photos; without photos it could not be checked."""
    if not found_in_photos:
        return Gate(name="face detector", passed=None, detail="no real photos")
    share = sum(found_in_photos) / len(found_in_photos)
    detail = f"finds a face in {share:.1%} of {len(found_in_photos)} real photos"
    return Gate(name="face detector", passed=share >= SANE_DETECTION, detail=detail)
