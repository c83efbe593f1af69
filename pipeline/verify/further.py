"""Metrics that a verification measures beside its own two when their weights are given: secondary columns."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from pipeline.errors import FatalWorkerError, UserError
from pipeline.verify.metrics.base import Against, Facts, Metric, Outcome, Reference, measure
from pipeline.verify.metrics.faces import FACES, FOUND, IDENTITY, MATCH, NO_FACE, detector_gate, face_figures
from pipeline.verify.metrics.registry import Absent, chosen_metrics, optional_numbers
from pipeline.verify.scores import Cell, Score
from pipeline.verify.tables import Gate, Question

TO_THE_EDIT = "{} to the edit of the clean image"
_ELSEWHERE = ("brisque", "clip_t", "fid")


@dataclass(frozen=True, slots=True, kw_only=True)
class FurtherMetrics:
    """What is measured of drawn pictures and of edits."""

    # Compared with photos of the subject that the attacker does not have.
    drawn: Sequence[Metric] = field(default_factory=list)
    # Distances to the wanted edit.
    edits: Sequence[Metric] = field(default_factory=list)

    def drawn_names(self, photos: Tensor) -> list[str]:
        """Numbers of a drawn picture that there are with these photos, uint8 `(M, 3, H, W)`, of its subject."""
        return [facts.name for metric in self.drawn if _applies(metric, photos) for facts in metric.facts]

    @property
    def edit_names(self) -> list[str]:
        """Numbers of an edit."""
        return [facts.name for facts in self._edit_facts()]

    @property
    def facts(self) -> list[Facts]:
        """All numbers, in the order of their names."""
        drawn = [facts for metric in self.drawn for facts in metric.facts]
        return sorted(drawn + self._edit_facts(), key=lambda facts: facts.name)

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


def _applies(metric: Metric, photos: Tensor) -> bool:
    try:
        return metric.why_not(Against(photos=photos)) is None
    except (ArithmeticError, RuntimeError, ValueError):
        return True  # a metric that breaks on the photos has numbers, and they are errors


def _measured(metrics: Sequence[Metric], images: Tensor, against: Against) -> dict[str, list[Outcome]]:
    return {name: found for metric in metrics for name, found in measure(metric, images, against).items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class AskedMetrics:
    """The metrics that a run was planned with. Plain data: every actor loads them, from its own disk."""

    # Folder by name, as `chosen_metrics`.
    folders: Mapping[str, str] = field(default_factory=dict)
    # What the run has to compare with.
    needs: tuple[Reference, ...] = ()
    facts: tuple[Facts, ...] = ()

    @property
    def identity(self) -> list[dict[str, str]]:
        """What decides their numbers."""
        return [facts.identity for facts in self.facts]

    def load(self, *, device: str = "cpu") -> FurtherMetrics:
        """The metrics.

        Raises:
            UserError: a metric is unknown or not installed.
            ModelError: a folder is not usable.
            FatalWorkerError: what lies here is not what the run was planned with.
        """
        found = _loaded(self.folders, self.needs, device)
        here = [facts.identity for facts in found.facts]
        if wrong := [facts["name"] for facts in self.identity if facts not in here]:
            raise FatalWorkerError(f"metric {wrong[0]}: this machine holds other weights or another library for it")
        return found


def ask_metrics(folders: Mapping[str, str], needs: tuple[Reference, ...]) -> AskedMetrics:
    """Checks the metrics that are asked for by loading them once; those that nothing can be compared for are not.

    Args:
        folders: folder by name, as `chosen_metrics`.
        needs: PHOTOS where pictures are drawn of subjects, ORIGINALS where images are edited.

    Raises:
        UserError: a metric is unknown, not installed, or says nothing about an attack.
        ModelError: a folder is not usable.
    """
    if "brisque" in folders:
        raise UserError("metric brisque: a purifier alone changes it, so it is no verdict; use `fixative measure`")
    return AskedMetrics(folders=folders, needs=needs, facts=tuple(_loaded(folders, needs, "cpu").facts))


def _loaded(folders: Mapping[str, str], needs: tuple[Reference, ...], device: str) -> FurtherMetrics:
    chosen = chosen_metrics(folders, needs, device=device)
    return FurtherMetrics(
        drawn=[metric for metric in chosen if metric.needs is Reference.PHOTOS],
        edits=[metric for metric in chosen if metric.needs is Reference.ORIGINALS],
    )


def questions(measured: Sequence[Facts], scores: Sequence[Score]) -> list[Question]:
    """What is asked of the further metrics that have scores, each in its own direction and unit."""
    scored = {score.metric for score in scores}
    return [
        Question(metric=facts.name, better=facts.better, delta=facts.delta)
        for facts in measured
        if facts.name in scored and facts.better != "neither" and facts.delta is not None
    ]


def not_measured(measured: Collection[str], asked: Collection[str]) -> list[Absent]:
    """The optional numbers that are not among those measured, and why; asked: names as in `chosen_metrics`."""
    absent = []
    for name, (kind, reason) in optional_numbers().items():
        if name in measured or TO_THE_EDIT.format(name) in measured:
            continue
        if name in _ELSEWHERE:
            reason = "says nothing about an attack by itself; `fixative measure` has it"
        elif kind in asked:
            reason = "asked for, but no attack gave it anything to measure" + (
                ", or no subject's photos show a face" if name in FACES else ""
            )
        absent.append(Absent(name=name, reason=reason))
    return absent


def face_gates(scores: Sequence[Score]) -> dict[tuple[str, str], list[Gate]]:
    """By attack and number: whether the detector finds the faces of real photos; empty where faces were not asked for.

    A detector that misses faces of photos makes misses of drawn faces meaningless. Subjects without a frontal face in
    any reference photo have no scores; how many there are is said.
    """
    gates: dict[tuple[str, str], list[Gate]] = {}
    for attack in sorted({score.attack for score in scores if score.metric == FOUND}):
        own = [score for score in scores if score.attack == attack]
        real = [score.value or 0.0 for score in own if (score.metric, score.cell) == (FOUND, Cell.CEILING)]
        units, faces = {score.unit for score in own}, {score.unit for score in own if score.metric == FOUND}
        said = f"{len(units - faces)} of {len(units)} groups are left out: {NO_FACE}"
        gates[attack, IDENTITY] = [detector_gate(real), Gate(name="subjects with a face", passed=True, detail=said)]
    return gates


def face_cells(scores: Sequence[Score], attack: str) -> list[dict[str, Any]]:
    """What is read beside the likeness of faces, by cell and purifier: means over pictures, without a verdict."""
    cells: dict[tuple[str, str], dict[str, list[float]]] = {}
    for score in scores:
        if score.attack == attack and score.metric in FACES and score.value is not None:
            place = cells.setdefault((score.cell.value, score.purifier), {name: [] for name in FACES})
            place[score.metric].append(score.value)
    rows = []
    for (cell, purifier), values in sorted(cells.items()):
        figures = face_figures(values[IDENTITY], values[FOUND])
        rows.append(
            {
                "cell": cell,
                "purifier": purifier,
                "not found": figures.not_found,
                "likeness where found": figures.detected,
                "likeness": figures.overall,
                "passes for the subject": sum(values[MATCH]) / len(values[MATCH]),
                "pictures": len(values[FOUND]),
            }
        )
    return rows
