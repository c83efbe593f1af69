"""What is recorded while a job runs stage by stage in this process; the exporter to Ray has tests of its own."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from pipeline import metrics
from pipeline.errors import ErrorInfo
from pipeline.metrics import METRICS, BusyClock, Metric
from pipeline.run import open_units, prepare
from pipeline.worker import Optimizer, load_units, store_unit
from tests.pipeline.archives import photo, write_folder
from tests.pipeline.local_job import FAKE, commit, job_config, protect_shard, ready

Series = tuple[str, ...]


@dataclass
class Records:
    """Sums of counters and all observations, by metric and the values of its tags."""

    sums: Counter[Series] = field(default_factory=Counter)
    seen: dict[Series, list[float]] = field(default_factory=dict)

    def __call__(self, metric: Metric, value: float, tags: Mapping[str, str]) -> None:
        series = (metric.name, *(tags[tag] for tag in metric.tags))
        self.sums[series] += value
        self.seen.setdefault(series, []).append(value)

    def of(self, metric: Metric, *tags: str) -> float:
        return self.sums[metric.name, *tags]


@pytest.fixture
def records() -> Iterator[Records]:
    taken = Records()
    metrics.export_to(taken)
    yield taken
    metrics.export_to(None)


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    images = {f"{n}.png": photo(n) for n in range(5)}
    return write_folder(tmp_path / "in", images | {"broken.png": b"no picture"})


def test_names_follow_prometheus() -> None:
    assert len({metric.name for metric in METRICS}) == len(METRICS) > 15
    for metric in METRICS:
        assert re.fullmatch(r"fixative_[a-z]+(_[a-z]+)*", metric.name)
        assert metric.name.endswith("_total") == (metric.kind == "counter"), metric.name
        assert metric.help.endswith(".")
        assert set(metric.tags) <= {"method", "stage", "error_type", "status", "repeated", "kind", "outcome", "metric"}
        assert (metric.kind == "histogram") == bool(metric.buckets)
        assert list(metric.buckets) == sorted(set(metric.buckets))
        assert all(bound > 0 for bound in metric.buckets), "Ray refuses others"


def test_a_job_from_start_to_end(archive: Path, tmp_path: Path, records: Records) -> None:
    config = job_config(archive, tmp_path / "out", archive={"unit_assets": 2})
    job, plan = ready(config)
    commit(job, plan)
    assert records.of(metrics.IMAGES_PROTECTED, FAKE) == 5
    assert records.of(metrics.IMAGES_QUARANTINED, FAKE, "decode", "DecodeError") == 1
    assert records.of(metrics.PARTS_COMMITTED, FAKE) == 3
    for stage in ("load", "protect", "store"):
        assert records.of(metrics.UNIT_ATTEMPTS, stage, "no") == 3
        assert records.of(metrics.UNIT_ATTEMPTS, stage, "yes") == 0
        seconds = records.seen[metrics.IMAGE_SECONDS.name, stage, FAKE]
        assert len(seconds) == (5 if stage == "protect" else 6)
        assert sum(seconds) == pytest.approx(records.of(metrics.STAGE_SECONDS, stage, FAKE))
    assert records.of(metrics.READ_BYTES, FAKE) == sum(path.stat().st_size for path in archive.iterdir())
    parts = sum(path.stat().st_size for path in (tmp_path / "out" / "parts").rglob("*.parquet"))
    assert records.of(metrics.WRITTEN_BYTES, FAKE, "store") == parts
    files = [path for name in ("data", "quarantine") for path in (tmp_path / "out" / name).iterdir()]
    assert records.of(metrics.WRITTEN_BYTES, FAKE, "commit") == sum(path.stat().st_size for path in files)
    levels = records.seen[metrics.LINF.name, FAKE]
    assert len(levels) == 5
    assert all(0 < level <= job.eps_levels(0) for level in levels)
    assert len(records.seen[metrics.OBJECTIVE_GAIN.name, FAKE]) == len(records.seen[metrics.PSNR.name, FAKE]) == 5
    assert records.of(metrics.SHARDS_COMMITTED, FAKE) == len(plan.shards)
    assert records.of(metrics.IMAGES_COMMITTED, FAKE, "protected") == 5
    assert records.of(metrics.IMAGES_COMMITTED, FAKE, "quarantined") == 1
    assert str(tmp_path) not in str(records), "tags name no place"
    assert ".png" not in str(records), "tags name no asset"


def test_what_is_done_again_counts_as_attempt_alone(archive: Path, tmp_path: Path, records: Records) -> None:
    job, plan = prepare(job_config(archive, tmp_path / "out", archive={"unit_assets": 6}))
    (shard,) = plan.shards
    ((group,),) = open_units(job.destination(), shard, job.config_fp)
    for _ in range(2):
        (unit,) = load_units(job, shard, [group[0]])
        store_unit(job, Optimizer(job, "cpu").protect(unit))
    for stage in ("load", "protect", "store"):
        assert (records.of(metrics.UNIT_ATTEMPTS, stage, "no"), records.of(metrics.UNIT_ATTEMPTS, stage, "yes")) == (
            1,
            1,
        )
    assert records.of(metrics.PARTS_COMMITTED, FAKE) == 1
    assert records.of(metrics.IMAGES_PROTECTED, FAKE) == 5
    assert len(records.seen[metrics.LINF.name, FAKE]) == 5


def test_of_two_finalizers_one_counts(archive: Path, tmp_path: Path, records: Records) -> None:
    job, plan = ready(job_config(archive, tmp_path / "out"))
    commit(job, plan)
    commit(job, plan)
    assert records.of(metrics.SHARDS_COMMITTED, FAKE) == 1
    assert records.of(metrics.IMAGES_COMMITTED, FAKE, "protected") == 5


def test_errors_of_foreign_code_are_one_type(records: Records) -> None:
    for name in ("CrashLoop", "OutOfMemoryError", "LibraryError4711", "/secret/place"):
        metrics.quarantined(ErrorInfo("protect", name, "why"), "m")
    counted = {series[-1]: count for series, count in records.sums.items()}
    assert counted == {"CrashLoop": 1, "OutOfMemoryError": 1, "other": 2}


def test_busy_and_idle_are_all_of_an_actors_life(records: Records, monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter([10.0, 13.0, 20.0, 21.0, 22.0])
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: next(ticks))
    clock = BusyClock()
    with clock.working("protect", "m"):
        pass
    with pytest.raises(ValueError, match="ill"), clock.working("check", "m"):
        raise ValueError("ill")
    assert records.of(metrics.ACTOR_IDLE) == 3 + 1
    assert records.of(metrics.ACTOR_BUSY, "protect", "m") == 7
    assert records.of(metrics.ACTOR_BUSY, "check", "m") == 1


def test_tags_are_the_declared_ones() -> None:
    for tags in ({}, {"method": "m", "asset": "a"}):
        with pytest.raises(ValueError, match="fixative_parts_committed_total has the tags"):
            metrics.PARTS_COMMITTED.record(**tags)


def test_without_an_exporter_nothing_happens(archive: Path, tmp_path: Path) -> None:
    job, plan = prepare(job_config(archive, tmp_path / "out"))
    assert sum(receipt.protected for receipt in protect_shard(job, plan.shards[0])) == 5
