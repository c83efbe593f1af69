"""The statistics of the four cells, on planted numbers.

Contract: 1. the control of a purified protected image is the purified clean one; 2. the worst case is under every row,
also inside the bootstrap; 3. neither the order of scores nor that of files decides anything; 4. an error is no miss
and a cell that fails its gate is never "protected"; 5. a claim needs units, and its correction.
"""

from __future__ import annotations

import json
import math
import random
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.verify.bootstrap import Interval, Plan
from pipeline.verify.cells import build_tables, verdict
from pipeline.verify.scores import Cell, Score
from pipeline.verify.tables import Gate, Question, State, Table, Verdict

FAST = Plan(resamples=500)
CLEAN, PURIFIED, PROTECTED, BOTH = Cell.CLEAN, Cell.PURIFIED, Cell.PROTECTED, Cell.PURIFIED_PROTECTED
FLOOR, CEILING, PLACEBO = Cell.FLOOR, Cell.CEILING, Cell.PLACEBO
IDENTITY = Question(metric="identity", primary=True)


def planted(
    levels: dict[tuple[Cell, str], float], *, units: int = 12, seeds: int = 1, images: int = 2, noise: float = 0.02
) -> list[Score]:
    """Scores around a level per cell; a unit's own offset is in all of its cells."""
    draws = np.random.default_rng(7)
    offsets = draws.normal(0, 0.1, units)
    return [
        Score(
            attack="dreambooth",
            metric="identity",
            unit=f"subject-{unit}",
            cell=cell,
            purifier=purifier,
            image=f"{image}",
            prompt="a photo of {}",
            seed=seed,
            value=level + offsets[unit] + draws.normal(0, noise),
        )
        for (cell, purifier), level in levels.items()
        for unit in range(units)
        for seed in range(seeds)
        for image in range(images)
    ]


FOUR = {
    (CLEAN, "none"): 0.8,
    (PROTECTED, "none"): 0.4,
    (PURIFIED, "jpeg75"): 0.7,
    (BOTH, "jpeg75"): 0.55,
    (PURIFIED, "blur"): 0.75,
    (BOTH, "blur"): 0.45,
    (FLOOR, "none"): 0.2,
    (CEILING, "none"): 0.9,
}


def only_table(scores: list[Score], question: Question = IDENTITY, **options: object) -> Table:
    (table,) = build_tables(scores, [question], plan=FAST, **options)  # type: ignore[arg-type]
    return table


@pytest.fixture(scope="module")
def table() -> Table:
    return only_table(planted(FOUR))


def test_every_contrast_is_what_was_planted(table: Table) -> None:
    jpeg = next(row for row in table.rows if row.purifier == "jpeg75")
    assert table.summary is not None
    planted_figures = {
        jpeg.residual: 0.15,
        jpeg.damage: 0.1,
        jpeg.lost: 0.25,
        jpeg.retention: 0.375,
        jpeg.effect: 0.3,
        table.summary.protection: 0.4,
        table.summary.attack_gain: 0.6,
        table.summary.worst_mean: 0.15,
        table.summary.worst_effect: 0.3,
        table.summary.attacker_loss: 0.25,
    }
    for figure, value in planted_figures.items():
        assert figure is not None
        assert figure.value == pytest.approx(value, abs=0.03)
        assert figure.low is not None
        assert figure.high is not None
        assert figure.low < figure.value < figure.high
    assert (table.summary.worst_purifier, table.summary.best_pipeline) == ("jpeg75", "jpeg75")
    assert table.cells == {
        "A": pytest.approx(0.8, abs=0.1),
        "C": pytest.approx(0.4, abs=0.1),
        "F": pytest.approx(0.2, abs=0.1),
        "R": pytest.approx(0.9, abs=0.1),
    }
    assert table.state is State.MEASURED
    assert all(gate.passed for gate in table.gates)
    assert table.summary.verdict is Verdict.SHOWN


def test_no_purifier_is_a_row_with_nothing_lost(table: Table) -> None:
    none = table.rows[0]
    assert table.summary is not None
    assert none.purifier == "none"
    assert none.residual == table.summary.protection
    assert none.damage == none.lost == Interval(value=0.0, low=0.0, high=0.0)
    assert none.effect is not None
    assert none.effect.value == pytest.approx(2 / 3, abs=0.05)


