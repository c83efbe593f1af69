"""Runs jobs in this process, stage by stage and without Ray, on the fake protector."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.config import JobConfig
from pipeline.finalize import finalize_shard
from pipeline.job import Job
from pipeline.manifest import Manifest, read_commits
from pipeline.plan import Plan, Shard, plan_columns
from pipeline.run import open_units, prepare, publish
from pipeline.verify.attack_models import AttackModels
from pipeline.verify.check import measure_check, prepare_checks, store_check
from pipeline.worker import Optimizer, Receipt, load_units, store_unit

FAKE = "protectors.fake:FakeProtector"


@dataclass(frozen=True)
class Outcome:
    job: Job
    plan: Plan
    manifests: list[Manifest]


def job_config(source: Path, destination: Path, **sections: Any) -> JobConfig:
    """A job on the fake method; sections are those of ``JobSettings``, and ``run``."""
    run = sections.pop("run", {})
    method = {"name": FAKE, **sections.pop("method", {})}
    document = {"source": str(source), "destination": str(destination), "job": {"method": method, **sections}}
    return JobConfig.model_validate({**document, "run": run})


def protect_shard(job: Job, shard: Shard, optimizer: Optimizer | None = None) -> list[Receipt]:
    """Protects every open unit of a shard."""
    optimizer = optimizer or Optimizer(job, "cpu")
    receipts: list[Receipt] = []
    for group in open_units(job.destination(), shard, job.config_fp):
        for unit in load_units(job, shard, [name for name, _ in group]):
            receipts.append(store_unit(job, optimizer.protect(unit)))
    return receipts


def check_shard(job: Job, shard: Shard) -> None:
    optimizer = Optimizer(job, "cpu")
    for check in prepare_checks(job, shard):
        store_check(job, check.key, measure_check(optimizer, check, AttackModels()))


def ready(config: JobConfig) -> tuple[Job, Plan]:
    """Everything up to the commit: parts and checks of all shards are stored."""
    job, plan = prepare(config)
    for shard in plan.shards:
        protect_shard(job, shard)
        check_shard(job, shard)
    return job, plan


def commit(job: Job, plan: Plan, shards: Sequence[Shard] | None = None) -> list[Manifest]:
    return [finalize_shard(job, shard, plan_columns(plan, shard)) for shard in shards or plan.shards]


def run_job(config: JobConfig) -> Outcome:
    """A whole run; shards that are committed already are left alone."""
    job, plan = prepare(config)
    done = read_commits(job.destination()).committed
    for shard in plan.shards:
        if shard.shard_id not in done:
            protect_shard(job, shard)
            check_shard(job, shard)
    manifests = commit(job, plan)
    publish(job, plan, manifests, "reports/none.json")
    return Outcome(job, plan, manifests)


def part_rows(job: Job, shard: Shard) -> list[dict[str, Any]]:
    """All rows of a shard's stored parts, in row order."""
    store = job.destination()
    rows: list[dict[str, Any]] = []
    for item in store.list(f"parts/{shard.shard_id}/"):
        rows += pq.read_table(pa.BufferReader(store.get(item.key))).to_pylist()
    return sorted(rows, key=lambda row: row["row"])


def data_table(destination: Path, manifest: Manifest) -> pa.Table:
    assert manifest.data is not None
    return pq.read_table(destination / manifest.data["key"])


def tree(root: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}
