"""Everything that can be measured of one set of images here, and why the rest cannot."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import groupby
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from pipeline.verify.digest import folder_digest
from pipeline.verify.embed import Embedder
from pipeline.verify.metrics.base import Against, Facts, Metric, Outcome, Reference, measure
from pipeline.verify.metrics.distribution import cmmd, kid
from pipeline.verify.metrics.faces import FaceIdentity, detector_gate, face_figures
from pipeline.verify.metrics.frechet import fid, fid_facts
from pipeline.verify.metrics.inception import FEATURES, Inception
from pipeline.verify.metrics.registry import Absent, available_metrics

_BATCH = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """What the images are compared with; what is not given leaves its metrics absent. All are uint8 `(3, H, W)`."""

    # One per image, and of its size.
    originals: Sequence[Tensor] | None = None
    # Real photos of the subject.
    photos: Sequence[Tensor] | None = None
    # One for all images.
    prompt: str | None = None
    # Another set.
    others: Sequence[Tensor] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Number:
    """One number of a set."""

    facts: Facts
    # None where no image has one.
    value: float | None
    # Behind the value.
    images: int
    # By place of the image; a distance of sets has none.
    outcomes: Mapping[int, Outcome] = field(default_factory=dict)
    # Beside the value, e.g. a standard error.
    beside: Mapping[str, Any] | None = None

    @property
    def errors(self) -> list[str]:
        """Why images have none."""
        return [outcome.error for outcome in self.outcomes.values() if outcome.error is not None]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        values = {str(place): outcome.value for place, outcome in self.outcomes.items()}
        return {
            **self.facts.to_dict(), "value": self.value, "images": self.images, "errors": self.errors,
            "values": values, **(self.beside or {}),
        }  # fmt: skip


def measure_set(
    images: Sequence[Tensor], given: Comparison, weights: Mapping[str, Path], *, device: str = "cpu"
) -> tuple[list[Number], list[Absent]]:
    """All numbers of a set of images, and those that it has none of.

    Args:
        images: uint8 `(3, H, W)`, sRGB, of any sizes.
        given: what they are compared with.
        weights: folder by name, as `available_metrics`.
        device: of the networks.

    Raises:
        ValueError: an unknown name of weights, or originals of other number or sizes.
        ModelError: a folder of weights is not usable.
    """
    metrics, absent = available_metrics(weights, device=device)
    numbers: list[Number] = []
    for metric in metrics:
        if (missing := _missing(metric.needs, given)) is not None:
            absent += [Absent(name=facts.name, reason=missing) for facts in metric.facts]
            continue
        found = _outcomes(metric, images, given)
        beside = None
        if isinstance(metric, FaceIdentity) and given.photos is not None:
            beside = {"detector": asdict(detector_gate(metric.found(given.photos)))}
        for facts in metric.facts:
            if facts.name in found:
                numbers.append(_mean(facts, found[facts.name], beside))
            else:
                absent.append(Absent(name=facts.name, reason=f"the images are too small: {facts.how}"))
    distances, left_out = _distances(images, given.others, weights, device)
    return numbers + distances, absent + left_out


def _missing(needs: Reference, given: Comparison) -> str | None:
    has = {
        Reference.NOTHING: True,
        Reference.ORIGINALS: given.originals is not None,
        Reference.PHOTOS: given.photos is not None,
        Reference.PROMPTS: given.prompt is not None,
    }
    return None if has[needs] else f"no {needs} given to compare with"


def _outcomes(metric: Metric, images: Sequence[Tensor], given: Comparison) -> dict[str, dict[int, Outcome]]:
    """By number and place of the image; images that are too small for a number have none."""
    found: dict[str, dict[int, Outcome]] = {}
    for places in _batches(images):
        against = Against(
            originals=None if given.originals is None else torch.stack([given.originals[place] for place in places]),
            photos=given.photos,
            prompts=None if given.prompt is None else [given.prompt] * len(places),
        )
        for name, outcomes in measure(metric, torch.stack([images[place] for place in places]), against).items():
            found.setdefault(name, {}).update(zip(places, outcomes, strict=True))
    return found


def _batches(images: Sequence[Tensor]) -> Iterator[list[int]]:
    """Places of neighbours of one size."""
    for _, group in groupby(range(len(images)), key=lambda place: images[place].shape):
        places = list(group)
        for start in range(0, len(places), _BATCH):
            yield places[start : start + _BATCH]


def _mean(facts: Facts, outcomes: Mapping[int, Outcome], beside: Mapping[str, Any] | None) -> Number:
    values = [outcome.value for outcome in outcomes.values() if outcome.value is not None]
    return Number(
        facts=facts, value=fmean(values) if values else None, images=len(values), outcomes=outcomes, beside=beside
    )


def _distances(
    images: Sequence[Tensor], others: Sequence[Tensor] | None, weights: Mapping[str, Path], device: str
) -> tuple[list[Number], list[Absent]]:
    """KID and CMMD by nano-embed, and FID where Inception is given."""
    inception = Inception(weights["inception"], device=device) if "inception" in weights else None
    names = ["nano_embed_kid", "nano_embed_cmmd"] + ([] if inception is None else ["fid"])
    if others is None:
        return [], [Absent(name=name, reason="no other set given to compare with") for name in names]
    numbers: list[Number] = []
    absent: list[Absent] = []
    embedder = Embedder(device=device)
    sides = [torch.cat([embedder.embed(image[None].float() / 255) for image in side]) for side in (images, others)]
    digest = folder_digest(embedder.folder)
    for name, distance in zip(names, (kid, cmmd), strict=False):
        how = f"{distance.__name__.upper()} on nano-embed; not comparable with published numbers; below 0 is noise"
        try:
            found = distance(sides[0], sides[1])
        except ValueError as error:
            absent.append(Absent(name=name, reason=str(error)))
            continue
        facts = Facts(name=name, better="neither", how=how, weights=digest)
        numbers.append(Number(facts=facts, value=found.value, images=found.images, beside=found.to_dict()))
    if inception is not None:
        try:
            frechet = fid(images, others, inception)
        except ValueError as error:
            return numbers, [*absent, Absent(name="fid", reason=str(error))]
        facts = fid_facts(inception)
        numbers.append(Number(facts=facts, value=frechet.value, images=min(frechet.images), beside=frechet.to_dict()))
    return numbers, absent


def remarks(numbers: Sequence[Number]) -> list[str]:
    """What must be read beside the numbers: the three figures of faces, and covariances that are not of full rank."""
    by_name = {number.facts.name: number for number in numbers}
    said = []
    faces, frechet = by_name.get("ism_all"), by_name.get("fid")
    if faces is not None and faces.images and faces.beside is not None:
        figures = face_figures(_values(faces), _values(by_name["face_found"]))
        where = "no image" if figures.detected is None else f"{figures.detected:.3f}"
        said.append(
            f"faces: none found in {figures.not_found:.1%}; ism where found {where}, in all {figures.overall:.3f}"
        )
        gate = faces.beside["detector"]
        said.append(f"face detector: {gate['detail']}{'' if gate['passed'] else ': its numbers do not apply'}")
    if frechet is not None and frechet.beside is not None and not frechet.beside["full_rank"]:
        said.append(f"fid: covariances of rank {frechet.beside['ranks']} of {FEATURES}: not of the whole space")
    return said


def _values(number: Number) -> list[float]:
    return [outcome.value for outcome in number.outcomes.values() if outcome.value is not None]
