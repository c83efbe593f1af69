"""The four-cell control: one table per attack and metric, whether it may be read, and what may be said of it.

Cells per unit, with M = attack success and P = purifier: A = M(clean), B = M(P(clean)), C = M(protected),
D = M(P(protected)), F = floor, R = ceiling. What is left of the protection is B - D: the purified clean image is the
control, or the purifier's own damage would be counted as protection.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from pipeline.verify.bootstrap import Interval, Plan, holm
from pipeline.verify.contrasts import Contrasts
from pipeline.verify.scores import NO_PURIFIER, Arranged, Cell, Grid, Score, arrange
from pipeline.verify.tables import FEW_UNITS, Gate, Question, Row, State, Summary, Table, Verdict

ATTACK_GATE = "attack works on clean images"
_CLAIM_LEVEL = 0.025  # one-sided, as the lower limit of a 95 % interval


def build_tables(
    scores: Sequence[Score],
    questions: Sequence[Question],
    *,
    not_run: Mapping[str, str] | None = None,
    gates: Mapping[tuple[str, str], Sequence[Gate]] | None = None,
    plan: Plan | None = None,
) -> list[Table]:
    """One table per attack and asked metric, with Holm's correction over the rows of all primary ones.

    Those of the other metrics are corrected among themselves: what is measured beside takes no verdict away.

    Args:
        scores: of all attacks, metrics, cells and units; their order does not matter, and metrics that are not
            asked about are left out.
        questions: one per metric, one of them primary.
        not_run: purifier to reason, for those that were planned and have no scores.
        gates: by (attack, metric), what was checked elsewhere, e.g. the face detector or the stored budget.
        plan: of the bootstrap; 10,000 resamples from seed 0 by default.

    Raises:
        ValueError: two questions about a metric, not exactly one primary, or two scores of one draw.
    """
    if len({question.metric for question in questions}) != len(questions):
        raise ValueError("ask one question per metric")
    if sum(question.primary for question in questions) != 1:
        raise ValueError("name exactly one primary metric, before the run")
    tables = []
    for attack in sorted({score.attack for score in scores}):
        for question in questions:
            own = [score for score in scores if (score.attack, score.metric) == (attack, question.metric)]
            if own:
                table = _table(Grid(own), question, not_run or {}, plan or Plan())
                given = (gates or {}).get((attack, question.metric), ())
                tables.append(_gated(table, given))
    return _judged(tables)


def _table(grid: Grid, question: Question, not_run: Mapping[str, str], plan: Plan) -> Table:
    rows = {name: _checked(grid, name, question) for name in grid.purifiers}
    for name in sorted(set(not_run) - set(rows)):
        rows[name] = Row(purifier=name, state=State.NOT_RUN, reason=not_run[name])
    gates = [_pairing_gate(grid), _error_gate(grid, rows, question)]
    usable = [name for name, row in rows.items() if row.state is State.MEASURED]
    arranged = arrange(grid, usable, sign=question.sign) if NO_PURIFIER in usable else None
    table = Table(
        attack=grid.attack,
        question=question,
        state=State.MEASURED,
        gates=gates,
        rows=list(rows.values()),
        counts=grid.counts,
    )
    return table if arranged is None else _filled(table, arranged, Contrasts(arranged, usable, question, plan), plan)


def _checked(grid: Grid, purifier: str, question: Question) -> Row:
    if (mismatch := grid.mismatch(purifier)) is not None:
        return Row(purifier=purifier, state=State.INVALID, reason=mismatch)
    if (share := grid.error_share(purifier)) > question.error_share:
        return Row(purifier=purifier, state=State.ERROR, reason=f"{share:.1%} of its scores failed")
    return Row(purifier=purifier, state=State.MEASURED)


def _filled(table: Table, arranged: Arranged, contrasts: Contrasts, plan: Plan) -> Table:
    sign = table.question.sign
    summary = contrasts.summary()
    means = {cell: contrasts.mean(cell) for cell in (Cell.CLEAN, Cell.PROTECTED, Cell.FLOOR, Cell.CEILING)}
    seeds = arranged.sample.seeds
    return replace(
        table,
        gates=[*table.gates, _attack_gate(means, summary.attack_gain, table.question)],
        rows=[contrasts.row(row.purifier) if row.state is State.MEASURED else row for row in table.rows],
        cells={cell.value: None if mean is None else sign * mean for cell, mean in means.items()},
        units=len(arranged.units),
        dropped=arranged.dropped,
        seeds=(int(seeds.min()), int(seeds.max())),
        bootstrap=plan.describe(arranged.sample),
        unit_residuals=contrasts.unit_residuals(),
        summary=summary,
    )


def _pairing_gate(grid: Grid) -> Gate:
    mismatch = grid.mismatch(NO_PURIFIER)
    return Gate(name="pairing", passed=mismatch is None, detail=mismatch or "clean and protected share their draws")


def _error_gate(grid: Grid, rows: Mapping[str, Row], question: Question) -> Gate:
    # A purifier that failed is a row of state "error"; it does not spoil the others.
    broken = {name for name, row in rows.items() if row.state is State.ERROR} - {NO_PURIFIER}
    values = [value for (_, name), draws in grid.columns.items() if name not in broken for value in draws.values()]
    share = sum(value is None for value in values) / len(values) if values else 0.0
    passed = share <= question.error_share and rows[NO_PURIFIER].state is not State.ERROR
    return Gate(name="errors", passed=passed, detail=f"{share:.2%} of the scores failed")


def _attack_gate(means: Mapping[Cell, float | None], gain: Interval | None, question: Question) -> Gate:
    """Weak attacks manufacture protection: on clean images the attacker must surely win something, and enough."""
    name = ATTACK_GATE
    clean, floor, ceiling = means[Cell.CLEAN], means[Cell.FLOOR], means[Cell.CEILING]
    if clean is None or floor is None or gain is None:
        return Gate(name=name, passed=None, detail="no floor measured")
    if gain.low is None:
        return Gate(name=name, passed=None, detail="one unit has no interval")
    if gain.low <= 0:
        return Gate(name=name, passed=False, detail=f"the lower limit of its gain is {gain.low:.3f}")
    if ceiling is None:
        return Gate(name=name, passed=None, detail="it gains, but no ceiling was measured")
    if clean < floor + question.attack_share * (ceiling - floor):
        detail = (
            f"its gain is {clean - floor:.3f}, under {question.attack_share:.0%} of the {ceiling - floor:.3f} there is"
        )
        return Gate(name=name, passed=False, detail=detail)
    return Gate(name=name, passed=True, detail=f"its gain is {clean - floor:.3f} of {ceiling - floor:.3f}")


def _gated(table: Table, given: Sequence[Gate]) -> Table:
    gates = [*table.gates, *given]
    failed = table.summary is None or any(gate.passed is False for gate in gates)
    return replace(table, gates=gates, state=State.INVALID if failed else State.MEASURED)


def _judged(tables: Sequence[Table]) -> list[Table]:
    """Adds verdicts: the rows of the primary metric are one family of claims, those of all others another."""
    judged = list(tables)
    for primary in (True, False):
        places = [place for place, table in enumerate(tables) if table.question.primary is primary]
        p_values = [row.claim_p for place in places for row in _claims(tables[place]) if row.claim_p is not None]
        corrected = iter(holm(p_values))
        for place in places:
            claimed = {row.purifier: next(corrected) for row in _claims(tables[place])}
            judged[place] = _with_verdicts(tables[place], claimed)
    return judged


def _claims(table: Table) -> list[Row]:
    if table.state is not State.MEASURED:
        return []
    return [row for row in table.rows if row.state is State.MEASURED and row.claim_p is not None]


def _with_verdicts(table: Table, corrected: Mapping[str, float]) -> Table:
    if table.state is not State.MEASURED or table.summary is None:
        return table
    delta = table.question.delta
    rows = []
    for row in table.rows:
        if row.purifier in corrected and row.residual is not None:
            p = corrected[row.purifier]
            row = replace(row, claim_p_holm=p, verdict=verdict(row.residual, delta, table.units, p=p))
        rows.append(row)
    # The worst case is above delta only if every row is: its p-value is the largest.
    p = 0.0 if table.question.primary else max(corrected.values(), default=1.0)
    worst: Summary = replace(table.summary, verdict=verdict(table.summary.worst_mean, delta, table.units, p=p))
    return replace(table, rows=rows, summary=worst)


def verdict(residual: Interval, delta: float, units: int, *, p: float = 0.0) -> Verdict:
    """What may be said of a residual.

    Args:
        residual: B - D, or its worst case.
        delta: the smallest residual that counts as protection.
        units: under ten nothing is claimed.
        p: corrected p-value of "the residual is above delta", for claims that must survive the correction.
    """
    if units < FEW_UNITS or residual.low is None or residual.high is None:
        return Verdict.UNRESOLVED
    if residual.low > delta:
        return Verdict.SHOWN if p <= _CLAIM_LEVEL else Verdict.UNRESOLVED
    return Verdict.NONE if residual.high < delta else Verdict.UNRESOLVED
