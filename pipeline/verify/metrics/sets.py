"""Everything that can be measured of one set of images here, and why the rest cannot."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import groupby, islice
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from pipeline.verify.digest import folder_digest
from pipeline.verify.embed import Embedder
from pipeline.verify.metrics.base import Against, Facts, Metric, Outcome, Reference, measure
from pipeline.verify.metrics.distribution import cmmd, kid
from pipeline.verify.metrics.faces import FOUND, IDENTITY, FaceIdentity, detector_gate, face_figures
from pipeline.verify.metrics.frechet import FrechetSets, fid_facts
from pipeline.verify.metrics.inception import FEATURES, Inception
from pipeline.verify.metrics.registry import Absent, available_metrics

_BATCH = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """What the images are compared with; what is not given leaves its metrics absent. All are uint8 `(3, H, W)`."""

    # One per image, in their order, and of its size.
    originals: Iterable[Tensor] | None = None
    # Real photos of the subject.
    photos: Sequence[Tensor] | None = None
    # One for all images.
    prompt: str | None = None
    # Another set.
    others: Iterable[Tensor] | None = None


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
            "values": values, "beside": dict(self.beside or {}),
        }  # fmt: skip


def measure_set(
    images: Iterable[Tensor], given: Comparison, weights: Mapping[str, Path], *, device: str = "cpu"
) -> tuple[list[Number], list[Absent]]:
    """All numbers of a set of images, and those that it has none of.

    Images, originals and the other set are gone through once, and no more than a batch of them is kept.

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
    usable: list[Metric] = []
    for metric in metrics:
        if (missing := _missing(metric, given)) is None:
            usable.append(metric)
        else:
            absent += [Absent(name=facts.name, reason=missing) for facts in metric.facts]
    distances = _Distances(weights, device) if given.others is not None else None
    found: dict[str, dict[int, Outcome]] = {}
    for first, batch, originals in _batches(images, given.originals):
        against = Against(
            originals=originals,
            photos=given.photos,
            prompts=None if given.prompt is None else [given.prompt] * len(batch),
        )
        for metric in usable:
            for name, outcomes in measure(metric, batch, against).items():
                found.setdefault(name, {}).update(enumerate(outcomes, start=first))
        if distances is not None:
            distances.add(0, batch)
    numbers: list[Number] = []
    for metric in usable:
        beside = None
        if isinstance(metric, FaceIdentity) and given.photos is not None:
            beside = {"detector": asdict(detector_gate(metric.found(given.photos)))}
        for facts in metric.facts:
            if facts.name in found:
                numbers.append(_mean(facts, found[facts.name], beside))
            else:
                absent.append(Absent(name=facts.name, reason=f"the images are too small: {facts.how}"))
    if distances is None or given.others is None:
        names = _EMBEDDED + (("fid",) if "inception" in weights else ())
        return numbers, absent + [Absent(name=name, reason="no other set given to compare with") for name in names]
    for _, batch, _ in _batches(given.others, None):
        distances.add(1, batch)
    more, left_out = distances.numbers()
    return numbers + more, absent + left_out


def _missing(metric: Metric, given: Comparison) -> str | None:
    has = {
        Reference.NOTHING: True,
        Reference.ORIGINALS: given.originals is not None,
        Reference.PHOTOS: given.photos is not None,
        Reference.PROMPTS: given.prompt is not None,
    }
    if not has[metric.needs]:
        return f"no {metric.needs} given to compare with"
    return metric.why_not(Against(photos=given.photos))


def _batches(
    images: Iterable[Tensor], originals: Iterable[Tensor] | None
) -> Iterator[tuple[int, Tensor, Tensor | None]]:
    """The place of the first image, neighbours of one size as `(N, 3, H, W)`, and their originals."""
    pairs = ((image, None) for image in images) if originals is None else zip(images, originals, strict=True)
    first = 0
    for _, group in groupby(pairs, key=lambda pair: pair[0].shape):
        while part := list(islice(group, _BATCH)):
            known = [original for _, original in part if original is not None]
            yield first, torch.stack([image for image, _ in part]), torch.stack(known) if known else None
            first += len(part)


def _mean(facts: Facts, outcomes: Mapping[int, Outcome], beside: Mapping[str, Any] | None) -> Number:
    values = [outcome.value for outcome in outcomes.values() if outcome.value is not None]
    return Number(
        facts=facts, value=fmean(values) if values else None, images=len(values), outcomes=outcomes, beside=beside
    )


_EMBEDDED = ("nano_embed_kid", "nano_embed_cmmd")


class _Distances:
    """KID and CMMD by nano-embed, and FID where Inception is given: what two sets of images leave of themselves."""

    def __init__(self, weights: Mapping[str, Path], device: str) -> None:
        self._embedder = Embedder(device=device)
        self._vectors: tuple[list[Tensor], list[Tensor]] = [], []
        self._inception = Inception(weights["inception"], device=device) if "inception" in weights else None
        self._sums = None if self._inception is None else FrechetSets(self._inception.network, device=device)

    def add(self, side: int, images: Tensor) -> None:
        """Adds images uint8 `(N, 3, H, W)` to set 0 or 1."""
        self._vectors[side].append(self._embedder.embed(images.float() / 255))
        if self._sums is not None:
            self._sums.add(side, images)

    def numbers(self) -> tuple[list[Number], list[Absent]]:
        """The distances, and why there is none."""
        numbers: list[Number] = []
        absent: list[Absent] = []
        left, right = (torch.cat(side) if side else torch.zeros(0, 1) for side in self._vectors)
        digest = folder_digest(self._embedder.folder)
        for name, distance in zip(_EMBEDDED, (kid, cmmd), strict=True):
            how = f"{distance.__name__.upper()} on nano-embed; not comparable with published numbers; below 0 is noise"
            try:
                found = distance(left, right)
            except ValueError as error:
                absent.append(Absent(name=name, reason=str(error)))
                continue
            facts = Facts(name=name, better="neither", how=how, weights=digest)
            numbers.append(Number(facts=facts, value=found.value, images=found.images, beside=found.to_dict()))
        if self._sums is None or self._inception is None:
            return numbers, absent
        try:
            frechet = self._sums.distance()
        except ValueError as error:
            return numbers, [*absent, Absent(name="fid", reason=str(error))]
        facts, beside = fid_facts(self._inception), frechet.to_dict()
        return [*numbers, Number(facts=facts, value=frechet.value, images=min(frechet.images), beside=beside)], absent


def remarks(numbers: Sequence[Number]) -> list[str]:
    """What must be read beside the numbers: the three figures of faces, and covariances that are not of full rank."""
    by_name = {number.facts.name: number for number in numbers}
    said = []
    faces, frechet = by_name.get(IDENTITY), by_name.get("fid")
    if faces is not None and faces.images and faces.beside is not None:
        figures = face_figures(_values(faces), _values(by_name[FOUND]))
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
