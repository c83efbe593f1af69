"""What a comparison found: fidelity, effects per purifier and in the worst case, and one method against another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean, median

import numpy as np

from pipeline.compare.methods import Method
from pipeline.compare.plan import AttackSpec, Comparison, PlannedCustomization, PlannedTrial
from pipeline.compare.store import Protected, Results
from pipeline.verify.bootstrap import Floats, Interval, Plan, Sample, figures_with_intervals, ratio
from pipeline.verify.cells import build_tables
from pipeline.verify.report import EDITING
from pipeline.verify.scores import NO_PURIFIER, Arranged, Cell, Grid, Score, arrange
from pipeline.verify.tables import Question, State, Table
from pipeline.verify.trials import QUESTION

WORST = "worst"
"""Names the worst case over purifiers beside their own names."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fidelity:
    """What protection costs: means over photos, and the largest change of any value."""

    photos: int
    linf_levels: int
    psnr: float
    # None where photos are smaller than its window.
    ssim: float | None
    ciede2000: float
    # Processor time over that of the first method, the median over subjects; None where the first has failed.
    time_ratio: float | None


@dataclass(slots=True, kw_only=True)
class MethodResult:
    """One row of the comparison."""

    method: Method
    # Why there are no numbers.
    failed: str | None = None
    # By subject.
    protected: dict[str, Protected] = field(default_factory=dict)
    fidelity: Fidelity | None = None
    # By the attack's label.
    tables: dict[str, Table] = field(default_factory=dict)
    # By the attack's label, and purifier or WORST: its effect less that of the method it is held against.
    differences: dict[str, dict[str, Interval]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Findings:
    """All numbers of a comparison."""

    comparison: Comparison
    # In the order of the comparison's methods.
    rows: Sequence[MethodResult]
    # Label of the method that all others are held against.
    against: str | None


def gather(
    comparison: Comparison, results: Results, failed: Mapping[str, str], *, against: str | None = None
) -> Findings:
    """Reads everything that is stored back and computes all numbers.

    Args:
        comparison: what was compared.
        results: where it is stored.
        failed: methods that have none, with the reason.
        against: label of the method that all others are held against.

    Raises:
        NotFound: a result of a method that has not failed is missing.
    """
    protections = [item for item in comparison.protections() if item.method.label not in failed]
    kept = {item.key: results.protected(item.key) for item in protections}
    trials = comparison.trials(protections)
    first = {
        item.subject.name: kept[item.key].seconds
        for item in protections
        if item.method.label == comparison.methods[0].label
    }
    rows = []
    scores: dict[tuple[str, str], list[Score]] = {}
    for method in comparison.methods:
        if method.label in failed:
            rows.append(MethodResult(method=method, failed=failed[method.label]))
            continue
        own_photos = {item.subject.name: kept[item.key] for item in protections if item.method.label == method.label}
        row = MethodResult(method=method, protected=own_photos, fidelity=_fidelity(own_photos, first))
        for attack in comparison.attacks:
            own = [score for trial in trials if _concerns(trial, attack, method) for score in results.scores(trial.key)]
            scores[method.label, attack.label] = own
            (row.tables[attack.label],) = build_tables(own, [question_of(attack)])
        rows.append(row)
    held = [row for row in rows if row.method.label == against and row.failed is None]
    for row in rows:
        for other in held if row.method.label != against else []:
            for label, table in row.tables.items():
                sides = (scores[row.method.label, label], scores[other.method.label, label])
                row.differences[label] = differences(sides, (table, other.tables[label]))
    return Findings(comparison=comparison, rows=rows, against=against)


def question_of(attack: AttackSpec) -> Question:
    """What is asked of an attack's scores."""
    return EDITING if attack.preset is None else QUESTION


def _concerns(trial: PlannedTrial, attack: AttackSpec, method: Method) -> bool:
    """Whether a trial belongs to a method's table: its own, and those on clean photos."""
    if trial.attack != attack:
        return False
    if isinstance(trial, PlannedCustomization) and trial.protection is None:
        return True
    return trial.protection is not None and trial.protection.method.label == method.label


def _fidelity(protected: Mapping[str, Protected], first: Mapping[str, float]) -> Fidelity:
    """Over all photos; `first` holds the seconds that the first method took, by subject."""
    one = next(iter(protected.values()))
    values = {name: [value for item in protected.values() for value in item.fidelity[name]] for name in one.fidelity}
    ratios = [item.seconds / first[name] for name, item in protected.items() if first.get(name)]
    return Fidelity(
        photos=len(values["psnr"]),
        linf_levels=int(max(values["linf_levels"])),
        psnr=fmean(values["psnr"]),
        ssim=fmean(values["ssim"]) if "ssim" in values else None,
        ciede2000=fmean(values["ciede2000_mean"]),
        time_ratio=median(ratios) if ratios else None,
    )


def differences(sides: tuple[Sequence[Score], Sequence[Score]], tables: tuple[Table, Table]) -> dict[str, Interval]:
    """The first method's effect less the second's, per purifier and in the worst case, paired by subject.

    An effect is the share of the attacker's gain that is prevented, (B - D) / (B - F). Above zero the first protects
    better. All subjects of a resample are the same for both.

    Args:
        sides: scores of the two methods under one attack.
        tables: their tables; purifiers that count in both are compared.

    Returns:
        By purifier, and WORST; nothing where there is no floor, or no subject in common.
    """
    question = tables[0].question
    counted = [{row.purifier for row in table.rows if row.state is State.MEASURED} for table in tables]
    names = [row.purifier for row in tables[0].rows if row.purifier in counted[0] & counted[1]]
    if NO_PURIFIER not in names:
        return {}
    first, second = (arrange(Grid(scores), names, sign=question.sign) for scores in sides)
    if first is None or second is None or any((Cell.FLOOR, NO_PURIFIER) not in one.places for one in (first, second)):
        return {}
    units = [unit for unit in first.units if unit in second.units]
    if not units:
        return {}
    values = [one.sample.means[[one.units.index(unit) for unit in units]] for one in (first, second)]
    width = values[0].shape[1]

    def statistic(drawn: Floats) -> dict[str, Floats]:
        left = _effects(drawn[..., :width], first, names)
        right = _effects(drawn[..., width:], second, names)
        return {name: left[name] - right[name] for name in left}

    return figures_with_intervals(Sample.of_units(np.concatenate(values, axis=1)), statistic, Plan())


def _effects(drawn: Floats, arranged: Arranged, names: Sequence[str]) -> dict[str, Floats]:
    """Effects of resamples `(R, units, columns)`, each `(R,)`."""
    means = drawn.mean(axis=1)
    floor = means[:, arranged.places[Cell.FLOOR, NO_PURIFIER]]
    effects = {}
    for name in names:
        clean, left = (means[:, arranged.places[cell, name]] for cell in (Cell.PURIFIED, Cell.PURIFIED_PROTECTED))
        effects[name] = ratio(clean - left, clean - floor)
    return effects | {WORST: np.min(list(effects.values()), axis=0)}
