"""Writes what a run's checks found: every number that a report shows, with sample size and interval."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from typing import Any

from pipeline.errors import AlreadyExists
from pipeline.job import Job, code_version
from pipeline.manifest import Manifest
from pipeline.plan import Shard
from pipeline.storage import Store, get_json, json_bytes
from pipeline.verify.check import stored_checks
from pipeline.verify.statistics import CONFIDENCE, RESAMPLES, Survival, survival

SCHEMA_VERSION = 1


def write_verification(job: Job, shards: Sequence[Shard], manifests: Sequence[Manifest]) -> tuple[str, list[Survival]]:
    """Writes ``reports/<run_id>/verification.json`` over all committed shards; returns its key and the totals."""
    destination = job.destination()
    per_shard: dict[str, Any] = {}
    everything: list[dict[str, list[float]]] = []
    rows = {manifest.shard_id: manifest for manifest in manifests}
    for shard in shards:
        checks = [check.objective for check in stored_checks(destination, shard).values()]
        everything += checks
        per_shard[shard.shard_id] = {
            "rows_in": rows[shard.shard_id].rows_in,
            "rows_ok": rows[shard.shard_id].rows_ok,
            "rows_quarantined": rows[shard.shard_id].rows_quarantined,
            "sampled": len(checks),
            "survival": [asdict(item) for item in survival(checks)],
        }
    total = survival(everything)
    document = {
        "schema_version": SCHEMA_VERSION,
        "run_id": job.run_id,
        "config_fingerprint": job.config_fp,
        "protector": job.config.job.method.name,
        "ladder": list(job.ladder),
        "model_digest": job.model_digest,
        "code_version": code_version(),
        "measure": (
            "share of the objective's gain that is left after the purifier, on decoded stored bytes; "
            "gain = objective(protected) - objective(clean), both treated by the same purifier; "
            "purified at full size, or at the model's training scale where the name says so"
        ),
        "interval": {"kind": "percentile bootstrap over images", "confidence": CONFIDENCE, "resamples": RESAMPLES},
        "purifiers": sorted(job.config.job.check.purifiers),
        "training_scale": job.base_size,
        "sampled": len(everything),
        "survival": [asdict(item) for item in total],
        "shards": per_shard,
    }
    key = f"reports/{job.run_id}/verification.json"
    with suppress(AlreadyExists):  # this run wrote it before it was interrupted
        destination.put_new(key, json_bytes(document))
    return key, total


def read_verification(destination: Store, key: str) -> list[Survival]:
    """The totals of a stored report."""
    return [Survival(**entry) for entry in get_json(destination, key)["survival"]]
