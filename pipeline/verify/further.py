"""Metrics that a verification measures beside its own two when their weights are given: secondary columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor

from pipeline.errors import UserError
from pipeline.verify.metrics.base import Against, Facts, Metric, Outcome, Reference, measure
from pipeline.verify.metrics.faces import detector_gate
from pipeline.verify.metrics.registry import Absent, chosen_metrics, optional_numbers
from pipeline.verify.scores import Cell, Score
from pipeline.verify.tables import Gate

FACES = ("ism_all", "face_found", "face_match")
FOUND = "face_found"
TO_THE_EDIT = "{} to the edit of the clean image"


@dataclass(frozen=True, slots=True, kw_only=True)
class FurtherMetrics:
    """What is measured of drawn pictures and of edits."""

    # Compared with photos of the subject that the attacker does not have.
    drawn: Sequence[Metric] = field(default_factory=list)
    # Distances to the wanted edit.
    edits: Sequence[Metric] = field(default_factory=list)

    @property
    def drawn_names(self) -> list[str]:
        """Numbers of a drawn picture."""
        return [facts.name for metric in self.drawn for facts in metric.facts]

    @property
    def edit_names(self) -> list[str]:
        """Numbers of an edit."""
        return [facts.name for facts in self._edit_facts()]

    @property
    def facts(self) -> list[Facts]:
        """All numbers."""
        return [facts for metric in self.drawn for facts in metric.facts] + self._edit_facts()

    def _edit_facts(self) -> list[Facts]:
        # A distance to the original is a cost of protection; one to the wanted edit is its success.
        facts = [facts for metric in self.edits for facts in metric.facts]
        return [replace(item, name=TO_THE_EDIT.format(item.name), better="up") for item in facts]

    def of_drawn(self, images: Tensor, photos: Tensor) -> dict[str, list[Outcome]]:
        """The numbers of drawn pictures uint8 `(N, 3, H, W)`, compared with photos uint8 `(M, 3, H, W)`."""
        return _measured(self.drawn, images, Against(photos=photos))

    def of_edit(self, image: Tensor, wanted: Tensor) -> dict[str, Outcome]:
        """The numbers of one edit, uint8 `(1, 3, H, W)` as the wanted one."""
        found = _measured(self.edits, image, Against(originals=wanted))
        return {TO_THE_EDIT.format(name): outcome for name, (outcome,) in found.items()}


def _measured(metrics: Sequence[Metric], images: Tensor, against: Against) -> dict[str, list[Outcome]]:
    return {name: found for metric in metrics for name, found in measure(metric, images, against).items()}


def further_metrics(asked: Mapping[str, str], *, device: str = "cpu") -> FurtherMetrics:
    """Loads the metrics that are asked for.

    Args:
        asked: folder by name, as `chosen_metrics`.
        device: of the networks.

    Raises:
        UserError: a metric is unknown, not installed, or says nothing about an attack.
        ModelError: a folder is not usable.
    """
    if "brisque" in asked:
        raise UserError("metric brisque: a purifier alone changes it, so it is no verdict; use `fixative measure`")
    chosen = chosen_metrics(asked, device=device)
    return FurtherMetrics(
        drawn=[metric for metric in chosen if metric.needs is Reference.PHOTOS],
        edits=[metric for metric in chosen if metric.needs is Reference.ORIGINALS],
    )


def not_measured(measured: Sequence[Facts]) -> list[Absent]:
    """The optional numbers that are not among these, and why."""
    known = {facts.name for facts in measured}
    elsewhere = "says nothing about an attack by itself; `fixative measure` has it"
    absent = []
    for name, reason in optional_numbers().items():
        if not known & {name, TO_THE_EDIT.format(name)}:
            absent.append(Absent(name=name, reason=elsewhere if name in ("brisque", "clip_t", "fid") else reason))
    return absent


def face_gates(scores: Sequence[Score]) -> dict[tuple[str, str], list[Gate]]:
    """By attack and number: whether the detector finds the faces of real photos; empty where faces were not asked for.

    A detector that misses faces of photos makes misses of drawn faces meaningless.
    """
    gates: dict[tuple[str, str], list[Gate]] = {}
    for attack in sorted({score.attack for score in scores if score.metric == FOUND}):
        real = [s for s in scores if (s.attack, s.metric, s.cell) == (attack, FOUND, Cell.CEILING)]
        # A photo of a subject none of whose photos shows a face counts as one without.
        gate = detector_gate([score.value or 0.0 for score in real])
        gates |= {(attack, name): [gate] for name in FACES}
    return gates
