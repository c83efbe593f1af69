"""The metrics as Prometheus gets them: from the endpoint that Ray's agent serves, while a job runs."""

from __future__ import annotations

import json
import tempfile
import time
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.error import URLError

import pytest
from prometheus_client.parser import text_string_to_metric_families

from pipeline import metrics, ray_metrics
from pipeline.manifest import Manifest
from pipeline.metrics import METRICS, Metric
from pipeline.plan import plan_columns
from pipeline.ray_job import Failed, cluster, decide_shards, finalize_shards, protect_units
from pipeline.run import Task, open_units, prepare
from tests.e2e.command import job_file, running, until
from tests.pipeline.archives import photo, write_folder
from tests.pipeline.local_job import FAKE, check_shard, job_config

pytestmark = pytest.mark.timeout(600)
FORGOTTEN_S = 2.5  # Ray forgets a gauge two reports after it was set; tests have one a second

Totals = Mapping[tuple[str, frozenset[tuple[str, str]]], float]


def totals(address: str) -> Totals:
    """Every series of Fixative that a node exports, summed over processes."""
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=10) as answer:
        families = text_string_to_metric_families(answer.read().decode())
    sums: dict[Any, float] = {}
    for sample in (sample for family in families for sample in family.samples):
        own = {tag: value for tag, value in sample.labels.items() if tag.islower() and not tag.startswith("otel")}
        if sample.name.startswith("ray_fixative_"):
            series = sample.name, frozenset(own.items())
            sums[series] = sums.get(series, 0) + sample.value
    return sums


class Endpoint:
    """What the cluster's only node exports right now."""

    def __init__(self) -> None:
        import ray

        (node,) = ray.nodes()
        self.address = f"{node['NodeManagerAddress']}:{node['MetricsExportPort']}"

    def totals(self) -> Totals:
        return totals(self.address)

    def settled(self) -> Totals:
        """The totals when nothing comes in any more: of tests before this one, say."""
        last = self.totals()
        while True:
            time.sleep(1.5)
            now = self.totals()
            if now == last:
                return now
            last = now


def of(totals: Totals, metric: Metric, suffix: str = "", **tags: str) -> float | None:
    """The sum of a metric's series with these tags; None where there is none."""
    name = f"ray_{metric.name}{suffix}"
    found = [
        value for (series, labels), value in totals.items() if series == name and tags.items() <= dict(labels).items()
    ]
    return sum(found) if found else None


