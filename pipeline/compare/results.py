"""What a comparison found: fidelity, effects per purifier and in the worst case, and one method against another."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean, median

import numpy as np

from pipeline.compare.methods import Method
from pipeline.compare.plan import AttackSpec, Comparison, PlannedCustomization, PlannedTrial
from pipeline.compare.store import Protected, Results
from pipeline.verify.bootstrap import Floats, Interval, Plan, Sample, figures_with_intervals
from pipeline.verify.cells import build_tables
from pipeline.verify.contrasts import effect
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Differences:
    """One method's effects less another's."""

    # By purifier, and WORST.
    intervals: Mapping[str, Interval] = field(default_factory=dict)
    # Why there is no WORST.
    reason: str = ""


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
    # By the attack's label: its effects less those of the method it is held against.
    differences: dict[str, Differences] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Findings:
    """All numbers of a comparison."""

    comparison: Comparison
    # In the order of the comparison's methods.
    rows: Sequence[MethodResult]
    # Label of the method that all others are held against.
    against: str | None
    # Attack, what it was made on and the error, of every trial that failed.
    failed_trials: Sequence[str] = ()


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
    errors = [f"{_about(trial)}: {error}" for trial in trials if (error := results.error(trial.key)) is not None]
    return Findings(comparison=comparison, rows=rows, against=against, failed_trials=errors)


def question_of(attack: AttackSpec) -> Question:
    """What is asked of an attack's scores."""
    return EDITING if attack.preset is None else QUESTION


def _about(trial: PlannedTrial) -> str:
    """Attack, method, subject and purifier of a trial, in words."""
    method = "clean photos" if trial.protection is None else trial.protection.method.label
    if isinstance(trial, PlannedCustomization):
        return f"{trial.attack.label} of {trial.subject.name}, {method}, purifier {trial.purifier}"
    return f"{trial.attack.label} of {trial.protection.subject.name}/{trial.photo}, {method}"


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


def worst_effect(table: Table) -> Interval | None:
    """The smallest effect over none and all purifiers that count; None where `why_no_worst` says so."""
    return None if table.summary is None or why_no_worst(table) else table.summary.worst_effect


def why_no_worst(table: Table) -> str:
    """Why a table has no worst case; "" where it has one.

    A purifier that ruins clean photos too is in none. One that was not measured might be the worst.
    """
    if missing := [row.purifier for row in table.rows if row.clean is None]:
        return f"not measured: {', '.join(missing)}"
    if missing := [row.purifier for row in table.rows if row.state is State.MEASURED and row.effect is None]:
        return f"no effect: {', '.join(missing)}"
    return ""


def differences(sides: tuple[Sequence[Score], Sequence[Score]], tables: tuple[Table, Table]) -> Differences:
    """The first method's effect less the second's, per purifier and in the worst case, paired by subject.

    An effect is the share of the attacker's gain that is prevented. Above zero the first protects better. All
    subjects of a resample are the same for both.

    Args:
        sides: scores of the two methods under one attack.
        tables: their tables; purifiers that count, and have an effect, in both are compared. There is a worst case
            only if they are the same ones.
    """
    if any(table.state is not State.MEASURED for table in tables):
        return Differences(reason="one of the two tables is not to be read as a claim")
    counted = [[row.purifier for row in table.rows if row.state is State.MEASURED and row.effect is not None]
               for table in tables]  # fmt: skip
    names = [name for name in counted[0] if name in counted[1]]
    if NO_PURIFIER not in names:
        return Differences(reason="one of the two has no effect without a purifier")
    sign = tables[0].question.sign
    first, second = (arrange(Grid(scores), names, sign=sign) for scores in sides)
    units = [unit for unit in first.units if unit in second.units] if first and second else []
    if first is None or second is None or not units:
        return Differences(reason="no subject was measured for both")
    values = [one.sample.means[[one.units.index(unit) for unit in units]] for one in (first, second)]
    width = values[0].shape[1]

    def statistic(drawn: Floats) -> dict[str, Floats]:
        left = _effects(drawn[..., :width], first, names)
        right = _effects(drawn[..., width:], second, names)
        return {name: left[name] - right[name] for name in left}

    found = figures_with_intervals(Sample.of_units(np.concatenate(values, axis=1)), statistic, Plan())
    # Over the subjects that both share, an attack may gain nothing that it gained over all.
    finite = {name: interval for name, interval in found.items() if math.isfinite(interval.value)}
    if why := next(filter(None, map(why_no_worst, tables)), ""):
        finite.pop(WORST, None)
        return Differences(intervals=finite, reason=f"one of the two has no worst case ({why})")
    if set(counted[0]) != set(counted[1]):
        finite.pop(WORST, None)
        return Differences(intervals=finite, reason="not the same purifiers count for both")
    return Differences(intervals=finite, reason="" if WORST in finite else "no gain on the subjects that both share")


def _effects(drawn: Floats, arranged: Arranged, names: Sequence[str]) -> dict[str, Floats]:
    """Effects of resamples `(R, units, columns)`, each `(R,)`."""
    means = drawn.mean(axis=1)
    floor = means[:, arranged.places[Cell.FLOOR, NO_PURIFIER]]
    effects = {}
    for name in names:
        clean, left = (means[:, arranged.places[cell, name]] for cell in (Cell.PURIFIED, Cell.PURIFIED_PROTECTED))
        effects[name] = effect(clean, left, floor)
    return effects | {WORST: np.min(list(effects.values()), axis=0)}
