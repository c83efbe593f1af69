"""The gate on customization: no measurement that is missing, broken or meaningless may pass for a good one."""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.job import Job
from pipeline.plan import Shard
from pipeline.storage import put_json_new
from pipeline.verify.gate import decide
from pipeline.verify.scores import Cell, Score
from pipeline.verify.trial import METRIC
from pipeline.verify.trials import planned_trials, selection_of, specimens_of, trials_of
from tests.pipeline.archives import photo
from tests.pipeline.local_job import job_config, ready

# What an attacker gets on clean images, on protected ones, after the purifier; before and at most.
PLAIN = {Cell.FLOOR: 0.3, Cell.CLEAN: 0.8, Cell.PROTECTED: 0.4, Cell.PURIFIED: 0.7, Cell.PURIFIED_PROTECTED: 0.6}
CEILING = 0.9


def checked(tmp_path: Path, subjects: int, gate: dict[str, Any]) -> tuple[Job, Shard]:
    (tmp_path / "in").mkdir()
    rows = [
        {"asset_id": f"r{n}", "image": {"bytes": photo(n), "path": None}, "who": f"s{n % subjects}"}
        for n in range(3 * subjects)
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "in" / "a.parquet")
    settings = {"metric": "effect", "action": "fail", "threshold": 0.2, **gate}
    check = {"groups": 4, "subject_column": "who", "customize_after": ["jpeg75"], "gate": settings}
    job, plan = ready(job_config(tmp_path / "in", tmp_path / "out", check=check))
    return job, plan.shards[0]


def measured(job: Job, shard: Shard, values: dict[Cell, float | None]) -> None:
    """Stores the results of all trials as if they had been run."""
    planned = planned_trials(specimens_of(job, shard), selection_of(job, shard), trials_of(shard))
    for place, (group, keys) in enumerate(planned):
        for (cell, purifier), key in keys.items():
            value = values[cell]
            scores = [score(group.name, cell, purifier, None if value is None else value + 0.01 * place)]
            if cell is Cell.FLOOR:
                scores.append(score(group.name, Cell.CEILING, "none", CEILING))
            document = {"writer_id": uuid.uuid4().hex, "scores": [item.to_dict() for item in scores]}
            put_json_new(job.destination(), key, document)


def score(unit: str, cell: Cell, purifier: str, value: float | None) -> Score:
    error = "broken" if value is None else None
    return Score(
        attack="dreambooth", metric=METRIC, unit=unit, cell=cell, purifier=purifier, image="0", value=value, error=error
    )


@pytest.mark.parametrize(
    ("values", "gate", "outcome", "purifier", "words"),
    [
        ({}, {}, "pass", "jpeg75", ""),  # 0.1 of 0.4 is prevented
        ({}, {"threshold": 0.3}, "fail", "jpeg75", ""),
        ({}, {"threshold": 0.3, "action": "flag"}, "flag", "jpeg75", ""),
        ({Cell.PURIFIED_PROTECTED: None}, {}, "flag", None, "after jpeg75"),
        ({Cell.PURIFIED_PROTECTED: None}, {"unmeasured": "fail"}, "fail", None, "after jpeg75"),
        ({Cell.CLEAN: 0.3, Cell.PURIFIED: 0.3}, {}, "flag", None, "invalid"),  # the attack fails on clean images
        # A purifier that ruins clean images too is nobody's choice: what counts is without it.
        ({Cell.PURIFIED: 0.31, Cell.PURIFIED_PROTECTED: 0.31}, {}, "pass", "none", ""),
    ],
)
def test_what_is_decided(
    tmp_path: Path,
    values: dict[Cell, float | None],
    gate: dict[str, Any],
    outcome: str,
    purifier: str | None,
    words: str,
) -> None:
    job, shard = checked(tmp_path, 3, gate)
    measured(job, shard, {**PLAIN, **values})
    decision = decide(job, shard)
    assert (decision.outcome, decision.purifier) == (outcome, purifier), decision
    assert words in decision.reason
    if purifier == "jpeg75":
        assert decision.value == pytest.approx(0.1 / 0.4, abs=0.01)


def test_too_few_groups_are_no_measurement(tmp_path: Path) -> None:
    job, shard = checked(tmp_path, 2, {})
    measured(job, shard, dict(PLAIN))
    decision = decide(job, shard)
    assert (decision.outcome, decision.value) == ("flag", None)
    assert "2 groups could be made of its images, 3 are needed" in decision.reason
