"""What a verification found: what protection prevents, what it leaves, what it costs, each with its interval.

Similarities: A of what the base draws of the subject after it was customized, C of the protected model, F of what the
base draws of the class before that. Image i of each is drawn from the same noise.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from pipeline.verify.bootstrap import Floats, Interval, ratio
from pipeline.verify.contrasts import effect
from pipeline.verify.scores import Cell
from pipeline.verify.tables import State
from pipeline.verify_model.figures import intervals
from pipeline.verify_model.plan import VerificationPlan
from pipeline.verify_model.store import Results
from pipeline.verify_model.tasks import Case, Kind, Row
from pipeline.verify_model.utility_results import UtilityResult, utility_of

PREVENTED_BAR = 0.5
"""Share of the attacker's gain on the protected subject that must be prevented, its interval above 0 ..."""
KEPT_BAR = 0.8
"""... and of what others can be taught that must be left."""
NO_GAIN = "the attack measures nothing: on the base itself it gains nothing that is surely above zero"
_PICTURES, _CONCEPTS, _MODELS, _OTHERS = "pictures of one attack each", "concepts", "models", "other subjects"
_ATTACKS = "attacks"
_COLUMNS = ("base", "protected", "floor", "own_floor")


@dataclass(frozen=True, slots=True, kw_only=True)
class CaseResult:
    """One row on one protected model and one subject."""

    case: Case
    # Similarities `(images, 4)` of A, C, F and of the protected model before it saw the subject.
    values: Floats
    # Of real photos of the subject that the attacker has to those that he has not.
    ceiling: float

    @property
    def means(self) -> dict[str, float]:
        """A, C, F and the protected model's own floor."""
        return dict(zip(_COLUMNS, map(float, self.values.mean(axis=0)), strict=True))


@dataclass(frozen=True, slots=True, kw_only=True)
class RowResult:
    """One row of one method."""

    row: Row
    label: str
    state: State
    # Why the state is not "measured".
    reason: str = ""
    cases: Sequence[CaseResult] = ()
    # What a resample draws, and how many there are of it.
    unit: str = ""
    units: int = 0
    # Drawn images per model.
    images: int = 0
    # Means over units; empty where nothing was measured.
    means: Mapping[str, float] = field(default_factory=dict)
    # A - F, and (A - C) / (A - F) or, of other subjects, (C - F) / (A - F).
    gain: Interval | None = None
    share: Interval | None = None
    # What failed.
    errors: Sequence[str] = ()

    @property
    def what(self) -> str:
        """Name of the share."""
        return "prevented" if self.row.kind is Kind.CONCEPT else "kept"

    @property
    def bar(self) -> float:
        """What the share must reach."""
        return PREVENTED_BAR if self.row.kind is Kind.CONCEPT else KEPT_BAR

    @property
    def met(self) -> bool | None:
        """Whether the share reaches its bar; None where there is none."""
        if self.share is None:
            return None
        above = self.row.kind is not Kind.CONCEPT or (self.share.low is not None and self.share.low > 0)
        return self.share.value >= self.bar and above


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """What one method prevents more than another, over the subjects that both were measured on."""

    row: Row
    label: str
    against: str
    interval: Interval | None
    unit: str = ""
    units: int = 0
    # Why there is none.
    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Findings:
    """All numbers of a verification."""

    plan: VerificationPlan
    # Row by row, in it method by method.
    rows: Sequence[RowResult]
    differences: Sequence[Difference]
    utility: Sequence[UtilityResult]
    against: str | None
    # What it was about and the error, of every trial that failed.
    failed_trials: Sequence[str]


def gather(
    plan: VerificationPlan, results: Results, failed: Mapping[str, str], *, against: str | None = None
) -> Findings:
    """Reads everything that is stored back and computes all numbers.

    Args:
        plan: what was verified.
        results: where it is stored.
        failed: what has no numbers, by key, with the reason.
        against: label of the method that the others are held against.

    Raises:
        NotFound: a result that has not failed is missing.
    """
    rows = [_row(plan, results, failed, row, label) for row in plan.rows for label in plan.labels]
    differences = []
    if against is not None:
        held = {found.row.title: found for found in rows if found.label == against}
        for found in rows:
            if found.row.kind is Kind.CONCEPT and found.label != against:
                differences.append(difference(found, held[found.row.title]))
    utility = [utility_of(plan, results, failed, label) for label in plan.labels]
    told = {task.key: f"{task.label}: {failed[task.key]}" for task in plan.tasks() if task.key in failed}
    return Findings(
        plan=plan,
        rows=rows,
        differences=differences,
        utility=utility,
        against=against,
        failed_trials=list(told.values()),
    )


