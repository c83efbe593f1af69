"""The main job as a Prefect flow: plan, then wave by wave protect, check and commit, then publish."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
from prefect import flow, get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State

from flows.artifacts import publish_artifacts, tell_interruption
from flows.progress import logged, observer
from pipeline.config import JobConfig
from pipeline.croissant import write_card
from pipeline.errors import PipelineError, StorageError
from pipeline.inspection import quarantined_now
from pipeline.job import Job
from pipeline.lineage import Written, lineage
from pipeline.manifest import Manifest, read_commits, read_manifests, read_success, says
from pipeline.plan import Plan, Shard, plan_columns
from pipeline.run import Tally, Task, cut_waves, prepare, publish, raised
from pipeline.storage import Store
from pipeline.verify.report import read_verification, write_verification
from pipeline.verify.statistics import Survival

FLOW = "protect-archive"


@dataclass(slots=True, kw_only=True)
class Outcome:
    """What a run came to."""

    job: Job
    plan: Plan
    tally: Tally
    # Of the shards that are published, or will be: not those that others have replaced.
    manifests: list[Manifest] = field(default_factory=list)
    # Quarantined assets whose source is still in the archive as it was.
    quarantined: int = 0
    survival: list[Survival] = field(default_factory=list)
    report_key: str | None = None
    # Shards of the plan that have no manifest.
    uncommitted: list[Shard] = field(default_factory=list)

    @property
    def problems(self) -> list[str]:
        """Why the run is not good; empty when every asset is accounted for and few enough are quarantined."""
        lines = [reason for _, reason in self.plan.unreadable]
        reasons = self.tally.failed
        lines += [f"{shard.shard_id}: {reasons.get(shard.shard_id, 'not committed')}" for shard in self.uncommitted]
        if self.quarantined > self.tally.tolerated:
            lines.append(f"{self.quarantined} assets are quarantined, {self.tally.tolerated:g} are tolerated")
        return lines


class RunIncomplete(PipelineError):
    """The run ended, and not every asset is protected or tolerably quarantined. What is done stays."""

    def __init__(self, outcome: Outcome) -> None:
        super().__init__("; ".join(outcome.problems))
        self.outcome = outcome


def _storage_failed(_task: Any, _run: Any, state: State[Any]) -> bool:
    """Retry what a store may recover from; a wrong configuration stays wrong."""
    return isinstance(state.result(raise_on_failure=False), StorageError)


_RETRIED: dict[str, Any] = {
    "retries": 2,
    "retry_delay_seconds": 10,
    "retry_condition_fn": _storage_failed,
    "cache_policy": NO_CACHE,
}


@task(name="plan", **_RETRIED)
def plan_archive(config: JobConfig) -> tuple[Job, Plan]:
    """Resolves the job, binds the destination and plans the source."""
    return prepare(config)


@task(name="protect-wave", cache_policy=NO_CACHE)
def protect_wave(job: Job, pool: Any, tasks: Sequence[Task], tally: Tally, *, again: bool = False) -> None:
    """Runs the optimizer over one wave of units. Not retried: the store holds what is done, a rerun goes on there."""
    from pipeline.ray_job import Failed, protect_units

    for result in protect_units(job, pool, tasks):
        if isinstance(result, Failed):
            tally.failed[result.shard_id] = result.error
            continue
        tally.add(result, again=again)
        note = f"{tally.quarantined} quarantined" if tally.quarantined else ""
        observer().advance(result.protected + len(result.quarantined), note)


@task(name="check-wave", cache_policy=NO_CACHE)
def check_wave(job: Job, pool: Any, shards: Sequence[Shard], tally: Tally) -> None:
    """Measures the sampled check of finished shards."""
    from pipeline.ray_job import Failed, check_shards

    observer().step("check", len(shards))
    for result in check_shards(job, pool, shards):
        if isinstance(result, Failed):
            tally.failed[result.shard_id] = result.error
    observer().advance(len(shards))


@task(name="gate-wave", cache_policy=NO_CACHE)
def gate_wave(job: Job, shards: Sequence[Shard], tally: Tally) -> tuple[list[Shard], list[Shard]]:
    """Decides on checked shards: those that may be committed, and those that a stronger preset is tried on."""
    from pipeline.ray_job import Failed, decide_shards

    ready: list[Shard] = []
    weak: list[Shard] = []
    for result in decide_shards(job, shards):
        if isinstance(result, Failed):
            tally.failed[result.shard_id] = result.error
            continue
        shard, decision = result
        if decision.outcome != "pass":
            observer().note(f"{shard.shard_id}: {decision}")
        if decision.outcome == "fail":
            tally.failed[shard.shard_id] = f"not committed, its protection is too weak: {decision}"
        else:
            (weak if decision.outcome == "strengthen" else ready).append(shard)
    return ready, weak


@task(name="commit-wave", cache_policy=NO_CACHE)
def commit_wave(job: Job, shards: Sequence[tuple[Shard, pa.Schema]], tally: Tally) -> None:
    """Commits finished shards, each with the output form of its customer's columns."""
    from pipeline.ray_job import Failed, finalize_shards

    observer().step("commit", len(shards))
    for result in finalize_shards(job, shards):
        if isinstance(result, Failed):
            tally.failed[result.shard_id] = result.error
        observer().advance(1)


