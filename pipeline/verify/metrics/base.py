"""What every metric is: 8-bit images and what they are compared with in, one number per image out."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any, ClassVar, Literal, final

import torch
from torch import Tensor

Better = Literal["down", "up", "neither"]
"""What better protection does to the number; "neither" is reported and judged by nobody."""

Licence = Literal[
    "free",
    "non-commercial",
    "of the given weights",
    "CC0; learnt from public sets of faces, VGG Face among them: have your use checked",
]
COSINE_DELTA = 0.05
"""Smallest difference of cosines, and of likenesses on their scale, that counts as protection."""
GIVEN: Licence = "of the given weights"


class WeightsMissing(Exception):
    """Trained files are not there, or are not the known ones; the message says what to install or to give."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What a report says of one number besides its value."""

    name: str
    better: Better
    # Size, interpolation, crop, normalisation, library: part of the number's identity.
    how: str
    # sha256 of the weights that it needs, or "none".
    weights: str = "none"
    licence: Licence = "free"
    # Of the computation: with another one the same weights give other numbers.
    version: str = "1"
    # Smallest difference that counts as protection, in the number's own unit; None: no verdict is made of it.
    delta: float | None = None

    @property
    def identity(self) -> dict[str, str]:
        """What decides the number; the rest of the facts is prose and judgement."""
        return {"name": self.name, "weights": self.weights, "version": self.version}

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


class Reference(StrEnum):
    """What a metric compares images with; names the field of `Against`."""

    NOTHING = "nothing"
    ORIGINALS = "originals"
    PHOTOS = "photos"
    PROMPTS = "prompts"


@dataclass(frozen=True, slots=True, kw_only=True)
class Against:
    """What a batch of images is compared with. A metric reads the one field that it needs."""

    # uint8 `(N, 3, H, W)`, one per image and of its size.
    originals: Tensor | None = None
    # uint8 `(3, H, W)` each, of any sizes: real photos of the subject that no attack was trained on.
    photos: Tensor | Sequence[Tensor] | None = None
    # One per image.
    prompts: Sequence[str] | None = None

    def only(self, place: int) -> Against:
        """What one image of the batch is compared with."""
        return Against(
            originals=None if self.originals is None else self.originals[place : place + 1],
            photos=self.photos,
            prompts=None if self.prompts is None else self.prompts[place : place + 1],
        )


class Metric(ABC):
    """One or several numbers per image that are measured in one pass."""

    needs: ClassVar[Reference]

    @property
    @abstractmethod
    def facts(self) -> Sequence[Facts]:
        """Its numbers."""

    @final
    def score(self, images: Tensor, against: Against | None = None) -> dict[str, list[float]]:
        """Every number of every image, by name of `facts`; image i depends on row i of images and reference alone.

        A number is left out where the images are too small for it or `why_not` has a reason. One that does not exist
        is not finite.

        Args:
            images: uint8 `(N, 3, H, W)`, sRGB.
            against: with the field that the metric needs.

        Raises:
            ValueError: not uint8 `(N, 3, H, W)` with N above 0, or the reference is missing or of another size.
        """
        given = against or Against()
        self._check(images, given)
        with torch.no_grad():
            return {} if self.why_not(given) is not None else self._score(images, given)

    def why_not(self, against: Against) -> str | None:
        """Why nothing can be compared with this reference, though it is of the right kind; None where it can."""
        return None

    def _check(self, images: Tensor, against: Against) -> None:
        _check_images("images", images)
        if self.needs is Reference.NOTHING:
            return
        reference = getattr(against, self.needs)
        if reference is None or len(reference) == 0:
            raise ValueError(f"{type(self).__name__} needs {self.needs} to compare with")
        if self.needs is Reference.PHOTOS:
            for photo in reference:
                _check_images(self.needs, photo[None])
        elif isinstance(reference, Tensor):
            _check_images(self.needs, reference)
        if self.needs is Reference.ORIGINALS and reference.shape != images.shape:
            raise ValueError(f"originals are {tuple(reference.shape)}, images {tuple(images.shape)}: give equal shapes")
        if self.needs is Reference.PROMPTS and len(reference) != len(images):
            raise ValueError(f"{len(images)} images and {len(reference)} prompts: give one per image")

    @abstractmethod
    def _score(self, images: Tensor, against: Against) -> dict[str, list[float]]:
        """The measurement itself."""


def _check_images(name: str, images: Tensor) -> None:
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3 or len(images) == 0:
        raise ValueError(f"{name} must be uint8 (N, 3, H, W), not {images.dtype} {tuple(images.shape)}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """A number of one image, or why there is none."""

    value: float | None
    error: str | None = None


def measure(metric: Metric, images: Tensor, against: Against | None = None) -> dict[str, list[Outcome]]:
    """Scores a batch for a report: a metric that fails on an image gives an error there and numbers elsewhere.

    Raises:
        ValueError: as `Metric.score`; a wrong call is no failed measurement.
    """
    given = against or Against()
    metric._check(images, given)
    try:
        scores = metric.score(images, given)
    except (ArithmeticError, RuntimeError, ValueError) as error:
        if len(images) == 1:
            outcome = Outcome(value=None, error=f"{type(error).__name__}: {error}"[:500])
            return {facts.name: [outcome] for facts in metric.facts}
        singles = [measure(metric, images[i : i + 1], given.only(i)) for i in range(len(images))]
        # An image that fails answers for all numbers, the others for those that their size allows.
        names = [facts.name for facts in metric.facts if all(facts.name in single for single in singles)]
        return {name: [outcome for single in singles for outcome in single[name]] for name in names}
    return {name: [_outcome(value) for value in values] for name, values in scores.items()}


def _outcome(value: float) -> Outcome:
    return Outcome(value=value) if math.isfinite(value) else Outcome(value=None, error=f"the score is {value}")