def test_a_tables_json_holds_every_number(table: Table) -> None:
    document = json.loads(json.dumps(table.to_dict(), allow_nan=False))
    assert document["rows"][2]["residual"]["value"] == table.rows[2].residual.value  # type: ignore[union-attr]
    assert document["bootstrap"] == {
        "kind": "percentile", "confidence": 0.95, "resamples": 500, "seed": 0, "levels": ["unit"],
    }  # fmt: skip
    assert document["publishable"] is False, "one training seed"
    assert set(document["unit_residuals"]["blur"]) == {f"subject-{unit}" for unit in range(12)}


def test_the_order_of_scores_does_not_matter(table: Table) -> None:
    scores = planted(FOUR)
    random.Random(3).shuffle(scores)
    assert only_table(scores).to_dict() == table.to_dict()


def test_identical_cells_leave_nothing() -> None:
    same = {column: 0.6 for column in FOUR if column[0] not in (FLOOR, CEILING)}
    for row in only_table(planted(same, noise=0.0)).rows:
        assert row.residual == Interval(value=0.0, low=0.0, high=0.0)
        assert row.verdict is Verdict.NONE


values = st.floats(-1, 1, allow_nan=False, width=32)


@settings(max_examples=25)
@given(st.lists(st.lists(values, min_size=6, max_size=6), min_size=3, max_size=5))
def test_the_worst_case_is_under_every_row(rows: list[list[float]]) -> None:
    columns = list(FOUR)[:6]
    scores = [
        Score(attack="a", metric="identity", unit=f"{u}", cell=cell, purifier=purifier, image="0", value=value)
        for u, row in enumerate(rows)
        for (cell, purifier), value in zip(columns, row, strict=True)
    ]
    table = only_table(scores)
    assert table.summary is not None
    for row in table.rows:
        assert row.residual is not None
        assert table.summary.worst_unit.value <= table.summary.worst_mean.value + 1e-12
        assert table.summary.worst_mean.value <= row.residual.value
        assert (table.summary.worst_mean.low or 0) <= (row.residual.low or 0)
        assert (table.summary.worst_mean.high or 0) <= (row.residual.high or 0)
        assert table.summary.attacker_loss.value <= table.summary.protection.value


def test_the_minimum_is_taken_inside_every_resample() -> None:
    """Of two equal purifiers with noise, the expected minimum lies below either; its interval must say so."""
    levels = {column: FOUR[column] for column in list(FOUR)[:2]}
    for name in ("x", "y"):
        levels |= {(PURIFIED, name): 0.7, (BOTH, name): 0.6}
    table = only_table(planted(levels, noise=0.1))
    assert table.summary is not None
    lows = [row.residual.low for row in table.rows if row.residual is not None]
    assert table.summary.worst_mean.low is not None
    assert table.summary.worst_mean.low < min(low for low in lows if low is not None)


def test_the_null_of_the_pessimistic_line_is_below_zero() -> None:
    placebo = {(PLACEBO, "none"): 0.8, (PLACEBO, "jpeg75"): 0.7, (PLACEBO, "blur"): 0.75}
    summary = only_table(planted(FOUR | placebo)).summary
    assert summary is not None
    assert summary.worst_unit_null is not None
    assert -0.1 < summary.worst_unit_null.value < 0


def test_a_metric_where_more_is_better_turns_contrasts_but_not_cells(table: Table) -> None:
    turned = only_table([replace(score, value=-score.value) for score in planted(FOUR) if score.value is not None],
                        replace(IDENTITY, better="up"))  # fmt: skip
    assert turned.summary == table.summary
    for up, down in zip(turned.rows, table.rows, strict=True):
        assert (up.clean, up.residual, up.verdict) == (-(down.clean or 0), down.residual, down.verdict)


def test_a_weak_attack_makes_the_table_invalid() -> None:
    weak = only_table(planted(FOUR | {(CEILING, "none"): 3.0}))
    assert weak.state is State.INVALID
    assert weak.summary is not None
    assert weak.summary.verdict is None
    assert all(row.verdict is None for row in weak.rows)
    failing = only_table(planted(FOUR | {(FLOOR, "none"): 0.8, (CEILING, "none"): 0.8}))
    assert failing.state is State.INVALID
    gate = next(gate for gate in failing.gates if gate.name.startswith("attack"))
    assert (gate.passed, "lower limit" in gate.detail) == (False, True)