@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.slow
def test_a_run_exports_every_metric(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_metrics, "REPEAT_S", 0.5)
    endpoint = Endpoint()
    source = write_folder(tmp_path / "in", {f"{n}.png": photo(n) for n in range(5)} | {"x.png": b"no picture"})
    config = job_config(source, tmp_path / "out", archive={"unit_assets": 2}, run={"actors": 1})
    job, plan = prepare(config)
    (shard,) = plan.shards
    groups = open_units(job.destination(), shard, job.config_fp)
    tasks = [Task(shard, tuple(name for name, _ in group), sum(b - a for _, (a, b) in group)) for group in groups]
    before = endpoint.settled()
    with cluster(config.run) as pool:
        for number, _ in enumerate(protect_units(job, pool, tasks)):
            if number == 0:  # the run is under way
                until(lambda: of(endpoint.totals(), metrics.OPEN_IMAGES, method=FAKE) == 4, "open images", 30)
        last_part = time.time()
        (early,) = finalize_shards(job, [(shard, plan_columns(plan, shard))])
        assert isinstance(early, Failed), "its checks are missing"
        check_shard(job, shard)
        assert len(list(decide_shards(job, [shard]))) == 1
        (manifest,) = finalize_shards(job, [(shard, plan_columns(plan, shard))])
        assert isinstance(manifest, Manifest)
        time.sleep(max(0, last_part + FORGOTTEN_S - time.time()))
        now = endpoint.settled()
        missing = [metric.name for metric in METRICS if of(now, metric, "_count" * bool(metric.buckets)) is None]
        assert missing == []
        assert of(now, metrics.OPEN_IMAGES) == 0
        assert of(now, metrics.LAST_PART) == pytest.approx(last_part, abs=30)
        assert of(now, metrics.LAST_COMMIT) >= of(now, metrics.LAST_PART)

    def came(metric: Metric, suffix: str = "", **tags: str) -> float:
        return (of(now, metric, suffix, **tags) or 0) - (of(before, metric, suffix, **tags) or 0)

    assert came(metrics.IMAGES_PROTECTED, method=FAKE) == 5
    assert came(metrics.IMAGES_QUARANTINED, method=FAKE, stage="decode", error_type="DecodeError") == 1
    assert came(metrics.PARTS_COMMITTED, method=FAKE) == 3
    assert [came(metrics.UNIT_ATTEMPTS, stage=stage) for stage in ("load", "protect", "store")] == [3, 3, 3]
    assert [came(metrics.IMAGE_SECONDS, "_count", stage=s) for s in ("load", "protect", "store")] == [6, 5, 6]
    assert came(metrics.LINF, "_count") == 5
    budget = job.eps_levels(0)
    assert came(metrics.LINF, "_bucket", le=str(budget)) == 5, "all within the budget"
    assert came(metrics.READ_BYTES) == sum(path.stat().st_size for path in source.iterdir())
    assert (came(metrics.FAILURES), came(metrics.FAILURES, stage="commit", kind="shard")) == (1, 1)
    assert (came(metrics.GATE_DECISIONS), came(metrics.GATE_DECISIONS, outcome="pass")) == (1, 1)
    assert came(metrics.SHARDS_COMMITTED) == 1
    assert came(metrics.IMAGES_COMMITTED, status="protected") == manifest.rows_ok == 5
    assert came(metrics.IMAGES_COMMITTED, status="quarantined") == manifest.rows_quarantined == 1
    assert came(metrics.ACTOR_BUSY, stage="protect") > 0
    assert not any(secret in str(now) for secret in (str(tmp_path), ".png", job.run_id)), "tags name no asset or place"
    assert sum(b"PNG" in path.read_bytes() for path in ray_logs()) == 0, "Ray's logs hold a picture"
    until(lambda: of(endpoint.totals(), metrics.OPEN_IMAGES) is None, "the end of what lives with the run", 30)


def ray_logs() -> list[Path]:
    """Every log of the cluster's session. Ray Data writes there what it could not convert, item by item."""
    import ray

    folder = Path(ray.worker._global_node.get_logs_dir_path())
    logs = [path for path in folder.rglob("*") if path.is_file()]
    assert any(path.name.startswith("ray-data") for path in logs)
    return logs


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_prometheus_finds_a_command_in_rays_discovery_file(prefect_home: Path, tmp_path: Path) -> None:
    """In the file that `infra/monitoring/prometheus.yml` reads, and there what the command has done so far."""
    # They take two minutes, so that a busy machine gets to a scrape; the command is killed then.
    source = write_folder(tmp_path / "in", {f"{n}.png": photo(n) for n in range(40)})
    config = job_file(tmp_path / "job.yaml", method={"name": FAKE, "overrides": {"sleep_s": 3}})
    with tempfile.TemporaryDirectory(prefix="r", dir="/tmp") as ray_folder:  # sockets want short paths
        discovery = Path(ray_folder) / "ray" / "prom_metrics_service_discovery.json"
        environment = {"RAY_TMPDIR": ray_folder, "RAY_metrics_report_interval_ms": "1000"}
        with running(
            "protect", source, tmp_path / "out", "-c", config, home=prefect_home, environment=environment
        ) as command:
            until(lambda: discovery.exists() or command.process.poll() is not None, "the discovery file", 300)

            def scraped() -> float:
                (found,) = json.loads(discovery.read_text())
                try:
                    scrapes = [totals(address) for address in found["targets"]]
                except URLError:
                    return 0  # the node is named before its agent listens; Prometheus tries again too
                return sum(of(scrape, metrics.IMAGES_PROTECTED, method=FAKE) or 0 for scrape in scrapes)

            done = until(lambda: command.process.poll() is not None or scraped(), "protected images", 200)
            assert command.process.poll() is None, command.wait(10)
            assert 2 <= done <= 40
