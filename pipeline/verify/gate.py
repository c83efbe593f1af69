"""Decides whether a shard's protection is good enough to ship, and remembers every decision."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from pipeline.errors import PipelineError
from pipeline.job import Job
from pipeline.plan import Shard
from pipeline.storage import Store, get_json, put_json_new
from pipeline.verify.check import AT_TRAINING_SCALE, UNPURIFIED, sampled_rows, stored_checks
from pipeline.verify.statistics import survival
from pipeline.verify.tables import State
from pipeline.verify.trials import stored_tables

Outcome = Literal["pass", "flag", "fail", "strengthen"]


class GateFailed(PipelineError):
    """A shard's protection is not good enough, and its policy forbids to commit it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """What the gate said of a shard on one rung of the ladder."""

    rung: int
    preset: str
    outcome: Outcome
    metric: str
    # The worst value over the purifiers that count, and its purifier; None where nothing could be measured.
    value: float | None
    low: float | None
    high: float | None
    purifier: str | None
    threshold: float
    # Why there is no value.
    reason: str = ""

    def __str__(self) -> str:
        measured = self.reason or f"{self.metric} {self.value:.2f} after {self.purifier}"
        return f"{measured}, {self.threshold:g} is wanted: {self.outcome} (preset {self.preset})"


def decide(job: Job, shard: Shard) -> Decision:
    """The decision on a shard whose checks are all stored. Idempotent: the stored decision wins."""
    destination = job.destination()
    document = asdict(_decide(job, shard))
    _, stored = put_json_new(destination, _key(shard), {"writer_id": uuid.uuid4().hex, **document})
    return _decision(stored)


def history(destination: Store, shard: Shard) -> list[Decision]:
    """The stored decisions on a shard, from the first rung on."""
    keys = sorted(item.key for item in destination.list(f"gates/{shard.shard_id}/"))
    return [_decision(get_json(destination, key)) for key in keys]


def at_current_rung(job: Job, shard: Shard) -> Shard:
    """The shard on the rung of the ladder that earlier runs have brought it to."""
    if not job.config.job.check.gate.ladder:
        return shard
    raised = sum(item.outcome == "strengthen" for item in history(job.destination(), shard))
    return replace(shard, rung=raised)


def _key(shard: Shard) -> str:
    return f"gates/{shard.shard_id}/{shard.rung:02d}.json"


def _decision(document: dict[str, Any]) -> Decision:
    return Decision(**{name: value for name, value in document.items() if name != "writer_id"})


def _decide(job: Job, shard: Shard) -> Decision:
    gate = job.config.job.check.gate
    measured = _survival(job, shard) if gate.metric == "survival" else _effect(job, shard)
    nothing_to_ship = not sampled_rows(job, shard)
    good = nothing_to_ship or (measured.value is not None and measured.value >= gate.threshold)
    outcome: Outcome = gate.action
    if good:
        outcome = "pass"
    elif gate.action == "strengthen" and shard.rung == len(gate.ladder):
        outcome = gate.finally_
    presets = (job.config.job.method.preset, *gate.ladder)
    return replace(measured, outcome=outcome, preset=presets[shard.rung], reason="" if good else measured.reason)


def _nothing(job: Job, shard: Shard, reason: str) -> Decision:
    gate = job.config.job.check.gate
    return Decision(
        rung=shard.rung,
        preset="",
        outcome="pass",
        metric=gate.metric,
        value=None,
        low=None,
        high=None,
        purifier=None,
        threshold=gate.threshold,
        reason=reason,
    )


def _survival(job: Job, shard: Shard) -> Decision:
    gate = job.config.job.check.gate
    found = survival([check.objective for check in stored_checks(job.destination(), shard).values()])
    counted = [
        item
        for item in found
        if item.purifier != UNPURIFIED and _counts(item.purifier.removesuffix(AT_TRAINING_SCALE), gate.purifiers)
    ]
    shares = [(item.share, item) for item in counted if item.share is not None]
    if len(shares) < len(counted) or not shares:
        return _nothing(job, shard, "nothing was gained that could survive")
    value, worst = min(shares, key=lambda pair: pair[0])
    return replace(_nothing(job, shard, ""), value=value, low=worst.low, high=worst.high, purifier=worst.purifier)


def _effect(job: Job, shard: Shard) -> Decision:
    gate = job.config.job.check.gate
    tables = stored_tables(job, [shard])
    if not tables:
        return _nothing(job, shard, "there are not enough images for a group")
    (table,) = tables
    if table.state is not State.MEASURED:
        failed = "; ".join(item.detail for item in table.gates if item.passed is False)
        return _nothing(job, shard, f"the measurement is invalid: {failed}")
    effects = [
        (row.effect.value, row)
        for row in table.rows
        if row.effect is not None and (row.purifier == UNPURIFIED or _counts(row.purifier, gate.purifiers))
    ]
    if not effects:
        return _nothing(job, shard, "personalization on clean images gains nothing that protection could prevent")
    value, worst = min(effects, key=lambda pair: pair[0])
    interval = worst.effect
    low, high = (None, None) if interval is None else (interval.low, interval.high)
    return replace(_nothing(job, shard, ""), value=value, low=low, high=high, purifier=worst.purifier)


def _counts(purifier: str, chosen: Sequence[str]) -> bool:
    return not chosen or purifier in chosen