def test_without_a_floor_the_gate_is_open_and_there_are_no_shares() -> None:
    table = only_table(planted({column: level for column, level in FOUR.items() if column[0] is not FLOOR}))
    assert table.summary is not None
    assert [gate.passed for gate in table.gates] == [True, True, None]
    assert table.summary.worst_effect is None
    assert all(row.effect is None for row in table.rows)


def test_a_purifier_that_destroys_the_subject_is_in_no_worst_case(table: Table) -> None:
    ruin = {(PURIFIED, "ruin"): 0.25, (BOTH, "ruin"): 0.25}
    ruined = only_table(planted(FOUR) + [s for s in planted(FOUR | ruin) if s.purifier == "ruin"])
    row = next(row for row in ruined.rows if row.purifier == "ruin")
    assert row.state is State.INVALID
    assert row.verdict is None
    assert "clean images" in row.reason
    assert ruined.summary is not None
    assert table.summary is not None
    assert ruined.summary.worst_mean == table.summary.worst_mean


def test_not_run_is_a_row_without_numbers() -> None:
    table = only_table(planted(FOUR), not_run={"diffpure": "no pixel model given"})
    row = table.rows[-1]
    assert (row.purifier, row.state, row.reason, row.residual) == (
        "diffpure", State.NOT_RUN, "no pixel model given", None,
    )  # fmt: skip


def failed(score: Score) -> Score:
    return replace(score, value=None, error="RuntimeError: no memory")


def test_errors_are_counted_and_leave_the_draw_out_of_all_cells() -> None:
    """One failure in 800 scores of a row: the rest stays paired, so a constant effect is still exact."""
    levels = {column: FOUR[column] for column in list(FOUR)[:4]}
    scores = planted(levels, units=10, images=40, noise=0.0)
    # Easy images score higher in every cell; leaving one out of a single cell would bias the contrast.
    scores = [replace(s, value=(s.value or 0) + (1.0 if s.image == "0" else 0.0)) for s in scores]
    place = next(i for i, s in enumerate(scores) if s.image == "0" and s.cell is BOTH)
    scores[place] = failed(scores[place])
    table = only_table(scores)
    assert table.counts == {"done": 1599, "error": 1}
    assert table.state is State.MEASURED
    assert table.rows[1].residual is not None
    assert table.rows[1].residual.value == pytest.approx(0.15)
    assert list(table.unit_residuals["jpeg75"].values()) == [pytest.approx(0.15)] * 10


def test_too_many_errors_make_a_row_an_error_and_not_a_success() -> None:
    scores = [failed(s) if s.purifier == "blur" and s.image == "0" else s for s in planted(FOUR)]
    table = only_table(scores)
    blur = next(row for row in table.rows if row.purifier == "blur")
    assert (blur.state, blur.residual) == (State.ERROR, None)
    assert table.state is State.MEASURED, "the other rows stand"
    clean = only_table([failed(s) if s.cell is CLEAN and s.image == "0" else s for s in planted(FOUR)])
    assert clean.state is State.INVALID
    assert clean.summary is None
    floor = only_table([failed(s) if s.cell is FLOOR and s.image == "0" else s for s in planted(FOUR)])
    assert (floor.state, [gate.name for gate in floor.gates if not gate.passed]) == (State.INVALID, ["errors"])


def test_cells_that_do_not_share_their_draws_are_invalid() -> None:
    table = only_table([s for s in planted(FOUR) if not (s.cell is BOTH and s.purifier == "blur" and s.image == "1")])
    blur = next(row for row in table.rows if row.purifier == "blur")
    assert blur.state is State.INVALID
    assert "12 draws" in blur.reason
    assert next(row for row in table.rows if row.purifier == "jpeg75").state is State.MEASURED


def test_a_gate_checked_elsewhere_makes_the_table_invalid() -> None:
    gate = Gate(name="detector", passed=False, detail="finds 80 % of real faces")
    table = only_table(planted(FOUR), gates={("dreambooth", "identity"): [gate]})
    assert table.state is State.INVALID
    assert gate in table.gates


