"""Decides whether a shard's protection is good enough to ship, and remembers every decision."""

from __future__ import annotations

import uuid
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from pipeline import metrics
from pipeline.job import Job
from pipeline.plan import Shard
from pipeline.storage import Store, get_json, put_json_new
from pipeline.verify.bootstrap import Interval
from pipeline.verify.check import AT_TRAINING_SCALE, sampled_rows, stored_checks
from pipeline.verify.scores import NO_PURIFIER
from pipeline.verify.statistics import survival
from pipeline.verify.tables import State
from pipeline.verify.trials import stored_tables

Outcome = Literal["pass", "flag", "fail", "strengthen"]
LEAST_GROUPS = 3


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
        measured = f"{self.metric} {self.value:.2f} after {self.purifier}" if self.value is not None else self.reason
        return f"{measured}, {self.threshold:g} is wanted: {self.outcome} (preset {self.preset})"


def decide(job: Job, shard: Shard) -> Decision:
    """The decision on a shard whose checks are all stored. Idempotent: the stored decision wins."""
    destination = job.destination()
    document = asdict(_decide(job, shard))
    ours, stored = put_json_new(destination, _key(shard), {"writer_id": uuid.uuid4().hex, **document})
    decision = _decision(stored)
    if ours:
        method = job.config.job.method.name
        metrics.GATE_DECISIONS.record(method=method, outcome=decision.outcome)
        if decision.value is not None:
            metrics.GATE_VALUE.record(decision.value, method=method, metric=decision.metric)
    return decision


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
    presets = (job.config.job.method.preset, *gate.ladder)
    measured = _survival(job, shard) if gate.metric == "survival" else _effect(job, shard)
    blank = replace(measured, preset=presets[shard.rung])
    if gate.action == "pass":
        return replace(blank, outcome="pass")
    if measured.value is None:
        nothing_to_ship = shard.rung == 0 and not sampled_rows(job, shard)
        return replace(blank, outcome="pass" if nothing_to_ship else gate.unmeasured)
    if measured.value >= gate.threshold:
        return replace(blank, outcome="pass")
    if gate.action == "strengthen" and shard.rung == len(gate.ladder):
        return replace(blank, outcome=gate.finally_)
    return replace(blank, outcome=gate.action)


def _unmeasured(job: Job, shard: Shard, reason: str) -> Decision:
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
    chosen = job.config.job.check.gate.purifiers
    found = survival([check.objective for check in stored_checks(job.destination(), shard).values()])
    counted = [
        item
        for item in found
        if item.purifier != NO_PURIFIER and (not chosen or item.purifier.removesuffix(AT_TRAINING_SCALE) in chosen)
    ]
    shares = [(item.share, item) for item in counted if item.share is not None]
    if not shares:
        return _unmeasured(job, shard, "nothing was gained that could survive" if found else "no image was checked")
    value, worst = min(shares, key=lambda pair: pair[0])
    return replace(_unmeasured(job, shard, ""), value=value, low=worst.low, high=worst.high, purifier=worst.purifier)


def _effect(job: Job, shard: Shard) -> Decision:
    check = job.config.job.check
    tables = stored_tables(job, [shard])
    if not tables or tables[0].units < LEAST_GROUPS:
        found = tables[0].units if tables else 0
        return _unmeasured(job, shard, f"{found} groups could be made of its images, {LEAST_GROUPS} are needed")
    table = tables[0]
    if table.state is not State.MEASURED:
        failed = "; ".join(item.detail for item in table.gates if item.passed is False)
        return _unmeasured(job, shard, f"the measurement is invalid: {failed}")
    rows = {row.purifier: row for row in table.rows}
    worst: tuple[Interval, str] | None = None
    # Without purification, and after each that counts: one that cannot be judged must not pass for a good one.
    for name in (NO_PURIFIER, *(check.gate.purifiers or check.customize_after)):
        row = rows.get(name)
        if row is not None and row.state is State.INVALID:
            continue  # it ruins clean images too: no attacker would use it
        if row is None or row.state is not State.MEASURED or row.effect is None:
            reason = (
                "it was not measured" if row is None else row.reason or "personalization on clean images gains nothing"
            )
            return _unmeasured(job, shard, f"after {name}: {reason}")
        if worst is None or row.effect.value < worst[0].value:
            worst = row.effect, name
    if worst is None:
        return _unmeasured(job, shard, "every purifier ruins clean images too")
    effect, name = worst
    return replace(_unmeasured(job, shard, ""), value=effect.value, low=effect.low, high=effect.high, purifier=name)