@task(name="publish", **_RETRIED)
def publish_results(outcome: Outcome) -> None:
    """Writes the verification report and, when every asset of the source is accounted for, ``_SUCCESS.json``."""
    job, plan, destination = outcome.job, outcome.plan, outcome.job.destination()
    committed = read_commits(destination).committed
    outcome.uncommitted = [shard for shard in plan.shards if shard.shard_id not in committed]
    done = [shard for shard in plan.shards if shard.shard_id in committed]
    manifests = read_manifests(destination, [shard.shard_id for shard in done])
    outcome.manifests = [manifest for manifest in manifests if manifest.shard_id not in plan.replaced]
    outcome.quarantined = sum(_quarantined(plan, destination, manifest) for manifest in outcome.manifests)
    published = read_success(destination)
    if published is not None and says(published, [item.key for item in manifests], plan.outdated):
        outcome.report_key = published["report"]  # nothing is new: the last report still tells everything
        outcome.survival = read_verification(destination, published["report"])
        write_card(destination)  # the run that published may have died before it wrote one
        return
    current = [shard for shard in done if shard.shard_id not in plan.replaced]
    outcome.report_key, outcome.survival = write_verification(job, current, outcome.manifests)
    if not outcome.problems:
        publish(job, plan, manifests, outcome.report_key)


def _quarantined(plan: Plan, destination: Store, manifest: Manifest) -> int:
    """Quarantined assets of a shard, but for those that were mended in the source or taken away since."""
    outdated = {key for keys in plan.outdated.values() for key in keys.get(manifest.shard_id, ())}
    return len(quarantined_now(destination, manifest, outdated)) if outdated else manifest.rows_quarantined


@flow(name=FLOW, on_crashed=[tell_interruption], on_cancellation=[tell_interruption])
def protect_archive(config: JobConfig) -> Outcome:
    """Protects what is new or changed in an archive. Run it again at any time: it goes on where it stopped.

    Args:
        config: The job: from where, to where, what decides the results (job), and how it runs (run).

    Raises:
        UserError: The job cannot run as configured.
        RunIncomplete: It ended with problems; holds the outcome.
    """
    with logged(get_run_logger().info), lineage(config, observer().note) as wrote:
        return _protect(config, wrote)


def _protect(config: JobConfig, wrote: Callable[[Written], object]) -> Outcome:
    job, plan = plan_archive(config)
    observer().note(f"source: {plan.changes}")
    tally = Tally(run=config.run, assets=plan.rows)
    committed = read_commits(job.destination()).committed
    todo = [shard for shard in plan.shards if shard.shard_id not in committed]
    tally.resumed = plan.rows - sum(shard.rows for shard in todo)
    if todo:
        _run_waves(job, plan, todo, tally)
    outcome = Outcome(job=job, plan=plan, tally=tally)
    publish_results(outcome)
    publish_artifacts(outcome)
    wrote(Written(job=job, plan=plan, manifests=outcome.manifests))
    if outcome.problems:
        raise RunIncomplete(outcome)
    return outcome


def _run_waves(job: Job, plan: Plan, shards: Sequence[Shard], tally: Tally) -> None:
    from pipeline.ray_job import (  # Ray costs seconds to import; a finished destination needs none
        cluster,
        dashboard_url,
    )

    with cluster(job.config.run, FLOW) as pool:
        observer().note(f"{pool.actors} {pool.device} actors; Ray dashboard: {dashboard_url() or 'off'}")
        for tasks, complete in cut_waves(job, shards, tally):
            observer().step("protect", plan.rows, tally.resumed + tally.protected + tally.quarantined)
            if tasks:
                protect_wave(job, pool, tasks, tally)
            while complete := [shard for shard in complete if shard.shard_id not in tally.failed]:
                check_wave(job, pool, complete, tally)
                checked = [shard for shard in complete if shard.shard_id not in tally.failed]
                ready, weak = gate_wave(job, checked, tally)
                if ready:
                    commit_wave(job, [(shard, plan_columns(plan, shard)) for shard in ready], tally)
                tasks, complete = raised(job, weak)
                if tasks:
                    observer().step("strengthen", sum(task.rows for task in tasks))
                    protect_wave(job, pool, tasks, tally, again=True)
