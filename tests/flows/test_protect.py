"""What is published of an archive that is mended and changes, run after run; without Ray and without a server."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from flows.protect import Outcome, publish_results
from pipeline.manifest import read_commits
from pipeline.run import Tally, prepare
from tests.pipeline.archives import photo, photos, write_folder, write_parquet
from tests.pipeline.local_job import check_shard, commit, job_config, protect_shard

STRICT = {"max_quarantine_rows": 0, "max_quarantine_fraction": 0.0}


def tick(root: Path) -> Outcome:
    """One run of the schedule."""
    config = job_config(root / "in", root / "out", run=STRICT)
    job, plan = prepare(config)
    done = read_commits(job.destination()).committed
    for shard in plan.shards:
        if shard.shard_id not in done:
            protect_shard(job, shard)
            check_shard(job, shard)
    commit(job, plan)
    outcome = Outcome(job=job, plan=plan, tally=Tally(run=config.run, assets=plan.rows))
    publish_results.fn(outcome)
    return outcome


def success(root: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((root / "out" / "_SUCCESS.json").read_bytes())
    return document


def test_what_was_mended_does_not_count_as_quarantined(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "in", {"a.png": photo(1), "b.png": b"no picture", "c.png": b"none either"})
    write_parquet(source / "p.parquet", [photo(2), b"no picture"])
    assert tick(tmp_path).problems == ["3 assets are quarantined, 0 are tolerated"]
    assert not (tmp_path / "out" / "_SUCCESS.json").exists()

    (source / "b.png").write_bytes(photo(3, side=30))
    (source / "c.png").unlink()
    (source / "p.parquet").unlink()
    write_parquet(source / "p.parquet", photos(3))
    second = tick(tmp_path)
    assert (second.problems, second.quarantined) == ([], 0)
    assert len(second.manifests) == 3  # the folder as it was, its mended file, and the new Parquet file
    state = success(tmp_path)
    assert (len(state["manifests"]), len(state["replaced"])) == (3, 1)
    shown = json.loads((tmp_path / "out" / second.report_key).read_bytes())["shards"] if second.report_key else {}
    assert shown.keys() == {manifest.shard_id for manifest in second.manifests}

    before = success(tmp_path)
    assert tick(tmp_path).report_key == second.report_key
    assert success(tmp_path) == before, "nothing is new, nothing is written"