def test_retention_needs_protection_to_be_kept() -> None:
    without = only_table(planted(FOUR | {(PROTECTED, "none"): 0.8}))
    assert all(row.retention is None for row in without.rows)


def test_few_units_claim_nothing_and_show_the_exact_p() -> None:
    table = only_table(planted(FOUR, units=6))
    assert {row.verdict for row in table.rows} == {Verdict.UNRESOLVED}
    assert [row.sign_flip_p for row in table.rows] == [2 / 2**6] * 3
    assert only_table(planted(FOUR, units=1)).rows[0].residual == replace(
        only_table(planted(FOUR, units=1)).rows[0].residual, low=None, high=None
    )


def test_three_seeds_are_resampled_too_and_their_spread_is_shown() -> None:
    table = only_table(planted(FOUR, units=20, seeds=3, noise=0.2))
    assert table.bootstrap["levels"] == ["unit", "seed"]
    assert table.bootstrap["kind"] == "BCa"
    assert table.publishable
    # B - D of one seed: two cells, two images each. Forty degrees of freedom.
    assert table.rows[1].seed_deviation == pytest.approx(0.2, abs=0.03)
    assert only_table(planted(FOUR)).rows[1].seed_deviation is None


def test_secondary_metrics_take_no_verdict_from_the_primary_one() -> None:
    """Ten units and six purifiers: alone they just hold, and whatever is measured beside must not change it."""
    rows = {(cell, f"p{n}"): 0.7 if cell is PURIFIED else 0.5 for n in range(6) for cell in (PURIFIED, BOTH)}
    without = {(CLEAN, "none"): 0.8, (PROTECTED, "none"): 0.4, (FLOOR, "none"): 0.2, (CEILING, "none"): 0.9}
    scores = planted({**without, **rows}, units=10)
    many = [replace(score, metric=f"m{number}") for number in range(4) for score in scores]
    questions = [IDENTITY, *(Question(metric=f"m{number}") for number in range(4))]
    alone = only_table(scores)
    tables = build_tables(many + scores, questions, plan=FAST)
    assert tables[0] == alone
    assert [row.claim_p_holm for row in alone.rows] == pytest.approx([7 / 1024] * 7)
    assert {row.verdict for row in alone.rows} == {Verdict.SHOWN}
    # The others pay for their own number: four times seven claims.
    for table in tables[1:]:
        assert [row.claim_p_holm for row in table.rows] == pytest.approx([28 / 1024] * 7)
        assert {row.verdict for row in table.rows} == {Verdict.UNRESOLVED}
        assert table.summary is not None
        assert table.summary.verdict is Verdict.UNRESOLVED


def test_questions_and_scores_that_make_no_sense_are_refused() -> None:
    scores = planted(FOUR)
    with pytest.raises(ValueError, match="primary"):
        build_tables(scores, [Question(metric="identity")])
    with pytest.raises(ValueError, match="one question"):
        build_tables(scores, [IDENTITY, IDENTITY])
    with pytest.raises(ValueError, match="two scores"):
        build_tables([*scores, scores[0]], [IDENTITY])
    with pytest.raises(ValueError, match="not finite"):
        replace(scores[0], value=math.nan)
    with pytest.raises(ValueError, match="not both"):
        replace(scores[0], error="x")
    with pytest.raises(ValueError, match="name their purifier"):
        replace(scores[0], purifier="jpeg75")


@pytest.mark.parametrize(
    ("low", "high", "units", "p", "expected"),
    [
        (0.06, 0.2, 10, 0.0, Verdict.SHOWN),
        (0.06, 0.2, 9, 0.0, Verdict.UNRESOLVED),
        (0.06, 0.2, 10, 0.03, Verdict.UNRESOLVED),
        (0.04, 0.2, 10, 0.0, Verdict.UNRESOLVED),
        (-0.1, 0.04, 10, 0.9, Verdict.NONE),
    ],
)
def test_wording(low: float, high: float, units: int, p: float, expected: Verdict) -> None:
    assert verdict(Interval(value=(low + high) / 2, low=low, high=high), 0.05, units, p=p) is expected