def _row(plan: VerificationPlan, results: Results, failed: Mapping[str, str], row: Row, label: str) -> RowResult:
    cases: dict[str, Case] = {}
    for case in plan.cases:
        if case.row is row and case.protected.label == label:
            # Several concepts of one model have the same other subjects: what was trained once counts once.
            cases.setdefault(case.attacked.key, case)
    tasks = {task.key: task for case in cases.values() for task in case.tasks}
    errors = [f"{task.label}: {failed[key]}" for key, task in tasks.items() if key in failed]
    sound = [case for case in cases.values() if not any(task.key in failed for task in case.tasks)]
    return summarize(row, label, [_read(results, case) for case in sound], errors)


def _read(results: Results, case: Case) -> CaseResult:
    columns = []
    for task in (case.base, case.attacked, case.floor, case.own_floor):
        cell = Cell.FLOOR if task.floor else Cell.CLEAN
        columns.append([score.value for score in results.scores(task.key) if score.cell is cell])
    photos = [score.value for score in results.scores(case.floor.key) if score.cell is Cell.CEILING]
    return CaseResult(
        case=case, values=np.array(columns, dtype=np.float64).T, ceiling=float(np.mean(np.array(photos, dtype=float)))
    )


def summarize(row: Row, label: str, cases: Sequence[CaseResult], errors: Sequence[str] = ()) -> RowResult:
    """All numbers of one row of one method.

    Args:
        row: which.
        label: of the method.
        cases: those that were measured.
        errors: of those that were not.
    """
    if not cases:
        state, reason = (State.ERROR, "; ".join(errors)) if errors else (State.NOT_RUN, "there is no such subject")
        return RowResult(row=row, label=label, state=state, reason=reason, errors=errors)
    units, several = _by_unit(cases)
    figures, unit, count = intervals(list(units.values()), _shares, alone=_PICTURES, several=several)
    gain, kept = figures["gain"], row.kind is not Kind.CONCEPT
    measured = gain.low is not None and gain.low > 0
    means = np.mean([values.mean(axis=0) for values in units.values()], axis=0)
    return RowResult(
        row=row,
        label=label,
        state=State.MEASURED if measured else State.INVALID,
        reason="" if measured else NO_GAIN,
        cases=cases,
        unit=unit,
        units=count,
        images=sum(len(case.values) for case in cases),
        means=dict(zip(_COLUMNS, map(float, means), strict=True)),
        gain=gain,
        share=figures["kept" if kept else "prevented"] if measured else None,
        errors=errors,
    )


def _by_unit(cases: Sequence[CaseResult]) -> tuple[dict[str, Floats], str]:
    """Values by what a resample draws, and what that is: one training of the protected model is in one unit alone.

    That is the protected subject; where others are taught, the model, and with one model the subject that is taught.
    Where there is one of it alone, and it was attacked several times, the attacks.
    """
    models = [case.case.protected.model.digest for case in cases]
    if all(case.case.row.kind is Kind.CONCEPT for case in cases):
        names, what = [case.case.concept.subject.name for case in cases], _CONCEPTS
    elif len(set(models)) > 1:
        names, what = models, _MODELS
    else:
        names, what = [case.case.subject.name for case in cases], _OTHERS
    if len(set(names)) == len(set(models)) == 1:
        names, what = [str(case.case.seed) for case in cases], _ATTACKS
    found: dict[str, list[Floats]] = {}
    for name, case in zip(names, cases, strict=True):
        found.setdefault(name, []).append(case.values)
    return {name: np.concatenate(values) for name, values in found.items()}, what


def _shares(values: Floats) -> dict[str, Floats]:
    """Of resamples `(R, units, 4)`."""
    means = values.mean(axis=1)
    base, protected, floor = (means[:, place] for place in range(3))
    return {
        "gain": base - floor,
        "prevented": effect(base, protected, floor),
        "kept": ratio(protected - floor, base - floor),
    }


def difference(found: RowResult, held: RowResult) -> Difference:
    """What one method prevents less what the other does, paired by subject and image."""
    empty = Difference(row=found.row, label=found.label, against=held.label, interval=None)
    if any(one.state is not State.MEASURED for one in (found, held)):
        return replace(empty, reason="one of the two has no number")
    names = [{case.case.concept.subject.name for case in one.cases} for one in (found, held)]
    (ours, several), (theirs, _) = (
        _by_unit([case for case in one.cases if case.case.concept.subject.name in names[0] & names[1]])
        for one in (found, held)
    )
    shared = [name for name in ours if name in theirs]
    if not shared:
        return replace(empty, reason="no subject was measured for both")
    width = len(_COLUMNS)

    def statistic(values: Floats) -> dict[str, Floats]:
        sides = (values[..., :width], values[..., width:])
        left, right = (_shares(side)["prevented"] for side in sides)
        return {"difference": left - right}

    units = [np.concatenate([ours[name], theirs[name]], axis=1) for name in shared]
    figures, unit, count = intervals(units, statistic, alone=_PICTURES, several=several)
    return replace(empty, interval=figures["difference"], unit=unit, units=count)
